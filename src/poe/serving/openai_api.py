"""Requests and replies of OpenAI's chat completions, checked: a field that is not supported is refused by its name."""

import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

import pydantic_core
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from poe.calls.conversation import Call
from poe.calls.tools import read_tools
from poe.errors import PoEError, printable
from poe.serving.sampling import Sampling, TokenScore

MOST_CHOICES = 16
MOST_STOPS = 16


class ApiError(PoEError):
    """A request that is refused: an HTTP status, and what OpenAI's clients read. `param` is the field that is wrong."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The error in OpenAI's form."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        text = printable(str(self), 1000)
        return {"error": {"message": text, "type": kind, "param": self.param, "code": self.code}}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Strict):
    """What a stream has besides the reply."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class NamedFunction(_Strict):
    """The name of a function."""

    name: str


class NamedTool(_Strict):
    """A `tool_choice` that names the function to call."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(_Strict):
    """The schema that a reply must satisfy."""

    name: str
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(_Strict):
    """The form of a reply without calls."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


def _refuse_unless(*neutral: Any) -> BeforeValidator:
    """Return a validator that takes only values which change nothing."""

    def check(value: Any) -> Any:
        if value not in neutral and value is not None:
            raise ValueError("this server does not support it, leave it out")
        return value

    return BeforeValidator(check)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class ChatRequest(_Strict):
    """A chat completion request. Fields that would change the answer and are not here are refused."""

    model: str
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int | None, Field(ge=1, le=MOST_CHOICES)] = None
    stop: Annotated[list[str] | None, Field(max_length=MOST_STOPS), BeforeValidator(_as_list)] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    seed: int | None = None
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    # accepted where they change nothing
    frequency_penalty: Annotated[float | None, _refuse_unless(0)] = None
    presence_penalty: Annotated[float | None, _refuse_unless(0)] = None
    logit_bias: Annotated[dict[str, float] | None, _refuse_unless({})] = None
    modalities: Annotated[list[str] | None, _refuse_unless(["text"])] = None
    store: Annotated[bool | None, _refuse_unless(False)] = None
    # notes to the operator of a server, which do not change an answer
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: str | None = None

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen; without a temperature, greedily."""
        return Sampling(self.temperature or 0.0, 1.0 if self.top_p is None else self.top_p, self.seed)

    @property
    def choices(self) -> int:
        """The number of replies."""
        return self.n or 1

    @property
    def stops(self) -> list[str]:
        """The strings that end a reply."""
        return self.stop or []

    @property
    def reply_options(self) -> dict[str, Any]:
        """The arguments of `poe.chat.plan_reply`."""
        choice, form = self.tool_choice, self.response_format
        return {
            "tool_choice": choice.model_dump() if isinstance(choice, NamedTool) else choice or "auto",
            "parallel_tool_calls": self.is_parallel,
            "response_format": None if form is None else form.model_dump(by_alias=True, exclude_none=True),
        }

    @property
    def is_parallel(self) -> bool:
        """Whether a reply may have several calls. Without a word about it, that to a named function has one."""
        if self.parallel_tool_calls is None:
            return not isinstance(self.tool_choice, NamedTool)
        return self.parallel_tool_calls

    @property
    def has_promise(self) -> bool:
        """Whether a reply can break what the request asks for."""
        asks_for_json = self.response_format is not None and self.response_format.type != "text"
        return asks_for_json or self.parallel_tool_calls is False or self.tool_choice not in (None, "auto", "none")

    @property
    def most_tokens(self) -> int | None:
        """The number of tokens at which a reply is cut off."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def scores(self) -> int | None:
        """How many likely tokens to report at each place, None for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


def read_request(body: bytes) -> ChatRequest:
    """Return a checked request. Raises `ApiError` (400) that names the first field that is wrong."""
    try:
        value = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"The body is not JSON: {error}.") from None
    if not isinstance(value, dict):
        raise ApiError(400, "Expected a JSON object with model and messages.")
    try:
        request = ChatRequest.model_validate(value)
    except ValidationError as error:
        raise _explain(error) from None
    _check_fields(request)
    return request


def _explain(error: ValidationError) -> ApiError:
    """Return the first problem of a request as an error that names its field."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    path = [str(part) for part in first["loc"] if not str(part).endswith(("Tool", "]"))]
    field = ".".join(path)
    if first["type"] == "extra_forbidden":
        text = f"This server does not support the field {field!r}: leave it out."
        return ApiError(400, text, field, "unsupported_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"The field {field!r} is missing.", field, "missing_required_parameter")
    reason = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"The field {field!r} cannot be used: {reason}.", field, "invalid_value")


