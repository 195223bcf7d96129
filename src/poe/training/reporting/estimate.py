"""The estimate of a run, shown before its first step and compared with the outcome.

Work: a frozen layer costs 2 operations per weight and token, a trained layer 6 (forward, and backward for the input and
for the weight). The head computes only positions with a label. A step therefore costs
`2 N_below + 6 (N_stage + N_head x share)` per token, plus Muon's matrix products; the head's gradient is as large as
the head for every kind of head delta. A validation costs `2 (N_below + N_stage + N_head x share)` per token. The time
is this work at the measured speed of a forward pass.

Held-out questions are answered twice, by the base and by the stage: a forward pass of the prompts, padded to the
longest of a batch, and one measured pass of a single token, with keys and values, for each of the `REPLY_TOKENS` that a
reply may have.

Memory, added to what the process already holds (libraries, model): per trained number its gradient, its copy in the
best weights, and its optimizer state (Muon one fp32 number, AdamW two, one more for a half-precision weight); per
number of the head its folded weight and two fp32 copies (the fold, the gradient); per token of a batch the inputs and
outputs of every trained matrix and of one frozen layer; a chunk of logits three times in fp32.
"""

import resource
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn
from transformers import PreTrainedModel

from poe.data.packing import Batch, Rows
from poe.decoding.generation import REPLY_BATCH, REPLY_TOKENS
from poe.errors import OutputError
from poe.modeling.fork import ForkedLinear
from poe.modeling.placement import device_of
from poe.stages.recipe import Plan
from poe.training.checkpoints.files import list_checkpoints
from poe.training.checkpoints.identity import sample_rows
from poe.training.hidden_states.sources import HiddenSource
from poe.training.loss import chunk_rows
from poe.training.optim import POLAR_EXPRESS, MuonAdamW
from poe.training.run import RunRows, RunSettings, TrainedModel

CALIBRATION_TOKENS = 2048  # enough to measure the full speed of a network
LABELS = {
    "rows": "packed rows",
    "tokens": "tokens",
    "steps": "steps",
    "passes": "passes",
    "parameters": "parameters trained",
    "seconds": "training and validation",
    "evaluation_seconds": "held-out questions, at most",
    "memory_bytes": "memory, peak",
    "result_bytes": "result",
    "disk_bytes": "disk, at most",
}


