"""What `generate(strategy=...)` takes: one way to decode with one expert."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from poe.errors import DecodingError, StageError
from poe.modeling.exits import exit_at
from poe.modeling.stage import Stage


@dataclass(frozen=True)
class Expert:
    """A base or one stage on it, with the native model that ends there.

    `stage` is None for the base itself; then `model` is `base`. `fingerprint_base` returns the base's fingerprint,
    which can take a pass over its files.
    """

    base: PreTrainedModel
    stage: Stage | None
    model: PreTrainedModel
    fingerprint_base: Callable[[], str]

    @property
    def name(self) -> str | None:
        """The stage's name, None for the base."""
        return None if self.stage is None else self.stage.name


class Strategy:
    """A way to decode with one expert. The subclasses are `Exit`, `AdaptiveDepth` and `SelfSpeculation`."""

    def build_model(self, expert: Expert) -> PreTrainedModel:
        """Return the model that this strategy runs. It shares every tensor with the expert."""
        raise NotImplementedError

    def generate(self, expert: Expert, *args: Any, **kwargs: Any) -> Any:
        """Call `generate` of transformers with this strategy; the arguments are those of `generate`."""
        model: Any = self.build_model(expert)
        return model.generate(*args, **kwargs)


@dataclass(frozen=True)
class Exit(Strategy):
    """Use only the first `depth` layers of the base, then the final norm and the head.

    A PoE base has exits after each of its stages, every other base after each layer. Raises `StageError` for a stage,
    `FamilyError` for a depth without an exit.
    """

    depth: int

    def build_model(self, expert: Expert) -> PreTrainedModel:
        """Return the base as a shallower model of its own class. It is built once per depth."""
        if expert.stage is not None:
            raise StageError(
                f"Exit({self.depth}) leaves the base below stage {expert.name!r}, so the stage would not be used: "
                "expected stage=None with it. For a cheaper specialist train a stage with attach_at."
            )
        models: dict[int, PreTrainedModel] = vars(expert.base).setdefault("_poe_exits", {})
        if self.depth not in models:
            models[self.depth] = exit_at(expert.base, self.depth)
        return models[self.depth]


def check_strategy(strategy: object) -> Strategy:
    """Return a strategy. Raises `DecodingError` for anything else."""
    if not isinstance(strategy, Strategy):
        raise DecodingError(
            f"strategy should be an Exit, an AdaptiveDepth or a SelfSpeculation of poe.decoding, got {strategy!r}."
        )
    return strategy