def _check_fields(request: ChatRequest) -> None:
    """Check what fields mean together. Raises `ApiError`."""
    if request.max_tokens and request.max_completion_tokens and request.max_tokens != request.max_completion_tokens:
        raise ApiError(400, "max_tokens and max_completion_tokens differ: give one of them.", "max_tokens")
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options belong to a stream: set stream to true.", "stream_options")
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError(400, "top_logprobs need logprobs: set it to true.", "top_logprobs")
    if request.response_format is not None:
        needs_schema = request.response_format.type == "json_schema"
        if needs_schema != (request.response_format.json_schema is not None):
            text = "type json_schema and the field json_schema belong together"
            raise ApiError(400, f"response_format: {text}.", "response_format")
    if not request.tools and request.tool_choice not in (None, "none", "auto"):
        raise ApiError(400, "tool_choice needs tools: give tools, or leave it out.", "tool_choice")


def read_offered(request: ChatRequest) -> list[dict[str, Any]]:
    """Return the tools of a request. Raises `ApiError` for those that cannot be read, or a choice that names none."""
    try:
        offered = read_tools(request.tools or [])
    except PoEError as error:
        raise ApiError(400, f"The tools cannot be used: {error}.", "tools", "invalid_value") from None
    if isinstance(request.tool_choice, NamedTool):
        name = request.tool_choice.function.name
        if name not in [tool["function"]["name"] for tool in offered]:
            raise ApiError(400, f"tool_choice names {name!r}, which is none of the tools.", "tool_choice")
    return offered


class Completion:
    """Writes one completion in OpenAI's form, whole or in chunks."""

    def __init__(self, model: str) -> None:
        self._common = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def whole(self, choices: Sequence[Mapping[str, Any]], usage: Mapping[str, int]) -> dict[str, Any]:
        """Return the completion with all its choices."""
        return {**self._common, "object": "chat.completion", "choices": list(choices), "usage": usage}

    def chunk(self, choices: Sequence[Mapping[str, Any]], usage: Mapping[str, int] | None = None) -> dict[str, Any]:
        """Return a part of a stream."""
        chunk = {**self._common, "object": "chat.completion.chunk", "choices": list(choices)}
        return chunk if usage is None else {**chunk, "usage": usage}


def write_choice(
    index: int, text: str, calls: Sequence[Mapping[str, Any]], reason: str, scores: Sequence[Mapping[str, Any]] | None
) -> dict[str, Any]:
    """Return one whole reply."""
    message: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None, "refusal": None}
    if calls:
        message["tool_calls"] = list(calls)
    logprobs = None if scores is None else {"content": list(scores), "refusal": None}
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}


def write_delta(
    index: int, delta: Mapping[str, Any], reason: str | None = None, scores: Sequence[Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """Return the next part of a reply."""
    logprobs = None if scores is None else {"content": list(scores), "refusal": None}
    return {"index": index, "delta": dict(delta), "logprobs": logprobs, "finish_reason": reason}


def write_call(call: Call) -> dict[str, Any]:
    """Return a call with an id of its own."""
    return {**call.as_openai(0), "id": f"call_{secrets.token_hex(12)}"}


def write_usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Return the numbers of tokens of a completion."""
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


def write_scores(scores: Iterable[TokenScore], tokenizer: Any) -> list[dict[str, Any]]:
    """Return the log-probabilities of tokens."""

    def write(token: int, logprob: float) -> dict[str, Any]:
        text = tokenizer.decode([token], skip_special_tokens=False)
        # minus infinity is no JSON
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode())}

    return [
        {**write(score.token, score.logprob), "top_logprobs": [write(*pair) for pair in score.top]} for score in scores
    ]
