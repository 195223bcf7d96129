"""Text of a reply while its tokens come: whole characters only, and nothing that may belong to a stop string."""

from collections.abc import Sequence
from typing import Any

_UNFINISHED = "\ufffd"  # what a decoder writes for the first bytes of a character


class TextBuilder:
    """Builds the text of one reply from its tokens. `text` is what was given out so far; `stopped` that it ended.

    A stop string ends the text before it. Text that may be the beginning of one is held back.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, [text for text in stop if text]
        self._ids: list[int] = []
        self._start = self._read = 0  # the window of tokens that is decoded, and its part that was read
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Take the next token and return the text that is certain now."""
        self._ids.append(token)
        before, whole = self._decode(self._start, self._read), self._decode(self._start, len(self._ids))
        if len(whole) <= len(before) or whole.endswith(_UNFINISHED):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return self._release(whole[len(before) :])

    def finish(self) -> str:
        """Return the text that was held back, when no more tokens come."""
        if self.stopped:
            return ""
        before, whole = self._decode(self._start, self._read), self._decode(self._start, len(self._ids))
        text = self._release(whole[len(before) :])
        held, self._held = "" if self.stopped else self._held, ""
        return text + held

    def _release(self, text: str) -> str:
        """Return the held text and `text` up to what may be the beginning of a stop string."""
        text = self._held + text
        places = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        longest = max(map(len, self._stop), default=1) - 1
        ends = range(max(0, len(text) - longest), len(text))
        cut = next((i for i in ends if any(stop.startswith(text[i:]) for stop in self._stop)), len(text))
        self._held = text[cut:]
        return text[:cut]

    def _decode(self, start: int, end: int) -> str:
        return str(self._tokenizer.decode(self._ids[start:end], skip_special_tokens=False))
