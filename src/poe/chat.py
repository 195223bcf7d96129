"""Answer conversations: write the prompt, generate, read the reply, check its calls."""

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from poe.calls.content import content_text, split_messages
from poe.calls.conversation import Call, Message, Tool
from poe.calls.forms.call_forms import parse_reply
from poe.calls.grammar import MARKS, Grammar, ToolChoice, read_tool_choice, write_call_grammar
from poe.calls.json_text import parse_json
from poe.calls.streaming import Part, Reply, ReplyReader, TextPart
from poe.calls.tools import check_calls, read_tools
from poe.calls.validation import TooComplexError, fits_schema
from poe.calls.values import fits_type
from poe.data.readers.messages import read_call
from poe.data.render import Renderer
from poe.data.templates import complete_template, note_unread_calls, reply_form, template_call_form
from poe.decoding.constraints import Constraint, ConstraintProcessor, Vocabulary, read_vocabulary
from poe.decoding.forced import generate_skipping_forced, supports_options
from poe.decoding.generation import REPLY_BATCH, REPLY_TOKENS, greedy_options
from poe.decoding.leaving import generate_leaving
from poe.errors import DataError, DecodingError, DeltaError
from poe.loaders.tokenizer import check_tokenizer
from poe.modeling.families import is_prefix_lm
from poe.modeling.placement import device_of

RETRIES = 3  # sampled replies, where the first one has a fault that the grammar does not exclude


@dataclass(frozen=True)
class Answer:
    """The answer of a model to a conversation.

    text           what it says beside its calls
    calls          its calls, each with `name` and `arguments`
    problems       one sentence for each call that cannot be read or does not fit its tool, and for a broken promise of
                   `tool_choice`, `parallel_tool_calls` or `response_format`
    finish_reason  "tool_calls" if there are calls, "stop", or "length": it was cut off at `max_new_tokens`, or closed
                   before them by the constraint
    raw            the text as generated, with the calls
    notes          what else to know about the prompt and the constraint, one sentence each
    """

    text: str
    calls: list[Call]
    problems: list[str]
    finish_reason: str
    raw: str
    notes: list[str]

    @property
    def message(self) -> Message:
        """The answer as a message in OpenAI's form, which can be appended to the conversation."""
        calls = [call.as_openai(index) for index, call in enumerate(self.calls)]
        content = {"role": "assistant", "content": self.text if self.text or not calls else None}
        return content | ({"tool_calls": calls} if calls else {})


@dataclass(frozen=True)
class RawReply:
    """A reply as generated, without its stop token. `is_complete` is false if it was cut off."""

    text: str
    is_complete: bool
    num_tokens: int = 0


@dataclass(frozen=True)
class ReplyPlan:
    """What replies to a conversation may be.

    `grammar` and `vocabulary` are None if any text is allowed. `schema` is the one that text without calls must fit.
    `threshold` decides between a call and text, see `Constraint`.
    """

    form: str
    choice: ToolChoice
    schema: Any = None
    grammar: Grammar | None = None
    vocabulary: Vocabulary | None = None
    notes: tuple[str, ...] = ()
    threshold: float | None = None

    def make_constraint(self, max_new_tokens: int | None = None) -> Constraint | None:
        """Return the constraint of one reply of at most so many tokens, None if any text is allowed."""
        if self.grammar is None or self.vocabulary is None:
            return None
        grammar = self.grammar
        return Constraint(
            grammar.lark,
            self.vocabulary,
            longest=grammar.longest,
            shortest=grammar.shortest,
            max_new_tokens=max_new_tokens,
            opening=grammar.opening,
            threshold=self.threshold if self.choice.mode == "auto" else None,
        )

    @property
    def may_call(self) -> bool:
        """Whether replies are read as calls: not if they are to be the JSON of `response_format` alone."""
        return self.schema is None or (self.choice.mode != "none" and bool(self.choice.tools))

    def read(self, reply: RawReply) -> tuple[Reply, list[str]]:
        """Return the parts of a reply, and what is wrong with it, one sentence each."""
        parsed = parse_reply(reply.text, self.form) if self.may_call else Reply(reply.text.strip())
        problems = check_calls(parsed.calls, list(self.choice.tools)) + [str(fault) for fault in parsed.faults]
        if self.choice.mode == "none":
            problems += [f"{call.name[:80]}: a call, and tool_choice is 'none'" for call in parsed.calls]
        if self.choice.mode == "required" and not parsed.calls and not parsed.faults:
            problems.append("no call, and tool_choice asks for one")
        if len(parsed.calls) > 1 and not self.choice.is_parallel:
            problems.append("several calls, and parallel_tool_calls is false")
        if self.schema is not None and not parsed.calls and (problem := check_json(parsed.content, self.schema)):
            problems.append(f"the text does not fit response_format: {problem}")
        return parsed, problems


