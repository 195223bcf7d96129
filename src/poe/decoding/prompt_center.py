"""How like a prompt is to those that a stage was trained on: what `stage="auto"` chooses by.

The base reads the prompt, and the mean of its last hidden states is a direction. A stage keeps the mean direction of
its training prompts, the center, and how far they are from it. A prompt belongs to the nearest center, as in
nearest-class-mean classifiers (Mensink et al., 2013), and to the base if it is beyond the edge of every stage.
The stage itself reads nothing, so this works for forks that are active on the answer, too.
"""

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from poe.decoding.branches import count_positions
from poe.decoding.strategy import Expert
from poe.errors import DeltaError
from poe.modeling.families import family_of, is_prefix_lm
from poe.modeling.placement import device_of
from poe.modeling.stage import Stage

KEY = "center"  # in the stage's prompt format, which `save_stage` writes
MIN_PROMPTS = 8  # fewer say little about where others are
_INSIDE, _SLACK = 0.95, 1.25  # the edge is a quarter farther away than 19 of 20 training prompts are
_NEAREST_EDGE = 0.99  # prompts that are all alike leave room for others


@dataclass(frozen=True)
class PromptCenter:
    """The mean direction (D,) of a stage's training prompts, and the cosine similarity where other prompts begin."""

    direction: Tensor
    edge: float

    def score(self, directions: Tensor) -> Tensor:
        """Return for directions (B, D) their cosine similarity (B,) to the center, less 1 beyond the edge."""
        similarity = directions @ self.direction.to(directions)
        return similarity - (similarity < self.edge).to(similarity)


@torch.no_grad()
def read_directions(base: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Return the mean of the base's last hidden states over each prompt (B, T), of length one: (B, D) in fp32."""
    device = device_of(base.get_input_embeddings())
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    ids, mask = input_ids.to(device), mask.to(device)
    inputs: dict[str, Any] = {"attention_mask": mask, "position_ids": count_positions(mask), "use_cache": False}
    if is_prefix_lm(base.config):
        inputs["token_type_ids"] = mask
    states = family_of(base).backbone_of(base)(input_ids=ids, **inputs).last_hidden_state.float()
    real = rearrange(mask, "b t -> b t 1").to(states)
    return functional.normalize((states * real).sum(1) / real.sum(1).clamp_min(1), dim=-1)


def fit_prompt_center(base: PreTrainedModel, stage: Stage, prompts: Sequence[Sequence[int]]) -> PromptCenter | None:
    """Measure where the training prompts of a stage lie, and keep it in the stage's prompt format.

    `prompts` are token ids; dozens are enough. Returns None, and changes nothing, if there are fewer than
    `MIN_PROMPTS`, or if the base computes no numbers for them.
    """
    prompts = [prompt for prompt in prompts if len(prompt)]
    if len(prompts) < MIN_PROMPTS:
        return None
    directions = torch.cat([read_directions(base, torch.tensor([list(prompt)])) for prompt in prompts])
    if not directions.isfinite().all():
        return None
    center = functional.normalize(directions.mean(0), dim=0)
    distance = _SLACK * float(torch.quantile(1 - directions @ center, _INSIDE))
    edge = max(-1.0, min(1 - distance, _NEAREST_EDGE))
    stage.prompt = {**(stage.prompt or {}), KEY: {"direction": _encode(center), "edge": round(edge, 4)}}
    return read_center(stage.prompt)


def read_center(prompt: Any) -> PromptCenter | None:
    """Return the center in a stage's prompt format, or None. Raises `DeltaError` for one that is damaged."""
    content = prompt.get(KEY) if isinstance(prompt, Mapping) else None
    if content is None:
        return None
    try:
        direction, edge = _decode(content["direction"]), float(content["edge"])
    except (KeyError, TypeError, ValueError, OverflowError):  # binascii.Error is a ValueError
        direction, edge = torch.zeros(0), math.nan
    length = float(direction.norm())
    if not (-1 <= edge <= _NEAREST_EDGE and math.isfinite(length) and length > 0):
        raise DeltaError(
            f"{KEY} in the stage's prompt should have a direction (fp16 numbers in base64) and an edge from -1 to "
            f"{_NEAREST_EDGE}, got {str(content)[:60]!r}. Train or load the stage again."
        )
    return PromptCenter(direction / length, edge)


def find_centers(experts: Sequence[Expert], width: int) -> dict[str, PromptCenter] | None:
    """Return the center of each stage among `experts`, by name; None if a stage has none.

    Raises `DeltaError` for one that is damaged or does not fit a base of `width`.
    """
    centers = {}
    for expert in experts:
        if expert.stage is None:
            continue
        center = read_center(expert.stage.prompt)
        if center is None:
            return None
        if len(center.direction) != width:
            raise DeltaError(
                f"{KEY} in the prompt of stage {expert.name!r} has {len(center.direction)} numbers, but the base has "
                f"{width}. Train or load the stage again."
            )
        centers[str(expert.name)] = center
    return centers


def _encode(direction: Tensor) -> str:
    return base64.b64encode(direction.cpu().numpy().astype("<f2").tobytes()).decode("ascii")


def _decode(text: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text, validate=True), dtype="<f2").astype(np.float32))
