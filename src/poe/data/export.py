"""Export rows in the format of other trainers: `messages` and `tools`, as JSON Lines or parquet.

`arguments` and `tools` are JSON text, as OpenAI writes them. A column of nested objects would give every row the keys
of all other rows, with null as their value.
"""

import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from poe.calls.conversation import Conversation
from poe.errors import DataError, MissingExtraError, OutputError
from poe.files.output import atomic_file

_PARQUET_ROWS = 2048


def as_row(conversation: Conversation) -> dict[str, Any]:
    """Return a row with `messages`, `tools` (JSON text of a list), `source`, `license` and `id`."""
    messages = []
    for message in conversation.messages:
        exported = {"role": message["role"], "content": message.get("content")}
        if calls := message.get("tool_calls"):
            exported["tool_calls"] = [_call(call) for call in calls]
        for key in ("tool_call_id", "name", "weight"):
            if message.get(key) is not None:
                exported[key] = message[key]
        messages.append(exported)
    return {
        "messages": messages,
        "tools": json.dumps(conversation.tools, ensure_ascii=False),
        "source": conversation.source,
        "license": conversation.license,
        "id": conversation.id,
    }


def export(conversations: Iterable[Conversation], path: Path) -> int:
    """Write rows to a new `.jsonl` or `.parquet` file and return their number.

    Raises `DataError` for another suffix, `OutputError` if the file exists or cannot be written (no partial file is
    left), and `MissingExtraError` for parquet without pyarrow.
    """
    if path.suffix not in (".jsonl", ".parquet"):
        raise DataError(f"{path}: expected a file that ends in .jsonl or .parquet.")
    if path.exists():
        raise OutputError(f"{path} exists already: name another file, or remove it.")
    with atomic_file(path) as part:
        rows = (as_row(c) for c in conversations)
        return _write_parquet(rows, part) if path.suffix == ".parquet" else _write_lines(rows, part)


def _write_lines(rows: Iterable[dict[str, Any]], path: Path) -> int:
    written = 0
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            written += 1
    return written


def _write_parquet(rows: Iterable[dict[str, Any]], path: Path) -> int:
    try:
        import pyarrow as pa
        import pyarrow.parquet as parquet
    except ImportError:
        raise MissingExtraError('Writing parquet needs pyarrow: pip install "poe-cascade[train]"') from None
    function = pa.struct({"name": pa.string(), "arguments": pa.string()})
    call = pa.struct({"id": pa.string(), "type": pa.string(), "function": function})
    texts = dict.fromkeys(("role", "content", "tool_call_id", "name"), pa.string())
    message = pa.struct({**texts, "tool_calls": pa.list_(call), "weight": pa.int64()})
    others = dict.fromkeys(("tools", "source", "license", "id"), pa.string())
    schema = pa.schema({"messages": pa.list_(message), **others})
    written = 0
    with parquet.ParquetWriter(path, schema) as writer:
        remaining = iter(rows)
        while batch := list(islice(remaining, _PARQUET_ROWS)):
            writer.write_table(pa.Table.from_pylist(batch, schema))
            written += len(batch)
    return written


def _call(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return {"id": call.get("id"), "type": "function", "function": {"name": function["name"], "arguments": arguments}}
