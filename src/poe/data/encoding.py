"""Turn text into token ids. Control tokens in content are encoded as text, so content cannot forge a turn.

A tokenizer gives every occurrence of a control token the token's id, in the chat template's text and in a user's text
alike. Here the content of a conversation gets a mark inside each occurrence before the template is rendered. In the
rendered text, what is not marked is the template's own. The text is then tokenized as a whole by a copy of the
tokenizer in which the control tokens have secret names: the template's occurrences are replaced by these names, and the
marks are removed. All other tokens are those of the original tokenizer.
"""

import json
import re
import secrets
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from poe.calls.conversation import Message, Tool
from poe.errors import DataError, RowError

__all__ = ["Content", "Encoded", "TextEncoder", "control_tokens"]

Span = tuple[int, int]  # character range [start, end) of a text

# Letters without case that templates and call forms print unchanged. One that a row does not have becomes its mark.
_MARKS = [chr(number) for number in range(0xA000, 0xA48D)]
_SHAPE = re.compile(r"<[|｜].*[|｜]>", re.DOTALL)
_THINKING = re.compile(r"\s*(<think>|\[THINK\])(.*?)(</think>|\[/THINK\])", re.DOTALL)
_SCHEMAS = ("parameters", "arguments")
_NAME_EDGE = "\U0010fffd"
_UNKNOWN = "\U000e0fff"  # a letter that no vocabulary has