def plan_reply(
    tokenizer: Any,
    vocab_size: int,
    stop_token_ids: Sequence[int],
    tools: Sequence[Tool],
    *,
    tool_choice: Any = "auto",
    parallel_tool_calls: bool = True,
    response_format: Any = None,
    constrain: bool = True,
    form: str | None = None,
    threshold: float | None = None,
) -> ReplyPlan:
    """Return what replies may be, from the arguments of `Cascade.chat`. `form` is the call form (None: the template's).

    Without tools and `response_format` any text is allowed. Raises `DataError` for arguments that cannot be used, and
    `DecodingError` if a call is required and replies cannot be constrained.
    """
    choice = read_tool_choice(tool_choice, tools, parallel_tool_calls)
    schema = read_response_format(response_format)
    plan = ReplyPlan(form or reply_form(tokenizer), choice, schema)
    if not constrain or (not tools and schema is None):
        return plan
    if choice.mode == "auto" and schema is None and form is None and template_call_form(tokenizer) is None:
        return plan  # its calls count as text (`note_unread_calls`), and no grammar has them
    try:
        vocabulary = read_vocabulary(tokenizer, vocab_size, stop_token_ids, MARKS)
    except DecodingError as error:
        if choice.mode == "required" or schema is not None:
            raise
        return replace(plan, notes=(str(error),))
    grammar = write_call_grammar(plan.form, choice, vocabulary.special, schema, vocabulary.text_tokens)
    notes = grammar.notes
    if grammar.unconstrained:
        notes += (f"checked after decoding, not while it: {', '.join(grammar.unconstrained)}",)
    threshold = threshold if grammar.opening else None
    return replace(plan, grammar=grammar, vocabulary=vocabulary, notes=notes, threshold=threshold)


def read_response_format(value: Any) -> Any:
    """Return the JSON Schema of a `response_format` in OpenAI's form, None for text. Raises `DataError`."""
    if value is None or value == {"type": "text"}:
        return None
    if value == {"type": "json_object"}:
        return {"type": "object"}
    inner = value.get("json_schema") if isinstance(value, Mapping) and value.get("type") == "json_schema" else None
    schema = inner.get("schema") if isinstance(inner, Mapping) else None
    if not isinstance(schema, Mapping):
        raise DataError(
            "Expected response_format to be {'type': 'text'}, {'type': 'json_object'} or {'type': 'json_schema', "
            f"'json_schema': {{'name': '...', 'schema': {{...}}}}}}, got {str(value)[:80]}."
        )
    return schema


def check_json(text: str, schema: Any) -> str | None:
    """Return why a text is no JSON value of a schema, or None."""
    try:
        return None if fits_schema(schema, parse_json(text)) else "the value does not fit the schema"
    except TooComplexError:
        return "the schema takes too long to check"
    except Exception as error:  # not JSON, or a reference that leads nowhere
        return str(error)[:200]


def read_call_threshold(prompt: Any) -> float | None:
    """Return the threshold in the prompt format of a stage, None if it has none. Raises `DeltaError`."""
    value = prompt.get("call_threshold") if isinstance(prompt, Mapping) else None
    if value is not None and not (fits_type("number", value) and math.isfinite(value)):
        raise DeltaError(f"call_threshold in the stage's prompt should be a finite number, got {str(value)[:40]!r}.")
    return value


def answer_messages(
    model: PreTrainedModel,
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    tools: Any,
    *,
    stream: bool = False,
    max_new_tokens: int = REPLY_TOKENS,
    tool_choice: Any = "auto",
    parallel_tool_calls: bool = True,
    response_format: Any = None,
    constrain: bool = True,
    threshold: float | None = None,
    notes: Sequence[str] = (),
    **options: Any,
) -> "Answer | AnswerStream":
    """Answer a conversation with a model; see `Cascade.chat`. `options` are those of `generate_replies`.

    `threshold` decides between a call and text, see `Constraint`. The answer's notes begin with `notes`.
    """
    prompt_messages, offered = read_messages(messages), read_tools(tools)
    vocab_size = model.config.vocab_size
    renderer = _make_renderer(tokenizer, vocab_size)
    stops = renderer.stop_token_ids
    prompt = renderer.prompt_ids(prompt_messages, offered)
    plan = plan_reply(
        tokenizer,
        vocab_size,
        stops,
        offered,
        tool_choice=tool_choice,
        parallel_tool_calls=parallel_tool_calls,
        response_format=response_format,
        constrain=constrain,
        threshold=threshold,
    )
    notes = [*notes, *plan.notes, *filter(None, [note_unread_calls(tokenizer) if offered else ""])]
    if count := renderer.count_control_tokens(prompt_messages, offered):
        notes.append(f"{count} control tokens in the question or the tools are read as text")
    first = plan.make_constraint(max_new_tokens)

    def generate(**streamer: Any) -> Answer:
        return _answer(plan, notes, first, 0 if stream else RETRIES, reply_with, **streamer)

    def reply_with(constraint: Constraint | None, **more: Any) -> RawReply:
        settings = {**options, **more, "max_new_tokens": max_new_tokens, "constraints": [constraint]}
        return generate_replies(model, tokenizer, [prompt], stops, **settings)[0]

    return AnswerStream(generate, tokenizer, stops, plan) if stream else generate()


