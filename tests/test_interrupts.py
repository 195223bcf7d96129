"""A stop signal in the middle of a step or a validation: the run leaves it at once, and resumes to the same bytes."""

import io
import json
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from poe.training.engine import Engine, Interrupted
from poe.training.reporting import progress as reporting
from poe.training.reporting.progress import Progress
from small_run import PLAN, small_engine

SHORT = PLAN.replace(max_steps=8, validation_every=4, checkpoint_every=1e9, tokens_per_step=64, max_tokens_per_batch=16)


def stop_in(engine: Engine, work: str, moment: str) -> None:
    """Let the engine receive a stop signal in the forward or backward pass of a step or a validation."""
    begin, model = engine.context.progress.begin, engine.trained.model

    def watch(name: str, step: int | None = None) -> None:
        begin(name, step)
        if name == work:
            layer = model.get_decoder().layers[-1]
            layer.register_forward_hook(stop_forward if moment == "forward" else stop_backward)

    def stop_forward(*_) -> None:
        engine.stop.requested = True

    def stop_backward(layer, args, output) -> None:
        output.register_hook(stop_forward)

    engine.context.progress.begin = watch  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, list]:
    """The weights and the validations of a run that nothing stopped."""
    engine, cascade = small_engine(tmp_path_factory.mktemp("whole"), SHORT)
    history = engine.run()
    return cascade.stages[PLAN.name].state_dict(), history.evals


@pytest.mark.parametrize(
    ("work", "moment", "saved"),
    [
        ("step 1/8", "forward", 0),
        ("step 6/8", "forward", 5),
        ("step 6/8", "backward", 5),
        ("validation after step 4", "forward", 4),
        ("validation after step 8", "forward", 8),
    ],
)
def test_a_run_stopped_inside_a_pass_resumes_to_the_same_bytes(
    work: str, moment: str, saved: int, whole: tuple[dict, list], tmp_path: Path
) -> None:
    engine, _ = small_engine(tmp_path, SHORT)
    stop_in(engine, work, moment)
    with pytest.raises(Interrupted):
        engine.run()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{saved}"]
    assert all(parameter.grad is None for _, parameter in engine.trained.parameters)
    assert len(engine.history.steps) == saved
    resumed, cascade = small_engine(tmp_path, SHORT)
    history = resumed.run(resume=True)
    weights, evals = whole
    assert history.evals == evals
    for name, tensor in cascade.stages[PLAN.name].state_dict().items():
        assert torch.equal(tensor, weights[name])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in lines if "loss" in record] == list(range(1, 9))


def test_a_run_stopped_before_its_first_validation_saves_nothing(tmp_path: Path) -> None:
    engine, _ = small_engine(tmp_path, SHORT)
    stop_in(engine, "validation after step 0", "forward")
    with pytest.raises(Interrupted):
        engine.run()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_long_steps_and_validations_print_lines_in_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    progress = Progress("stage x")
    progress.console = Console(file=io.StringIO(), width=150, soft_wrap=True)
    progress.start(0, 10, 10)
    progress.begin("step 1/10", 0)
    for second in range(30):  # a module of the network every second
        clock[0] += 1
        progress.beat() if second != 15 else progress.show_share(0.5)
    progress.begin("step 2/10", 1)
    progress.beat()
    lines = progress.console.file.getvalue().splitlines()
    assert lines == [f"stage x: step 1/10: {text}" for text in ("10 s", "50% done after 20 s", "50% done after 30 s")]
    assert reporting.LINE_INTERVAL_S <= 20
