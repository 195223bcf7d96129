"""Read a reply piece by piece: its text, its calls the moment they close, and the faults of its calls."""

from dataclasses import replace
from typing import Any

from poe.calls.faults import Fault, FaultKind
from poe.calls.forms.call_forms import call_form
from poe.calls.reading import CallPart, FaultPart, Part, PartReader, Reply, TextPart, join_parts
from poe.calls.tools import find_faults, read_tools

__all__ = ["CallPart", "Fault", "FaultKind", "FaultPart", "Part", "Reply", "ReplyReader", "TextPart", "join_parts"]


class ReplyReader:
    """Reads a reply in a call form while it arrives.

    The parts that `feed` and `close` return make up what `parse_reply` returns for the whole text (`join_parts`),
    however the text is cut. A piece that may be the beginning of a mark is held back until more text decides. A call of
    a list of calls is returned when the list closes, because one unreadable member makes the list unreadable. No text
    raises an error, and the work grows as the text does.

    `tools`, in any spelling, are those that are offered: `CallPart.faults` is then what is wrong with a call.
    """

    def __init__(self, form: str, tools: Any = None) -> None:
        self._tools = None if tools is None else read_tools(tools)
        self._reader = PartReader(call_form(form).scan)

    def feed(self, text: str) -> list[Part]:
        """Take the next piece of the reply. Return the parts that are certain now."""
        return [self._check(part) for part in self._reader.feed(text)]

    def close(self) -> list[Part]:
        """End the reply. Return the rest of its parts."""
        return [self._check(part) for part in self._reader.close()]

    def _check(self, part: Part) -> Part:
        if self._tools is None or not isinstance(part, CallPart):
            return part
        return replace(part, faults=tuple(find_faults(part.call, self._tools)))
