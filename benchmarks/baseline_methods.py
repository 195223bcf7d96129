"""The training methods of the baseline kit: how each is trained, saved, and opened again.

A rate is AdamW's, or Muon's for the matrices of a stage (its head then has a tenth of it with AdamW). Every method has
three rates, of which validation rows choose one. `chain` is a fork on a fork, `fork-new` new layers on a fork, and
`product` two sibling forks with equal weights: each of the two learns from one half of the steps, so that all methods
see the same tokens. `fork-late-all` is active on the answer, and on all tokens in the last quarter of its steps, and
`fork-cached` keeps what the base reads, for further passes over the same rows.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import arms
import torch
from torch import Tensor
from torch.nn import functional
from training_gpu import Clock
from transformers import PreTrainedModel

from poe import Cascade
from poe.data.packing import IGNORED, Batch
from poe.modeling.families import logits_of
from poe.modeling.fingerprint import fingerprint_files
from poe.stages.copying import find_copying_layer
from poe.training.hidden_states.sources import make_source
from poe.training.schedule import lr_factor

FIRST, SECOND = "first", "second"  # the names of stages, and of their folders
STAGE_LAYERS = 4
TWO_STAGES = ("chain", "product", "new-on-fork")
NEW_LAYERS_RATE = 0.01  # Muon's, of the new layers on a fork, whose rate is the one that is swept


@dataclass(frozen=True)
class Method:
    """A way to train: its kind, the rates to try, and the options of its arm."""

    kind: str
    rates: tuple[float, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


LORA_RATES, FORK_RATES, MUON_RATES = (1e-3, 3e-3, 6e-3), (3e-3, 6e-3, 1.2e-2), (0.003, 0.01, 0.03)
METHODS = {
    "base": Method("base"),
    "lora": Method("lora", LORA_RATES),
    "fork": Method("fork", FORK_RATES),
    "stage": Method("stage", MUON_RATES, {"head": "low_rank"}),
    "fork-full": Method("fork", (1e-4, 2e-4, 4e-4), {"rank": None}),
    "fork-all": Method("fork", FORK_RATES, {"active": "all"}),
    "fork-cached": Method("fork", FORK_RATES, {"cached": True}),
    "fork-late-all": Method("late", FORK_RATES),
    "fork-rank-4": Method("fork", FORK_RATES, {"rank": 4}),
    "fork-rank-32": Method("fork", FORK_RATES, {"rank": 32}),
    "fork-head": Method("fork", FORK_RATES, {"head": "low_rank"}),
    "fork-new": Method("new-on-fork", FORK_RATES, {"active": "all"}),
    "full": Method("full", (3e-5, 1e-4, 3e-4)),
    "lora-top": Method("lora", LORA_RATES, {"top": True}),
    "last": Method("last", (1e-4, 3e-4, 1e-3)),
    "chain": Method("chain", FORK_RATES),
    "product": Method("product", FORK_RATES),
    "stage-dense": Method("stage", MUON_RATES, {"head": "dense"}),
    "stage-no-head": Method("stage", MUON_RATES, {"head": "none"}),
    "stage-copied": Method("stage", (0.0015, 0.005, 0.015), {"head": "low_rank", "copied": True}),
    "stage-adamw": Method("stage", (3e-4, 1e-3, 3e-3), {"head": "low_rank", "adamw": True}),
}


def open_base(method: Method, base: str, dtype: str, device: str) -> Cascade:
    """Open the base on which a method trains. Full fine-tuning trains weights in fp32, under autocast."""
    own = "float32" if method.kind == "full" else dtype
    return Cascade.from_pretrained(base, dtype=own, device_map=None if device == "cpu" else {"": device})


def train(
    method: Method, cascade: Cascade, settings: arms.Settings, length: int, steps: int, batch: Callable[[int], Batch]
) -> tuple[arms.Arm, list[float], list[float]]:
    """Train a method for `steps` steps; return its last arm, and the CPU and wall seconds of every step.

    The rate rises over a twentieth of the steps, and then falls to zero. `batch(step)` are the rows of a step.
    """
    # halves of the steps, each with a stage of its own
    parts = [steps - steps // 2, steps // 2] if method.kind in TWO_STAGES else [steps]
    clock, cpu_seconds, done = Clock(settings.device), [], 0
    for number, count in enumerate(parts):
        arm = build_arm(method, cascade, settings, length, number)
        for step in range(count):
            rows = batch(done + step)
            if method.kind == "late" and step == count - count // 4:
                arm = act_on_all(arm, method, cascade, settings, length)
            arm.scale_rates(lr_factor(step, count, initial_lr_factor=0.0, warmup_ratio=0.05, warmdown_ratio=0.95))
            clock.begin()
            started = time.process_time()
            arm.step(rows)
            cpu_seconds.append(time.process_time() - started)
            clock.end()
        done += count
        for stage in cascade.stages.values():
            stage.requires_grad_(False)
    return arm, cpu_seconds, clock.seconds


def build_arm(method: Method, cascade: Cascade, settings: arms.Settings, length: int, number: int = 0) -> arms.Arm:
    """Return the arm of a method, or of its stage `number`."""

    def make_base() -> PreTrainedModel:
        return cascade.base.requires_grad_(True)

    options = dict(method.options)
    if method.kind == "full":
        return arms.full(make_base, length, settings)
    if method.kind == "last":
        return arms.last_layers(make_base, length, settings)
    if method.kind == "lora":
        first = settings.attach_at if options.get("top") else 0
        first = find_copying_layer(cascade.base) if first == "auto" else int(first)
        return arms.lora(make_base, length, settings, first)
    cascade.base.requires_grad_(False)
    if method.kind == "stage":
        settings = dataclasses.replace(settings, adamw=options.pop("adamw", False))
        return arms.stage(make_base, length, settings, cascade=cascade, name=FIRST, **options)
    name, parent = (SECOND if number else FIRST), (FIRST if number and method.kind != "product" else None)
    settings = dataclasses.replace(settings, seed=settings.seed + 1000 * number)
    if number and method.kind == "new-on-fork":
        settings = dataclasses.replace(settings, stage_layers=2, matrix_lr=NEW_LAYERS_RATE)
        return arms.stage(make_base, length, settings, "none", cascade=cascade, name=name, parent=parent)
    return arms.fork(make_base, length, settings, cascade=cascade, name=name, parent=parent, **options)


@torch.no_grad()
def act_on_all(arm: arms.Arm, method: Method, cascade: Cascade, settings: arms.Settings, length: int) -> arms.Arm:
    """Return an arm that goes on with the fork of `arm` and its optimizer, but is active on all tokens."""
    cascade.remove_stage(FIRST)
    options = {**method.options, "active": "all"}
    with torch.enable_grad():
        later = build_arm(dataclasses.replace(method, options=options), cascade, settings, length)
    for new, old in zip(later.parameters, arm.parameters, strict=True):
        new.copy_(old)
    later.optimizer.load_state_dict(arm.optimizer.state_dict())
    return later


def save(method: Method, cascade: Cascade, arm: arms.Arm, folder: Path) -> int:
    """Write the artifact of a trained method in bf16, and return the bytes of its weights."""
    if method.kind == "lora":
        arm.adapter.to(torch.bfloat16).save_pretrained(folder, save_embedding_layers=False)
    elif method.kind in ("full", "last"):
        base = cascade.base
        base.config.tie_word_embeddings = base.get_output_embeddings().weight is base.get_input_embeddings().weight
        base.to(torch.bfloat16).save_pretrained(folder)
        cascade.tokenizer.save_pretrained(folder)
    else:
        for name in cascade.stages:
            cascade.save_stage(name, folder / name, training={})
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


class TrainedMethod:
    """A trained method as an evaluation takes a cascade: `model` is always its model, `stage` its stage, if it has one.

    LoRA's weights are merged into the base. `folder` has the artifact, None for the base alone.
    """

    def __init__(self, method: Method, folder: Path | None, base: str, dtype: str, device: str) -> None:
        place: dict[str, Any] = {"dtype": dtype, "device_map": None if device == "cpu" else {"": device}}
        self.stage: str | None = None
        self.is_product = method.kind == "product"
        if method.kind in ("full", "last"):
            self._cascade = Cascade.from_pretrained(str(folder), **place)
        elif method.kind == "lora":
            from peft import PeftModel

            opened = Cascade.from_pretrained(base, **place)
            merged = PeftModel.from_pretrained(opened.base, str(folder)).merge_and_unload()
            self._cascade = Cascade(merged, opened.tokenizer, source=opened.base_source)
        elif folder is None:
            self._cascade = Cascade.from_pretrained(base, **place)
        else:
            last = SECOND if method.kind in ("chain", "new-on-fork") else FIRST
            self._cascade = Cascade.from_pretrained(folder / last, base=base, **place)
            self.stage = self._cascade.active
            if self.is_product:
                self._cascade.load_stage(folder / SECOND)
        self._model: PreTrainedModel = (
            self._cascade.compose({FIRST: 0.5, SECOND: 0.5}) if self.is_product else self._cascade.model(self.stage)
        )
        self._model.eval()
        self._source = None if self.is_product else make_source(self._cascade, self.stage)
        files = [] if folder is None else sorted(folder.rglob("*.safetensors"))
        names = [self._cascade.base_source.fingerprint, *(fingerprint_files([file]) for file in files)]
        self.base_source = dataclasses.replace(self._cascade.base_source, known_fingerprint=" ".join(names))

    def model(self, stage: str | None = None) -> PreTrainedModel:
        """Return the model of the method."""
        return self._model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cascade, name)

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """Return the logits (N, V), fp32, at the tokens of packed rows that have a label, with teacher forcing."""
        labeled = batch.labels != IGNORED
        if self.is_product:
            labels = functional.pad(batch.labels[:, :-1], (1, 0), value=IGNORED)  # not shifted
            output = self._model(
                input_ids=batch.input_ids, position_ids=batch.position_ids, labels=labels, use_cache=False
            )
            return output.logits[labeled].float()
        *_, prediction = self._source.predictions(batch)
        states = prediction.hidden[labeled].to(prediction.weight.dtype)
        found: Tensor = logits_of(self._model.config)(
            functional.linear(states, prediction.weight, prediction.bias).float()
        )
        return found
