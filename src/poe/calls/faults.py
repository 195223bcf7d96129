"""The faults of calls that models write, each with a name."""

from dataclasses import dataclass
from enum import StrEnum


class FaultKind(StrEnum):
    """What is wrong with a call. The value is the reason in words."""

    UNCLOSED = "the text ends inside the call"
    NOT_JSON = "not JSON"
    NOT_PYTHON = "not Python notation"
    NOT_A_CALL = "not the name and the arguments of a call in this form"
    TEXT_IN_CALL = "text between a call and its end mark"
    BRACE_LOOP = "closing brackets after the end of the call"
    QUOTED_ARGUMENTS = "arguments as a quoted string"
    DUPLICATE_KEY = "one key twice in an object"
    TOO_DEEP = "nested too deeply"
    INVALID_VALUE = "a value that is not JSON"
    UNKNOWN_TOOL = "call to a tool that is not offered"
    INVALID_ARGUMENTS = "arguments that do not fit the tool"


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong with a call.

    kind    the name of the fault
    text    the part of the reply that cannot be read; of a call that can be read, what is wrong
    path    the tool and the place in the arguments (`get_weather: arguments.days[0]`); empty if no call can be read
    """

    kind: FaultKind
    text: str
    path: str = ""

    def __str__(self) -> str:
        return f"{self.path}: {self.text}" if self.path else f"this call cannot be read ({self.kind}): {self.text}"


class UnreadableError(ValueError):
    """A text is not a call. It is caught where calls are read, and becomes a `Fault` of its kind.

    `depth`: the number of brackets that are open where the text stops to be one.
    """

    def __init__(self, kind: FaultKind, depth: int = 0) -> None:
        super().__init__(kind.value)
        self.kind = kind
        self.depth = depth
