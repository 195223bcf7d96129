"""Calibrate adaptive depth: find thresholds on half of the rows and measure their agreement on the other half."""

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from poe.decoding.adaptive import CONFIDENCES, Confidence, ConfidenceMeter, with_adaptive_depth
from poe.decoding.segments import SegmentedModel, States, list_exits, segment_model
from poe.decoding.strategy import Expert, Strategy
from poe.errors import DecodingError
from poe.files.output import write_file
from poe.modeling.families import family_of

MARGIN = 1.65  # standard errors above the target: with 95 % probability other tokens of the same kind reach the target
# Exits are used only if a token then reads at most this share of the weights. The rest pays for the extra passes.
MAX_COST = 0.85


@dataclass(frozen=True)
class AdaptiveDepth(Strategy):
    """Let each token leave at the first exit with enough confidence. `calibrate_depth` finds the values for one model.

    `depths` are the exits in layers, and `thresholds` are their minimum confidence of kind `confidence`. A threshold is
    infinite if no token leaves there and the exit only counts for the "agreement" of the next one. Both are empty if no
    exit pays. `full` is full depth in layers. `base` is the fingerprint of the base, and `stage` the name of the stage.
    `target` is the requested agreement. On held-out rows, `agreement` is the share of tokens that equal full depth's
    most likely token, and `shares` are the shares of the tokens that left at each exit, full depth last.
    """

    depths: tuple[int, ...]
    thresholds: tuple[float, ...]
    confidence: Confidence
    full: int
    target: float
    agreement: float
    shares: tuple[float, ...]
    base: str
    stage: str | None = None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the values as JSON. Raises `OutputError` if the file cannot be written."""
        record = dataclasses.asdict(self)
        record["thresholds"] = [None if math.isinf(threshold) else threshold for threshold in self.thresholds]
        write_file(Path(path), json.dumps(record, indent=2) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "AdaptiveDepth":
        """Read a file that `save` wrote. Raises `DecodingError` for any other file."""
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8"))
            depths = tuple(map(int, record["depths"]))
            thresholds = tuple(math.inf if value is None else float(value) for value in record["thresholds"])
            shares = tuple(map(float, record["shares"]))
            numbers = {name: float(record[name]) for name in ("target", "agreement")}
            consistent = len(depths) == len(thresholds) == len(shares) - 1 and record["confidence"] in CONFIDENCES
            if not consistent or set(record) != {field.name for field in dataclasses.fields(cls)}:
                raise ValueError("its fields do not fit together")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DecodingError(
                f"{path} is not a saved adaptive depth ({error}): expected a file that `save` wrote."
            ) from error
        return cls(**{**record, **numbers, "depths": depths, "thresholds": thresholds, "shares": shares})

    def build_model(self, expert: Expert) -> PreTrainedModel:
        """Return the expert's model with a forward pass that leaves early.

        Raises `DecodingError` if the thresholds were found for another model.
        """
        fingerprint = expert.fingerprint_base()
        if (fingerprint, expert.name) != (self.base, self.stage):
            raise DecodingError(
                f"These thresholds are for {self.stage or 'the base'} on {self.base[:12]}, got "
                f"{expert.name or 'the base'} on {fingerprint[:12]}: find its thresholds with calibrate_depth."
            )
        if not self.depths:
            return expert.model
        return with_adaptive_depth(expert.model, segment_model(expert, self.depths), self.thresholds, self.confidence)


@torch.no_grad()
def calibrate_depth(
    expert: Expert, rows: Sequence[Sequence[int]], *, agreement: float = 0.99, confidence: Confidence = "margin"
) -> AdaptiveDepth:
    """Find exits and thresholds with which `agreement` of the tokens equal full depth's most likely tokens.

    Every second row (token ids) is for finding them, the others are for measuring. A token leaves at an exit if its
    confidence reaches the threshold. Each exit gets the lowest threshold at which at most a common share of the leaving
    tokens is wrong; that share is as high as the target and a statistical margin allow. Exits are added while they
    lower the number of weights that a token reads.
    """
    if not 0 < agreement <= 1:
        raise DecodingError(f"agreement must be a share of tokens above 0 and at most 1, got {agreement!r}.")
    rows = [row for row in rows if len(row)]
    if len(rows) < 2:
        raise DecodingError(
            f"Thresholds are found on half of the rows and measured on the others: expected at least two rows of token "
            f"ids, got {len(rows)}."
        )
    ConfidenceMeter(confidence)  # raises for an unknown kind before any work
    fingerprint = expert.fingerprint_base()
    depths = list_exits(expert)
    segmented = segment_model(expert, depths)
    calibration, held_out = (
        ExitPredictions.collect(segmented, rows[half::2], confidence, expert.model.device) for half in (0, 1)
    )
    cost_of = _Cost(expert)
    target = min(1.0, agreement + MARGIN * math.sqrt(agreement * (1 - agreement) / calibration.correct.shape[1]))
    chosen: list[int] = []
    thresholds: list[float] = []
    cost = cost_of([], [1.0]) * MAX_COST
    while True:
        trials = []
        others = [index for index in range(len(depths)) if index not in chosen]
        # The agreement of exits needs two of them.
        added_at_once = 2 if confidence == "agreement" and not chosen else 1
        for added in itertools.combinations(others, added_at_once):
            exits = sorted([*chosen, *added])
            trial_thresholds = find_thresholds(calibration, exits, target)
            _, shares = measure_exits(calibration, exits, trial_thresholds)
            trials.append((cost_of([depths[i] for i in exits], shares), exits, trial_thresholds))
        if not trials or min(trials)[0] >= cost:
            break
        cost, chosen, thresholds = min(trials)
    agreed, shares = measure_exits(held_out, chosen, thresholds)
    return AdaptiveDepth(
        depths=tuple(depths[i] for i in chosen),
        thresholds=tuple(thresholds),
        confidence=confidence,
        full=segmented.depths[-1],
        target=agreement,
        agreement=agreed,
        shares=tuple(shares),
        base=fingerprint,
        stage=expert.name,
    )


class ExitPredictions:
    """The predictions of E exits and of full depth for N tokens.

    `tokens` (E + 1, N) are the most likely tokens, full depth last. `correct` (E, N) is true where an exit's token
    equals full depth's. `confidences` (E, N) is None for "agreement", which depends on the chosen exits.
    """

    def __init__(self, tokens: torch.Tensor, confidences: torch.Tensor | None) -> None:
        self.tokens, self._confidences = tokens, confidences
        self.correct = tokens[:-1] == tokens[-1]

    @classmethod
    def collect(
        cls, segmented: SegmentedModel, rows: Sequence[Sequence[int]], kind: Confidence, device: torch.device
    ) -> "ExitPredictions":
        """Run the model over rows of token ids, one at a time, and collect the predictions at every token."""
        tokens, confidences = [], []
        for row in rows:
            ids = torch.tensor([list(row)], device=device)
            positions = torch.arange(ids.shape[1], device=device)[None]
            states: States = ()
            row_tokens, row_confidences = [], []
            for index, segment in enumerate(segmented.segments):
                states, hidden = segment(states, ids, positions)
                logits = segmented.logits(index, hidden[0])
                row_tokens.append(logits.argmax(-1).cpu())
                if kind != "agreement" and index < len(segmented.segments) - 1:
                    row_confidences.append(ConfidenceMeter(kind)(logits).cpu())
            tokens.append(torch.stack(row_tokens))
            confidences.append(torch.stack(row_confidences) if row_confidences else torch.empty(0, ids.shape[1]))
        return cls(torch.cat(tokens, 1), torch.cat(confidences, 1) if kind != "agreement" else None)

    def confidences(self, exits: Sequence[int]) -> list[torch.Tensor]:
        """Return the confidences (N) of each of these exits."""
        if self._confidences is not None:
            return [self._confidences[index] for index in exits]
        counts: list[torch.Tensor] = []
        for previous, index in zip([None, *exits], exits, strict=False):
            ones = torch.ones(self.tokens.shape[1])
            if previous is None:
                counts.append(ones)
            else:
                counts.append(torch.where(self.tokens[previous] == self.tokens[index], counts[-1] + 1, ones))
        return counts


def find_thresholds(predictions: ExitPredictions, exits: Sequence[int], agreement: float) -> list[float]:
    """Return the lowest thresholds with which `agreement` of all tokens are correct, equally strict at every exit."""
    low, high = 0.0, 1.0  # bounds of the share of the tokens leaving at an exit that may be wrong
    best = _thresholds_for(predictions, exits, low)
    if agreement < 1:
        for _ in range(12):
            middle = (low + high) / 2
            thresholds = _thresholds_for(predictions, exits, middle)
            if measure_exits(predictions, exits, thresholds)[0] >= agreement:
                low, best = middle, thresholds
            else:
                high = middle
    return best


def _thresholds_for(predictions: ExitPredictions, exits: Sequence[int], wrong_share: float) -> list[float]:
    """Return each exit's lowest threshold with which at most `wrong_share` of the tokens leaving there are wrong."""
    remaining = torch.ones(predictions.correct.shape[1], dtype=torch.bool)
    thresholds = []
    for index, confidence in zip(exits, predictions.confidences(exits), strict=True):
        order = confidence[remaining].argsort(descending=True)
        ranked = confidence[remaining][order]
        wrong = (~predictions.correct[index][remaining][order]).cumsum(0)
        leaving = torch.arange(1, len(ranked) + 1)
        # Tokens of equal confidence leave together, so only the last of them can be the threshold.
        last_of_equals = torch.cat([ranked[1:] < ranked[:-1], torch.ones(1, dtype=torch.bool)])[: len(ranked)]
        allowed = ((wrong <= wrong_share * leaving) & last_of_equals).nonzero()
        threshold = float(ranked[allowed[-1, 0]]) if len(allowed) else math.inf
        thresholds.append(threshold)
        remaining &= ~(confidence >= threshold)
    return thresholds


