"""Training runs of a user: processes that are killed, interrupted and resumed, and wrong input."""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from command_line import run_program
from conftest import SMALL_RUN
from poe import Cascade, train_stage
from poe.errors import DataError, OutputError, TemplateError, TokenizerError, TrainingError
from poe.modeling.modeling_poe import PoEForCausalLM
from poe.stages import load_recipe
from poe.stages.recipe import load_base_recipe
from poe.training import step as step_module
from poe.training.checkpoints.files import has_checkpoint, list_checkpoints
from poe.training.pretrain import train_base
from poe.training.reporting.progress import Progress

QUIET = Progress("test", quiet=True)


@pytest.fixture
def base(demo_base: Path) -> Path:
    return demo_base


def command(base: Path, out: Path, *options: str, data: str = "demo=120") -> list[str]:
    fields = [part for k, v in SMALL_RUN.items() for part in (f"--{k.replace('_', '-')}", str(v))]
    program = [sys.executable, "-m", "poe.commands.train", "stage", "demo", "--no-eval"]
    return [*program, "--base", str(base), "--out", str(out), "--data", data, *fields, *options]


def run(args: list[str], **options) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(args, capture_output=True, text=True, timeout=300, env=environment, check=False, **options)


def run_in_process(args: list[str], **options) -> subprocess.CompletedProcess[str]:
    """Run the command here, where torch is imported already."""
    return run_program("poe-train", *args[3:], **options)


def list_files(folder: Path) -> list[str]:
    """Return the names of the files in the folder of a failed run; none if there is no folder."""
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


def start(args: list[str], **options) -> subprocess.Popen[bytes]:
    """Start a process that handles Ctrl-C. A shell starts background jobs, such as these tests, with SIGINT ignored."""
    options.setdefault("env", {**os.environ, "OMP_NUM_THREADS": "1"})
    ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    before = signal.signal(signal.SIGINT, signal.default_int_handler) if ignored else None
    try:
        return subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **options)
    finally:
        if ignored:
            signal.signal(signal.SIGINT, before)


def wait_for_steps(out: Path, steps: int, process: subprocess.Popen[bytes]) -> None:
    metrics = out / "metrics.jsonl"
    deadline = time.monotonic() + 180  # the machine may be busy
    while time.monotonic() < deadline:
        if metrics.exists() and metrics.read_text().count('"loss"') >= steps:
            return
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.01)
    raise AssertionError(f"no {steps} steps in three minutes")


@pytest.mark.slow
@pytest.mark.parametrize("kills", [1, 3])
def test_killed_run_resumes_to_the_same_bytes(base: Path, tmp_path: Path, kills: int) -> None:
    options = ("--max-steps", "60", "--checkpoint-every", "0.05")
    whole = run_in_process(command(base, tmp_path / "whole", *options))
    assert whole.returncode == 0, whole.stderr
    out = tmp_path / "killed"
    moments = random.Random(os.getpid())
    for attempt, steps in enumerate(sorted(moments.sample(range(2, 50), kills))):
        process = start(command(base, out, *options, *(["--resume"] if attempt else [])))
        wait_for_steps(out, steps, process)
        time.sleep(moments.random() * 0.05)
        process.kill()
        process.wait()
        assert has_checkpoint(out)
    resumed = run_in_process(command(base, out, *options, "--resume"))
    assert resumed.returncode == 0, resumed.stderr
    assert (out / "delta.safetensors").read_bytes() == (tmp_path / "whole" / "delta.safetensors").read_bytes()
    trajectories = [json.loads((tmp_path / f / "training.json").read_text())["trajectory"] for f in ("whole", "killed")]
    assert trajectories[0] == trajectories[1]
    assert not list_checkpoints(out)


