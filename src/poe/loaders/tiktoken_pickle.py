"""A pickled `tiktoken.Encoding` read without unpickling: its opcodes are walked, and nothing in it can be called.

A pickle is a program for a small stack machine, and its danger is that it may name any class and call it. What pickling
an Encoding writes needs so little of that machine (text, bytes, numbers, one dictionary in another, one class that is
named and given its state) that this little is done here: the class becomes a mark on the stack, and an opcode, or a
use of one, that such a pickle does not have is refused before anything is made of it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickletools import genops
from typing import Any

from poe.errors import SourceError

_NAMED = ("tiktoken.core", "Encoding")
_FIELDS = {"name": str, "pat_str": str, "mergeable_ranks": dict, "special_tokens": dict}


@dataclass(frozen=True)
class TiktokenEncoding:
    """What a tiktoken Encoding is made of: a pattern that cuts text, tokens' bytes and ids, special tokens and ids."""

    pattern: str
    ranks: dict[bytes, int]
    special_tokens: dict[str, int]


class _Mark:
    """Something on the stack that is no value: the class, its instance, the mark before a dictionary's items."""


class _Refused(Exception):
    """An opcode, or a use of one, that the pickle of an Encoding does not have."""


def read_tiktoken_pickle(path: Path) -> TiktokenEncoding:
    """Return what the pickle of one tiktoken Encoding holds; nothing in the file is imported, called or built.

    Raises `SourceError` for every other pickle, for a damaged one, and for one that only names an encoding of
    tiktoken's own (it holds no tokens).
    """
    try:
        state = _Machine().run(path.read_bytes())
    except Exception as error:  # a hostile file may be malformed in any way
        raise SourceError(
            f"{path} is not the pickle of a tiktoken Encoding: {error}. A pickle can run any code, so nothing else is "
            "read from one; nothing in it was run."
        ) from error
    if isinstance(state, str):
        raise SourceError(
            f"{path} holds no tokens, only the name {state!r} of an encoding that tiktoken fetches: expected a "
            "tokenizer that nanochat trained."
        )
    return _checked(state, path)


def _checked(state: dict[Any, Any], path: Path) -> TiktokenEncoding:
    if {key: type(value) for key, value in state.items()} != _FIELDS:
        raise SourceError(f"{path}: expected an Encoding's {', '.join(_FIELDS)}, got {', '.join(map(str, state))}.")
    ranks, special = state["mergeable_ranks"], state["special_tokens"]
    for tokens, kind in ((ranks, bytes), (special, str)):
        if not all(type(token) is kind and token and type(number) is int for token, number in tokens.items()):
            raise SourceError(f"{path}: expected tokens that are {kind.__name__}, each with a number.")
    numbers = sorted([*ranks.values(), *special.values()])
    if numbers != list(range(len(numbers))) or len(ranks) + len(special) == 0:
        raise SourceError(f"{path}: expected the ids 0 to {len(numbers) - 1}, each once; got others.")
    return TiktokenEncoding(state["pat_str"], ranks, special)


class _Machine:
    """The part of pickle's stack machine that the pickle of an Encoding needs."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[Any, Any] = {}  # by the order in which things were remembered
        self.mark, self.named, self.instance = _Mark(), _Mark(), _Mark()
        self.state: dict[Any, Any] | str | None = None
        self.simple: dict[str, Callable[[], None]] = {
            "EMPTY_DICT": lambda: self.stack.append({}),
            "EMPTY_TUPLE": lambda: self.stack.append(()),
            "MARK": lambda: self.stack.append(self.mark),
            "MEMOIZE": lambda: self.memo.update({len(self.memo): self.stack[-1]}),
            "STACK_GLOBAL": self._name_class,
            "NEWOBJ": self._make_instance,
            "SETITEM": self._set_item,
            "SETITEMS": self._set_items,
            "BUILD": self._take_state,
        }

    def run(self, content: bytes) -> dict[Any, Any] | str:
        """Walk the opcodes and return the state that the instance is given: a dictionary, or a name."""
        for opcode, value, position in genops(content):
            name = opcode.name
            if name in ("SHORT_BINUNICODE", "BINUNICODE", "SHORT_BINBYTES", "BINBYTES", "BININT1", "BININT2", "BININT"):
                self.stack.append(value)
            elif name in ("BINGET", "LONG_BINGET"):
                self.stack.append(self.memo[value])
            elif name in self.simple:
                self.simple[name]()
            elif name == "STOP":
                if self.state is None or self.stack != [self.instance]:
                    raise _Refused("it ends before an Encoding is made")
                return self.state
            elif name not in ("PROTO", "FRAME"):
                raise _Refused(f"opcode {name} at byte {position} has no place in one")
        raise _Refused("it has no end")

    def _name_class(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if (module, name) != _NAMED:
            raise _Refused(f"it names {module}.{name}")
        self.stack.append(self.named)

    def _make_instance(self) -> None:
        arguments, named = self.stack.pop(), self.stack.pop()
        if named is not self.named or arguments != ():
            raise _Refused("it makes something else")
        self.stack.append(self.instance)

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._put(self.stack[-1], [key, value])

    def _set_items(self) -> None:
        items: list[Any] = []
        while (top := self.stack.pop()) is not self.mark:
            items.append(top)
        self._put(self.stack[-1], items[::-1])

    def _put(self, target: Any, items: list[Any]) -> None:
        if type(target) is not dict or any(type(key) not in (str, bytes) for key in items[::2]):
            raise _Refused("it fills something that is not a dictionary of tokens")
        target.update(zip(items[::2], items[1::2], strict=True))

    def _take_state(self) -> None:
        state = self.stack.pop()
        if self.state is not None or self.stack[-1] is not self.instance or type(state) not in (dict, str):
            raise _Refused("it gives a state to something else")
        self.state = state
