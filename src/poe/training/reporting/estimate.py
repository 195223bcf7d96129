"""What a run will take, said before its first step and compared with what it took.

Work: a frozen layer costs 2 operations per weight and token, a trained one 6 (forward, and a backward for the input and
for the weight); the head only sees the positions that have a label: `2 N_below + 6 (N_stage + N_head x share)` per
token. The head's own gradient is as large as the head, whatever form its delta has. Per step come Muon's matrix
products; per validation `2 (N_below + N_stage + N_head x share)` per token. Time is all that at the speed of a forward
pass of some rows, which is measured.

Memory, beyond what the process holds when it is asked (libraries, model): per trained number its gradient, its copy in
the best weights, its optimizer state (Muon one fp32 number, AdamW two, one more for a half-precision weight); per
number of the head its folded weight and two fp32 copies (the fold, the gradient); per token of a batch the inputs and
outputs of every matrix that is trained, and of one frozen layer; a chunk of logits three times in fp32.
"""

import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn
from transformers import PreTrainedModel

from poe.data.packing import Batch, Rows
from poe.errors import OutputError
from poe.stages.recipe import Plan
from poe.training.checkpoints.files import checkpoints
from poe.training.checkpoints.identity import sampled
from poe.training.loss import chunk_rows
from poe.training.optim import POLAR_EXPRESS, MuonAdamW

CALIBRATION_TOKENS = 2048  # enough for a network to reach its speed
LABELS = {
    "parameters": "parameters trained",
    "tokens": "tokens",
    "seconds": "time",
    "memory_bytes": "memory, peak",
    "result_bytes": "result",
    "disk_bytes": "disk",
}


@dataclass(frozen=True)
class Estimate:
    """Bytes, seconds and numbers of a whole run. `flops_per_token` is that of a training step, without Muon's."""

    parameters: int  # numbers that are trained
    tokens: int  # slots that go through the network in training, padding included
    flops_per_token: float
    seconds: float  # of all steps and validations
    memory_bytes: int  # peak of the process (CPU), or allocated on the GPU
    result_bytes: int  # delta.safetensors to the byte; of a base its weights
    disk_bytes: int  # most that lies in the run's folder at a time

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values: whole numbers, and seconds to three digits."""
        return {name: float(f"{v:.3g}") if name == "seconds" else round(v) for name, v in asdict(self).items()}


@dataclass(frozen=True)
class Weights:
    """How many weights of a model multiply every token: frozen ones, trained ones, and those of the head."""

    below: int
    stage: int
    head: int


def count_weights(model: PreTrainedModel, parameters: Iterable[tuple[str, nn.Parameter]]) -> Weights:
    """Count the matrices of a model by what becomes of them. Embeddings are looked up, not multiplied.

    A recurrent base runs its layers several times, and a mixture of experts some of them: both are counted once.
    """
    trained = {id(p) for _, p in parameters}
    head: Any = model.get_output_embeddings()
    apart = {id(p) for p in head.parameters()}
    apart |= {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    below = stage = 0
    for parameter in model.parameters():
        if id(parameter) in apart or parameter.ndim < 2:
            continue
        if id(parameter) in trained:
            stage += parameter.numel()
        else:
            below += parameter.numel()
    return Weights(below, stage, head.weight.numel())


def trained_share(rows: Rows) -> float:
    """Return the share of the slots that have a label, from at most 64 rows spread evenly."""
    labels = [batch.labels for batch in sampled(rows)]
    return sum(int((part != -100).sum()) for part in labels) / sum(part.numel() for part in labels)


def estimate_run(
    model: PreTrainedModel,
    parameters: list[tuple[str, nn.Parameter]],
    optimizer: MuonAdamW,
    plan: Plan,
    train: Rows,
    val: Rows | None,
    num_steps: int,
    hidden: Callable[[Batch], torch.Tensor],
    result_bytes: int | None = None,
    cached: bool = False,
    processes: int = 1,
) -> Estimate:
    """Return what training `parameters` of `model` by `plan` will take (see the module for how).

    `hidden` is the forward pass of a run's step, (B, T) tokens -> (B, T, D); some rows go through it to be timed.
    `result_bytes` is the size of the file that will be written, if the caller knows it; else two bytes a weight.
    `cached`: hidden states come from a cache, so that the layers below cost nothing. `processes` share the rows and the
    optimizer's state; what goes between them is not counted.
    """
    numbers = sum(p.numel() for _, p in parameters)
    some = train.batch(0, max(1, min(CALIBRATION_TOKENS, plan.tokens_per_step) // plan.seq_len))
    model.eval()  # no dropout: nothing is drawn from the generators, which a run that is continued has just restored
    some = Batch(*(part.to(parameters[0][1].device) for part in some))
    weights = count_weights(model, parameters)
    if cached:
        weights = replace(weights, below=0)
    head = weights.head * trained_share(train)
    per_token = 2 * weights.below + 6 * (weights.stage + head)
    tokens = num_steps * plan.tokens_per_step
    flops = tokens * per_token + num_steps * _muon_flops(optimizer)
    if val is not None:
        measures = 1 + -(-num_steps // plan.validation_every)
        val_head = weights.head * trained_share(val)
        flops += measures * val.num_rows * plan.seq_len * 2 * (weights.below + weights.stage + val_head)
    state = _state_bytes(optimizer)
    own = sum(p.numel() * p.element_size() for _, p in parameters)
    result = 2 * numbers if result_bytes is None else result_bytes
    return Estimate(
        parameters=numbers,
        tokens=tokens,
        flops_per_token=per_token,
        seconds=flops / processes / network_speed(hidden, some, weights),
        memory_bytes=_memory(model, parameters, plan, own, state // processes),
        result_bytes=result,
        # one checkpoint more than are kept lies there while it is written; it holds current and best weights
        disk_bytes=(plan.keep_checkpoints + 1) * (2 * own + state) + result,
    )


def refuse_full_disk(run: Path, needed: int) -> None:
    """Raise `OutputError` where `needed` bytes do not fit; the run's own checkpoints are among them."""
    held = sum(path.stat().st_size for folder in checkpoints(run) for path in folder.iterdir())
    free = shutil.disk_usage(run).free + held
    if free < needed:
        raise OutputError(
            f"Not enough disk for {run}: this run writes up to {needed / 2**20:,.0f} MiB, {free / 2**20:,.0f} MiB are "
            "free. Free some space, or choose another folder with --out."
        )


