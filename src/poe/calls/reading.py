"""Read text that arrives in pieces: every call form is read with the same few steps, and each character about once.

A form is a generator over a `Source`. It yields parts of the reply as soon as they are certain, and None where it needs
more text. So a form is written once, as if the whole text were there, and reads a stream and a whole reply alike.
"""

import json
import re
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

from poe.calls.conversation import Call
from poe.calls.faults import Fault, FaultKind, UnreadableError
from poe.errors import DataError

MAX_DEPTH = 100
"""The maximum number of open brackets. `poe.calls.values` allows fewer inside a call."""


@dataclass(frozen=True, slots=True)
class TextPart:
    """Text beside the calls."""

    text: str


@dataclass(frozen=True, slots=True)
class CallPart:
    """A call that just closed. `faults` is what is wrong with it: a tool that is not offered, arguments that do not
    fit."""

    call: Call
    faults: tuple[Fault, ...] = ()


@dataclass(frozen=True, slots=True)
class FaultPart:
    """A text that looks like a call and cannot be read as one."""

    fault: Fault


Part = TextPart | CallPart | FaultPart
Wait = Generator[None, None, Any]
"""Yields None while it needs more text, and returns a value."""
Parts = Generator[Part | None, None, Any]
"""Yields parts, and None while it needs more text."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply that was read: its text without calls, its calls, and the texts that look like a call and are none."""

    content: str
    calls: list[Call] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    @property
    def malformed(self) -> list[str]:
        """The texts that look like a call and cannot be read as one."""
        return [fault.text for fault in self.faults]


class Source:
    """The text of a reply as it arrives.

    `window` is the text that is not read yet, with `position` in it. Text that was read is dropped unless it is held.
    """

    def __init__(self) -> None:
        self.window = ""
        self.position = 0
        self.is_final = False
        self._held: list[str] | None = None  # the held text before the window
        self._start = 0  # where the held text continues in the window

    def feed(self, text: str) -> None:
        """Append text."""
        if self._held is not None:
            self._held.append(self.window[self._start : self.position])
        self.window = self.window[self.position :] + text
        self.position = self._start = 0

    def hold(self) -> None:
        """Keep the text from here on, so that it can be read again."""
        self._held, self._start = [], self.position

    def held(self) -> str:
        """Return the text from the place of `hold` to here."""
        return "".join([*(self._held or ()), self.window[self._start : self.position]])

    def rewind(self) -> None:
        """Go back to the place of `hold`."""
        if self._held:
            self.window = "".join([*self._held, self.window[self._start :]])
            self._held, self._start = [], 0
        self.position = self._start

    @property
    def count(self) -> int:
        """The number of held characters."""
        return sum(map(len, self._held or ())) + self.position - self._start

    def skip(self, text: str) -> Wait:
        """Return whether a text is here, and go past it if it is."""
        while True:
            here = self.window[self.position : self.position + len(text)]
            if here == text:
                self.position += len(text)
                return True
            if self.is_final or not text.startswith(here):
                return False
            yield

    def run(self, pattern: re.Pattern[str], partial: re.Pattern[str] | None = None) -> Wait:
        """Go past all that matches `pattern`, a repeated class of characters. Return the next one, "" at the end.

        `partial` matches what more text may complete.
        """
        while True:
            match = pattern.match(self.window, self.position)
            self.position = match.end() if match else self.position
            waits = partial is not None and partial.match(self.window, self.position) is not None
            if self.position < len(self.window) and not waits:
                return self.window[self.position]
            if self.is_final:
                self.position = len(self.window)
                return ""
            yield

    def take(self, pattern: re.Pattern[str]) -> Wait:
        """Go past all characters that match `pattern`, and return them."""
        taken = []
        while True:
            match = pattern.match(self.window, self.position)
            if match:
                taken.append(match[0])
                self.position = match.end()
            if self.position < len(self.window) or self.is_final:
                return "".join(taken)
            yield

    def match(self, pattern: Any) -> Wait:
        """Return whether a pattern of `regex` matches here, and go past the match if it does."""
        while True:
            match = pattern.match(self.window, self.position, partial=not self.is_final)
            if match is None:
                return False
            if not match.partial:
                self.position = match.end()
                return True
            yield

    def text_before(self, pattern: Any, at_end: Any = None) -> Parts:
        """Yield the text before the next match of a pattern of `regex`, and go there. Return None if there is none.

        `at_end`: the pattern that decides at the end of the text, if that is another one. Held text is dropped.
        """
        self._held = None
        while True:
            chosen = at_end if at_end is not None and self.is_final else pattern
            match = chosen.search(self.window, self.position, partial=not self.is_final)
            start = match.start() if match else len(self.window)
            if start > self.position:
                text = self.window[self.position : start]
                self.position = start
                yield TextPart(text)
            if match and not match.partial:
                return match
            if self.is_final:
                return None
            yield None


