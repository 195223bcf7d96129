"""Render a conversation to token ids and a loss mask with the tokenizer's own chat template.

The loss covers exactly the tokens that the model must generate: the content and calls of each assistant message, up to
and including the stop token. The whole text is tokenized once. Token offsets decide which tokens are the assistant's.
"""

import hashlib
import json
import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jinja2
import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from poe.calls.content import split_messages
from poe.calls.conversation import Conversation, Message, PromptForm, Tool
from poe.calls.forms.prompt_forms import write_as_text
from poe.calls.tools import read_tools
from poe.data.encoding import Content, Encoded, Span, TextEncoder
from poe.data.template_needs import find_needs
from poe.errors import DataError, RowError, TemplateError, TokenizerError

__all__ = ["RenderedRow", "Renderer", "token_bytes"]

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_BYTE_FALLBACK = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE_MARKS = "Ġ▁"  # a leading space in the vocabulary of byte-level BPE and of SentencePiece
_PROBE = "an answer to see what follows it"


@dataclass(frozen=True, slots=True)
class RenderedRow:
    """One rendered row: its token ids, the loss mask of the same length (True: the token is a target), and its text.

    `control_tokens` counts the control tokens in its content, which are encoded as text.
    """

    input_ids: list[int]
    loss_mask: list[bool]
    text: str
    control_tokens: int = 0


