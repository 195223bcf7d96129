"""How early each token may leave: thresholds found on half of the data, and what they do on the other half."""

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from poe.decoding.adaptive import CONFIDENCES, Confidence, Confidences, leaves_early
from poe.decoding.segments import SegmentedModel, list_exits, segment_model
from poe.decoding.strategy import Expert, Strategy
from poe.errors import DecodingError, OutputError
from poe.modeling.families import family_of

CERTAIN = 1.65  # standard errors: with 95 % probability other tokens of the same kind agree as often as was asked for
# With exits a token must read at most this share of the weights: what parts and wider passes cost is not counted.
WORTH = 0.85


@dataclass(frozen=True)
class AdaptiveDepth(Strategy):
    """Where tokens leave and how sure an exit must be, for one model; `generate(strategy=...)` takes it.

    `depths` are the exits in layers and `thresholds` their least confidence of kind `confidence` (infinite where none
    leaves, and the exit only counts for the agreement of the next); both are empty where no exit would pay. `full` is
    full depth, `base` the fingerprint of the base and `stage` the name of the stage that they were found for. On rows
    that had no part in finding them, `agreement` is the share of tokens that are full depth's likeliest and `shares`
    those of the tokens that left at each exit, the top last; `target` was asked for.
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
        """Write it as JSON; raises `OutputError`."""
        held = dataclasses.asdict(self)
        held["thresholds"] = [None if math.isinf(threshold) else threshold for threshold in self.thresholds]
        try:
            scratch = File(f"{path}.part")
            scratch.write_text(json.dumps(held, indent=2) + "\n", encoding="utf-8")
            os.replace(scratch, path)
        except OSError as error:
            raise OutputError(f"{path} cannot be written: {error.strerror or error}.") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "AdaptiveDepth":
        """Read what `save` wrote; raises `DecodingError` for anything else."""
        try:
            held = json.loads(File(path).read_text(encoding="utf-8"))
            depths = tuple(map(int, held["depths"]))
            thresholds = tuple(math.inf if value is None else float(value) for value in held["thresholds"])
            shares = tuple(map(float, held["shares"]))
            numbers = {name: float(held[name]) for name in ("target", "agreement")}
            sound = len(depths) == len(thresholds) == len(shares) - 1 and held["confidence"] in CONFIDENCES
            if not sound or set(held) != {field.name for field in dataclasses.fields(cls)}:
                raise ValueError("its fields do not fit together")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DecodingError(
                f"{path} is not a saved adaptive depth ({error}): expected what AdaptiveDepth.save wrote."
            ) from error
        return cls(**{**held, **numbers, "depths": depths, "thresholds": thresholds, "shares": shares})

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
        return leaves_early(expert.model, segment_model(expert, self.depths), self.thresholds, self.confidence)


@torch.no_grad()
def calibrate_depth(
    expert: Expert, rows: Sequence[Sequence[int]], *, agreement: float = 0.99, confidence: Confidence = "margin"
) -> AdaptiveDepth:
    """Find exits and thresholds with which `agreement` of the tokens are the likeliest ones of full depth.

    Every second of `rows` (token ids) is for finding them, the others for measuring. All tokens of an exit that are
    surer than its threshold leave there; the thresholds are the lowest at which no more than a common share of those
    that leave are wrong, that share as high as the target, and a margin for chance, allow. Exits are added while they
    save reading of weights.
    """
    if not 0 < agreement <= 1:
        raise DecodingError(f"agreement must be a share of tokens above 0 and at most 1, got {agreement!r}.")
    rows = [row for row in rows if len(row)]
    if len(rows) < 2:
        raise DecodingError(
            f"Thresholds are found on half of the rows and measured on the others: expected at least two rows of token "
            f"ids, got {len(rows)}."
        )
    Confidences(confidence)  # refuses an unknown kind before any work
    fingerprint = expert.fingerprint_base()
    depths = list_exits(expert)
    path = segment_model(expert, depths)
    finding, measuring = (_Said.of(path, rows[half::2], confidence, expert.model.device) for half in (0, 1))
    costs = _Costs(expert)
    strict = min(1.0, agreement + CERTAIN * math.sqrt(agreement * (1 - agreement) / finding.right.shape[1]))
    chosen: list[int] = []
    thresholds: list[float] = []
    cost = costs([], [1.0]) * WORTH
    while True:
        trials = []
        others = [index for index in range(len(depths)) if index not in chosen]
        # One exit alone agrees with nobody.
        together = 2 if confidence == "agreement" and not chosen else 1
        for added in itertools.combinations(others, together):
            exits = sorted([*chosen, *added])
            found = _thresholds(finding, exits, strict)
            price = costs([depths[i] for i in exits], _leaving(finding, exits, found)[1])
            trials.append((price, exits, found))
        if not trials or min(trials)[0] >= cost:
            break
        cost, chosen, thresholds = min(trials)
    agreed, shares = _leaving(measuring, chosen, thresholds)
    return AdaptiveDepth(
        depths=tuple(depths[i] for i in chosen),
        thresholds=tuple(thresholds),
        confidence=confidence,
        full=path.depths[-1],
        target=agreement,
        agreement=agreed,
        shares=tuple(shares),
        base=fingerprint,
        stage=expert.name,
    )


class _Said:
    """What every exit said of N tokens: the likeliest (E + 1, N), full depth last, and how sure each was (E, N)."""

    def __init__(self, likeliest: torch.Tensor, sure: torch.Tensor | None) -> None:
        self.likeliest, self._sure = likeliest, sure
        self.right = likeliest[:-1] == likeliest[-1]

    @classmethod
    def of(cls, path: SegmentedModel, rows: Sequence[Sequence[int]], kind: Confidence, device: torch.device) -> "_Said":
        likeliest, sure = [], []
        for row in rows:
            ids = torch.tensor([list(row)], device=device)
            where = torch.arange(ids.shape[1], device=device)[None]
            states: tuple[torch.Tensor, ...] = ()
            said, surely = [], []
            for index, part in enumerate(path.parts):
                states, hidden = part(states, ids, where)
                logits = path.logits(index, hidden[0])
                said.append(logits.argmax(-1).cpu())
                if kind != "agreement" and index < len(path.parts) - 1:
                    surely.append(Confidences(kind)(logits).cpu())
            likeliest.append(torch.stack(said))
            sure.append(torch.stack(surely) if surely else torch.empty(0, ids.shape[1]))
        return cls(torch.cat(likeliest, 1), torch.cat(sure, 1) if kind != "agreement" else None)

    def sure(self, exits: Sequence[int]) -> list[torch.Tensor]:
        """The confidences (N) of these exits; how many agree in a row depends on which there are."""
        if self._sure is not None:
            return [self._sure[index] for index in exits]
        confidences, in_a_row = [], None
        for before, index in zip([None, *exits], exits, strict=False):
            ones = torch.ones(self.likeliest.shape[1])
            same = None if before is None else self.likeliest[before] == self.likeliest[index]
            in_a_row = ones if same is None or in_a_row is None else torch.where(same, in_a_row + 1, ones)
            confidences.append(in_a_row)
        return confidences


def _thresholds(said: _Said, exits: Sequence[int], agreement: float) -> list[float]:
    """The lowest thresholds with which `agreement` of all tokens are right, equally strict at every exit."""
    low, high = 0.0, 1.0  # the share of those that leave at an exit which may be wrong
    best = _within(said, exits, low)
    if agreement < 1:
        for _ in range(12):
            middle = (low + high) / 2
            found = _within(said, exits, middle)
            if _leaving(said, exits, found)[0] >= agreement:
                low, best = middle, found
            else:
                high = middle
    return best


def _within(said: _Said, exits: Sequence[int], wrong_share: float) -> list[float]:
    """For each exit the lowest threshold with which at most `wrong_share` of those that leave there are wrong."""
    waiting = torch.ones(said.right.shape[1], dtype=torch.bool)
    thresholds = []
    for index, sure in zip(exits, said.sure(exits), strict=True):
        order = sure[waiting].argsort(descending=True)
        surest = sure[waiting][order]
        wrong = (~said.right[index][waiting][order]).cumsum(0)
        leaving = torch.arange(1, len(surest) + 1)
        last_of_equals = torch.cat([surest[1:] < surest[:-1], torch.ones(1, dtype=torch.bool)])[: len(surest)]
        fine = ((wrong <= wrong_share * leaving) & last_of_equals).nonzero()
        threshold = float(surest[fine[-1, 0]]) if len(fine) else math.inf
        thresholds.append(threshold)
        waiting &= ~(sure >= threshold)
    return thresholds


def _leaving(said: _Said, exits: Sequence[int], thresholds: Sequence[float]) -> tuple[float, list[float]]:
    """The share of tokens that are right, and the shares that leave at each exit, the top last."""
    count = said.right.shape[1]
    waiting = torch.ones(count, dtype=torch.bool)
    right, shares = 0, []
    for index, sure, threshold in zip(exits, said.sure(exits), thresholds, strict=True):
        leaves = waiting & (sure >= threshold)
        right += int(said.right[index][leaves].sum())
        shares.append(float(leaves.sum()) / count)
        waiting &= ~leaves
    return (right + int(waiting.sum())) / count, [*shares, float(waiting.sum()) / count]


class _Costs:
    """How many weights a token reads on the average when tokens leave at given depths in given shares."""

    def __init__(self, expert: Expert) -> None:
        family = family_of(expert.base)
        self._layers = [sum(map(_read, layer.modules())) for layer in family.layers_of(expert.model)]
        head: Any = family.head_of(expert.model)
        self._head = head.weight.numel()

    def __call__(self, depths: Sequence[int], shares: Sequence[float]) -> float:
        cost, reaching = 0.0, 1.0
        for start, end, share in zip([0, *depths], [*depths, len(self._layers)], shares, strict=True):
            cost += reaching * (sum(self._layers[start:end]) + self._head)
            reaching -= share
        return cost


def _read(module: nn.Module) -> int:
    """How many of a module's own weights a token reads: of a table of embeddings hardly any."""
    return 0 if isinstance(module, nn.Embedding) else sum(p.numel() for p in module.parameters(recurse=False))
