"""Seal-Tools: generated questions about 4,076 generated tools. Later calls may use results of earlier ones.

Repository: fairyshine/Seal-Tools, `Seal-Tools_Dataset`; give a file or its folder, `sealtools=dev.jsonl`. License:
Apache-2.0.

Two formats are read.

* Plain, `{"id", "query", "calling": [{"api", "parameters", "responses"}]}`. A row does not contain the offered tools.
  The reader offers the called tools and others from the pool (`tool.jsonl`, or any JSON Lines file with "tool" in its
  name and such entries) that is among the files or beside them: five tools, as in the other format, of which at least
  two are not called. The choice and the order depend only on the row's id and the pool. Without a pool the row is
  dropped.
* Fine-tuning, `{"id", "conversations"}`: the same rows as one prompt with five tools chosen by similarity, with tools
  and calls in Python notation. These distractors are harder, and no pool is needed. Do not read both formats.

`responses` names the results of a call (`API_call_0`, ...), one for each result that the tool declares. A later call
may use such a name as an argument. Calls that depend on each other are not parallel, so they become steps. All calls up
to the first one that needs a result of the same step are one message. A tool message answers each of them and gives
the declared results their names, `{"diagnosis": "API_call_0"}`. The next message continues from there. So the
conversation shows every name before a call uses it, and no value is invented. If no call depends on another, all calls
are one message without results.

Traps and how the reader handles them:

* A name inside a longer text ("API_call_0 response"), a name that no earlier call gives, and a name in place of a
  number (results are text here): dropped.
* Numbers in quotes are coerced if that is exact.
* In a few fine-tuning rows a called tool is not among the five: dropped.
* The pool and `field.jsonl` contain no rows: they are skipped in a folder, and raise an error if they are given alone.
* Values are often random and dates contradict each other; the set is not corrected.
"""

import json
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from poe.calls.conversation import Conversation
from poe.calls.literals import parse_literal
from poe.calls.schema import Note
from poe.calls.tools import read_tool, unique_tools
from poe.data.drops import DropReport
from poe.data.readers.turns import Turns, parse_call_object, read_rows
from poe.data.sources import Row, expand, file_rows
from poe.errors import DataError, RowError

NAME = "sealtools"
HUB_ID = None
LICENSE = "Apache-2.0"

NUM_OFFERED = 5
MIN_NOT_CALLED = 2

Pool = dict[str, dict[str, Any]]

_FIELDS = ("id", "query", "calling", "conversations")
_PROMPT = ("\napi_list = ", '\ntask_instruction = "', '"\nOutput:')
_RESULT = re.compile(r"API_call_\d+")
_JSON_LINES = (".jsonl", ".jsonl.gz")


def read(rows: Iterable[Row], report: DropReport, pool: Pool | None = None) -> Iterator[Conversation]:
    """Yield the conversations of rows in either format; rows that lose content are dropped and counted."""
    return read_rows(NAME, LICENSE, _FIELDS, rows, report, lambda row, note: _convert(row, note, pool or {}))


def read_path(path: str, report: DropReport) -> Iterator[Conversation]:
    """Yield the conversations of files, with the pool that is among them or beside them."""
    row_files, pools = _find_files(path)
    pool: Pool = {}
    for file in pools:
        pool |= _read_pool(file)
    return read((row for file in row_files for row in file_rows(str(file), NAME, report)), report, pool)


def files(path: str) -> list[Path]:
    """Return all files that decide the rows of a path: its own and the pools beside them."""
    return sorted({*expand(path), *_find_files(path)[1]})


def _find_files(path: str) -> tuple[list[Path], list[Path]]:
    """Return the files of a path that have rows, and the pools that are among them or beside them."""
    kinds = {file: _kind(file) for file in expand(path)}
    row_files = [file for file, kind in kinds.items() if kind == "rows"]
    if not row_files:
        raise DataError(
            f"{path!r} has no rows of Seal-Tools, only its {' and '.join(sorted(set(kinds.values())))}. "
            f"Give the rows, {NAME}=dev.jsonl; the pool of tools beside them is found."
        )
    for folder in {file.parent for file in row_files}:
        kinds |= {file: _kind(file) for file in folder.iterdir() if file not in kinds and _may_be_pool(file)}
    return row_files, sorted(file for file, kind in kinds.items() if kind == "pool of tools")


def _may_be_pool(file: Path) -> bool:
    return file.is_file() and "tool" in file.name.lower() and file.name.lower().endswith(_JSON_LINES)


