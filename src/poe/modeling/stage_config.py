"""The configuration of one stage."""

import re
from dataclasses import dataclass
from typing import Literal

from .failures import StageError

HEADS = ("dense", "low_rank", "none")
LAYERS = ("new", "fork")
MOST_LAYERS = 1000  # more would be built until the memory is full


@dataclass(frozen=True)
class StageConfig:
    """The shape of one stage: a few new decoder layers and an additive head.

    name        letters, digits, `.`, `_`, `-`; the stage's name in a cascade and in its files
    num_layers  number of new decoder layers, 1 to 1000
    head        "dense" (vocabulary x width), "low_rank" (`head_rank`), or "none"
    head_rank   rank of a low-rank head delta, or "auto": the largest power of two, at least 8 and at most the width,
                with no more head parameters than layer parameters; other heads ignore it
    parent      name of the stage below it; None for the base itself
    attach_at   number of layers below it; None for all. New layers on a parent attach on top of it. Forks: or "auto",
                the lowest layer of the base that copies (`Cascade.add_stage` measures it)
    layers      "new": new decoder layers. "fork": the stage's own version of every layer from `attach_at` to the top,
                the weight W below it plus a trained change; `num_layers` follows from that
    rank        rank of a fork's changes, None for changes of full rank; new layers ignore it
    active      "all": the stage acts on every token. "answer": the layers below read the prompt, and the fork acts
                from the last token of the prompt on; it attends to their keys and values
    """

    name: str
    num_layers: int = 4
    head: str = "dense"
    head_rank: int | Literal["auto"] = 64
    parent: str | None = None
    attach_at: int | Literal["auto"] | None = None
    layers: str = "new"
    rank: int | None = 16
    active: str = "all"

    def __post_init__(self) -> None:
        check_stage_name(self.name)
        for field, most in (("num_layers", MOST_LAYERS), ("head_rank", None)):
            value = getattr(self, field)
            is_auto = field == "head_rank" and value == "auto"
            is_number = isinstance(value, int) and not isinstance(value, bool)
            if not is_auto and not (is_number and 1 <= value <= (most or value)):
                limit = f" and at most {most}" if most else " or 'auto'"
                raise StageError(
                    f"Stage {self.name!r}: {field} must be a whole number of at least 1{limit}, got {repr(value)[:80]}."
                )
        if self.head not in HEADS:
            raise StageError(f"Stage {self.name!r}: head must be one of {', '.join(HEADS)}, got {self.head!r}.")
        if self.parent is not None and (not isinstance(self.parent, str) or self.parent == self.name):
            raise StageError(f"Stage {self.name!r}: parent must be another stage's name or None, got {self.parent!r}.")
        if self.layers not in LAYERS:
            raise StageError(f"Stage {self.name!r}: layers must be one of {', '.join(LAYERS)}, got {self.layers!r}.")
        if self.layers == "fork" and self.attach_at is None:
            raise StageError(f"Stage {self.name!r}: a fork needs attach_at, the number of layers that it leaves alone.")
        if self.active not in ("all", "answer") or (self.active == "answer" and self.layers != "fork"):
            raise StageError(
                f"Stage {self.name!r}: active must be 'all', or 'answer' for a fork, got {self.active!r}: new "
                "layers have no keys and values of a prompt that they did not read."
            )
        if self.rank is not None and (not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1):
            raise StageError(f"Stage {self.name!r}: rank must be at least 1 or None, got {self.rank!r}.")
        least = 0 if self.layers == "fork" else 1
        is_number = isinstance(self.attach_at, int) and not isinstance(self.attach_at, bool) and self.attach_at >= least
        if not is_number and self.attach_at not in ((None, "auto") if self.layers == "fork" else (None,)):
            raise StageError(
                f"Stage {self.name!r}: attach_at must be at least {least} or None (a fork: or 'auto'), "
                f"got {self.attach_at!r}."
            )

    def layers_below(self, depth: int) -> int:
        """Return the number of layers below the stage, where `depth` is that of the base and its parents."""
        assert self.attach_at != "auto"  # Cascade.add_stage measures it
        if self.layers == "fork":
            assert self.attach_at is not None
            if self.attach_at >= depth:
                raise StageError(
                    f"Stage {self.name!r} forks the layers above {self.attach_at}, but there are only {depth}: "
                    f"expected attach_at from 0 to {depth - 1}."
                )
            return self.attach_at
        if self.attach_at is None or self.attach_at == depth:
            return depth
        if self.parent is not None:
            raise StageError(
                f"Stage {self.name!r} stands on {self.parent!r} and attaches on top of it: expected "
                f"attach_at None or {depth}, got {self.attach_at}."
            )
        if self.attach_at > depth:
            raise StageError(f"Stage {self.name!r}: attach_at is {self.attach_at}, but the base has {depth} layers.")
        return self.attach_at


def check_stage_name(name: object) -> None:
    """Raise `StageError` unless a stage can have this name."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise StageError(
            f"A stage's name must start with a letter or digit and have only letters, digits, '.', '_', '-', at most "
            f"100: got {str(name)[:100]!r}."
        )
