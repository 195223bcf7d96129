"""The estimate of a run: sizes are exact, and memory and time are measured."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from poe.training.reporting import estimate as estimating
from poe.training.reporting.estimate import (
    compare_with_estimate,
    count_weights,
    estimate_line,
    estimate_run,
    estimate_table,
    memory_now,
    memory_peak,
    trained_share,
)
from poe.training.reporting.report import outcome_record
from poe.training.stage_setup import delta_bytes
from small_run import PLAN, small_engine, stop_after

HEADS = [("dense", 2), ("low_rank", 3), ("none", 2)]


def estimate(engine, result_bytes: int | None = None):
    settings = replace(engine.settings, result_bytes=result_bytes)
    return estimate_run(engine.plan, engine.trained, engine.rows, settings, engine.optimizer)


@pytest.mark.parametrize(("head", "rank"), HEADS)
def test_size_of_the_delta_and_number_of_parameters_are_exact(head: str, rank: int, tmp_path: Path) -> None:
    engine, cascade = small_engine(tmp_path, PLAN.replace(head=head, head_rank=rank, num_layers=2))
    stage = cascade.stages[PLAN.name]
    expected = estimate(engine, delta_bytes(stage))
    for dtype in (torch.bfloat16, torch.float32, torch.int8):
        stage.saved_dtype = dtype
        size = delta_bytes(stage)
        cascade.save_stage(PLAN.name, tmp_path / str(dtype))
        assert (tmp_path / str(dtype) / "delta.safetensors").stat().st_size == size
        assert (dtype != torch.bfloat16) or size == expected.result_bytes
    assert expected.parameters == stage.num_parameters()
    assert expected.tokens == PLAN.max_steps * PLAN.tokens_per_step


def test_flops_equal_those_counted_by_torch(tmp_path: Path) -> None:
    """The operations of a forward pass without the embedding and attention, which the formula omits."""
    from torch.utils.flop_counter import FlopCounterMode

    engine, _ = small_engine(tmp_path)
    weights = count_weights(engine.trained.model, engine.trained.parameters)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        engine.trained.model(torch.zeros(1, 16, dtype=torch.int64))
    counted = sum(flops for op, flops in counter.get_flop_counts()["Global"].items() if op in MATMULS)
    fold = 2 * weights.head * PLAN.head_rank  # a low-rank delta is multiplied out once for any number of tokens
    assert counted - fold == 16 * 2 * (weights.below + weights.stage + weights.head)
    share = trained_share(engine.rows.train)
    by_hand = [
        (row.labels != -100).float().mean() for row in (engine.rows.train.batch(i, 1) for i in range(10**6) if i < 64)
    ]
    assert 0 < share < 1
    assert estimate(engine).flops_per_token == pytest.approx(
        2 * weights.below + 6 * (weights.stage + weights.head * share)
    )
    assert share == pytest.approx(sum(map(float, by_hand[: engine.rows.train.num_rows])) / engine.rows.train.num_rows)


MATMULS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)


def test_tied_embedding_counts_for_the_head_only() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.layer, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.embedding.weight

        def get_output_embeddings(self) -> nn.Module:
            return self.head

    model = Tied()
    weights = count_weights(model, [("weight", model.layer.weight)])
    assert (weights.below, weights.stage, weights.head) == (0, 16, 28)


def test_outcome_is_recorded_with_the_estimate(tmp_path: Path) -> None:
    engine, _ = small_engine(tmp_path, PLAN.replace(max_steps=5))
    assert estimate(engine).seconds > 0
    history = engine.run()
    record = outcome_record(history)
    assert record["actual"]["tokens"] == record["estimate"]["tokens"] == 5 * PLAN.tokens_per_step
    assert record["ratio"]["tokens"] == 1
    assert record["ratio"]["steps"] == 1
    assert record["ratio"]["passes"] == pytest.approx(1, abs=0.01)
    assert set(record["ratio"]) == {"tokens", "steps", "passes", "seconds", "memory_bytes", "disk_bytes"}
    history.evaluation_seconds = 1.0
    history.estimate["evaluation_seconds"] = 2.0
    assert outcome_record(history, result_bytes=5)["ratio"]["evaluation_seconds"] == 0.5
    assert record["estimate"]["seconds_after_3_steps"] > 0
    assert json.loads(json.dumps(record)) == record
    assert compare_with_estimate({"seconds": 2.0}, {"seconds": 3.0, "memory_bytes": 1.0}) == {"seconds": 1.5}
    shown = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    shown.print(estimate_table(record["estimate"], record["actual"]))
    text = shown.export_text()
    assert "ratio" in text
    assert "1.00" in text
    assert "parameters trained" in estimate_line(record["estimate"])


def test_memory_is_measured_in_bytes() -> None:
    cpu = torch.device("cpu")
    before = memory_now(cpu)
    tensor = torch.ones(1 << 24)  # 64 MiB
    grown = memory_now(cpu) - before
    assert tensor.numel() * 4 * 0.9 < grown < tensor.numel() * 4 * 1.5
    assert memory_peak(cpu) >= memory_now(cpu) * 0.99


def test_resumed_run_keeps_its_first_estimate_and_name(tmp_path: Path, monkeypatch) -> None:
    engine, _ = small_engine(tmp_path)
    stop_after(engine, 3)
    with pytest.raises(KeyboardInterrupt):
        engine.run()
    first = engine.history.estimate
    monkeypatch.setattr(estimating, "network_speed", lambda *args: 1.0)
    again, _ = small_engine(tmp_path)
    again._load_checkpoint()
    again.report_estimate()
    assert again.history.estimate == first
    assert again.history.name == engine.history.name