def network_speed(hidden: Callable[[Batch], torch.Tensor], rows: Batch, weights: Weights) -> float:
    """Return the operations per second of a forward pass of `rows` through the network, without its head.

    Measured on the network itself: what a single matrix product reaches says little about a small model, whose norms
    and attention take as long as its matrices, and nothing about a recurrent one.
    """
    device = rows.input_ids.device
    fastest = float("inf")
    with torch.no_grad():
        for _ in range(3):  # the first one also prepares
            _wait(device)
            started = time.perf_counter()
            hidden(rows)
            _wait(device)
            fastest = min(fastest, time.perf_counter() - started)
    return 2 * rows.input_ids.numel() * (weights.below + weights.stage) / fastest


def memory_now(device: torch.device) -> int:
    """Bytes that this process holds: resident on the CPU, allocated by tensors on a GPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, ValueError):  # not Linux
        return memory_peak(device)


def memory_peak(device: torch.device) -> int:
    """The most bytes that this process has held so far: resident on the CPU, allocated by tensors on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def comparison(estimate: dict[str, Any], actual: dict[str, Any]) -> dict[str, float]:
    """Return what happened over what was estimated, for every quantity of which both are known."""
    return {name: round(actual[name] / estimate[name], 3) for name in actual if estimate.get(name)}


def estimate_table(estimate: dict[str, Any], actual: dict[str, Any] | None = None) -> Table:
    """A small table of an estimate; with `actual`, what happened stands beside it."""
    table = Table(title="estimate" if actual is None else "estimate and outcome", title_justify="left")
    for column in ("", "estimate", *(() if actual is None else ("actual", "ratio"))):
        table.add_column(column, justify="right" if column else "left")
    ratios = {} if actual is None else comparison(estimate, actual)
    for name, label in LABELS.items():
        row = [label, readable(name, estimate[name])]
        if actual is not None:
            row += [
                readable(name, actual[name]) if name in actual else "",
                f"{ratios[name]:.2f}" if name in ratios else "",
            ]
        table.add_row(*row)
    return table


def estimate_line(estimate: dict[str, Any]) -> str:
    """The same in one line, for a log."""
    return "estimate: " + ", ".join(f"{label} {readable(name, estimate[name])}" for name, label in LABELS.items())


def readable(name: str, value: float) -> str:
    """Return a quantity of an estimate with its unit."""
    if name.endswith("_bytes"):
        return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.2f} MB"
    if name == "seconds":
        return f"{value:.0f} s" if value < 120 else f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"
    return f"{value:,}"


def _muon_flops(optimizer: MuonAdamW) -> float:
    """Operations of one step's orthogonalizing: per iteration two products of a matrix, one of its Gram matrix."""
    flops = 0.0
    for group in optimizer.param_groups:
        if group["kind"] == "muon":
            for parameter in group["params"]:
                rows, cols = parameter.shape
                least = min(rows, cols)
                flops += len(POLAR_EXPRESS) * (4 * rows * cols * least + 2 * least**3)
    return flops


def _state_bytes(optimizer: MuonAdamW) -> int:
    numbers = 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            moments = 1 if group["kind"] == "muon" else 2
            numbers += parameter.numel() * (moments + (parameter.element_size() < 4))
    return 4 * numbers


def _memory(
    model: PreTrainedModel, parameters: list[tuple[str, nn.Parameter]], plan: Plan, own: int, state: int
) -> int:
    device = parameters[0][1].device
    trained = {id(p) for _, p in parameters}
    head: Any = model.get_output_embeddings()
    size = parameters[0][1].element_size()
    kept, passing = 0, [0]  # elements per token: of trained matrices, of the frozen layers'
    for layer in (m for name, m in model.named_modules() if name.rpartition(".")[2].isdigit()):
        matrices = [m for m in layer.modules() if isinstance(m, nn.Linear)]
        wide = sum(m.in_features + m.out_features for m in matrices)
        if any(id(p) in trained for p in layer.parameters()):
            kept += wide
        else:
            passing.append(wide)
    rows = min(plan.max_tokens_per_batch, plan.tokens_per_step) // plan.seq_len
    tokens = max(rows, 1) * plan.seq_len
    logits = min(chunk_rows(head.weight), tokens) * head.weight.shape[0]
    activations = tokens * (kept + max(passing)) * size + 3 * 4 * logits
    folded = head.weight.numel() * (8 + (0 if id(head.weight) in trained else head.weight.element_size()))
    return max(memory_peak(device), memory_now(device) + 2 * own + state + folded + activations)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