def measure_exits(
    predictions: ExitPredictions, exits: Sequence[int], thresholds: Sequence[float]
) -> tuple[float, list[float]]:
    """Return the share of correct tokens, and the shares of the tokens that leave at each exit, full depth last."""
    count = predictions.correct.shape[1]
    remaining = torch.ones(count, dtype=torch.bool)
    correct, shares = 0, []
    for index, confidence, threshold in zip(exits, predictions.confidences(exits), thresholds, strict=True):
        leaving = remaining & (confidence >= threshold)
        correct += int(predictions.correct[index][leaving].sum())
        shares.append(float(leaving.sum()) / count)
        remaining &= ~leaving
    return (correct + int(remaining.sum())) / count, [*shares, float(remaining.sum()) / count]


class _Cost:
    """The mean number of weights that a token reads if tokens leave at given depths in given shares."""

    def __init__(self, expert: Expert) -> None:
        family = family_of(expert.base)
        self._layers = [sum(map(_count_read_weights, layer.modules())) for layer in family.layers_of(expert.model)]
        head: Any = family.head_of(expert.model)
        self._head = head.weight.numel()

    def __call__(self, depths: Sequence[int], shares: Sequence[float]) -> float:
        cost, remaining = 0.0, 1.0
        for start, end, share in zip([0, *depths], [*depths, len(self._layers)], shares, strict=True):
            cost += remaining * (sum(self._layers[start:end]) + self._head)
            remaining -= share
        return cost


def _count_read_weights(module: nn.Module) -> int:
    """Return how many of a module's own weights a token reads. Of an embedding it reads one row, counted as none."""
    return 0 if isinstance(module, nn.Embedding) else sum(p.numel() for p in module.parameters(recurse=False))
