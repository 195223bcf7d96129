"""Raw rows from files: every format, and the handling of broken files."""

import gzip
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poe.data import sources
from poe.data.drops import DropReport
from poe.data.readers import read_source
from poe.data.sources import expand, file_rows, hub_rows
from poe.data.spec import parse_spec
from poe.errors import DataError, MissingExtraError, SourceError

ROWS = [{"a": 1}, {"a": "é\u2028ü"}, {"a": [1, {"b": '],\\"['}]}]
DEEP = "[" * 10_000 + "]" * 10_000


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read(path: Path | str) -> tuple[list[Any], dict[str, int]]:
    report = DropReport()
    rows = [row for _, row in file_rows(str(path), "s", report)]
    dropped = report.as_dict().get("s", {"dropped": {}})["dropped"]
    assert report.read["s"] == sum(dropped.values())  # the reader counts the rows it gets
    return rows, dropped


@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x.json", json.dumps(ROWS, indent=2)),
        ("x.json", " \n" + json.dumps(ROWS)),
        ("x.json", json.dumps({"data": ROWS, "version": 1})),
        ("x.json", json.dumps({"rows": ROWS}, indent=1)),
        ("x.json", lines(ROWS)),
        ("x.jsonl", lines(ROWS)),
        ("x.ndjson", lines(ROWS).rstrip("\n")),
        ("x.jsonl", lines(ROWS).replace("\n", "\r\n\r\n")),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_formats(tmp_path: Path, name: str, text: str, bom: str, zipped: bool) -> None:
    data = (bom + text).encode()
    path = tmp_path / (name + ".gz" * zipped)
    path.write_bytes(gzip.compress(data) if zipped else data)
    assert read(path) == (ROWS, {})


@pytest.mark.parametrize("zipped", [False, True])
def test_parquet(tmp_path: Path, zipped: bool) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    plain = tmp_path / "x.parquet"
    parquet.write_table(pa.table({"query": ["a", "b"], "answers": ["[]", None]}), plain)
    path = plain
    if zipped:
        path = tmp_path / "y.parquet.gz"
        path.write_bytes(gzip.compress(plain.read_bytes()))
    assert read(path)[0] == [{"query": "a", "answers": "[]"}, {"query": "b", "answers": None}]
    plain.write_bytes(b"PAR1 and then nothing of the kind")
    with pytest.raises(DataError, match=r"not a parquet file"):
        read(plain)