def test_ctrl_c_saves_a_checkpoint_and_reports_how_to_resume(base: Path, tmp_path: Path) -> None:
    options = ("--max-steps", "80")
    process = start(command(base, tmp_path / "a", *options))
    wait_for_steps(tmp_path / "a", 5, process)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=300)[1].decode()
    assert process.returncode == 130, errors
    assert re.search(r"Stopped; saved at step \d+\. To continue: poe-train stage demo --out .* --resume", errors)
    again = run_in_process(command(base, tmp_path / "a", *options))
    assert again.returncode == 1
    assert "continue it with --resume" in again.stderr
    other = run_in_process(command(base, tmp_path / "a", *options, "--resume", "--matrix-lr", "0.5"))
    assert other.returncode == 1
    assert "matrix_lr: 0.02 -> 0.5" in other.stderr
    assert run_in_process(command(base, tmp_path / "a", *options, "--resume")).returncode == 0
    assert run_in_process(command(base, tmp_path / "b", *options)).returncode == 0
    deltas = [(tmp_path / f / "delta.safetensors").read_bytes() for f in "ab"]
    assert deltas[0] == deltas[1]


@pytest.mark.slow
def test_ctrl_c_during_data_preparation_reports_that_nothing_was_written(base: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "POE_CACHE": str(tmp_path / "cache")}
    args = command(base, tmp_path / "out", data="demo=100000")
    process = start(args, env=environment, text=True, start_new_session=True)
    while "stage demo on" not in (line := process.stderr.readline()):
        assert line, "the process ended"
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to all processes of the group
    errors = process.communicate(timeout=300)[1]
    assert process.returncode == 130, errors
    assert errors == "Stopped before the first checkpoint: nothing was saved.\n"
    assert list_files(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("options", "data", "message"),
    [
        ((), "dmo", "Did you mean 'demo'"),
        ((), "glaive", "glaive"),  # without network the Hub data set cannot be downloaded
        ((), "messages=EMPTY", "No row of the data source"),
        ((), "messages=BROKEN", "every row was dropped"),
        ((), "messages=MISSING", "MISSING"),
        (("--seq-len", "16", "--tokens-per-step", "32"), "demo=40", "longer than 16 tokens"),
        (("--head", "thick"), "demo=40", "head should be"),
        (("--matrix-lr", "fast"), "demo=40", "matrix_lr should be a number (0 or more), got 'fast'"),
    ],
)
def test_bad_data_and_options_are_one_message(base: Path, tmp_path: Path, options, data: str, message: str) -> None:
    (tmp_path / "EMPTY.jsonl").write_text("")
    (tmp_path / "BROKEN.jsonl").write_text('{"messages": 3}\nnot json\n')
    for name in ("EMPTY", "BROKEN", "MISSING"):
        data = data.replace(name, str(tmp_path / f"{name}.jsonl"))
    done = run_in_process(command(base, tmp_path / "out", *options, data=data))
    assert done.returncode == 1, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_dropped_rows_are_recorded_with_their_reasons(base: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    good = {"messages": [{"role": "user", "content": "hello 7"}, {"role": "assistant", "content": "hello"}]}
    lines = [
        json.dumps({**good, "messages": [{"role": "user", "content": f"hi {i}"}, good["messages"][1]]})
        for i in range(90)
    ]
    rows.write_text("\n".join([*lines, '{"messages": 3}', "not json"]))
    recipe = load_recipe("demo", **{**SMALL_RUN, "max_steps": 1, "validation_ratio": 0.2})
    result = train_stage(Cascade.from_pretrained(base), recipe, f"messages={rows}", tmp_path / "out", progress=QUIET)
    counts = result.record["data"]["rows"]["messages"]
    assert (counts["read"], counts["kept"]) == (92, 90)
    assert sum(counts["dropped"].values()) == 2
    kept = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    assert sorted(row["reason"] for row in kept) == sorted(counts["dropped"])


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["stage", "tol"], 1, "Did you mean 'tool'"),
        (["stage", "demo", "--no-such-option"], 2, "no-such-option"),
        (["stage", "demo", "--base", "missing/no-such-model-anywhere"], 1, "missing/no-such-model-anywhere"),
        (["base", "nothing"], 1, "Unknown recipe 'nothing'"),
    ],
)
def test_wrong_names_and_usage_have_exit_codes(tmp_path: Path, args: list[str], code: int, message: str) -> None:
    done = run_program("poe-train", *args, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_base_without_chat_template_gets_one_that_is_saved_with_the_stage(base: Path, tmp_path: Path) -> None:
    cascade = Cascade.from_pretrained(base)
    cascade.tokenizer.chat_template = None
    long = {**SMALL_RUN, "seq_len": 4096, "tokens_per_step": 4096, "max_steps": 1}
    train_stage(cascade, "demo", "demo=40", tmp_path / "out", progress=QUIET, **long)
    saved = Cascade.from_pretrained(tmp_path / "out").tokenizer
    assert saved.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False) == "<|bos|>User: hello\n\n"


