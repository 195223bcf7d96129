"""Seal-Tools: generated questions about 4,076 generated tools; later calls may use what earlier ones return.

Repository: fairyshine/Seal-Tools, `Seal-Tools_Dataset`; give a file or its folder, `sealtools=dev.jsonl`. License:
Apache-2.0.

Two formats are read.

* Plain, `{"id", "query", "calling": [{"api", "parameters", "responses"}]}`. The tools on offer are not part of the row:
  they are the called ones and others, drawn from the pool (`tool.jsonl`, or any JSON Lines file with "tool" in its name
  and such entries in it) that is among the files or beside them. How many: five, as in the other format, and two that
  are not called at least. Which, and in what order, depends on the row's id and the pool alone. Without a pool the row
  is dropped.
* Fine-tuning, `{"id", "conversations"}`: the same rows as one prompt with five tools chosen by similarity, tools and
  calls in Python notation. The harder choice of the two, and it needs no pool; do not read both.

`responses` names the results of a call (`API_call_0`, ...), one for each result that the tool declares. A later call
may have such a name as an argument. Calls that depend on each other are no parallel calls, so they become steps: calls
up to the first that needs a result of the same step are one message; each is answered by a tool message that gives its
declared results their names, `{"diagnosis": "API_call_0"}`; the next message goes on from there. The name that a later
call uses is thus one that the conversation has shown, and no value is made up. Where no call depends on another, all
calls are one message and no results follow.

Traps, and what is done about each:

* A name as part of a longer text ("API_call_0 response"), a name that no earlier call gives, and a name where a number
  is declared (results are text here): dropped.
* Numbers in quotes are coerced if exact.
* In a few fine-tuning rows a called tool is not among the five: dropped.
* The pool and `field.jsonl` are not rows: passed over in a folder, and an error if nothing else is given.
* Values are often random and dates contradict each other; that is how the set is.
"""

import json
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from poe.calls.conversation import Conversation
from poe.calls.literals import parse_literal
from poe.calls.schema import Note, unique_tools
from poe.data.drops import DropReport
from poe.data.readers.flat import read_tool
from poe.data.readers.turns import Turns, named_call, read_rows
from poe.data.sources import Row, expand, file_rows
from poe.errors import DataError, RowError

NAME = "sealtools"
HUB_ID = None
LICENSE = "Apache-2.0"

OFFERED = 5
NOT_CALLED = 2

Pool = dict[str, dict[str, Any]]

_FIELDS = ("id", "query", "calling", "conversations")
_PROMPT = ("\napi_list = ", '\ntask_instruction = "', '"\nOutput:')
_RESULT = re.compile(r"API_call_\d+")
_JSON_LINES = (".jsonl", ".jsonl.gz")


def read(rows: Iterable[Row], report: DropReport, pool: Pool | None = None) -> Iterator[Conversation]:
    """Conversations of rows in either format; what cannot be read faithfully is dropped and counted."""
    return read_rows(NAME, LICENSE, _FIELDS, rows, report, lambda row, note: _convert(row, note, pool or {}))


def read_path(path: str, report: DropReport) -> Iterator[Conversation]:
    """The rows of files, with the pool that is among them or beside them."""
    given, pools = _files(path)
    pool: Pool = {}
    for file in pools:
        pool |= _read_pool(file)
    return read((row for file in given for row in file_rows(str(file), NAME, report)), report, pool)


def files(path: str) -> list[Path]:
    """Every file that decides which rows a path gives: its own and the pools beside them."""
    return sorted({*expand(path), *_files(path)[1]})


def _files(path: str) -> tuple[list[Path], list[Path]]:
    """The files with rows that a path names, and the pools that are among them or beside them."""
    kinds = {file: _kind(file) for file in expand(path)}
    given = [file for file, kind in kinds.items() if kind == "rows"]
    if not given:
        raise DataError(
            f"{path!r} holds no rows of Seal-Tools but its {' and '.join(sorted(set(kinds.values())))}. "
            f"Give the rows, {NAME}=dev.jsonl; the pool of tools is found beside them."
        )
    for folder in {file.parent for file in given}:
        kinds |= {file: _kind(file) for file in folder.iterdir() if file not in kinds and _may_be_pool(file)}
    return given, sorted(file for file, kind in kinds.items() if kind == "pool of tools")


def _may_be_pool(file: Path) -> bool:
    return file.is_file() and "tool" in file.name.lower() and file.name.lower().endswith(_JSON_LINES)


def _kind(file: Path) -> str:
    """What a file holds, by its first line: rows, or one of the two lists that belong to them."""
    if not file.name.lower().endswith(_JSON_LINES):
        return "rows"
    _, first = next(file_rows(str(file), NAME, DropReport()), ("", None))
    if isinstance(first, dict) and "api_name" in first:
        return "pool of tools"
    if isinstance(first, dict) and len(first) == 1 and isinstance(next(iter(first.values())), list):
        return "list of fields"
    return "rows"