def test_ids_give_the_position_of_a_row(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n\n{"a": 2}\n')
    (tmp_path / "y.json").write_text('[{"a": 1}, {"a": 2}]')
    assert [i for i, _ in file_rows(str(tmp_path), "s", DropReport())] == [
        "x.jsonl:1",
        "x.jsonl:3",
        "y.json[0]",
        "y.json[1]",
    ]


def test_folders_and_globs_are_sorted(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.json", "sub/c.jsonl.gz", "notes.txt", ".hidden/d.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        data = b'{"a": 1}\n' if "json" in name else b"no data"
        path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert [p.name for p in expand(str(tmp_path))] == ["a.json", "b.jsonl", "c.jsonl.gz"]
    assert [p.name for p in expand(str(tmp_path / "*.json*"))] == ["a.json", "b.jsonl"]
    assert [p.name for p in expand(str(tmp_path / "**" / "*.gz"))] == ["c.jsonl.gz"]
    odd = tmp_path / "what[1]*.jsonl"
    odd.write_text('{"a": 1}\n')
    assert expand(str(odd)) == [odd]


@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
def test_only_the_broken_row_is_dropped(tmp_path: Path, name: str) -> None:
    bad = ['{"a": NaN}', '{"a": Infinity}', '{"a": ', "{'a': 1}", '{"a": ' + DEEP + "}", '{"a": ' + "9" * 5000 + "}"]
    if name == "x.json":
        bad.remove('{"a": ')
        text = "[" + ",".join(['{"a": 1}', *bad, '{"a": 2}']) + "]"
    else:
        text = "\n".join(['{"a": 1}', *bad, '{"a": 2}'])
    (tmp_path / name).write_text(text)
    rows, dropped = read(tmp_path / name)
    assert rows == [{"a": 1}, {"a": 2}]
    assert dropped == {"not JSON": len(bad)}


def test_only_the_line_that_is_not_utf8_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"a": 1}\n{"a": "\xff\xfe"}\n{"a": 2}')
    assert read(tmp_path / "x.jsonl") == ([{"a": 1}, {"a": 2}], {"not UTF-8": 1})


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.json.gz"])
def test_a_truncated_gzip_gives_the_rows_before_the_break(tmp_path: Path, name: str) -> None:
    rows = [{"n": n, "text": f"row {n * n % 977} with some text ü {n * 7919 % 1009}"} for n in range(20_000)]
    data = lines(rows) if name == "x.jsonl.gz" else json.dumps(rows, ensure_ascii=False)
    packed = gzip.compress(data.encode())
    (tmp_path / name).write_bytes(packed[: len(packed) // 2])
    got, dropped = read(tmp_path / name)
    assert 5_000 < len(got) < 15_000
    assert got == rows[: len(got)]
    assert dropped == {"truncated file": 1}


def test_a_truncated_list_gives_the_rows_before_the_break(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('[{"a": 1}, {"a": [2, "]"]}, {"a": "bro')
    assert read(tmp_path / "x.json") == ([{"a": 1}, {"a": [2, "]"]}], {"truncated file": 1})
    (tmp_path / "x.json").write_text('[{"a": 1}] {"b": 2}')
    assert read(tmp_path / "x.json") == ([{"a": 1}], {"text after the end of the list": 1})


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.json", b'"text"', "starts with"),
        ("x.json", b"17", "starts with"),
        ("x.json", b"", "is empty"),
        ("x.json", b'{"version": 1}', r"keys \['version'\]"),
        ("x.json", b'{"data": 1, "rows": 2}', "one JSON object"),
        ("x.json", b'{"a": ', "is not JSON"),
        ("x.json", b'{"a": ' + DEEP.encode() + b"}", "nested too deeply"),
        ("x.json", b'["\xff"]', "not UTF-8"),
        ("x.json", '[{"a": 1}]'.encode("utf-16"), "UTF-16"),
        ("x.jsonl", '{"a": 1}\n'.encode("utf-16"), "UTF-16"),
        ("x.jsonl.gz", b"not gzip at all", "not a gzip file"),
        ("x.txt", b"text", "unknown format"),
        ("x", b"text", "unknown format"),
    ],
)
def test_unusable_files_are_rejected(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


def test_paths_without_files_raise_errors(tmp_path: Path) -> None:
    for path, message in (
        ("none.json", "No file or folder"),
        ("*.none", "No file matches"),
        (".", "has no data file"),
    ):
        with pytest.raises(DataError, match=message):
            read(tmp_path / path)


def load(spec: str, report: DropReport | None = None) -> list:
    return list(read_source(parse_spec(spec)[0], report or DropReport()))


def test_sources_without_usable_rows_raise_errors(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("no JSON\n{}\n")
    with pytest.raises(DataError, match=r"every row was dropped: not JSON \(1\), row without a list of messages \(1\)"):
        load(f"messages={path}")
    path.write_text("")
    with pytest.raises(DataError, match="has no rows"):
        load(f"messages={path}")
    with pytest.raises(DataError, match="no public data set"):
        load("messages")


json_rows = st.recursive(
    st.none() | st.integers() | st.text(st.sampled_from('ab"\\\\ ,[]{}\n🙂'), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(st.lists(json_rows, max_size=6), st.integers(1, 9), st.booleans())
def test_a_list_is_read_the_same_in_blocks_of_any_size(rows: list, size: int, ascii_only: bool) -> None:
    text = json.dumps(rows, ensure_ascii=ascii_only, indent=size % 3 or None)[1:]
    elements = [("".join(e.parts).strip(), mark) for e, mark in sources._elements([text])]
    parts = [text[i : i + size] for i in range(0, len(text), size)]
    assert [("".join(e.parts).strip(), mark) for e, mark in sources._elements(parts)] == elements
    assert [json.loads(element) for element, mark in elements if element and mark != "after"] == rows


@pytest.mark.parametrize(("name", "begin", "end"), [("x.jsonl", "", "\n"), ("x.json", "[", ",")])
def test_a_row_that_is_too_long_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, begin: str, end: str
) -> None:
    monkeypatch.setattr(sources, "MAX_ROW", 1000)
    long = json.dumps({"text": "y" * 5000})
    rest = end.join(['{"a": 1}', long, '{"a": 2}'])
    (tmp_path / name).write_text(begin + rest + ("]" if begin else ""))
    assert read(tmp_path / name) == ([{"a": 1}, {"a": 2}], {sources.TOO_LONG: 1})


@pytest.mark.parametrize("begin", ["", "["])
def test_a_hundred_megabytes_in_one_row_take_little_memory(tmp_path: Path, begin: str) -> None:
    path = tmp_path / ("x.json.gz" if begin else "x.jsonl.gz")
    with gzip.open(path, "wt", compresslevel=1) as file:
        file.write(begin + '{"messages": "')
        for _ in range(100):
            file.write("z" * 2**20)
        file.write('"}')
    code = (
        "import resource, sys\n"
        "from poe.data.drops import DropReport\n"
        "from poe.data.sources import file_rows\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "report = DropReport()\n"
        "rows = list(file_rows(sys.argv[1], 's', report))\n"
        "print(len(rows), dict(report.dropped['s']), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    count, reasons, kilobytes = re.fullmatch(r"(\d+) (\{.*\}) (\d+)\n", done.stdout).groups()
    assert count == "0"
    assert ("16 MiB" in reasons) or ("truncated" in reasons)
    assert int(kilobytes) < 150_000


def test_dropped_rows_are_written_to_a_file(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"messages": "\\ud800"}\nbroken {\n[1]\n')
    with DropReport(tmp_path / "out" / "dropped.jsonl") as report, pytest.raises(DataError):
        load(f"messages={path}", report)
    kept = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text("utf-8").splitlines()]
    assert [(k["id"], k["reason"], k["row"]) for k in kept] == [
        ("x.jsonl:1", "text with a lone surrogate", {"messages": "\ud800"}),
        ("x.jsonl:2", "not JSON", "broken {"),
        ("x.jsonl:3", "row is not an object", [1]),
    ]
    assert report.as_dict()["messages"]["read"] == 3


def test_deep_nesting_does_not_stop_the_drop_report(tmp_path: Path) -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with DropReport(tmp_path / "dropped.jsonl") as report:
        report.drop("s", "nested too deeply", deep)
    assert "nested too deeply" in (tmp_path / "dropped.jsonl").read_text()


class FakeHub:
    """Replace `datasets` and `huggingface_hub` by fakes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, info: Callable[..., Any], load: Callable[..., Any]) -> None:
        datasets, hub = pytest.importorskip("datasets"), pytest.importorskip("huggingface_hub")
        monkeypatch.setattr(hub.HfApi, "dataset_info", info)
        monkeypatch.setattr(datasets, "load_dataset", load)
        self.datasets = datasets


def test_rows_are_read_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeHub(monkeypatch, lambda *a, **k: None, lambda *asked, split: [{"asked": asked, "split": split}])
    assert list(hub_rows("me/rows", "glaive")) == [("me/rows[0]", {"asked": ("me/rows", None), "split": "train"})]
    assert next(hub_rows("me/rows", "gsm8k", config="main"))[1]["asked"] == ("me/rows", "main")


def test_an_unreachable_hub_raises_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    offline_values = []

    def info(*a: Any, **k: Any) -> None:
        raise ConnectionError("no route")

    def load(*a: Any, **k: Any) -> Any:
        offline_values.append(hub.datasets.config.HF_HUB_OFFLINE)
        raise ConnectionError("no cache")

    hub = FakeHub(monkeypatch, info, load)
    before = hub.datasets.config.HF_HUB_OFFLINE
    with pytest.raises(SourceError, match=r"'me/rows'.*cannot be reached and no copy is cached.*glaive=path"):
        list(hub_rows("me/rows", "glaive"))
    assert offline_values == [True]  # only from the cache, without a retry
    assert before == hub.datasets.config.HF_HUB_OFFLINE


def test_a_missing_extra_raises_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"pip install \"poe-cascade\[train\]\".*xlam=path"):
        list(hub_rows("me/rows", "xlam"))