def test_tokenizer_without_end_of_turn_is_refused_before_anything_is_written(base: Path, tmp_path: Path) -> None:
    cascade = Cascade.from_pretrained(base)
    cascade.tokenizer.chat_template = cascade.tokenizer.eos_token = None
    with pytest.raises(TemplateError, match="chat template"):
        train_stage(cascade, "demo", "demo=40", tmp_path / "out", progress=QUIET, **SMALL_RUN)
    assert not (tmp_path / "out").exists()


def test_output_folder_that_is_not_empty_is_not_touched(base: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("precious")
    with pytest.raises(OutputError, match=r"not empty \(notes.txt\)"):
        train_stage(Cascade.from_pretrained(base), "demo", "demo=40", tmp_path, progress=QUIET, **SMALL_RUN)
    with pytest.raises(TrainingError, match="Nothing to resume"):
        train_stage(
            Cascade.from_pretrained(base), "demo", "demo=40", tmp_path, resume=True, progress=QUIET, **SMALL_RUN
        )
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.slow
def test_full_disk_is_reported_before_training_and_during_writes(base: Path, tmp_path: Path, monkeypatch) -> None:
    class Usage:
        free = 10_000

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: Usage)
        with pytest.raises(OutputError, match="Not enough disk"):
            train_stage(
                Cascade.from_pretrained(base),
                "demo",
                "demo=60",
                tmp_path / "early",
                progress=QUIET,
                **SMALL_RUN,
                max_steps=2,
            )
    assert not (tmp_path / "early").exists()

    def limit() -> None:  # files are limited to 64 KiB, so the checkpoint cannot be written
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))

    done = run(command(base, tmp_path / "late", "--max-steps", "2", data="demo=60"), preexec_fn=limit)
    assert done.returncode == 1, done.stderr
    assert "could not be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "late").exists()
    again = run_in_process(command(base, tmp_path / "late", "--max-steps", "2", data="demo=60"))
    assert again.returncode == 0, again.stderr


def test_nan_loss_stops_the_run(base: Path, tmp_path: Path, monkeypatch) -> None:
    real = step_module.cross_entropy_sum
    monkeypatch.setattr(step_module, "cross_entropy_sum", lambda *a, **k: real(*a, **k) * float("nan"))
    with pytest.raises(TrainingError, match="loss of step 1 is nan"):
        train_stage(
            Cascade.from_pretrained(base), "demo", "demo=60", tmp_path / "o", progress=QUIET, **SMALL_RUN, max_steps=2
        )


def test_stage_is_trained_in_the_dtype_of_the_recipe(base: Path, tmp_path: Path) -> None:
    cascade = Cascade.from_pretrained(base, dtype=torch.bfloat16)
    fields = {**SMALL_RUN, "max_steps": 1, "z_loss": 1e-4, "checkpoint_activations": True}
    train_stage(cascade, "demo", "demo=60", tmp_path / "o", progress=QUIET, **fields)  # float32
    assert {p.dtype for p in cascade.stages["demo"].parameters()} == {torch.float32}
    assert all("forward" not in vars(layer) for layer in cascade.stages["demo"].layers)
    half = Cascade.from_pretrained(base, dtype=torch.float16)
    with pytest.raises(TrainingError, match="float16"):
        train_stage(half, "demo", "demo=60", tmp_path / "no", progress=QUIET, **fields)
    assert not (tmp_path / "no").exists()


def test_base_that_keeps_a_graph_is_refused_before_the_first_step(base: Path, tmp_path: Path) -> None:
    cascade = Cascade.from_pretrained(base)
    cascade.base.enable_input_require_grads()
    with pytest.raises(TrainingError, match="disable_input_require_grads"):
        train_stage(cascade, "demo", "demo=60", tmp_path / "o", progress=QUIET, **SMALL_RUN, max_steps=1)
    assert not (tmp_path / "o").exists()


