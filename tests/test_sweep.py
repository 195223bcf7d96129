"""Sweeps: comparable candidates, one pass through the base, the best stage is kept, also after an interruption."""

import json
import subprocess
from pathlib import Path

import pytest

from command_line import run_program
from poe import Cascade
from poe.data.cache import cache_root
from poe.errors import OutputError, RecipeError, TrainingError
from poe.modeling.boundary import Boundary
from poe.stages import load_recipe
from poe.training import sweep as sweep_module
from poe.training.reporting.progress import Progress
from poe.training.sweep import RECORD, candidate_recipes, sweep

QUIET = Progress("test", quiet=True)
SMALL = {
    "seq_len": 512,
    "tokens_per_step": 1024,
    "validation_every": 20,
    "eval_rows": 2,
    "dtype": "float32",
    "validation_ratio": 0.1,
    "max_steps": 3,
    "num_layers": 1,
    "head_rank": 4,
}
TRIES = {"head": ["none", "low_rank"], "matrix_lr": [0.01, 0.02]}
DATA = "demo=60"


@pytest.fixture
def base(demo_base: Path) -> Path:
    return demo_base


@pytest.mark.parametrize(
    ("tries", "message"),
    [
        ({}, "at least one field"),
        ({"seq_len": [256, 512]}, "seq_len cannot be tried in a sweep: it changes the rows"),
        ({"seed": [0, 1]}, "seed cannot be tried"),
        ({"dtype": ["float32"]}, "dtype cannot be tried in a sweep: it changes the hidden states of the base"),
        ({"num_layer": [1]}, "Did you mean 'num_layers'"),
        ({"num_layers": [1, 1]}, "different values"),
        ({"num_layers": [1, "two"]}, "num_layers should be a whole number .1 to 1000., got 'two'"),
    ],
)
def test_candidates_that_cannot_be_compared_are_refused(tries: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        candidate_recipes(load_recipe("demo"), tries)


def test_all_combinations_are_candidates() -> None:
    plans = candidate_recipes(load_recipe("demo"), TRIES)
    assert len(plans) == 4
    assert {(plan.head, plan.matrix_lr) for plan in plans.values()} == {
        (head, rate) for head in TRIES["head"] for rate in TRIES["matrix_lr"]
    }
    assert all(plan.cache_hidden for plan in plans.values())


def test_sweep_runs_the_base_once_and_resumes(base: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("POE_CACHE", str(tmp_path / "cache"))
    passes, real = [], Boundary.below
    monkeypatch.setattr(Boundary, "below", lambda self, ids, at: passes.append(ids.shape) or real(self, ids, at))
    train_stage, trained = sweep_module.train_stage, []

    def stops_at_the_third(*args, **options):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(options)
        return train_stage(*args, **options)

    monkeypatch.setattr(sweep_module, "train_stage", stops_at_the_third)
    out, options = tmp_path / "out", {**SMALL, "progress": QUIET}
    with pytest.raises(KeyboardInterrupt):
        sweep(Cascade.from_pretrained(base), "demo", TRIES, DATA, out, **options)
    first = json.loads((out / RECORD).read_text())
    assert len(first["candidates"]) == 2
    after_two = [shape for shape in passes if shape[1] == 512]
    written = sorted(path.name for path in (cache_root() / "hidden").rglob("*.safetensors"))
    with pytest.raises(OutputError, match="continue it with --resume"):
        sweep(Cascade.from_pretrained(base), "demo", TRIES, DATA, out, **options)
    monkeypatch.setattr(sweep_module, "train_stage", train_stage)
    with pytest.raises(TrainingError, match="max_steps: 3 -> 4"):
        sweep(Cascade.from_pretrained(base), "demo", TRIES, DATA, out, resume=True, **{**options, "max_steps": 4})
    cascade = Cascade.from_pretrained(base)
    result = sweep(cascade, "demo", TRIES, DATA, out, resume=True, **options)
    assert [shape for shape in passes if shape[1] == 512] == after_two  # all that the base was asked, it was asked once
    assert sorted(path.name for path in (cache_root() / "hidden").rglob("*.safetensors")) == written
    assert [c.val_bpb for c in result.candidates] == sorted(c.val_bpb for c in result.candidates)
    assert len(result.candidates) == 4
    record = json.loads((out / RECORD).read_text())
    assert record["best"] == result.best.name
    assert {row["folder"]: row for row in first["candidates"]}.items() <= {
        row["folder"]: row for row in record["candidates"]
    }.items()
    for candidate in result.candidates:
        assert (out / candidate.folder / "training.json").is_file()
        assert (out / candidate.folder / "delta.safetensors").is_file() == (candidate.folder == record["best"])
    assert cascade.active == "demo"
    assert Cascade.from_pretrained(result.best).stages["demo"].num_parameters() == result.candidates[0].parameters


def test_sweep_command(base: Path, tmp_path: Path) -> None:
    fields = [part for k, v in SMALL.items() for part in (f"--{k.replace('_', '-')}", str(v))]
    arguments = ["sweep", "demo", "--base", str(base), "--data", DATA, "--out", str(tmp_path / "out"), *fields]

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        environment = {"POE_CACHE": str(tmp_path / "cache")}
        return run_program("poe-train", *arguments, *options, environment=environment)

    refused = run("--try", "seq_len=256,512")
    assert (refused.returncode, "seq_len cannot be tried" in refused.stderr) == (1, True), refused.stderr
    done = run("--try", "num_layers=1,2", "--try", "head=none")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert f"best: {tmp_path}/out/{record['best']}" in done.stdout
    assert all(f"{row['parameters']:,}" in done.stdout for row in record["candidates"])
    assert "0.0 MiB of it to be written" in done.stderr  # the second candidate finds what the first wrote
    again = run("--try", "num_layers=1,2", "--try", "head=none", "--resume")
    assert (again.returncode, again.stdout) == (0, done.stdout), again.stderr