_SPACE = re.compile(r"[ \t\n\r]*")
_ANY_SPACE = re.compile(r"\s*")
_STRING = re.compile(r'(?:[^"\\\x00-\x1f]|\\(?:["\\/bfnrt]|u[0-9A-Fa-f]{4}))*')
_PART_OF_ESCAPE = re.compile(r"\\(?:u[0-9A-Fa-f]{0,3})?\Z")
_WORD = re.compile(r"[A-Za-z0-9+\-.]*")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_CONSTANTS = ("true", "false", "null")
_NOT_FINITE = ("NaN", "Infinity", "-Infinity")
_NOT_BRACKETS = re.compile(r"[^][{}]*")


def read_json(source: Source) -> Wait:
    """Go past one JSON value, after optional white space. Raises `UnreadableError` at the first wrong character."""
    closing: list[str] = []  # what closes each open bracket
    expected = "value"
    if (yield from source.run(_ANY_SPACE)) and _skip_whole_value(source):
        return
    while True:
        character = yield from source.run(_SPACE)
        if character == "":
            raise UnreadableError(FaultKind.UNCLOSED, len(closing))
        fault = None
        if closing and character == closing[-1] and expected in ("first value", "first key", "end"):
            source.position += 1
            closing.pop()
            expected = "end"
        elif expected == "end" and character == ",":
            source.position += 1
            expected = "key" if closing[-1] == "}" else "value"
        elif expected == "colon" and character == ":":
            source.position += 1
            expected = "value"
        elif expected in ("key", "first key") and character == '"':
            fault = yield from _read_string(source)
            expected = "colon"
        elif expected not in ("value", "first value"):
            fault = FaultKind.NOT_JSON
        elif character in "{[":
            source.position += 1
            closing.append("}" if character == "{" else "]")
            expected = "first key" if character == "{" else "first value"
            fault = FaultKind.TOO_DEEP if len(closing) > MAX_DEPTH else None
        else:
            fault = yield from (_read_string(source) if character == '"' else _read_word(source))
            expected = "end"
        if fault is not None:
            raise UnreadableError(fault, len(closing))
        if not closing:
            return


def _skip_whole_value(source: Source) -> bool:
    """Go past an object or a list that is all there. It is a shortcut: what it does not take, is read step by step."""
    if source.window[source.position] not in "{[":
        return False
    try:
        _, end = _DECODER.raw_decode(source.window, source.position)
    except (ValueError, RecursionError):
        return False
    brackets = source.window.count("{", source.position, end) + source.window.count("[", source.position, end)
    source.position = end if brackets <= MAX_DEPTH else source.position
    return brackets <= MAX_DEPTH


def _reject(name: str) -> Any:
    raise ValueError(name)


_DECODER = json.JSONDecoder(parse_constant=_reject)


def _read_string(source: Source) -> Wait:
    """Go past a string. Return what is wrong with it, or None."""
    source.position += 1
    character = yield from source.run(_STRING, _PART_OF_ESCAPE)
    if character == '"':
        source.position += 1
        return None
    return FaultKind.NOT_JSON if character else FaultKind.UNCLOSED