def _kind(file: Path) -> str:
    """Return the content of a file by its first line: rows, a pool of tools or a list of fields."""
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
        entries, query, calling = _read_prompt(row["conversations"])
    if not isinstance(query, str) or not isinstance(calling, list) or not calling:
        raise RowError("row of an unknown format")
    if not all(isinstance(call, dict) and isinstance(call.get("api"), str) for call in calling):
        raise RowError("call without a name or arguments")
    if entries is None:
        entries = choose_tools(str(row.get("id") or query), [call["api"] for call in calling], pool)
    turns = Turns(unique_tools([_tool(entry, note) for entry in entries], note), note)
    turns.add_user(query.strip())
    _add_steps(turns, calling, {entry["api_name"]: entry for entry in entries})
    return turns


def _tool(entry: dict[str, Any], note: Note) -> Any:
    function = {"name": entry.get("api_name"), "description": entry.get("api_description")}
    required = entry.get("required")
    required = required if isinstance(required, list) else []
    return read_tool({**function, "parameters": entry.get("parameters"), "required": required}, note, flat=True)


def _read_prompt(conversation: Any) -> tuple[list[dict[str, Any]], str, Any]:
    """Return the tools, the question and the calls of a fine-tuning row."""
    turns = conversation if isinstance(conversation, list) else []
    values = [turn.get("value") for turn in turns if isinstance(turn, dict)]
    prompt, answer = values if len(values) == 2 else (None, None)
    if not isinstance(prompt, str) or not isinstance(answer, str):
        raise RowError("row of an unknown format")
    before_tools, before_query, end = _PROMPT
    tools_text, mark, query = prompt.partition(before_tools)[2].partition(before_query)
    if not mark or not query.rstrip().endswith(end):
        raise RowError("row of an unknown format")
    try:
        entries, calling = parse_literal(tools_text), parse_literal(answer)
    except ValueError:
        raise RowError("tools or calls not in Python notation") from None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise RowError("tools are not a list of objects")
    return entries, query.rstrip().removesuffix(end), calling


def choose_tools(seed: str, called: list[str], pool: Pool) -> list[dict[str, Any]]:
    """Return the called tools and other tools of the pool. The seed decides the choice and the order."""
    if not pool:
        raise RowError("no pool of tools beside the rows")
    names = list(dict.fromkeys(called))
    if any(name not in pool for name in names):
        raise RowError("call to a tool that the pool does not have")
    rng = random.Random(f"{NAME}:{seed}")
    others = max(NUM_OFFERED - len(names), MIN_NOT_CALLED)
    names += rng.sample(sorted(pool.keys() - names), min(others, len(pool) - len(names)))
    rng.shuffle(names)
    return [pool[name] for name in names]


def _add_steps(turns: Turns, calling: list[dict[str, Any]], entries: dict[Any, dict[str, Any]]) -> None:
    """Add one message per step. A new step begins at a call that uses a result of the current step."""
    step: list[dict[str, Any]] = []
    known: set[str] = set()
    for call in calling:
        used = _used_results(call.get("parameters"))
        if used & {name for earlier in step for name in _result_names(earlier)}:
            turns.add_calls([parse_call_object(earlier, "api", "parameters") for earlier in step])
            for earlier in step:
                turns.add_response(_write_results(earlier, entries.get(earlier["api"], {})))
                known.update(_result_names(earlier))
            step = []
        if not used <= known:
            raise RowError("result that no earlier call gives")
        step.append(call)
    turns.add_calls([parse_call_object(call, "api", "parameters") for call in step])


def _result_names(call: dict[str, Any]) -> list[str]:
    results = call.get("responses")
    if not isinstance(results, list) or not all(isinstance(name, str) for name in results):
        raise RowError("results are not a list of names")
    return results


def _used_results(value: Any) -> set[str]:
    """Return the names of results among the values of an argument."""
    if isinstance(value, str):
        if _RESULT.fullmatch(value):
            return {value}
        if _RESULT.search(value):
            raise RowError("name of a result inside another text")
        return set()
    members = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return {name for member in members for name in _used_results(member)}


def _write_results(call: dict[str, Any], entry: dict[str, Any]) -> str:
    """Return the declared results of the tool, each with the name in the row, as JSON."""
    declared, names = entry.get("responses"), _result_names(call)
    if not isinstance(declared, dict) or len(declared) != len(names):
        raise RowError("results that the tool does not declare")
    return json.dumps(dict(zip(declared, names, strict=True)), ensure_ascii=False)
