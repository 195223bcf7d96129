"""From SPEC to packed rows: every row is counted, and no row is in both training and validation."""

import errno
import gzip
import json
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from conftest import demo_tokenizer
from poe.data import corpus, pipeline
from poe.data.cache import cache_root
from poe.data.drops import DropReport
from poe.data.pipeline import TrainingData, prepare
from poe.data.render import Renderer
from poe.data.statistics import compute_statistics
from poe.data.text import documents
from poe.errors import DataError, OutputError
from poe.stages import Augmentation, Recipe

ANSWER = {"role": "assistant", "content": "I say it"}


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(demo_tokenizer())


def write(path: Path, first: int, count: int) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"I say {i}"}]}
        for i in range(first, first + count)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def make_recipe(spec: str, **fields) -> Recipe:
    return Recipe(name="test", data=spec, **{"near_duplicates": None, **fields})


def load(
    spec: str, renderer: Renderer, report: DropReport | None = None, workers: int | None = None, **fields
) -> TrainingData:
    return prepare(make_recipe(spec, seq_len=128, validation_ratio=0.2, **fields), renderer, report, workers)


def test_two_files_of_one_reader_both_count(tmp_path: Path, renderer: Renderer) -> None:
    a, b = write(tmp_path / "a.jsonl", 0, 60), write(tmp_path / "b.jsonl", 100, 60)
    data = load(f"messages={a},messages={b}*3", renderer)
    held = data.held_out["held-out messages"]
    numbers = [int(c.query.split()[1]) for c in held]
    assert min(numbers) < 60 <= 100 <= max(numbers)
    trained = [s["conversations"] for s in data.summary["sources"].values()]
    assert sum(trained) + len(held) == 120
    assert data.train.stats.documents == trained[0] + 3 * trained[1]


def test_epochs_of_the_spec_override_the_recipe_and_weights_multiply(tmp_path: Path, renderer: Renderer) -> None:
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


def test_long_rows_are_dropped_counted_and_reported(tmp_path: Path, renderer: Renderer) -> None:
    path = write(tmp_path / "a.jsonl", 0, 60)
    long = {"messages": [{"role": "user", "content": "x " * 200}, {"role": "assistant", "content": "no"}]}
    path.write_text(path.read_text() + "\n" + json.dumps(long))
    with DropReport(tmp_path / "dropped.jsonl") as report:
        load(f"messages={path}", renderer, report)
    (row,) = map(json.loads, (tmp_path / "dropped.jsonl").read_text().splitlines())
    assert row["reason"] == "longer than 128 tokens"
    assert row["row"]["messages"] == long["messages"]


def packed(data: TrainingData) -> list:
    return [part.tolist() for part in data.train.batch(0, data.train.num_rows)]