@dataclass(frozen=True)
class Estimate:
    """What a whole run will take. `flops_per_token` counts a training step without Muon."""

    parameters: int  # trained numbers
    rows: int  # packed rows to train on
    steps: int
    passes: float  # through the packed rows
    tokens: int  # positions that go through the network in training, padding included
    flops_per_token: float
    seconds: float  # of all steps and validations
    evaluation_seconds: float  # of the answers to the held-out questions
    memory_bytes: int  # peak of the process (CPU), or allocated on the GPU
    result_bytes: int  # exact size of delta.safetensors; for a base the size of its weights
    disk_bytes: int  # peak size of the run's folder

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values: integers, and times and passes with three digits."""
        fractions = ("passes", "seconds", "evaluation_seconds")
        return {name: float(f"{v:.3g}") if name in fractions else round(v) for name, v in asdict(self).items()}


@dataclass(frozen=True)
class Weights:
    """The numbers of weights that multiply every token: frozen ones, trained ones, and those of the head."""

    below: int
    stage: int
    head: int
    forked: int = 0  # the base's weights in the layers of a low-rank fork, which multiply its tokens too
    replaced: int = 0  # those in a fork of full rank, which multiply only what the fork is not active on

    def reading(self, source: HiddenSource) -> int:
        """Return how many weights multiply every token of a row, without a gradient."""
        if source.cached:
            return 0
        return self.below + (self.forked + self.replaced if source.answers_only else 0)


def count_weights(model: PreTrainedModel, parameters: Iterable[tuple[str, nn.Parameter]]) -> Weights:
    """Count the weights of a model's matrices. Embeddings do not count, because they are looked up.

    Every layer is counted once, although a recurrent base runs it several times and a mixture of experts only in part.
    """
    trained = {id(p) for _, p in parameters}
    head: Any = model.get_output_embeddings()
    skipped = {id(p) for p in head.parameters()}
    skipped |= {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    forks = [module for module in model.modules() if isinstance(module, ForkedLinear)]
    forked, replaced = ({id(f.base.weight) for f in forks if f.is_full == full} for full in (False, True))
    numbers: Counter[str] = Counter()
    for parameter in model.parameters():
        if id(parameter) in skipped or parameter.ndim < 2:
            continue
        kinds = {"stage": trained, "forked": forked, "replaced": replaced}
        kind = next((name for name, members in kinds.items() if id(parameter) in members), "below")
        numbers[kind] += parameter.numel()
    return Weights(numbers["below"], numbers["stage"], head.weight.numel(), numbers["forked"], numbers["replaced"])


def trained_share(rows: Rows) -> float:
    """Return the share of positions with a label, measured on at most 64 rows spread evenly."""
    labels = [batch.labels for batch in sample_rows(rows)]
    return sum(int((part != -100).sum()) for part in labels) / sum(part.numel() for part in labels)


def estimate_run(
    plan: Plan,
    trained: TrainedModel,
    rows: RunRows,
    settings: RunSettings,
    optimizer: MuonAdamW,
    num_processes: int = 1,
) -> Estimate:
    """Return what a run will take; the module's docstring has the formulas.

    Some training rows go through `trained.sources.train` to measure its speed. If these states come from a cache, the
    layers below the stage cost nothing. The size of a result of unknown size is two bytes per weight. `num_processes`
    share the rows and the optimizer's state; the traffic between them is not counted.
    """
    model, parameters, source = trained.model, trained.parameters, trained.sources.train
    numbers = sum(p.numel() for _, p in parameters)
    timed_rows = rows.train.batch(0, max(1, min(CALIBRATION_TOKENS, plan.tokens_per_step) // plan.seq_len))
    timed_rows = Batch(*(part.to(parameters[0][1].device) for part in timed_rows))
    model.eval()  # without dropout the measurement draws no random numbers, so a resumed run continues exactly
    weights = count_weights(model, parameters)
    share = trained_share(rows.train)
    head, active = weights.head * share, share if source.answers_only else 1.0
    flops_per_token = 2 * weights.reading(source) + active * (6 * weights.stage + 4 * weights.forked) + 6 * head
    tokens = settings.num_steps * plan.tokens_per_step
    flops = tokens * flops_per_token + settings.num_steps * _muon_flops(optimizer)
    if rows.val is not None:
        num_validations = 1 + -(-settings.num_steps // plan.validation_every)
        val_tokens = num_validations * rows.val.num_rows * plan.seq_len
        flops += val_tokens * (forward_flops(weights, source, active) + 2 * weights.head * trained_share(rows.val))
    speed = network_speed(source, timed_rows, forward_flops(weights, source, active))
    all_weights = weights.below + weights.stage + weights.forked + weights.replaced
    state = _state_bytes(optimizer)
    weight_bytes = sum(p.numel() * p.element_size() for _, p in parameters)
    result_bytes = 2 * numbers if settings.result_bytes is None else settings.result_bytes
    return Estimate(
        parameters=numbers,
        rows=rows.train.num_rows,
        steps=settings.num_steps,
        passes=settings.num_steps * plan.tokens_per_step / (rows.train.num_rows * plan.seq_len),
        tokens=tokens,
        flops_per_token=flops_per_token,
        seconds=flops / num_processes / speed,
        evaluation_seconds=_evaluation_seconds(model, settings.questions, 2 * all_weights / speed),
        memory_bytes=_memory_bytes(model, parameters, plan, weight_bytes, state // num_processes),
        result_bytes=result_bytes,
        # While a checkpoint is written there is one more than are kept. It holds the current and the best weights.
        disk_bytes=(plan.keep_checkpoints + 1) * (2 * weight_bytes + state) + result_bytes,
    )


def check_disk_space(run: Path, needed: int) -> None:
    """Raise `OutputError` unless `needed` bytes fit on the disk. The run's own checkpoints count as free space."""
    checkpoint_bytes = sum(map(folder_bytes, list_checkpoints(run)))
    existing = next(folder for folder in (run.absolute(), *run.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free + checkpoint_bytes
    if free < needed:
        raise OutputError(
            f"Not enough disk for {run}: this run writes up to {needed / 2**20:,.0f} MiB, {free / 2**20:,.0f} MiB are "
            "free. Free some space, or choose another folder with --out."
        )


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def forward_flops(weights: Weights, source: HiddenSource, active: float) -> float:
    """Return the operations per token of a forward pass without the head; a fork acts on a share `active` of tokens."""
    return 2 * weights.reading(source) + 2 * active * (weights.stage + weights.forked)


def network_speed(hidden: Callable[[Batch], torch.Tensor], rows: Batch, flops_per_token: float) -> float:
    """Return the operations per second of a forward pass of `rows` through the network, without its head.

    The network itself is measured. The speed of a single matrix product does not predict that of a small model, where
    norms and attention take as long as the matrices, or that of a recurrent one. A run that compiles is measured
    without: passes without a gradient would have to be compiled too, for this alone.
    """
    return rows.input_ids.numel() * flops_per_token / fastest_seconds(lambda: hidden(rows), rows.input_ids.device)


def fastest_seconds(action: Callable[[], object], device: torch.device) -> float:
    """Return the time of the fastest of three calls, without gradients; the first one includes preparations."""
    fastest = float("inf")
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for _ in range(3):
            _synchronize(device)
            started = time.perf_counter()
            action()
            _synchronize(device)
            fastest = min(fastest, time.perf_counter() - started)
    return fastest


def _evaluation_seconds(model: PreTrainedModel, questions: Mapping[str, list[int]], token_seconds: float) -> float:
    """Return how long the base and the stage take to answer, if every reply is as long as it may be."""
    prompt_tokens = replies = 0
    for lengths in questions.values():
        ordered = sorted(lengths)
        batches = [ordered[i : i + REPLY_BATCH] for i in range(0, len(ordered), REPLY_BATCH)]
        prompt_tokens += sum(max(batch) * len(batch) for batch in batches)
        replies += len(batches)
    if not replies:
        return 0.0
    rows = min(REPLY_BATCH, max(map(len, questions.values())))
    longest = max(map(max, questions.values()))
    step = _decoding_step_seconds(model, rows, longest)
    return 2 * (prompt_tokens * token_seconds + replies * REPLY_TOKENS * step)


def _decoding_step_seconds(model: PreTrainedModel, rows: int, cached_tokens: int) -> float:
    """Return the time of one token for each of `rows` replies after prompts of `cached_tokens`.

    The matrices are read once for all rows, so that part is measured on all of them. Keys and values belong to each row
    and can take longer than the matrices. Two rows show what they add, because those of all rows may not fit yet.
    """
    device = device_of(model.get_input_embeddings())
    ids = torch.zeros((rows, 1), dtype=torch.int64, device=device)
    two = ids[:1].expand(2, 1)
    with torch.no_grad():
        prompts = two.expand(2, cached_tokens)
        cache = model(input_ids=prompts, use_cache=True, logits_to_keep=1).past_key_values
    together = fastest_seconds(lambda: model(input_ids=ids, use_cache=False), device)
    alone = fastest_seconds(lambda: model(input_ids=two, use_cache=False), device)
    cached = fastest_seconds(lambda: model(input_ids=two, past_key_values=cache, use_cache=True), device)
    return together + rows / 2 * max(0.0, cached - alone)


def memory_now(device: torch.device) -> int:
    """Return the bytes that this process holds now: resident on the CPU, allocated by tensors on a GPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, ValueError):  # not Linux
        return memory_peak(device)


def memory_peak(device: torch.device) -> int:
    """Return the most bytes that this process has held: resident on the CPU, allocated by tensors on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def compare_with_estimate(estimate: dict[str, Any], actual: dict[str, Any]) -> dict[str, float]:
    """Return the ratio of the actual to the estimated value, for every quantity that has both."""
    return {name: round(actual[name] / estimate[name], 3) for name in actual if estimate.get(name)}


def estimate_table(estimate: dict[str, Any], actual: dict[str, Any] | None = None) -> Table:
    """Return a table of an estimate, with columns for the actual values if they are given."""
    table = Table(title="plan" if actual is None else "plan and outcome", title_justify="left")
    for column in ("", "estimate", *(() if actual is None else ("actual", "ratio"))):
        table.add_column(column, justify="right" if column else "left")
    ratios = {} if actual is None else compare_with_estimate(estimate, actual)
    for name, label in LABELS.items():
        if not estimate.get(name):  # a run without questions
            continue
        row = [label, format_quantity(name, estimate[name])]
        if actual is not None:
            row += [
                format_quantity(name, actual[name]) if name in actual else "",
                f"{ratios[name]:.2f}" if name in ratios else "",
            ]
        table.add_row(*row)
    return table


def estimate_line(estimate: dict[str, Any]) -> str:
    """Return an estimate as one line for a log."""
    return "plan: " + ", ".join(
        f"{label} {format_quantity(name, estimate[name])}" for name, label in LABELS.items() if estimate.get(name)
    )


def format_quantity(name: str, value: float) -> str:
    """Format a quantity of an estimate with its unit."""
    if name.endswith("_bytes"):
        return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.2f} MB"
    if name.endswith("seconds"):
        return f"{value:.0f} s" if value < 120 else f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"
    return f"{value:,}" if isinstance(value, int) else f"{value:.1f}"


def _muon_flops(optimizer: MuonAdamW) -> float:
    """Return the operations of one step's orthogonalization.

    An iteration takes two products with the matrix and one with its Gram matrix.
    """
    flops = 0.0
    for group in optimizer.param_groups:
        if group["kind"] == "muon":
            for parameter in group["params"]:
                rows, cols = parameter.shape
                smaller_side = min(rows, cols)
                flops += len(POLAR_EXPRESS) * (4 * rows * cols * smaller_side + 2 * smaller_side**3)
    return flops


def _state_bytes(optimizer: MuonAdamW) -> int:
    numbers = 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            moments = 1 if group["kind"] == "muon" else 2
            numbers += parameter.numel() * (moments + (parameter.element_size() < 4))
    return 4 * numbers


def _memory_bytes(
    model: PreTrainedModel, parameters: list[tuple[str, nn.Parameter]], plan: Plan, weight_bytes: int, state_bytes: int
) -> int:
    device = parameters[0][1].device
    trained = {id(p) for _, p in parameters}
    head: Any = model.get_output_embeddings()
    size = parameters[0][1].element_size()
    kept, frozen = 0, [0]  # elements per token: of all trained layers, of each frozen layer
    for layer in (m for name, m in model.named_modules() if name.rpartition(".")[2].isdigit()):
        matrices = [m for m in layer.modules() if isinstance(m, nn.Linear)]
        elements = sum(m.in_features + m.out_features for m in matrices)
        if any(id(p) in trained for p in layer.parameters()):
            kept += elements
        else:
            frozen.append(elements)
    rows = min(plan.max_tokens_per_batch, plan.tokens_per_step) // plan.seq_len
    tokens = max(rows, 1) * plan.seq_len
    logits = min(chunk_rows(head.weight), tokens) * head.weight.shape[0]
    activations = tokens * (kept + max(frozen)) * size + 3 * 4 * logits
    folded = head.weight.numel() * (8 + (0 if id(head.weight) in trained else head.weight.element_size()))
    return max(memory_peak(device), memory_now(device) + 2 * weight_bytes + state_bytes + folded + activations)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
