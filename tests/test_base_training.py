"""Training a base on text that is read during training: resumed runs, and the count of every document."""

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from poe.data import streamed
from poe.data import text as text_reader
from poe.demo.words import THINGS
from poe.errors import DataError
from poe.loaders.repository import EMBEDDED_BASE
from poe.stages import BaseRecipe
from poe.training import text_rows
from poe.training.engine import Interrupted
from poe.training.pretrain import train_base
from poe.training.reporting.progress import Progress
from poe.training.text_rows import make_rows, make_tokenizer

QUIET = Progress("test", quiet=True)
RECIPE = BaseRecipe(
    name="small",
    vocab_size=300,
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    seq_len=32,
    tokens_per_step=64,
    max_steps=30,
    validation_every=10,
    dtype="float32",
)


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BaseRecipe:
    """Return a recipe on sixty short documents, five to a chunk, and two damaged lines."""
    monkeypatch.setattr(streamed, "CHUNK_CHARACTERS", 500)
    monkeypatch.setattr(text_rows, "VALIDATION_ROWS", 4)
    rows = [{"text": f"Document {n}: " + " and ".join(THINGS[n % 20 :][:12])} for n in range(60)]
    lines = [*map(json.dumps, rows), '{"text": ', "{}"]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    return RECIPE.replace(data=f"text={tmp_path}/a.jsonl")


class StopsAt(Progress):
    """Progress that requests a stop after a step."""

    def __init__(self, last: int) -> None:
        super().__init__("test", quiet=True)
        self.last = last

    def show_step(self, step: int, *args: Any, **kwargs: Any) -> None:
        super().show_step(step, *args, **kwargs)
        if step == self.last:
            signal.raise_signal(signal.SIGINT)


def test_run_on_streamed_rows_resumes_to_the_same_bytes(recipe: BaseRecipe, tmp_path: Path) -> None:
    whole = train_base(recipe, tmp_path / "whole", progress=QUIET)
    parts = tmp_path / "parts"
    for last in (3, 17):
        with pytest.raises(Interrupted):
            train_base(recipe, parts, resume=parts.exists(), progress=StopsAt(last))
        assert (parts / "chunks.jsonl").exists()
    train_base(recipe, parts, resume=True, progress=QUIET)
    for name in ("model.safetensors", "tokenizer.json"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()
    records = [json.loads((folder / "training.json").read_text()) for folder in (whole, parts)]
    assert records[0]["trajectory"] == records[1]["trajectory"]
    assert records[0]["data"] == records[1]["data"]
    assert not (parts / "chunks.jsonl").exists()


def test_read_and_dropped_rows_are_recorded(recipe: BaseRecipe, tmp_path: Path) -> None:
    folder = train_base(
        recipe.replace(max_steps=40, validation_every=40, tokens_per_step=256), tmp_path / "run", progress=QUIET
    )
    data = json.loads((folder / "training.json").read_text())["data"]
    dropped = {"not JSON": 1, "no text in the column 'text'": 1}
    assert data["rows"] == {"text": {"read": 62, "kept": 60, "dropped": dropped}}  # each document counts once
    assert data["passes"] > 1
    assert len((folder / "dropped.jsonl").read_text().splitlines()) == 2


def text_of(tokenizer: Any, rows: Any, count: int) -> str:
    """Return the text of the first rows."""
    return " ".join(tokenizer.batch_decode([rows.batch(n, 1).input_ids[0] for n in range(count)]))


def test_training_and_validation_share_no_document(recipe: BaseRecipe) -> None:
    tokenizer = make_tokenizer(recipe)
    val, train = make_rows(recipe, tokenizer, 60)

    held_out, trained = (
        set(re.findall(r"Document (\d+):", text))
        for text in (text_of(tokenizer, val, val.num_rows), text_of(tokenizer, train, 200))  # more than one pass
    )
    assert held_out
    assert len(trained) > 40
    assert not held_out & trained


def test_no_part_of_a_held_out_source_row_is_trained_on(
    recipe: BaseRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Source rows have several parts, are interleaved with others, and some are read twice in one pass."""
    monkeypatch.setattr(text_reader, "PART_CHARACTERS", 200)
    for name in "ab":
        rows = [f"Of row {name}{number} comes line. " * 30 for number in range(9)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    recipe = recipe.replace(data=f"text={tmp_path}/a.jsonl*2,text={tmp_path}/b.jsonl:0.5")
    tokenizer = make_tokenizer(recipe)
    val, train = make_rows(recipe, tokenizer, 200)

    held_out, trained = (
        set(re.findall(r"Of row (\w\d) comes", text))
        for text in (text_of(tokenizer, val, val.num_rows), text_of(tokenizer, train, 400))
    )
    assert held_out
    assert len(trained) > 9
    assert not held_out & trained


def test_chat_markers_are_special_tokens_in_generated_texts_only(recipe: BaseRecipe, tmp_path: Path) -> None:
    for name in "bc":
        (tmp_path / f"{name}.txt").write_text("He wrote <|assistant_end|> and <tool_call>. " * 20)
    tokenizer = make_tokenizer(recipe)
    marks = set(tokenizer.all_special_ids) - {tokenizer.bos_token_id, tokenizer.pad_token_id}
    for spec, expected in ((f"text={tmp_path}/b.txt", False), ("demo", True)):
        val = make_rows(recipe.replace(data=f"{spec},text={tmp_path}/c.txt"), tokenizer, 1)[0]
        ids = set(val.batch(0, val.num_rows).input_ids.flatten().tolist())
        assert bool(marks & ids) == expected


def test_text_too_short_for_training_rows_is_refused(recipe: BaseRecipe, tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text("Too short. " * 3)
    with pytest.raises(DataError, match="No text is left to train on"):
        make_rows(recipe.replace(data=f"text={tmp_path}/c.txt"), AutoTokenizer.from_pretrained(EMBEDDED_BASE), 1)
