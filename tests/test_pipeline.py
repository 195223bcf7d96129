"""From SPEC to packed rows: nothing lost, nothing on both sides, everything accounted for."""

import gzip
import json
from pathlib import Path

import pytest

from poe.data.demo.text import make_text
from poe.data.demo.tokenizer import train_tokenizer
from poe.data.drops import DropReport
from poe.data.pipeline import TrainingData, prepare
from poe.data.render import Renderer
from poe.data.text import documents
from poe.errors import DataError


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(train_tokenizer([make_text(i).text for i in range(300)], 600))


def write(path: Path, first: int, count: int) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"I say {i}"}]}
        for i in range(first, first + count)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def load(spec: str, renderer: Renderer, report: DropReport | None = None, **options) -> TrainingData:
    return prepare(spec, renderer, seq_len=128, held_out=0.2, report=report, **options)


def test_two_files_of_one_reader_both_count(tmp_path: Path, renderer: Renderer) -> None:
    a, b = write(tmp_path / "a.jsonl", 0, 60), write(tmp_path / "b.jsonl", 100, 60)
    data = load(f"messages={a},messages={b}*3", renderer)
    held = data.held_out["held-out messages"]
    numbers = [int(c.query.split()[1]) for c in held]
    assert min(numbers) < 60 <= 100 <= max(numbers)
    trained = [s["conversations"] for s in data.summary["sources"].values()]
    assert sum(trained) + len(held) == 120
    assert data.train.stats.documents == trained[0] + 3 * trained[1]


def test_epochs_are_the_specs_else_the_recipes_and_weights_multiply(tmp_path: Path, renderer: Renderer) -> None:
    path = write(tmp_path / "a.jsonl", 0, 100)
    once = load(f"messages={path}", renderer).train.stats.documents
    assert load(f"messages={path}", renderer, epochs={"messages": 4}).train.stats.documents == 4 * once
    assert load(f"messages={path}*2", renderer, epochs={"messages": 4}).train.stats.documents == 2 * once
    half = load(f"messages={path}*3:0.5", renderer).train.stats.documents
    assert half == once + round(once / 2)


def test_repetitions_across_sources_are_dropped_and_counted(tmp_path: Path, renderer: Renderer) -> None:
    a, b = write(tmp_path / "a.jsonl", 0, 60), write(tmp_path / "b.jsonl", 30, 60)
    report = DropReport()
    data = load(f"messages={a},messages={b}", renderer, report)
    assert report.read["messages"] == 120
    assert report.kept["messages"] == 90
    assert sum(report.dropped["messages"].values()) == 30
    assert data.summary["rows"]["messages"]["dropped"] == {"duplicate row": 30}


def test_what_is_too_long_is_dropped_counted_and_kept(tmp_path: Path, renderer: Renderer) -> None:
    path = write(tmp_path / "a.jsonl", 0, 60)
    long = {"messages": [{"role": "user", "content": "x " * 200}, {"role": "assistant", "content": "no"}]}
    path.write_text(path.read_text() + "\n" + json.dumps(long))
    with DropReport(tmp_path / "dropped.jsonl") as report:
        load(f"messages={path}", renderer, report)
    (row,) = map(json.loads, (tmp_path / "dropped.jsonl").read_text().splitlines())
    assert row["reason"] == "longer than 128 tokens"
    assert row["row"]["messages"] == long["messages"]


def test_text_sources_are_interleaved_by_weight(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(["a" * 100] * 50))
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write("\n".join(json.dumps({"text": "b" * 100}) for _ in range(50)))
    texts = list(documents(f"text={tmp_path}/a.txt,text={tmp_path}/b.jsonl.gz:0.5"))
    assert len(texts) == 100
    first = "".join(t.text[0] for t in texts[:30])
    assert 19 <= first.count("a") <= 21


def test_long_texts_come_in_parts_that_lose_nothing(tmp_path: Path) -> None:
    text = "\n".join(f"line {i} of a long book" for i in range(5000))
    (tmp_path / "book.txt").write_text(text)
    parts = list(documents(f"text={tmp_path}/book.txt"))
    assert len(parts) > 3
    assert "".join(part.text for part in parts) == text
    assert parts[0].answers is None


def test_text_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "hello"}\n' * 1000)[:60])
    for spec in (f"text={tmp_path}/no.txt", "text", "novel=x", f"text={tmp_path}/cut.jsonl.gz"):
        with pytest.raises(DataError):
            list(documents(spec))
