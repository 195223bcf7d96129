"""What could fail at the end of a run is reported before its first step, and a failed run leaves nothing behind."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from command_line import run_program
from conftest import SMALL_RUN
from poe import Cascade, train_stage
from poe.errors import PoEError, TrainingError
from poe.loaders.hub import find_problems
from poe.loaders.outcome import describe_failure, describe_untrained
from poe.training import trainer
from poe.training.reporting.progress import Progress
from poe.training.trainer import check_stage_run

SMALL: dict[str, Any] = {**SMALL_RUN, "max_steps": 2}
QUIET = Progress("test", quiet=True)


@pytest.fixture
def base(demo_base: Path, tmp_path: Path) -> Path:
    """The folder of a base that the test may change."""
    return Path(shutil.copytree(demo_base, tmp_path / "base"))


def options(base: Path, out: Path, **fields: Any) -> list[str]:
    values = {**SMALL, **fields}
    words = [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return ["demo", "--base", str(base), "--out", str(out), "--data", "demo=120", *words]


def never_train(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("a step was taken")


def give_no_parent_files(cascade: Cascade) -> None:
    cascade.add_stage(name="below", num_layers=1)
    cascade.add_stage(name="demo", num_layers=1, parent="below")


def break_tokenizer(cascade: Cascade) -> None:
    def save_pretrained(*args: Any, **kwargs: Any) -> None:
        raise ValueError("added token is not in the vocabulary")

    cascade.tokenizer.save_pretrained = save_pretrained


FAILURES: dict[str, Callable[[Cascade], Any]] = {
    "a generation config that no file can hold": lambda c: setattr(
        c.base.generation_config, "suppress_tokens", torch.tensor([1])
    ),
    "a tokenizer that cannot be saved": break_tokenizer,
    "a parent without files": give_no_parent_files,
    "a base that was changed in memory": lambda c: next(c.base.parameters()).data.add_(1),
    "a hook": lambda c: c.base.model.layers[0].register_forward_hook(lambda module, args, output: output * 2),
}


@pytest.mark.parametrize("cause", FAILURES)
def test_what_would_fail_at_the_save_is_raised_before_the_first_step(
    cause: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "_fit", never_train)
    cascade = Cascade.from_pretrained(base)
    FAILURES[cause](cascade)
    with pytest.raises(PoEError):
        train_stage(cascade, "demo", "demo=120", tmp_path / "out", progress=QUIET, **SMALL)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_reports_every_check_and_leaves_no_folder(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs" / "out"
    result = run_program("poe-train", "stage", *options(base, out), "--dry-run")
    assert result.returncode == 0, result.stderr
    lines = [line.removeprefix("ok  ").strip() for line in result.stdout.splitlines() if line.startswith("ok")]
    assert {"base", "tokenizer", "chat template", "output folder", "data", "files of the stage"} <= set(lines)
    assert "120 rows read" in result.stderr
    assert "plan: packed rows" in result.stderr
    assert all(
        f"{word} " in result.stderr for word in ("steps", "passes", "held-out questions, at most", "memory, peak")
    )
    assert not out.parent.exists()


def test_a_dry_run_of_a_run_that_would_fail_has_exit_code_1_and_every_problem(base: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (base / "generation_config.json").write_text(json.dumps({"temperature": 0.5}))
    result = run_program("poe-train", "stage", *options(base, tmp_path / "out", track="nothing"), "--dry-run")
    assert result.returncode == 1
    assert "FAIL output folder: " in result.stdout
    assert "FAIL trackers: " in result.stdout
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]


def test_a_dry_run_leaves_the_cascade_as_it_was(base: Path, tmp_path: Path) -> None:
    cascade = Cascade.from_pretrained(base).add_stage(name="other", num_layers=1)
    checks: dict[str, str | None] = {}
    fields = {**SMALL, "seq_len": "at most 512", "tokens_per_step": "at most 1024", "max_steps": None}  # from the data
    passed = check_stage_run(
        cascade, "demo", "demo=120", tmp_path / "out", checks.__setitem__, progress=QUIET, **fields
    )
    assert passed, checks
    assert not any(checks.values())
    assert list(cascade.stages) == ["other"]
    assert cascade.active == "other"


@pytest.mark.slow
@pytest.mark.parametrize("command", ["sweep", "base"])
def test_sweeps_and_bases_have_dry_runs(command: str, base: Path, tmp_path: Path) -> None:
    words = [*options(base, tmp_path / "out"), "--try", "num_layers=1,2"]
    if command == "base":
        pages = Path(__file__).parents[1] / "docs" / "**" / "*.md"
        words = ["demo", "--out", str(tmp_path / "out"), "--max-steps", "2", "--vocab-size", "300"]
        words += ["--data", f"text={pages}", "--seq-len", "64", "--tokens-per-step", "64"]
        words += ["--hidden-size", "32", "--num-heads", "2"]
    result = run_program("poe-train", command, *words, "--dry-run")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("ok") >= 4
    assert not (tmp_path / "out").exists()


def test_a_run_that_learned_nothing_is_saved_and_has_exit_code_1(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run_program("poe-train", "stage", *options(base, out, matrix_lr=0, head_lr=0), "--no-eval")
    assert result.returncode == 1
    assert "learned nothing" in result.stderr
    assert Cascade.from_pretrained(out).active == "demo"


def test_a_base_that_computes_no_numbers_is_reported_before_the_first_step(base: Path, tmp_path: Path) -> None:
    weights = load_file(base / "model.safetensors")
    name = next(name for name in weights if "layers.0" in name)
    weights[name].flatten()[0] = torch.nan
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(TrainingError, match="after step 0"):
        train_stage(Cascade.from_pretrained(base), "demo", "demo=120", tmp_path / "out", progress=QUIET, **SMALL)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("poe generate demo text --max-new-tokens -3", 2),
        ("poe generate demo text --temperature -1", 2),
        ("poe calibrate demo --out x --rows 0", 2),
        ("poe calibrate demo --out x --agreement 2", 2),
        ("poe-train stage --max-steps -3", 1),
        ("poe-train stage --max-steps 0", 1),
        ("poe-train stage --seed -1", 1),
        ("poe-train base demo --seed -1", 1),
    ],
)
def test_a_number_outside_its_range_is_refused_before_a_model_is_opened(
    command: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Cascade, "from_pretrained", never_train)
    program, *words = command.split()
    result = run_program(program, *words)
    assert result.returncode == code
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("values", "best", "expected"),
    [
        ([2.0, 1.5, 1.0], 2, None),
        ([2.0, 1.5, 1.9], 1, None),
        ([2.0], 0, None),
        ([2.0, 2.0], 0, "learned nothing"),
        ([2.0, 2.5, 3.0], 0, "learned nothing"),
        ([2.0, 1.5, 9.0], 1, "diverged"),
    ],
)
def test_a_run_is_a_success_if_it_ends_better_than_it_began(
    values: list[float], best: int, expected: str | None
) -> None:
    trajectory = [{"step": step, "val_bpb": value} for step, value in enumerate(values)]
    problem = describe_failure({"trajectory": trajectory, "best_step": best})
    assert (problem is None) if expected is None else expected in str(problem)


@pytest.mark.parametrize(
    "fields",
    [{"head": "low_rank", "head_rank": 2}, {"head": "none"}, {"layers": "fork", "attach_at": 1, "rank": 2}],
)
def test_a_stage_that_was_never_trained_is_named_when_it_is_saved(
    fields: dict[str, Any], saved_base: Callable[..., Path], tmp_path: Path
) -> None:
    cascade = Cascade.from_pretrained(saved_base("llama")).add_stage(name="new", **fields)
    with pytest.warns(UserWarning, match="'new': The stage was never trained"):
        cascade.save_stage("new", tmp_path / "new")
    delta = tmp_path / "new" / "delta.safetensors"
    assert list(find_problems({delta.name: delta})) == [describe_untrained(load_file(delta))]
    (tmp_path / "training.json").write_text('{"trajectory": [{"val_bpb": 1}, {"val_bpb": 2}], "best_step": 0}')
    record = {delta.name: delta, "training.json": tmp_path / "training.json"}
    assert "learned nothing" in next(find_problems(record))
    for parameter in cascade.stages["new"].parameters():
        torch.nn.init.normal_(parameter)
    assert describe_untrained(cascade.stages["new"].delta_state_dict()) is None
