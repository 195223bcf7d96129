"""Read a pickled `tiktoken.Encoding` without unpickling, with a machine for its opcodes that cannot call anything.

A pickle is a program for a stack machine that can import and call any class. The pickle of an Encoding needs a small
part of that machine: text, bytes, integers, nested dictionaries, and one class that gets its state. Only this part is
implemented here, and the class is a marker on the stack. Any other opcode, or use of one, raises before it has effect.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickletools import genops
from typing import Any

from poe.errors import SourceError

_ENCODING_CLASS = ("tiktoken.core", "Encoding")
_FIELDS = {"name": str, "pat_str": str, "mergeable_ranks": dict, "special_tokens": dict}


@dataclass(frozen=True)
class TiktokenEncoding:
    """The parts of a tiktoken Encoding: the pattern that splits text, tokens (bytes) and special tokens with ids."""

    pattern: str
    ranks: dict[bytes, int]
    special_tokens: dict[str, int]


class _Mark:
    """An object on the stack that is not a value: the class, its instance, or the mark before a dictionary's items."""


class _UnsupportedPickleError(Exception):
    """The pickle has an opcode, or a use of one, that the pickle of an Encoding does not have."""


def read_tiktoken_pickle(path: Path) -> TiktokenEncoding:
    """Return the content of the pickle of one tiktoken Encoding. Nothing in the file is imported, called or built.

    Raises `SourceError` for any other or damaged pickle, and for one that only names an encoding of tiktoken's own (it
    has no tokens).
    """
    try:
        state = _Machine().run(path.read_bytes())
    except Exception as error:  # a hostile file can be malformed in any way
        raise SourceError(
            f"{path} is not the pickle of a tiktoken Encoding: {error}. Other pickles are never read, because they can "
            "run any code. Nothing in it was run."
        ) from error
    if isinstance(state, str):
        raise SourceError(
            f"{path} holds no tokens, only the name {state!r} of an encoding that tiktoken fetches: expected a "
            "tokenizer that nanochat trained."
        )
    return _check_encoding(state, path)


def _check_encoding(state: dict[Any, Any], path: Path) -> TiktokenEncoding:
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
    """The part of pickle's stack machine that an Encoding needs."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[Any, Any] = {}  # in the order of memoization
        self.mark, self.encoding_class, self.instance = _Mark(), _Mark(), _Mark()
        self.state: dict[Any, Any] | str | None = None
        self.handlers: dict[str, Callable[[], None]] = {
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
        """Run the opcodes and return the state of the instance: a dictionary, or a name."""
        for opcode, value, position in genops(content):
            name = opcode.name
            if name in ("SHORT_BINUNICODE", "BINUNICODE", "SHORT_BINBYTES", "BINBYTES", "BININT1", "BININT2", "BININT"):
                self.stack.append(value)
            elif name in ("BINGET", "LONG_BINGET"):
                self.stack.append(self.memo[value])
            elif name in self.handlers:
                self.handlers[name]()
            elif name == "STOP":
                if self.state is None or self.stack != [self.instance]:
                    raise _UnsupportedPickleError("it ends before an Encoding is made")
                return self.state
            elif name not in ("PROTO", "FRAME"):
                raise _UnsupportedPickleError(f"it has the unsupported opcode {name} at byte {position}")
        raise _UnsupportedPickleError("it has no STOP opcode")

    def _name_class(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if (module, name) != _ENCODING_CLASS:
            raise _UnsupportedPickleError(f"it names {module}.{name}")
        self.stack.append(self.encoding_class)

    def _make_instance(self) -> None:
        arguments, cls = self.stack.pop(), self.stack.pop()
        if cls is not self.encoding_class or arguments != ():
            raise _UnsupportedPickleError("it creates another object")
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
            raise _UnsupportedPickleError("it fills an object that is not a dictionary of tokens")
        target.update(zip(items[::2], items[1::2], strict=True))

    def _take_state(self) -> None:
        state = self.stack.pop()
        if self.state is not None or self.stack[-1] is not self.instance or type(state) not in (dict, str):
            raise _UnsupportedPickleError("it sets the state of another object")
        self.state = state
