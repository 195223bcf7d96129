"""From a request to what the engine decodes, and from its pieces to text and calls."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from poe.calls.conversation import Message, Tool
from poe.calls.streaming import CallPart, FaultPart, Part, ReplyReader, TextPart
from poe.chat import RawReply, ReplyPlan, plan_reply, read_messages
from poe.decoding.constraints import Constraint
from poe.errors import PoEError, TokenizerError
from poe.serving.engine import End, Piece
from poe.serving.models import REPLY_TOKENS, ServedModel
from poe.serving.openai_api import (
    ApiError,
    ChatRequest,
    read_offered,
    write_call,
    write_choice,
    write_delta,
    write_scores,
)


@dataclass(frozen=True)
class Question:
    """A request as the engine takes it. `constraint` is what each of its replies may be."""

    model: ServedModel
    request: ChatRequest
    prompt: list[int]
    max_tokens: int
    plan: ReplyPlan
    constraint: Constraint | None


def read_question(model: ServedModel, request: ChatRequest, max_context: int) -> Question:
    """Write the prompt of a request. Raises `ApiError` for what cannot be used, or is longer than `max_context`."""
    prompt, tools = write_prompt(model, request)
    room = max_context - len(prompt)
    if room < 1 or (request.most_tokens or 1) > room:
        wanted = f" and max_tokens {request.most_tokens}" if request.most_tokens else ""
        raise ApiError(
            400,
            f"The prompt has {len(prompt)} tokens{wanted}; prompt and reply may have {max_context} together. Shorten "
            "the messages or the tools, or ask for fewer tokens.",
            "messages" if room < 1 else "max_tokens",
            "context_length_exceeded",
        )
    max_tokens = request.most_tokens or min(REPLY_TOKENS, room)
    plan, constraint = _plan(model, request, tools, max_tokens)
    return Question(model, request, prompt, max_tokens, plan, constraint)


def write_prompt(model: ServedModel, request: ChatRequest) -> tuple[list[int], Sequence[Tool]]:
    """Return the prompt of a request, as a model gets it, and its tools. Raises `ApiError` for what cannot be used."""
    tools = read_offered(request)
    messages = [_check_role(number, message) for number, message in enumerate(request.messages)]
    try:
        return model.renderer.prompt_ids(read_messages(messages), tools), tools
    except TokenizerError as error:
        raise ApiError(500, str(error)) from None
    except PoEError as error:
        raise ApiError(400, f"The messages cannot be used: {error}", "messages", "invalid_value") from None


def _plan(
    model: ServedModel, request: ChatRequest, tools: Sequence[Tool], max_tokens: int
) -> tuple[ReplyPlan, Constraint | None]:
    """Return what the replies may be. Raises `ApiError` for tools and schemas that no reply can follow."""
    param = "tools" if tools else "response_format"
    try:
        plan = plan_reply(
            model.tokenizer,
            model.vocab_size,
            model.renderer.stop_token_ids,
            tools,
            threshold=model.threshold,
            **request.reply_options,
        )
        param = "max_tokens"
        return plan, plan.make_constraint(max_tokens)
    except PoEError as error:
        text = str(error).replace("max_new_tokens", "max_tokens")
        raise ApiError(400, f"No reply can be given: {text}", param, "invalid_value") from None


ROLES = ("system", "developer", "user", "assistant", "tool")


def _check_role(number: int, message: Message) -> Message:
    """Return a message with a role that templates have: `developer` is a newer name of `system`."""
    role = message.get("role")
    if role not in ROLES:
        raise ApiError(400, f"The role of a message is one of {', '.join(ROLES)}.", f"messages.{number}.role")
    return {**message, "role": "system"} if role == "developer" else message


class Choice:
    """One reply of a completion: takes the engine's events and gives what OpenAI's clients read.

    `add` and `finish` return the parts of a stream. `write` returns the reply as a whole; it has the same content.
    """

    def __init__(self, index: int, question: Question) -> None:
        self._index, self._question = index, question
        choice = question.plan.choice
        has_calls = bool(choice.tools) and choice.mode != "none"
        self._reader = ReplyReader(question.plan.form, choice.tools) if has_calls else None
        self._raw = self._text = ""
        self._calls: list[dict[str, Any]] = []
        self._scores: list[dict[str, Any]] = []
        self._begun = False
        self.end: End | None = None

    def add(self, piece: Piece) -> list[dict[str, Any]]:
        """Take the next piece of text."""
        self._raw += piece.text
        scores = None
        if self._question.request.scores is not None:
            scores = write_scores(piece.scores, self._question.model.tokenizer)
            self._scores += scores
        parts: list[Part] = [TextPart(piece.text)] if piece.text else []
        deltas = [self._read(part) for part in (self._reader.feed(piece.text) if self._reader else parts)]
        return self._write_deltas(deltas or ([{}] if scores else []), scores)

    def finish(self, end: End) -> list[dict[str, Any]]:
        """Take the end. Raises `ApiError` if the reply was not finished."""
        self.end = end
        if end.reason in _FAILURES:
            raise ApiError(*_FAILURES[end.reason])
        deltas = [self._read(part) for part in (self._reader.close() if self._reader else [])]
        if end.reason == "stop" and self._question.request.has_promise:
            _, problems = self._question.plan.read(RawReply(self._raw, True))
            if problems:
                raise ApiError(
                    500, f"The reply is not what was asked for: {'; '.join(problems)}", None, "invalid_reply"
                )
        return [*self._write_deltas(deltas, None), write_delta(self._index, {}, self._reason)]

    def write(self) -> dict[str, Any]:
        """Return the whole reply."""
        scores = None if self._question.request.scores is None else self._scores
        return write_choice(self._index, self._text, self._calls, self._reason, scores)

    @property
    def _reason(self) -> str:
        assert self.end is not None
        return "tool_calls" if self._calls and self.end.reason == "stop" else self.end.reason

    def _read(self, part: Part) -> dict[str, Any]:
        """Take a part of the reply and return what a stream has of it. A call with a fault is text."""
        if isinstance(part, CallPart) and not part.faults:
            self._calls.append(call := write_call(part.call))
            return {"tool_calls": [{"index": len(self._calls) - 1, **call}]}
        if isinstance(part, TextPart):
            text = part.text
        elif isinstance(part, FaultPart):
            text = part.fault.text
        else:
            text = json.dumps({"name": part.call.name, "arguments": part.call.arguments}, ensure_ascii=False)
        self._text += text
        return {"content": text}

    def _write_deltas(self, deltas: list[dict[str, Any]], scores: Any) -> list[dict[str, Any]]:
        """Return parts of a stream. The first one has the role, and log-probabilities."""
        if deltas and not self._begun:
            self._begun = True
            deltas[0] = {"role": "assistant", "content": "", **deltas[0]}
        return [write_delta(self._index, delta, scores=None if i else scores) for i, delta in enumerate(deltas)]


_FAILURES = {
    "timeout": (504, "The reply was not finished in the time that this server gives to a request.", None, "timeout"),
    "canceled": (503, "The server is shutting down.", None, "shutting_down"),
    "error": (500, "The server failed while it decoded the reply.", None, "decoding_failed"),
}