class Renderer:
    """Renders conversations and prompts with `tokenizer.chat_template`.

    `stop_token_ids` are further tokens that end a turn (the model's `generation_config.eos_token_id`), in addition to
    the tokenizer's EOS token and the token that the template puts after an answer. `template_options` are passed to
    every rendering, for example `enable_thinking=False` of Qwen3. With `calls_only`, only assistant messages that have
    calls are trained on. `vocab_size` is the number of tokens that the base has an embedding for.

    Content is text: a control token in it is encoded as text (`poe.data.encoding`). Messages that the template refuses
    in our form are adapted to it (`poe.data.template_needs`).

    Raises `TemplateError` for a tokenizer without a chat template or without offsets (a slow tokenizer), and
    `TokenizerError` for a template that writes tokens which the base has no embedding for.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stop_token_ids: Iterable[int] = (),
        template_options: Mapping[str, Any] | None = None,
        calls_only: bool = False,
        vocab_size: int | None = None,
    ) -> None:
        if tokenizer is None:
            raise TokenizerError(
                "Expected a tokenizer, got None: the base has none. Put its tokenizer files beside it."
            )
        if not tokenizer.chat_template:
            raise TemplateError(
                f"Expected a tokenizer with a chat template, got {_name(tokenizer)} without one. Set its chat_template "
                "to the Jinja template of your prompts, or train a stage: it comes with one."
            )
        if not tokenizer.is_fast:
            raise TemplateError(
                "Expected a fast tokenizer, which gives the position of each token in the text, got "
                f"{type(tokenizer).__name__} ({_name(tokenizer)}). Convert it to a tokenizer.json and load it with "
                "AutoTokenizer."
            )
        self.tokenizer = tokenizer
        self._options = dict(template_options or {})
        self._calls_only = calls_only
        self._encoder = TextEncoder(tokenizer, vocab_size)
        self._needs = find_needs(lambda messages, tools: self._text(messages, tools))
        self._generation_prompt = ""
        stops = [tokenizer.eos_token_id, *stop_token_ids, self._probe()]
        self._stop_token_ids = tuple(dict.fromkeys(s for s in stops if s is not None))

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a turn: EOS, the given ones, and the template's end-of-turn token."""
        return self._stop_token_ids

    def fingerprint(self) -> str:
        """Return a hash of everything that affects rendering: tokenizer, template, options and stop tokens."""
        tokenizer: Any = self.tokenizer
        parts = [tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, self._options, self._stop_token_ids]
        parts += [self._calls_only, self._encoder.vocab_size]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def render(self, conversation: Conversation) -> list[RenderedRow]:
        """Render to the fewest rows that train every assistant message once, after the prompt that generates it.

        This is one row for templates with `{% generation %}` marks and for templates that only append. A template that
        rewrites earlier turns (Qwen3 removes their thinking) takes a row per version of the history. Without assistant
        messages, the mask is all False. The conversation's `form`, if any, is applied.

        Raises `DataError` if the template rejects the messages, `RowError` if the form cannot hold them, and
        `TemplateError` if the template does not show which tokens are the assistant's, or if a turn does not end in a
        stop token.
        """
        content = self._prepare(conversation.messages, conversation.tools, conversation.form)
        messages, tools = content.messages, content.tools
        if not messages:
            raise DataError("A conversation without messages cannot be rendered.")
        answers = [message for message in split_messages(conversation.messages) if message["role"] == "assistant"]
        trained = [
            message.get("weight") != 0 and (not self._calls_only or bool(message.get("tool_calls")))
            for message in answers
        ]
        if _GENERATION_MARK.search(self._template(tools)):
            text, spans = self._marked(messages, tools)
            if all(trained):
                return [self._row(text, spans, content)]
            if len(spans) != len(trained):
                raise TemplateError(
                    f"The chat template of {_name(self.tokenizer)} marks {len(spans)} parts for {len(trained)} turns "
                    "of the assistant: training on some turns only needs one {% generation %} part for each turn."
                )
            spans = [span for span, is_trained in zip(spans, trained, strict=True) if is_trained]
            return [self._row(text, spans, content)]
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        skipped = {i for i, is_trained in zip(turns, trained, strict=True) if not is_trained}
        if not turns:
            return [self._row(self._text(messages, tools), [], content)]
        if turns[0] == 0:
            raise DataError("The conversation begins with the assistant: expected a system or user message before it.")
        prompts = {i: self._text(messages[:i], tools, prompt=True) for i in turns}
        texts = {i: self._text(messages[: i + 1], tools) for i in turns}
        for i in turns:
            if not texts[i].startswith(prompts[i]):
                raise TemplateError(
                    f"The chat template of {_name(self.tokenizer)} does not render message {i} after its own "
                    f"generation prompt: expected {prompts[i][-60:]!r} and then the answer, got {texts[i][-120:]!r}. "
                    "Mark the answer with {% generation %} in the template, or set template_options."
                )
        rows = []
        whole = text = texts[turns[-1]] if turns[-1] == len(messages) - 1 else self._text(messages, tools)
        while turns:
            covered = [i for i in turns if text.startswith(texts[i])]
            if spans := [(len(prompts[i]), len(texts[i])) for i in covered if i not in skipped]:
                rows.append(self._row(text, spans, content))
            turns = [i for i in turns if i not in covered]
            text = texts[turns[-1]] if turns else ""  # this text contains at least the last remaining turn
        return rows[::-1] or [self._row(whole, [], content)]

    def prompt(self, messages: Sequence[Message], tools: Any = (), form: PromptForm | None = None) -> str:
        """Return the prompt text for the answer to `messages`, written in `form`.

        `tools` are in any spelling of `poe.calls.tools`, `messages` may have the blocks of `poe.calls.content`. Raises
        the errors of `render`, and `RowError` for tools and blocks that cannot be read.
        """
        content = self._prepare(messages, read_tools(tools), form)
        return self._text(content.messages, content.tools, prompt=True).replace(content.mark, "")

    def prompt_ids(self, messages: Sequence[Message], tools: Any = (), form: PromptForm | None = None) -> list[int]:
        """Return the token ids of `prompt(messages, tools, form)`."""
        content = self._prepare(messages, read_tools(tools), form)
        text = self._text(content.messages, content.tools, prompt=True)
        try:
            return self._encoder.encode(text, content.mark).ids
        except RowError as error:
            raise RowError(error.reason, "The prompt cannot be used, change its text") from error

    def count_control_tokens(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> int:
        """Return the number of control tokens in messages and tools. They are encoded as text."""
        return self._encoder.protect(split_messages(messages), tools).count

    def _prepare(self, messages: Sequence[Message], tools: Sequence[Tool], form: PromptForm | None) -> Content:
        """Return messages and tools as the template takes them, as text if there is a form, with marks in content."""
        messages = split_messages(messages)
        content = self._encoder.protect(messages, tools)
        if form is not None:
            if content.mark:  # the form must be able to hold the text as it is, without marks
                write_as_text(Conversation(list(messages), list(tools)), form)
            written = write_as_text(Conversation(content.messages, content.tools), form)
            content = replace(content, messages=written.messages, tools=written.tools)
        return replace(content, messages=self._needs.adapt(content.messages))

    def _template(self, tools: Sequence[Tool]) -> str:
        return self.tokenizer.get_chat_template(None, list(tools) or None)

    def _text(self, messages: Sequence[Message], tools: Sequence[Tool], *, prompt: bool = False) -> str:
        with _template_failures(self.tokenizer):
            return str(
                self.tokenizer.apply_chat_template(
                    list(messages),
                    tools=list(tools) or None,
                    tokenize=False,
                    add_generation_prompt=prompt,
                    **self._options,
                )
            )

    def _marked(self, messages: Sequence[Message], tools: Sequence[Tool]) -> tuple[str, list[Span]]:
        """Return the text and the spans inside its generation marks, without an assistant header inside them.

        `apply_chat_template(return_assistant_tokens_mask=True)` uses the same spans. Its mask is not used here because
        it includes all of a token that begins before the mark, and the whole rest of the text when the last character
        is in no token.
        """
        with _template_failures(self.tokenizer):
            rendered: Any = render_jinja_template(
                conversations=[list(messages)],
                tools=list(tools) or None,
                chat_template=self._template(tools),
                return_assistant_tokens_mask=True,
                **{**self.tokenizer.special_tokens_map, **self._options},
            )
        text, header = rendered[0][0], self._generation_prompt
        return text, [(a + len(header) if text.startswith(header, a, b) else a, b) for a, b in rendered[1][0]]

    def _probe(self) -> int | None:
        """Set the generation prompt; return the added token that the template puts after an answer, or None."""
        question = [{"role": "user", "content": "a question"}]
        try:
            before, prompt = self._text(question, ()), self._text(question, (), prompt=True)
            text = self._text([*question, {"role": "assistant", "content": _PROBE}], ())
        except DataError:
            return None  # rendering a real row reports the error
        self._generation_prompt = prompt[len(before) :] if prompt.startswith(before) else ""
        position = text.rfind(_PROBE)
        if position < 0:
            return None
        encoded = self._encode_probe(text)
        end = position + len(_PROBE)
        tokens = zip(encoded.ids, encoded.offsets, strict=True)
        first = next((i for i, (a, b) in tokens if a >= end and text[a:b].strip()), None)
        return first if first in self.tokenizer.added_tokens_decoder else None

    def _encode_probe(self, text: str) -> Encoded:
        try:
            return self._encoder.encode(text)
        except RowError as error:
            raise TokenizerError(f"The chat template of {_name(self.tokenizer)} writes a {error.reason}.") from error

    def _row(self, text: str, spans: Sequence[Span], content: Content) -> RenderedRow:
        """Tokenize `text` and mark each span's tokens up to its last stop token."""
        encoded = self._encoder.encode(text, content.mark)
        if content.mark:
            spans = [(a - text.count(content.mark, 0, a), b - text.count(content.mark, 0, b)) for a, b in spans]
        ids, offsets, text = encoded.ids, encoded.offsets, encoded.text
        starts = [a for a, _ in offsets]
        mask = [False] * len(ids)
        for start, end in spans:
            first, end_index = bisect_left(starts, start), bisect_left(starts, end)
            if first < end_index and self._starts_before(start, ids[first], offsets[first], text):
                first += 1
            last = next((i for i in range(end_index - 1, first - 1, -1) if ids[i] in self._stop_token_ids), None)
            if last is None or text[offsets[last][1] : end].strip():
                stops = self.tokenizer.convert_ids_to_tokens(list(self._stop_token_ids))
                raise TemplateError(
                    f"An assistant turn must end in a stop token ({', '.join(map(str, stops)) or 'none known'}) and "
                    f"train it, or the model never learns to stop; got {text[start:end][-60:]!r}. Put the stop token "
                    "into the template (inside its {% generation %} marks if any), or name another in stop_token_ids."
                )
            mask[first : last + 1] = [True] * (last + 1 - first)
        return RenderedRow(ids, mask, text, content.count)

    def _starts_before(self, start: int, token_id: int, offset: Span, text: str) -> bool:
        """Return whether a token with an offset of `start` or later has leading spaces before `start`.

        Some tokenizers (`trim_offsets`) report offsets without a token's leading spaces.
        """
        if not text.endswith(" ", 0, start) or text.startswith((" ", *_SPACE_MARKS), *offset):
            return False
        token = str(self.tokenizer.convert_ids_to_tokens(token_id))
        return offset[0] - (len(token) - len(token.lstrip(_SPACE_MARKS))) < start


def token_bytes(tokenizer: PreTrainedTokenizerBase, vocab_size: int | None = None) -> torch.Tensor:
    """Return the number of UTF-8 bytes of each token, int64 (vocab,), 0 for special tokens. Bits per byte need them.

    Bits per byte, as in nanochat, are the summed loss of the targets with bytes > 0, divided by ln 2 times their summed
    bytes. A byte-level BPE token has one byte per character of its vocabulary entry, even if it is not valid UTF-8.
    Other tokens have the bytes of their decoded text. `vocab_size` (default `len(tokenizer)`) is the number of rows of
    the model's head, which may be padded beyond the tokenizer.
    """
    counts = torch.zeros(max(len(tokenizer), vocab_size or 0), dtype=torch.int64)
    added = tokenizer.added_tokens_decoder
    special = set(tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}
    byte_level = _is_byte_level(tokenizer)
    for token, index in tokenizer.get_vocab().items():
        if index in special:
            continue
        if index in added:
            counts[index] = len(added[index].content.encode())
        elif byte_level:
            counts[index] = len(token)
        elif _BYTE_FALLBACK.fullmatch(token):
            counts[index] = 1
        elif "▁" in token:  # decoding a lone token would strip its space
            counts[index] = len(token.replace("▁", " ").encode())
        else:
            counts[index] = len(str(tokenizer.decode([index])).encode())
    return counts if vocab_size is None else counts[:vocab_size]


def _is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    if not tokenizer.is_fast:
        return False
    decoder = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"] or {}
    return any(part.get("type") == "ByteLevel" for part in (decoder, *decoder.get("decoders", [])))


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return repr(tokenizer.name_or_path or type(tokenizer).__name__)


class _template_failures:
    """Converts every exception of a template to `TemplateError` or `DataError`. A template may raise any exception."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, jinja2.TemplateSyntaxError):
            raise TemplateError(f"The chat template of {_name(self.tokenizer)} is not valid Jinja: {error}.") from error
        if isinstance(error, Exception):
            raise DataError(
                f"The chat template of {_name(self.tokenizer)} cannot render this conversation: "
                f"{type(error).__name__}: {error}"
            ) from error
