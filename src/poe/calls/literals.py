"""Parse Python literals and calls as data, without executing them.

Some data sets write values as Python literals (`{'a': True}`) or calls (`[Weather(city='Oslo', days=2)]`). Python's
parser makes a syntax tree, which is converted node by node. No name is looked up and no code is executed.
"""

import ast
import math
import re
import warnings
from typing import Any, NamedTuple

MAX_CHARACTERS = 200_000
MAX_DEPTH = 60

_OPENING_BRACKET = re.compile(r"[\[({]")


class PythonCall(NamedTuple):
    """A call in Python notation. A value may be a `PythonCall` or a `Variable`."""

    name: str
    positional: list[Any]
    named: dict[str, Any]


class Variable(NamedTuple):
    """A bare name in place of a value."""

    name: str


def parse_literal(text: str) -> Any:
    """Return a Python literal as a JSON value: tuples and sets become lists, and keys become text.

    Raises `ValueError` for any other text: names, arithmetic, calls, non-finite numbers, complex numbers, bytes, and
    text that is longer than `MAX_CHARACTERS` or nests deeper than `MAX_DEPTH`.
    """
    return _convert(parse_python(text, "eval").body, calls=False, depth=0)


def parse_calls(text: str) -> list[PythonCall]:
    """Return the calls of a text in Python notation: one call, a list of calls, or statements (`x = f(1)`).

    Raises `ValueError` for any other text.
    """
    calls: list[PythonCall] = []
    for statement in parse_python(text, "exec").body:
        node = statement.value if isinstance(statement, ast.Expr | ast.Assign) else None
        parts = node.elts if isinstance(node, ast.List | ast.Tuple) else [node]
        for part in parts:
            if not isinstance(part, ast.Call):
                raise ValueError("not a call")
            calls.append(_convert_call(part, 0))
    if not calls:
        raise ValueError("no call")
    return calls


def parse_python(text: str, mode: str = "exec") -> Any:
    """Return the syntax tree of a text, which is not executed. Raises `ValueError` if Python's parser refuses it."""
    if len(text) > MAX_CHARACTERS or len(_OPENING_BRACKET.findall(text)) > MAX_CHARACTERS // 4:
        raise ValueError("too long to be parsed")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an invalid escape such as "\d" is accepted as text
            return ast.parse(text.strip(), mode=mode)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"not Python notation: {type(error).__name__}") from None


def _convert_call(node: ast.Call, depth: int) -> PythonCall:
    if any(keyword.arg is None for keyword in node.keywords):
        raise ValueError("unpacked arguments")
    named: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg in named:
            raise ValueError("one argument twice")
        named[str(keyword.arg)] = _convert(keyword.value, calls=True, depth=depth + 1)
    return PythonCall(_dotted_name(node.func), [_convert(arg, calls=True, depth=depth + 1) for arg in node.args], named)


def _dotted_name(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_dotted_name(node.value)}.{node.attr}"
    raise ValueError("a call of an expression without a name")


def _convert(node: ast.expr, *, calls: bool, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise ValueError("nested too deeply")
    if isinstance(node, ast.Constant):
        if node.value is None or isinstance(node.value, str | bool | int):
            return node.value
        if isinstance(node.value, float) and math.isfinite(node.value):
            return node.value
        raise ValueError("a value that JSON cannot write")
    if isinstance(node, ast.List | ast.Tuple | ast.Set):
        return [_convert(member, calls=calls, depth=depth + 1) for member in node.elts]
    if isinstance(node, ast.Dict):
        members: dict[str, Any] = {}
        for key, member in zip(node.keys, node.values, strict=True):
            name = None if key is None else _convert(key, calls=False, depth=depth + 1)
            if name is None or isinstance(name, list | dict | bool) or str(name) in members:
                raise ValueError("a key that JSON cannot write")
            members[str(name)] = _convert(member, calls=calls, depth=depth + 1)
        return members
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        number = _convert(node.operand, calls=False, depth=depth + 1)
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise ValueError("a sign before a value that is not a number")
        return -number if isinstance(node.op, ast.USub) else number
    if calls and isinstance(node, ast.Call):
        return _convert_call(node, depth)
    if calls and isinstance(node, ast.Name):
        return Variable(node.id)
    raise ValueError("not a literal")


def parse_definition(text: str) -> ast.FunctionDef:
    """Return the syntax tree of a text that is one function definition. Raises `ValueError` for any other text."""
    match parse_python(text, "exec").body:
        case [ast.FunctionDef() as definition]:
            return definition
    raise ValueError("not a function definition")
