"""Answer conversations: write the prompt, generate, read the reply, check its calls."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from poe.calls.content import content_text, split_messages
from poe.calls.conversation import Call, Message
from poe.calls.forms.call_forms import parse_reply
from poe.calls.tools import check_calls, read_tools
from poe.data.readers.messages import read_call
from poe.data.render import Renderer
from poe.data.templates import complete_template, note_unread_calls, reply_form
from poe.decoding.generation import REPLY_BATCH, REPLY_TOKENS, greedy_options
from poe.errors import DataError, DecodingError
from poe.loaders.tokenizer import check_tokenizer
from poe.modeling.families import is_prefix_lm
from poe.modeling.placement import device_of


@dataclass(frozen=True)
class Answer:
    """The answer of a model to a conversation.

    text           what it says beside its calls
    calls          its calls, each with `name` and `arguments`
    problems       one sentence for each call that cannot be read, or that does not fit its tool
    finish_reason  "tool_calls" if there are calls, "stop", or "length": it was cut off at `max_new_tokens`
    raw            the text as generated, with the calls
    notes          what else to know about the prompt, one sentence each
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


def answer_messages(
    model: PreTrainedModel,
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    tools: Any,
    *,
    stream: bool = False,
    **options: Any,
) -> "Answer | AnswerStream":
    """Answer a conversation with a model; see `Cascade.chat`. `options` are those of `generate_replies`."""
    prompt_messages, offered = read_messages(messages), read_tools(tools)
    vocab_size = model.config.vocab_size
    check_tokenizer(tokenizer, vocab_size)
    complete_template(tokenizer)  # of a base without a stage; a stage's is complete
    renderer = Renderer(tokenizer, vocab_size=vocab_size)
    prompt = renderer.prompt_ids(prompt_messages, offered)
    notes = [note_unread_calls(tokenizer)] if offered else []
    if count := renderer.count_control_tokens(prompt_messages, offered):
        notes.append(f"{count} control tokens in the question or the tools are read as text")

    def generate(**streamer: Any) -> Answer:
        (reply,) = generate_replies(model, tokenizer, [prompt], renderer.stop_token_ids, **options, **streamer)
        return read_answer(reply, offered, reply_form(tokenizer), list(filter(None, notes)))

    return AnswerStream(generate, tokenizer, renderer.stop_token_ids) if stream else generate()


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


def read_answer(reply: RawReply, tools: Any, form: str, notes: list[str]) -> Answer:
    """Return a reply with its calls, written in the call form `form`, checked against the tools."""
    parsed = parse_reply(reply.text, form)
    problems = check_calls(parsed.calls, tools) + [f"this call cannot be read: {text}" for text in parsed.malformed]
    reason = "length" if not reply.is_complete else "tool_calls" if parsed.calls else "stop"
    return Answer(parsed.content, parsed.calls, problems, reason, reply.text, notes)


def generate_replies(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    stop_token_ids: Sequence[int],
    *,
    max_new_tokens: int = REPLY_TOKENS,
    batch_size: int = REPLY_BATCH,
    progress: Callable[[int], None] | None = None,
    **options: Any,
) -> list[RawReply]:
    """Generate a reply to each prompt (a list of token ids), in batches of similar length.

    Decoding is greedy unless `options`, those of `generate`, say otherwise. The replies keep their special tokens.
    `progress` is called after each batch with the number of its prompts.
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
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        if is_prefix_lm(model.config):
            inputs["token_type_ids"] = mask.to(device)
        output: Any = model.generate(**inputs, **settings)  # type: ignore[operator]
        for row, i in zip(output[:, width:].tolist(), part, strict=True):
            end = next((k for k, token in enumerate(row) if token in stop_token_ids), None)
            replies[i] = RawReply(tokenizer.decode(row[:end], skip_special_tokens=False), end is not None)
        if progress is not None:
            progress(len(part))
    return replies


class AnswerStream:
    """The text of an answer piece by piece, while a thread generates it. The pieces together are `answer.raw`.

    `answer` is the whole answer; it reads the pieces that are left. `close` stops the thread at its next token, and so
    does deleting the stream.
    """

    def __init__(self, generate: Callable[..., Answer], tokenizer: Any, stop_token_ids: Sequence[int]) -> None:
        self._tokens = _Tokens()
        self._pieces = _decode(self._tokens, tokenizer, stop_token_ids)
        threading.Thread(target=_run, args=(generate, self._tokens), daemon=True).start()

    def __iter__(self) -> Iterator[str]:
        return self._pieces

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