def _read_pool(file: Path) -> Pool:
    pool = {}
    for row_id, entry in file_rows(str(file), NAME, DropReport()):
        if not isinstance(entry, dict) or not isinstance(entry.get("api_name"), str):
            raise DataError(f"The pool of tools is damaged: {row_id} has no 'api_name'.")
        pool[entry["api_name"]] = entry
    return pool


def _convert(row: dict[str, Any], note: Note, pool: Pool) -> Turns:
    entries: list[dict[str, Any]] | None = None
    query, calling = row.get("query"), row.get("calling")
    if "conversations" in row:
        entries, query, calling = _prompted(row["conversations"])
    if not isinstance(query, str) or not isinstance(calling, list) or not calling:
        raise RowError("row is of no known format")
    if not all(isinstance(call, dict) and isinstance(call.get("api"), str) for call in calling):
        raise RowError("call without a name or arguments")
    if entries is None:
        entries = candidates(str(row.get("id") or query), [call["api"] for call in calling], pool)
    turns = Turns(unique_tools([_tool(entry, note) for entry in entries], note), note)
    turns.user(query.strip())
    _steps(turns, calling, {entry["api_name"]: entry for entry in entries})
    return turns


def _tool(entry: dict[str, Any], note: Note) -> Any:
    function = {"name": entry.get("api_name"), "description": entry.get("api_description")}
    required = entry.get("required")
    required = required if isinstance(required, list) else []
    return read_tool({**function, "parameters": entry.get("parameters"), "required": required}, note)


def _prompted(conversation: Any) -> tuple[list[dict[str, Any]], str, Any]:
    """The tools, the question and the calls of a fine-tuning row."""
    turns = conversation if isinstance(conversation, list) else []
    values = [turn.get("value") for turn in turns if isinstance(turn, dict)]
    asked, answer = values if len(values) == 2 else (None, None)
    if not isinstance(asked, str) or not isinstance(answer, str):
        raise RowError("row is of no known format")
    before_tools, before_query, end = _PROMPT
    listed, mark, query = asked.partition(before_tools)[2].partition(before_query)
    if not mark or not query.rstrip().endswith(end):
        raise RowError("row is of no known format")
    try:
        entries, calling = parse_literal(listed), parse_literal(answer)
    except ValueError:
        raise RowError("tools or calls not in Python notation") from None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise RowError("tools are not a list of objects")
    return entries, query.rstrip().removesuffix(end), calling


def candidates(seed: str, called: list[str], pool: Pool) -> list[dict[str, Any]]:
    """The called tools and others of the pool, in an order and a choice that the seed decides."""
    if not pool:
        raise RowError("tools on offer not at hand (no pool of tools beside the rows)")
    names = list(dict.fromkeys(called))
    if any(name not in pool for name in names):
        raise RowError("call to a tool that the pool does not have")
    draw = random.Random(f"{NAME}:{seed}")
    others = max(OFFERED - len(names), NOT_CALLED)
    names += draw.sample(sorted(pool.keys() - names), min(others, len(pool) - len(names)))
    draw.shuffle(names)
    return [pool[name] for name in names]


def _steps(turns: Turns, calling: list[dict[str, Any]], entries: dict[Any, dict[str, Any]]) -> None:
    """One message per step; a new step begins at a call that uses a result of the current one."""
    step: list[dict[str, Any]] = []
    known: set[str] = set()
    for call in calling:
        used = _used(call.get("parameters"))
        if used & {name for earlier in step for name in _results(earlier)}:
            turns.calls([named_call(earlier, "api", "parameters") for earlier in step])
            for earlier in step:
                turns.response(_answer(earlier, entries.get(earlier["api"], {})))
                known.update(_results(earlier))
            step = []
        if not used <= known:
            raise RowError("result that no earlier call gives")
        step.append(call)
    turns.calls([named_call(call, "api", "parameters") for call in step])


def _results(call: dict[str, Any]) -> list[str]:
    results = call.get("responses")
    if not isinstance(results, list) or not all(isinstance(name, str) for name in results):
        raise RowError("results are not a list of names")
    return results


def _used(value: Any) -> set[str]:
    """The names of results among the values of an argument."""
    if isinstance(value, str):
        if _RESULT.fullmatch(value):
            return {value}
        if _RESULT.search(value):
            raise RowError("name of a result inside another text")
        return set()
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return {name for member in inside for name in _used(member)}


def _answer(call: dict[str, Any], entry: dict[str, Any]) -> str:
    """The results that the tool declares, each with the name that the row gives it."""
    declared, names = entry.get("responses"), _results(call)
    if not isinstance(declared, dict) or len(declared) != len(names):
        raise RowError("results that the tool does not declare")
    return json.dumps(dict(zip(declared, names, strict=True)), ensure_ascii=False)