def route_messages(
    tokenizer: Any, vocab_size: int, messages: Sequence[Mapping[str, Any]], tools: Any, route: Callable[..., Any]
) -> tuple[str | None, str]:
    """Return the stage that `route` chooses for the prompt of a conversation (None: the base), and a note of it."""
    prompt = _make_renderer(tokenizer, vocab_size).prompt_ids(read_messages(messages), read_tools(tools))
    stage = route(torch.tensor([prompt])).stages[0]
    return stage, f"answered by {'the base' if stage is None else f'the stage {stage!r}'}"


def _make_renderer(tokenizer: Any, vocab_size: int) -> Renderer:
    check_tokenizer(tokenizer, vocab_size)
    complete_template(tokenizer)  # of a base without a stage; a stage's is complete
    return Renderer(tokenizer, vocab_size=vocab_size)


def _answer(
    plan: ReplyPlan,
    notes: list[str],
    constraint: Constraint | None,
    retries: int,
    reply_with: Callable[..., RawReply],
    **options: Any,
) -> Answer:
    """Return the first answer without a problem. Retries are sampled; after the last one the first answer counts."""
    own = constraint and constraint.copy()
    reply = reply_with(own, **options)
    parsed, problems = plan.read(reply)
    tried = 0
    while problems and constraint is not None and own is not None and own.is_finished and tried < retries:
        tried += 1
        again = reply_with(constraint.copy(), **{**options, "do_sample": True})
        parts, faults = plan.read(again)
        if not faults:
            reply, parsed, problems = again, parts, faults
    if tried:
        notes = [*notes, f"{tried} more {'reply was' if tried == 1 else 'replies were'} sampled: {problems or 'fits'}"]
    reason = "length" if not reply.is_complete else "tool_calls" if parsed.calls else "stop"
    return Answer(parsed.content, parsed.calls, problems, reason, reply.text, notes)


def read_messages(messages: Any) -> list[Message]:
    """Return messages in OpenAI's form as chat templates take them: content as text, arguments as objects."""
    expected = "expected a list of messages such as {'role': 'user', 'content': '...'}"
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise DataError(f"Messages cannot be {type(messages).__name__} {str(messages)[:60]!r}: {expected}.")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DataError(f"{str(message)[:80]!r} is no message: {expected}.")
    read: list[Message] = []
    for message in split_messages(map(dict, messages)):
        content = message.get("content")
        text = {"content": None if content is None else content_text(content)}
        calls = [read_call(call, [], False) for call in message.get("tool_calls") or ()]
        functions = [
            {"id": source_id or f"call_{i}", "type": "function", "function": {"name": name, "arguments": arguments}}
            for i, (name, arguments, source_id) in enumerate(calls, 1)
        ]
        read.append({**message, **text, **({"tool_calls": functions} if functions else {})})
    if read[-1]["role"] == "assistant":
        raise DataError("The last message is the assistant's: expected one of the user or of a tool, to be answered.")
    return read


