"""Python notation as data: literals and calls are parsed, never run.

Some sets write values as Python does (`{'a': True}`), some write calls (`[Weather(city='Oslo', days=2)]`). The text
goes through Python's own grammar and the tree is read node by node: nothing is looked up and nothing is executed.
"""

import ast
import math
import re
import warnings
from typing import Any, NamedTuple

MAX_CHARACTERS = 200_000
MAX_DEPTH = 60

_DEEP = re.compile(r"[\[({]")


class PythonCall(NamedTuple):
    """A call in Python notation. A value may itself be a `PythonCall`, or a `Variable` that an assignment named."""

    name: str
    positional: list[Any]
    named: dict[str, Any]


class Variable(NamedTuple):
    """A bare name where a value was expected."""

    name: str


def parse_literal(text: str) -> Any:
    """The value of a Python literal as JSON would hold it: tuples and sets become lists, keys text.

    Raises ValueError for anything else: names, arithmetic, calls, non-finite numbers, complex numbers, bytes, and what
    is longer than `MAX_CHARACTERS` or nests deeper than `MAX_DEPTH`.
    """
    return _value(_tree(text, "eval").body, calls=False, depth=0)


def parse_calls(text: str) -> list[PythonCall]:
    """The calls of a text in Python notation: one call, a list of calls, or statements (`x = f(1)`, one per line).

    Raises ValueError if it is anything else.
    """
    found: list[PythonCall] = []
    for statement in _tree(text, "exec").body:
        node = statement.value if isinstance(statement, ast.Expr | ast.Assign) else None
        parts = node.elts if isinstance(node, ast.List | ast.Tuple) else [node]
        for part in parts:
            if not isinstance(part, ast.Call):
                raise ValueError("not a call")
            found.append(_call(part, 0))
    if not found:
        raise ValueError("no call")
    return found


def _tree(text: str, mode: str) -> Any:
    if len(text) > MAX_CHARACTERS or len(_DEEP.findall(text)) > MAX_CHARACTERS // 4:
        raise ValueError("too long to be parsed")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an invalid escape such as "\d" is only text to us
            return ast.parse(text.strip(), mode=mode)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"not Python notation: {type(error).__name__}") from None


def _call(node: ast.Call, depth: int) -> PythonCall:
    if any(keyword.arg is None for keyword in node.keywords):
        raise ValueError("unpacked arguments")
    named: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg in named:
            raise ValueError("one argument twice")
        named[str(keyword.arg)] = _value(keyword.value, calls=True, depth=depth + 1)
    return PythonCall(_dotted(node.func), [_value(arg, calls=True, depth=depth + 1) for arg in node.args], named)


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    raise ValueError("a call of something that has no name")


def _value(node: ast.expr, *, calls: bool, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise ValueError("nested too deeply")
    if isinstance(node, ast.Constant):
        if node.value is None or isinstance(node.value, str | bool | int):
            return node.value
        if isinstance(node.value, float) and math.isfinite(node.value):
            return node.value
        raise ValueError("a value that JSON cannot write")
    if isinstance(node, ast.List | ast.Tuple | ast.Set):
        return [_value(member, calls=calls, depth=depth + 1) for member in node.elts]
    if isinstance(node, ast.Dict):
        made: dict[str, Any] = {}
        for key, member in zip(node.keys, node.values, strict=True):
            name = None if key is None else _value(key, calls=False, depth=depth + 1)
            if name is None or isinstance(name, list | dict | bool) or str(name) in made:
                raise ValueError("a key that JSON cannot write")
            made[str(name)] = _value(member, calls=calls, depth=depth + 1)
        return made
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        number = _value(node.operand, calls=False, depth=depth + 1)
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise ValueError("a sign before what is no number")
        return -number if isinstance(node.op, ast.USub) else number
    if calls and isinstance(node, ast.Call):
        return _call(node, depth)
    if calls and isinstance(node, ast.Name):
        return Variable(node.id)
    raise ValueError("not a literal")


def parse_definition(text: str) -> ast.FunctionDef:
    """The one function definition that a text holds, as a syntax tree. Raises ValueError if it is anything else."""
    match _tree(text, "exec").body:
        case [ast.FunctionDef() as definition]:
            return definition
    raise ValueError("not a function definition")