def test_training_improves_the_stage_and_keeps_the_base_unchanged(base: Path, tmp_path: Path) -> None:
    cascade = Cascade.from_pretrained(base)
    ids = torch.arange(40)[None]
    before = cascade.base(ids).logits
    fields = {**SMALL_RUN, "max_steps": 40}
    result = train_stage(cascade, "demo", "demo=150", tmp_path / "o", progress=QUIET, **fields)
    trajectory = [point["val_bpb"] for point in result.record["trajectory"]]
    assert trajectory[-1] < trajectory[0] * 0.9
    assert torch.equal(cascade.base(ids).logits, before)
    assert not torch.equal(cascade(ids).logits, before)
    reloaded = Cascade.from_pretrained(tmp_path / "o")
    saved = {n: t.to(torch.bfloat16) for n, t in cascade.stages["demo"].delta_state_dict().items()}
    assert all(
        torch.equal(t.to(torch.bfloat16), saved[n]) for n, t in reloaded.stages["demo"].delta_state_dict().items()
    )
    assert (tmp_path / "o" / "report.png").stat().st_size > 1000


def test_a_new_stage_stands_on_the_stage_that_is_given_as_the_base(stage_folders: list[str], tmp_path: Path) -> None:
    parent = Path(stage_folders[0])
    done = run_in_process(command(parent, tmp_path / "out", "--max-steps", "1"))
    assert f"stage demo stands on the stage {parent.name}" in done.stderr
    cascade = Cascade.from_pretrained(tmp_path / "out")
    assert [stage.name for stage in cascade.stages["demo"].chain] == [parent.name, "demo"]


def test_losses_equal_recorded_numbers(base: Path, tmp_path: Path) -> None:
    """A change that is meant to be numerically neutral must not change them."""
    result = train_stage(
        Cascade.from_pretrained(base),
        "demo",
        "demo=80",
        tmp_path / "o",
        progress=QUIET,
        **{**SMALL_RUN, "max_steps": 3},
    )
    losses = [record["loss"] for record in result.history.steps]
    assert losses == pytest.approx(GOLDEN, abs=2e-3), losses


@pytest.mark.parametrize("head", ["dense", "low_rank", "none"])
def test_tokens_without_labels_keep_the_logits_of_the_base(base, head: str, tmp_path: Path) -> None:
    cascade = Cascade.from_pretrained(base)
    fields = {**SMALL_RUN, "max_steps": 3, "head": head, "head_rank": 4}
    train_stage(cascade, "demo", "demo=80", tmp_path / "o", progress=QUIET, **fields)
    stage = cascade.stages["demo"]
    folded = cascade.model("demo").lm_head.weight.detach()
    changed = (folded != cascade.base.lm_head.weight).any(dim=1)
    assert changed.any() == (head != "none")
    assert changed[cascade.tokenizer.convert_tokens_to_ids("<tool_call>")] == (head != "none")
    assert not changed[cascade.tokenizer.convert_tokens_to_ids("<|user_start|>")]  # the assistant never writes it
    assert all(not tensor._backward_hooks for tensor in stage.head.parameters())  # the gradient mask is removed


def test_base_training_continues_from_another_base(base: Path, tmp_path: Path) -> None:
    recipe = load_base_recipe("demo", init=str(base), num_layers=2, max_steps=2, seq_len=1024, tokens_per_step=1024)
    recipe = recipe.replace(checkpoint_activations=True)
    folder = train_base(recipe, tmp_path / "more", progress=QUIET)
    before, after = (PoEForCausalLM.from_pretrained(f) for f in (base, folder))
    assert after.config.hidden_size == 32
    assert (folder / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert not torch.equal(before.lm_head.weight, after.lm_head.weight.float())
    with pytest.raises(TokenizerError, match="has no tokenizer"):
        train_base(load_base_recipe("demo", init=str(tmp_path), max_steps=1), tmp_path / "no", progress=QUIET)


def test_training_needs_validation_rows(base: Path, tmp_path: Path) -> None:
    fields = {**SMALL_RUN, "validation_ratio": 0.0}
    with pytest.raises(DataError, match="is held out for validation"):
        train_stage(Cascade.from_pretrained(base), "demo", "demo=30", tmp_path / "o", progress=QUIET, **fields)


GOLDEN = [6.39726, 6.36103, 6.18024]