def packed_val(data: TrainingData) -> list:
    return [part.tolist() for part in data.val.batch(0, data.val.num_rows)]


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Use an empty cache; a call of the fixture changes to another empty cache."""
    counter = count()

    def use_new_cache() -> None:
        monkeypatch.setenv("POE_CACHE", str(tmp_path / f"cache{next(counter)}"))

    use_new_cache()
    return use_new_cache


def test_the_number_of_workers_changes_nothing(tmp_path: Path, renderer: Renderer, fresh, monkeypatch) -> None:
    monkeypatch.setattr(pipeline, "MIN_ROWS_FOR_WORKERS", 0)
    spec = f"messages={write(tmp_path / 'a.jsonl', 0, 500)}*2"
    one = load(spec, renderer, workers=1)
    fresh()
    three = load(spec, renderer, workers=3)
    assert packed(one) == packed(three)
    assert one.summary == three.summary


def test_prepared_data_is_reused(tmp_path: Path, renderer: Renderer, fresh, monkeypatch) -> None:
    path = write(tmp_path / "a.jsonl", 0, 80)
    path.write_text(path.read_text() + "\nbroken")
    reports = [DropReport(tmp_path / f"{i}.jsonl") for i in range(2)]
    first = load(f"messages={path}", renderer, reports[0])
    monkeypatch.setattr(pipeline, "_pack", None)  # nothing is prepared again
    monkeypatch.setattr(corpus, "_build", None)
    again = load(f"messages={path}", renderer, reports[1])
    assert packed(first) == packed(again)
    assert first.summary == again.summary
    for report in reports:
        report.close()
    assert (tmp_path / "0.jsonl").read_text() == (tmp_path / "1.jsonl").read_text() != ""


def test_other_rows_or_options_are_prepared_again(tmp_path: Path, renderer: Renderer, fresh) -> None:
    path = write(tmp_path / "a.jsonl", 0, 80)
    sizes = [load(f"messages={path}", renderer).train.stats.documents]
    write(path, 0, 90)
    sizes.append(load(f"messages={path}", renderer).train.stats.documents)
    sizes.append(load(f"messages={path}", renderer, epochs={"messages": 3}).train.stats.documents)
    assert sizes[0] < sizes[1] < sizes[2]


def test_an_interrupted_preparation_leaves_no_folder(tmp_path: Path, renderer: Renderer, fresh, monkeypatch) -> None:
    spec = f"messages={write(tmp_path / 'a.jsonl', 0, 80)}"

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "pack_to_folder", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load(spec, renderer)
    assert not list((cache_root() / "packed").iterdir())
    assert load(spec, renderer).train.num_rows


def test_a_full_disk_raises_an_output_error(tmp_path: Path, renderer: Renderer, fresh, monkeypatch) -> None:
    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pipeline, "pack_to_folder", full)
    with pytest.raises(OutputError, match=r"No space left on device.*POE_CACHE"):
        load(f"messages={write(tmp_path / 'a.jsonl', 0, 80)}", renderer)


def test_evaluation_rows_are_not_trained_on(tmp_path: Path, renderer: Renderer) -> None:
    tool = {"name": "pay", "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}}}

    def row(question: str, n: int) -> dict:
        call = {"function": {"name": "pay", "arguments": {"n": n}}}
        answer = {"role": "assistant", "tool_calls": [call]}
        return {"messages": [{"role": "user", "content": question}, answer], "tools": [tool]}

    train = [row(f"Pay {n} coins", n) for n in range(100)]
    evaluation = [row("Please could you pay 7", 7), row("pay  9 COINS", 1009), row("Pay a lot", 5000)]
    for name, rows in (("train", train), ("asked", evaluation)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report = DropReport()
    recipe = make_recipe(
        f"messages={tmp_path}/train.jsonl",
        seq_len=256,
        validation_ratio=0.1,
        eval_data=f"messages={tmp_path}/asked.jsonl",
    )
    data = prepare(recipe, renderer, report)
    assert report.dropped["messages"] == {"call of an evaluation row": 1, "query of an evaluation row": 1}
    assert [c.query for c in data.held_out[f"messages={tmp_path}/asked.jsonl"]] == [
        "please could you pay 7",
        "pay 9 coins",
        "pay a lot",
    ]
    trained = renderer.tokenizer.decode(data.train.batch(0, data.train.num_rows).input_ids.flatten())
    assert "Pay 7 coins" not in trained
    assert "Pay 9 coins" not in trained
    assert data.train.stats.documents == 98 - len(data.held_out["held-out messages"])


def refusing_renderer(condition: str) -> Renderer:
    """Return a renderer with a template that refuses rows with a first message `m` of that condition."""
    tokenizer = demo_tokenizer()
    refusal = "{% set m = messages[0]['content'] %}{% if CONDITION %}{{ raise_exception('no') }}{% endif %}"
    tokenizer.chat_template = refusal.replace("CONDITION", condition) + tokenizer.chat_template
    return Renderer(tokenizer)


def test_rows_of_every_side_that_cannot_be_rendered_are_counted_and_kept(tmp_path: Path) -> None:
    questions = [f"say {i}{' refused' * (i % 5 == 0)}" for i in range(100)] + ["say " + "again " * 200]
    lines = [json.dumps({"messages": [{"role": "user", "content": text}, ANSWER]}) for text in questions]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines[10:]))
    (tmp_path / "asked.jsonl").write_text("\n".join(lines[:10]))
    asked, report = f"messages={tmp_path}/asked.jsonl", DropReport(tmp_path / "dropped.jsonl")
    renderer = refusing_renderer("'refused' in m")
    recipe = make_recipe(f"messages={tmp_path}/rows.jsonl", seq_len=128, validation_ratio=0.4, eval_data=asked)
    data = prepare(recipe, renderer, report)
    report.close()
    dropped = {"the chat template rejects it": 20, "longer than 128 tokens": 1}
    assert data.summary["rows"]["messages"] == {"read": 101, "kept": 80, "dropped": dropped}
    kept = [json.loads(line)["row"]["messages"][0]["content"] for line in report_lines(tmp_path)]
    assert sorted(kept) == sorted(text for text in questions if "refused" in text or "again" in text)
    assert [row.query for row in data.held_out[asked]] == [q for q in questions[:10] if "refused" not in q]
    assert not [row for row in data.held_out["held-out messages"] if "refused" in row.query or "again" in row.query]
    assert prepare(recipe, renderer, DropReport()).summary == data.summary  # also what was prepared before
    counted = DropReport()
    compute_statistics(corpus.read_corpus(recipe, DropReport()), renderer, counted)
    assert counted.dropped["messages"] == {"the chat template rejects it": 20}


def report_lines(folder: Path) -> list[str]:
    return (folder / "dropped.jsonl").read_text().splitlines()


def test_held_out_rows_that_are_all_refused_are_named_in_the_error(tmp_path: Path, renderer: Renderer) -> None:
    spec = f"messages={write(tmp_path / 'a.jsonl', 0, 40)}"
    held_out = [row.query for row in load(spec, renderer, eval_rows=40).held_out["held-out messages"]]
    with pytest.raises(DataError, match=rf"dropped: the chat template rejects it \({len(held_out)}\)"):
        load(spec, refusing_renderer(f"m in {held_out}"))


EVERYTHING = Augmentation(
    mask=0.5, irrelevance=0.2, contrast=0.2, distractors=0.5, shuffle=1.0, case=0.2, paraphrase=0.5, formats=0.7
)


def test_augmented_rows_are_the_same_for_any_number_of_workers(renderer: Renderer, fresh, monkeypatch) -> None:
    monkeypatch.setattr(pipeline, "MIN_ROWS_FOR_WORKERS", 0)
    plain_recipe = make_recipe("demo=200", seq_len=1024, epochs={"demo": 2})
    recipe = plain_recipe.replace(augment=EVERYTHING)
    one = prepare(recipe, renderer, workers=1)
    fresh()
    two = prepare(recipe, renderer, workers=2)
    assert packed(one) == packed(two)
    assert one.summary == two.summary
    plain = prepare(plain_recipe, renderer)
    assert packed(plain) != packed(one)
    assert packed_val(plain) == packed_val(one)
    assert plain.summary["augmented_rows_left_plain"] == {}


def test_augmented_rows_that_do_not_fit_are_replaced_by_the_original(renderer: Renderer) -> None:
    recipe = make_recipe("demo=100", seq_len=512)
    plain = prepare(recipe, renderer)
    longer = prepare(recipe.replace(augment=Augmentation(formats=1.0, tool_formats=("indent4",))), renderer)
    left = longer.summary["augmented_rows_left_plain"]
    assert 0 < left["longer than 512 tokens"] < 100
    assert longer.train.stats.documents == plain.train.stats.documents


def test_near_duplicates_are_dropped_and_counted(tmp_path: Path, renderer: Renderer) -> None:
    texts = [" ".join(f"{story}{i}" for i in range(20)) for story in "abcdefghij"]
    near = [text + " indeed" for text in texts[:4]]
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]}
        for text in [*texts, *near]
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    report = DropReport()
    load(f"messages={path}", renderer, report, near_duplicates=0.8)
    ((reason, number),) = report.dropped["messages"].items()
    assert number == 4
    assert reason.startswith("almost the same")


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


def test_missing_text_and_other_readers_raise_errors(tmp_path: Path) -> None:
    for spec in (f"text={tmp_path}/no.txt", "text", "novel=x"):
        with pytest.raises(DataError):
            list(documents(spec))
