"""`poe data` prints the rows that training sees, and other trainers can read its exports."""

import html
import json
import re
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from command_line import run_program
from poe.calls.conversation import Conversation
from poe.calls.tools import as_tool
from poe.data.drops import DropReport
from poe.data.export import export
from poe.data.readers import read_source
from poe.data.spec import DataSource
from poe.demo.conversations import make_conversation
from poe.errors import DataError, OutputError


def poe(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    return run_program("poe", *arguments, cwd=cwd)


def read_back(path: Path) -> list[Conversation]:
    return list(read_source(DataSource("messages", str(path)), DropReport()))


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_written_rows_are_read_back(tmp_path: Path, ending: str) -> None:
    rows = [make_conversation(i) for i in range(60)]
    path = tmp_path / f"rows{ending}"
    assert export(rows, path) == 60
    assert [(c.messages, c.tools) for c in read_back(path)] == [(c.messages, c.tools) for c in rows]
    assert not list(tmp_path.glob(".*"))


texts = st.text(st.characters(codec="utf-8"), max_size=20)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(st.dictionaries(texts, json_values, max_size=4))
def test_any_arguments_survive_an_export(tmp_path: Path, arguments: dict) -> None:
    tool = as_tool("act", "", {"type": "object", "properties": {}, "additionalProperties": True})
    call = {"id": "call_1", "type": "function", "function": {"name": "act", "arguments": arguments}}
    messages = [{"role": "user", "content": "do"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    path = tmp_path / "one.jsonl"
    path.unlink(missing_ok=True)
    export([Conversation(messages, [tool])], path)
    assert read_back(path)[0].messages == messages


def test_an_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        export([], path)
    with pytest.raises(DataError, match=r"ends in \.jsonl or \.parquet"):
        export([], tmp_path / "rows.csv")
    assert path.read_text() == "mine"


def test_a_failed_export_leaves_no_file(tmp_path: Path) -> None:
    def rows():
        yield make_conversation(0)
        raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match="No space left on device"):
        export(rows(), tmp_path / "rows.jsonl")
    assert not list(tmp_path.iterdir())


def test_the_commands_show_rows_print_statistics_and_export(tmp_path: Path) -> None:
    shown = poe("data", "show", "demo=40", "-n", "2", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("<|assistant_start|>") >= 2
    assert "trained" in shown.stdout
    read = poe("data", "show", "demo=40", "-n", "1", "--after", "read", cwd=tmp_path)
    assert '"role": "user"' in read.stdout, read.stderr
    counted = poe("data", "stats", "demo=40", "--json", "--out", "page.html", cwd=tmp_path)
    assert counted.returncode == 0, counted.stderr
    ((source,), rows) = json.loads(counted.stdout).values()
    assert rows["demo"]["read"] == 40
    assert sum(source["rows"].values()) == 40 - rows["demo"]["dropped"].get("duplicate row", 0)
    assert 0 < source["trained_tokens"] < source["total_tokens"]
    page = (tmp_path / "page.html").read_text()
    assert "data:image/png;base64," in page
    assert "Rows that are not used" not in page or rows["demo"]["dropped"]
    marked = re.findall("<mark>(.*?)</mark>", page, re.DOTALL)[1:]  # the first is of the legend
    assert len(re.findall("<pre>", page)) == 2
    assert marked
    assert all(html.unescape(text).endswith("<|assistant_end|>") for text in marked)
    written = poe("data", "export", "demo=40", "rows.jsonl", cwd=tmp_path)
    assert written.returncode == 0, written.stderr
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == source["rows"]["train"]
    wrong = poe("data", "show", "demmo", cwd=tmp_path)
    assert wrong.returncode == 1
    assert "Did you mean 'demo'" in wrong.stderr