def generate_replies(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    stop_token_ids: Sequence[int],
    *,
    max_new_tokens: int = REPLY_TOKENS,
    batch_size: int = REPLY_BATCH,
    progress: Callable[[int], None] | None = None,
    generate: Callable[..., Any] | None = None,
    constraints: Sequence[Constraint | None] | None = None,
    seeds: Sequence[int] | None = None,
    **options: Any,
) -> list[RawReply]:
    """Generate a reply to each prompt (a list of token ids), in batches of similar length.

    Decoding is greedy unless `options`, those of `generate`, say otherwise; `seeds` has the seed of each reply then.
    The replies keep their special tokens. `progress` is called after each batch with the number of its prompts.
    `generate` is used in place of the model's own. `constraints` has what each reply may be, None for any text. A row
    that has ended leaves its batch (`poe.decoding.leaving`), and a single constrained row skips the model for tokens
    that are forced (`poe.decoding.forced`).
    """
    pad = tokenizer.pad_token_id
    if pad is None or pad >= model.config.vocab_size:
        pad = stop_token_ids[0]
    device = device_of(model.eval().get_input_embeddings())
    stops = {"eos_token_id": list(stop_token_ids), "pad_token_id": pad}
    settings = greedy_options(max_new_tokens=max_new_tokens, **{**stops, **options})
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    replies = [RawReply("", True)] * len(prompts)
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        width = max(len(prompts[i]) for i in part)
        ids = torch.tensor([[pad] * (width - len(prompts[i])) + list(prompts[i]) for i in part])
        mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in part])
        inputs: dict[str, Any] = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        if is_prefix_lm(model.config):
            inputs["token_type_ids"] = mask.to(device)
        own = [None if constraints is None else constraints[i] for i in part]
        if any(own):
            processor = ConstraintProcessor(own, width)
            inputs["logits_processor"] = [*settings.get("logits_processor", ()), processor]
        decode: Any = generate or model.generate
        if generate is None and supports_options(options) and (len(part) > 1 or seeds is not None):
            draws = None if seeds is None else [torch.Generator().manual_seed(seeds[i]) for i in part]
            decode = partial(generate_leaving, model, draws)
        elif generate is None and supports_options(options) and own[0] is not None:
            decode = partial(generate_skipping_forced, model, own[0])
        output: Any = decode(**{**settings, **inputs})
        for row, i, constraint in zip(output[:, width:].tolist(), part, own, strict=True):
            end = next((k for k, token in enumerate(row) if token in stop_token_ids), None)
            is_cut = False
            if constraint is not None:
                constraint.follow(row)
                is_cut = constraint.is_cut
            text = tokenizer.decode(row[:end], skip_special_tokens=False)
            replies[i] = RawReply(text, end is not None and not is_cut, len(row[:end]))
        if progress is not None:
            progress(len(part))
    return replies


class AnswerStream:
    """The text of an answer piece by piece, while a thread generates it. The pieces together are `answer.raw`.

    `parts` gives text and calls instead. `answer` is the whole answer; it reads the pieces that are left. `close` stops
    the thread at its next token, and so does deleting the stream.
    """

    def __init__(
        self, generate: Callable[..., Answer], tokenizer: Any, stop_token_ids: Sequence[int], plan: ReplyPlan
    ) -> None:
        self._plan = plan
        self._tokens = _Tokens()
        self._pieces = _decode(self._tokens, tokenizer, stop_token_ids)
        threading.Thread(target=_run, args=(generate, self._tokens), daemon=True).start()

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def parts(self) -> Iterator[Part]:
        """Yield the text beside the calls, and each call the moment it closes with what is wrong with it."""
        if not self._plan.may_call:
            yield from map(TextPart, self._pieces)
            return
        reader = ReplyReader(self._plan.form, self._plan.choice.tools)
        for piece in self._pieces:
            yield from reader.feed(piece)
        yield from reader.close()

    @property
    def answer(self) -> Answer:
        """The whole answer, with its calls checked."""
        for _ in self._pieces:
            pass
        if self._tokens.answer is None:
            raise DecodingError("The stream was closed before its answer was whole.")
        return self._tokens.answer

    def close(self) -> None:
        """Stop generating."""
        self._tokens.is_closed = True

    def __del__(self) -> None:
        self.close()


class _Closed(Exception):
    """Ends the thread of a stream that was closed."""


class _Tokens(BaseStreamer):
    """The tokens of a reply, from the thread that generates them; then its answer, or the error that ended it."""

    def __init__(self) -> None:
        self.queue: SimpleQueue[list[int] | Answer | BaseException] = SimpleQueue()
        self.is_closed = False
        self.answer: Answer | None = None
        self._follows_prompt = False

    def put(self, value: torch.Tensor) -> None:
        """Take the next tokens. `generate` gives the prompt first."""
        if self.is_closed:
            raise _Closed
        if self._follows_prompt:
            self.queue.put(value.flatten().tolist())
        self._follows_prompt = True

    def end(self) -> None:
        """Do nothing: the answer follows."""


def _run(generate: Callable[..., Answer], tokens: _Tokens) -> None:
    try:
        tokens.queue.put(generate(streamer=tokens))
    except BaseException as error:  # any kind: it is raised where the stream is read
        tokens.queue.put(error)


def _decode(tokens: _Tokens, tokenizer: Any, stop_token_ids: Sequence[int]) -> Iterator[str]:
    """Yield new text whenever there is some that later tokens cannot change."""
    ids: list[int] = []
    text = ""
    while True:
        item = tokens.queue.get()
        if isinstance(item, _Closed):
            return
        if isinstance(item, BaseException):
            raise item
        if isinstance(item, Answer):
            tokens.answer = item
            if rest := item.raw.removeprefix(text):
                yield rest
            return
        ids += [token for token in item if token not in stop_token_ids]
        whole = tokenizer.decode(ids, skip_special_tokens=False)
        stable = whole.rstrip().rstrip("\ufffd")  # an unfinished character, or a space that may be cleaned up
        if len(stable) > len(text) and stable.startswith(text):
            piece, text = stable[len(text) :], stable
            yield piece