@dataclass(frozen=True, slots=True)
class Content:
    """Messages and tools in which each control token has a mark, and the number of these tokens.

    `mark` is "" if there are none.
    """

    messages: list[Message]
    tools: list[Tool]
    mark: str = ""
    count: int = 0


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids, the characters of each token in `text`, and the text without marks."""

    ids: list[int]
    offsets: list[Span]
    text: str


@dataclass(frozen=True, slots=True)
class _Renamed:
    """The copy of the tokenizer, the name of each control token in it, and the original id of each of its own."""

    tokenizer: Tokenizer
    names: dict[str, str]
    ids: dict[int, int]


def control_tokens(tokenizer: PreTrainedTokenizerBase, vocab_size: int | None = None) -> dict[str, int]:
    """Return the tokens that content must not produce, with their ids.

    They are the special tokens, the added tokens that the chat template writes or that look like `<|x|>`, and those
    with an id of `vocab_size` or more, which the model has no embedding for. Other added tokens are vocabulary.
    """
    special, template = set(tokenizer.all_special_ids), str(tokenizer.chat_template or "")
    limit = vocab_size or len(tokenizer)
    return {
        token.content: number
        for number, token in tokenizer.added_tokens_decoder.items()
        if len(token.content.strip()) > 1
        and (
            token.special
            or number in special
            or number >= limit
            or token.content in template
            or _SHAPE.fullmatch(token.content)
        )
    }


class TextEncoder:
    """Encodes text with a fast tokenizer. Only the text of chat templates becomes control tokens.

    `vocab_size` is the number of rows of the model's embedding.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int | None = None) -> None:
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self.control = control_tokens(tokenizer, vocab_size)
        self._ids = {*self.control.values(), *tokenizer.all_special_ids} - _unknown_ids(tokenizer)
        self._is_printable = all(token == repr(token)[1:-1] for token in self.control)  # `repr` shows each as it is
        cores = {re.sub(r"^\W+|\W+$", "", token) for token in self.control} - {""}
        self.pattern = re.compile(_any_of(self.control))
        self.cores = re.compile(rf"(?<!\w)(?:{_any_of(cores)})(?!\w)")

    def protect(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> Content:
        """Mark the control tokens in all texts, names and schemas.

        In an assistant's message, the marks of the thinking at its beginning stay: they are the template's own.
        """
        known = repr((messages, tools))
        if self._is_printable and not self.pattern.search(known) and not self.cores.search(known):
            return Content(list(messages), list(tools))
        known += str(self.tokenizer.chat_template)
        for letter in _MARKS:
            marker = _Marker(self.pattern, self.cores, letter)
            marked = [marker.mark_message(message) for message in messages], marker.mark(list(tools))
            if not marker.changed:
                break
            if letter not in known:
                return Content(*marked, letter, marker.count)
        else:
            raise RowError("control tokens, and every letter of Yi")
        return Content(list(messages), list(tools))

    def encode(self, text: str, mark: str = "") -> Encoded:
        """Return the tokens of a rendered text without its marks. Only unmarked control tokens become their ids.

        Raises `RowError` if the tokenizer or the template does not allow that, and for tokens that the model has no
        embedding for.
        """
        if mark and f"u{ord(mark):04x}" in text.lower():
            raise RowError("the chat template writes escapes instead of letters around a control token")
        if not mark or mark not in text:
            encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            ids, offsets = list(encoded["input_ids"]), list(encoded["offset_mapping"])
            if not self._has_forged(ids, text):
                return self._checked(Encoded(ids, offsets, text))
        return self._checked(self._encode_renamed(text, mark))

    def has_control_tokens(self, text: str) -> bool:
        """Return whether a text contains a control token by its spelling."""
        return self.pattern.search(text) is not None

    def encode_plain(self, text: str) -> list[int]:
        """Return the tokens of a text without a chat template, in which control tokens are text.

        The tokens that the tokenizer puts around every text are included. Raises `DataError` if there are no tokens,
        and the errors of `encode`.
        """
        if self.tokenizer.is_fast:
            content = self.protect([{"content": text}])
            before, after = self._around
            ids = [*before, *self.encode(content.messages[0]["content"], content.mark).ids, *after]
        else:
            ids = list(self.tokenizer(text, split_special_tokens=True, verbose=False)["input_ids"])
        if not ids:
            raise DataError("The text has no tokens: expected at least one. Give a text that is not empty.")
        return ids

    @cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        """The tokens that the tokenizer puts before and after every text."""
        encoded = self.tokenizer("a", return_special_tokens_mask=True, verbose=False)
        ids, mask = encoded["input_ids"], encoded["special_tokens_mask"]
        if 0 not in mask:
            return list(ids), []
        start, end = mask.index(0), len(mask) - mask[::-1].index(0)
        return list(ids[:start]), list(ids[end:])

    def _has_forged(self, ids: Sequence[int], text: str) -> bool:
        """Return whether there are more control tokens than the text has by their exact spelling."""
        found = Counter(i for i in ids if i in self._ids)
        if not found:
            return False
        return bool(found - Counter(self.control[m[0]] for m in self.pattern.finditer(text) if m[0] in self.control))

    def _encode_renamed(self, text: str, mark: str) -> Encoded:
        renamed = self._renamed
        parts: list[str] = []
        plain: list[str] = []
        starts: list[int] = []  # for each character of the parts, its position in the text without marks
        position = end = num_names = 0

        def add(part: str, original: str) -> None:
            nonlocal position
            parts.append(part)
            plain.append(original)
            same = part == original
            starts.extend(range(position, position + len(part)) if same else [position] * len(part))
            position += len(original)

        for match in self.pattern.finditer(text):
            if (name := renamed.names.get(match[0])) is not None:
                between = text[end : match.start()].replace(mark, "") if mark else text[end : match.start()]
                add(between, between)
                add(name, match[0])
                end, num_names = match.end(), num_names + 1
        rest = text[end:].replace(mark, "") if mark else text[end:]
        add(rest, rest)
        starts.append(position)
        changed = "".join(parts)
        encoding = renamed.tokenizer.encode(changed, add_special_tokens=False)
        ids: list[int] = []
        offsets: list[Span] = []
        for number, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            original = renamed.ids.get(number, number)
            pieces = [original]
            if _NAME_EDGE in changed[start:stop]:
                num_names -= 1
            elif original in self._ids:  # an entry of the vocabulary that is spelled like a control token
                pieces = self._split(renamed.tokenizer, number)
            ids += pieces
            offsets += [(starts[start], starts[stop])] * len(pieces)
        if num_names:
            raise RowError("control token that the tokenizer does not find")
        return Encoded(ids, offsets, "".join(plain))

    def _split(self, tokenizer: Tokenizer, number: int) -> list[int]:
        """Return other tokens for the text of a token: two parts, or its letters."""
        token = tokenizer.id_to_token(number) or ""
        for parts in ([token[:1], token[1:]], list(token)):
            try:
                ids = [piece.id for part in parts if part for piece in tokenizer.model.tokenize(part)]
            except Exception:  # the library raises an error of its own for a text without tokens
                continue
            if not self._ids.intersection(ids):
                return ids
        raise RowError("control token that the tokenizer cannot write as text")

    def _checked(self, encoded: Encoded) -> Encoded:
        if self.vocab_size is not None and encoded.ids and max(encoded.ids) >= self.vocab_size:
            number = max(encoded.ids)
            token = self.tokenizer.convert_ids_to_tokens(number)
            raise RowError(f"token {token!r} (id {number}) beyond the base's embedding of {self.vocab_size} tokens")
        return encoded

    @cached_property
    def _renamed(self) -> _Renamed:
        backend: Any = self.tokenizer.backend_tokenizer
        content = json.loads(backend.to_str())
        secret = secrets.token_hex(8)
        names: dict[str, str] = {}
        spelled: dict[str, int] = {}
        for token in content["added_tokens"]:
            original = name = token["content"]
            if original in self.control:
                name = names[original] = f"{_NAME_EDGE}{secret}{len(names)}{_NAME_EDGE}"
                token.update(content=name, single_word=False)
            spelled[name] = token["id"]
        content.update(truncation=None, padding=None)
        copy = Tokenizer.from_str(json.dumps(content))
        ids = {copy.token_to_id(name): number for name, number in spelled.items()}
        return _Renamed(copy, names, {own: number for own, number in ids.items() if own is not None})


class _Marker:
    """Puts a mark after the first letter of each control token of a conversation, and counts these tokens."""

    def __init__(self, pattern: re.Pattern[str], cores: re.Pattern[str], letter: str) -> None:
        self.pattern, self.cores, self.letter = pattern, cores, letter
        self.count, self.changed = 0, False

    def mark_message(self, message: Message) -> Message:
        """Mark a message, but not the marks of an assistant's thinking at its beginning."""
        text = message.get("content")
        thinking = _THINKING.match(text) if message.get("role") == "assistant" and isinstance(text, str) else None
        if thinking is None:
            return dict(self.mark(message))
        marked = self.mark({**message, "content": None})
        inside, rest = self._mark_text(thinking[2]), self._mark_text(thinking.string[thinking.end() :])
        return {**marked, "content": thinking.string[: thinking.start(2)] + inside + thinking[3] + rest}

    def mark(self, value: Any, is_name: bool = False, in_schema: bool = False) -> Any:
        """Mark a value. In schemas and arguments the keys are names."""
        if isinstance(value, str):
            return self._mark_text(value, is_name)
        if isinstance(value, dict):
            return {
                self._mark_text(key, in_schema) if isinstance(key, str) else key: self.mark(
                    member, key in ("name", "required"), in_schema or key in _SCHEMAS
                )
                for key, member in value.items()
            }
        if isinstance(value, (list, tuple)):
            return [self.mark(member, is_name, in_schema) for member in value]
        return value

    def _mark_text(self, text: str, is_name: bool = False) -> str:
        """Mark a text; with `is_name`, also a name that a template could complete, as in `<` + name + `>`."""
        marked, count = self.pattern.subn(self._insert, text)
        if is_name and not count:
            marked = self.cores.sub(self._insert, text)
        self.count += count
        self.changed = self.changed or marked != text
        return marked

    def _insert(self, match: re.Match[str]) -> str:
        return match[0][0] + self.letter + match[0][1:]


def _unknown_ids(tokenizer: PreTrainedTokenizerBase) -> set[int | None]:
    """Return the ids that stand for unknown text, which any content can have."""
    try:
        ids = tokenizer.encode(_UNKNOWN, add_special_tokens=False)
    except Exception:  # the library raises an error of its own for a vocabulary without an unknown token
        ids = []
    return {tokenizer.unk_token_id, *ids}


def _any_of(texts: Iterable[str]) -> str:
    """Return a pattern of all texts, the longest first. Numbers stand for all numbers, which keeps it short."""
    patterns = {re.sub(r"[0-9]+", "[0-9]+", re.escape(text)) for text in texts}
    return "|".join(sorted(patterns, key=len, reverse=True)) or r"(?!)"
