"""Read the tools of a JSON or YAML file."""

import datetime
from pathlib import Path
from typing import Any

from poe.calls.conversation import Tool
from poe.calls.schema import Note, no_note
from poe.calls.tools import read_tools
from poe.errors import DataError, RowError

MAX_YAML_VALUES = 1_000_000
"""The maximum number of values of a YAML file, each alias counted with all that it stands for."""


def read_tools_file(path: Path, note: Note = no_note) -> list[Tool]:
    """Return the tools of a file in any spelling of `poe.calls.tools`. Raises `DataError`."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        tools = read_tools(_parse_yaml(text) if path.suffix.lower() in (".yaml", ".yml") else text, note)
    except OSError as error:
        raise DataError(f"The tools file {path} cannot be read: {error.strerror or error}.") from None
    except (RowError, UnicodeDecodeError) as error:
        raise DataError(f"The tools file {path} cannot be used: {error}.") from None
    if not tools:
        raise DataError(f"The tools file {path} holds no tools; expected a list of them, or an OpenAPI document.")
    return tools


def _parse_yaml(text: str) -> Any:
    """Return the JSON value of a YAML text: keys become text, and dates the text of ISO 8601."""
    import yaml

    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise RowError(f"not YAML{place}: {getattr(error, 'problem', None) or type(error).__name__}") from None
    return _as_json(value, [MAX_YAML_VALUES], 0)


def _as_json(value: Any, left: list[int], depth: int) -> Any:
    left[0] -= 1
    if left[0] < 0:
        raise RowError(f"more than {MAX_YAML_VALUES:,} values")
    if depth > 200:
        raise RowError("nested too deeply")
    if isinstance(value, dict):
        return {_as_key(key): _as_json(member, left, depth + 1) for key, member in value.items()}
    if isinstance(value, list):
        return [_as_json(member, left, depth + 1) for member in value]
    return value.isoformat() if isinstance(value, datetime.date | datetime.time) else value


def _as_key(key: Any) -> str:
    return str(key).lower() if isinstance(key, bool) else str(key)