def _read_word(source: Source) -> Wait:
    """Go past a number or a constant. Return what is wrong with it, or None."""
    word = yield from source.take(_WORD)
    if word in _CONSTANTS or _NUMBER.fullmatch(word):
        return None
    return FaultKind.INVALID_VALUE if word in _NOT_FINITE else FaultKind.NOT_JSON


def read_to_close(source: Source, depth: int) -> Wait:
    """Go on until `depth` brackets are closed, those in strings counted as well. Return whether they are."""
    while depth > 0:
        bracket = yield from source.run(_NOT_BRACKETS)
        if bracket == "":
            return False
        source.position += 1
        depth += 1 if bracket in "{[" else -1
    return True


_ANYTHING = re.compile(r".*", re.DOTALL)
_CLOSING = re.compile(r"[\]}\s]*")


def read_rest(source: Source) -> Wait:
    """Go to the end of the text."""
    yield from source.run(_ANYTHING)


def read_closing_brackets(source: Source) -> Parts:
    """Yield the closing brackets that follow a call: a fault if there are several, as text otherwise.

    A model that does not end its reply after a call often writes them again and again.
    """
    text = yield from source.take(_CLOSING)
    if sum(text.count(bracket) for bracket in "]}") < 2:
        yield TextPart(text)
        return
    yield FaultPart(Fault(FaultKind.BRACE_LOOP, text.strip()))
    yield TextPart(text[len(text.rstrip()) :])


def collect_text(parts: Parts) -> Wait:
    """Return the text of parts that are all text, and what their generator returns."""
    texts: list[str] = []
    while True:
        try:
            part = next(parts)
        except StopIteration as end:
            return "".join(texts), end.value
        if isinstance(part, TextPart):
            texts.append(part.text)
        else:
            yield


class PartReader:
    """Gives the parts of a reply that arrives in pieces. The text is that of the reply without white space around it.

    The parts do not depend on how the text is cut into pieces, except that text may come in more parts.
    """

    def __init__(self, scan: Callable[[Source], Parts]) -> None:
        self._source = Source()
        self._parts = scan(self._source)
        self._space: list[str] = []  # white space that is part of the text if more text follows
        self._has_text = False

    def feed(self, text: str) -> list[Part]:
        """Take the next text. Return what is certain now."""
        if self._source.is_final:
            raise DataError("This reader of a reply is closed: use a new one for the next reply.")
        self._source.feed(text)
        return list(self._read())

    def close(self) -> list[Part]:
        """End the text. Return the rest."""
        self._source.is_final = True
        return list(self._read())

    def _read(self) -> Iterator[Part]:
        texts: list[str] = []
        for part in self._parts:
            if isinstance(part, TextPart):
                texts.append(part.text)
                continue
            yield from self._join(texts)
            texts = []
            if part is None:
                return
            yield part
        yield from self._join(texts)

    def _join(self, texts: list[str]) -> Iterator[TextPart]:
        text = "".join(texts)
        stripped = text.rstrip()
        if stripped:
            before = "".join(self._space) if self._has_text else ""
            yield TextPart(before + (stripped if self._has_text else stripped.lstrip()))
            self._has_text = True
            self._space = []
        self._space.append(text[len(stripped) :])


def read_reply(scan: Callable[[Source], Parts], text: str) -> Reply:
    """Return the parts of a whole reply."""
    reader = PartReader(scan)
    return join_parts([*reader.feed(text), *reader.close()])


def join_parts(parts: list[Part]) -> Reply:
    """Return the reply that the parts make up."""
    return Reply(
        "".join(part.text for part in parts if isinstance(part, TextPart)),
        [part.call for part in parts if isinstance(part, CallPart)],
        [part.fault for part in parts if isinstance(part, FaultPart)],
    )
