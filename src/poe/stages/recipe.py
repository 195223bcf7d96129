"""A recipe is data: the same fields are the YAML file, the dataclass, the command-line options and the model card."""

import dataclasses
import os
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import yaml

from poe.errors import RecipeError, suggest
from poe.modeling.stage_config import StageConfig
from poe.stages.augmentation import Augmentation

P = TypeVar("P", bound="Plan")
RECIPES = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What every training run has: its data, its length, its rates. Learning rates are those at width 768.

    The schedule multiplies every rate by a factor. It starts at `initial_lr_factor`, reaches 1 after the share
    `warmup_ratio` of the steps, and falls to `final_lr_factor` over the last share `warmdown_ratio`. AdamW rates are
    scaled by `(width / 768) ** -0.5`; so is `matrix_lr` when `matrix_optimizer` is adamw.
    """

    name: str
    description: str = ""
    data: str = ""  # a --data SPEC
    seq_len: int = 2048  # tokens in a packed row
    tokens_per_step: int = 131072  # over all rows of an optimizer step
    max_tokens_per_batch: int = 16384  # in one forward pass; a step accumulates as many as it needs
    max_steps: int | None = None  # None: as many as the data and its epochs make
    matrix_lr: float = 0.002  # for the matrices of the layers
    head_lr: float = 1e-4  # AdamW, for the head delta
    weight_decay: float = 0.1
    momentum: float = 0.95  # of Muon
    initial_momentum: float | None = None  # of Muon in the first step; it rises over `warmup_ratio`
    matrix_optimizer: Literal["muon", "adamw"] = "muon"  # for the matrices of the layers
    initial_lr_factor: float = 0.2
    warmup_ratio: float = 0.05
    warmdown_ratio: float = 0.9
    final_lr_factor: float = 0.0
    max_grad_norm: float | None = None  # gradients are scaled down to this norm over all of them; None: never
    z_loss: float = 0.0  # times the mean of (log Z)^2: keeps logits from drifting (PaLM has 1e-4)
    validation_every: int = 200  # steps between two measures of val bits per byte
    checkpoint_every: float = 300.0  # seconds between two checkpoints
    keep_checkpoints: int = 1  # how many of the newest are kept while the run goes on
    track: str = ""  # trackers that are told of every step: a comma list of trackio, wandb, tensorboard
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # auto: bfloat16 where the hardware multiplies it
    compile: bool = False  # torch.compile for the forward pass: a minute first, then faster steps
    checkpoint_activations: bool = False  # recompute the trained layers in the backward pass: slower, less memory
    seed: int = 0

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if not _fits(value, hints[f.name]):
                raise RecipeError(
                    f"Recipe {self.name!r}: {f.name} should be {_readable(hints[f.name])}, got {value!r}."
                )
        if self.tokens_per_step % self.seq_len:
            raise RecipeError(
                f"Recipe {self.name!r}: tokens_per_step ({self.tokens_per_step}) must be a multiple of seq_len "
                f"({self.seq_len})."
            )
        if self.keep_checkpoints < 1:
            raise RecipeError(
                f"Recipe {self.name!r}: keep_checkpoints is {self.keep_checkpoints}, expected at least 1."
            )

    def replace(self, **fields: Any) -> Self:
        """Return a copy with some fields changed; an unknown field is a `RecipeError` with a suggestion."""
        known = {f.name for f in dataclasses.fields(self)}
        for name in fields:
            if name not in known:
                raise RecipeError(f"A recipe has no field {name!r}.{suggest(name, known)}")
        return dataclasses.replace(self, **fields)

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.as_dict(), sort_keys=False, allow_unicode=True)


@dataclass(frozen=True, kw_only=True)
class Recipe(Plan):
    """How a stage is shaped and trained. The defaults are those published for the 1.3B stages of Cognica PoE."""

    train_on: Literal["assistant", "calls"] = "assistant"  # which of the assistant's turns are learned
    isolate_documents: bool = True  # packed documents do not see each other
    augment: Augmentation = field(default_factory=Augmentation)  # a mapping such as {mask: 0.33} becomes one
    num_layers: int = 4
    head: Literal["dense", "low_rank", "none"] = "dense"
    head_rank: int | Literal["auto"] = 64
    attach_at: int | None = None  # how many of the base's layers lie below the stage; None: all
    epochs: dict[str, int] = field(default_factory=dict)  # passes per data reader, unless the SPEC says so
    validation_ratio: float = 0.02  # share of the queries kept for validation
    eval_data: str = ""  # a SPEC of questions to answer after training; rows that share a query or a call are left out
    near_duplicates: float | None = 0.9  # the similarity from which a row repeats another; None: only exact repetitions
    eval_rows: int = 200  # rows of each held-out split that are answered after training
    cache_hidden: bool = False  # write what the base makes of the rows to disk once, and train from there
    shard_base: bool = False  # divide the base's layers among the processes, where one device cannot hold it

    def __post_init__(self) -> None:
        if not isinstance(self.augment, Augmentation):
            object.__setattr__(self, "augment", Augmentation.from_dict(self.augment))
        super().__post_init__()
        for other in ("compile", "shard_base"):
            if self.cache_hidden and getattr(self, other):
                raise RecipeError(
                    f"Recipe {self.name!r}: cache_hidden and {other} do not go together: with the cache there is "
                    f"{'no forward pass of the whole model to compile' if other == 'compile' else 'no base to divide'} "
                    "while training. Choose one of them."
                )

    def as_dict(self) -> dict[str, Any]:
        return {**super().as_dict(), "augment": self.augment.as_dict()}

    def stage_config(self, **fields: Any) -> StageConfig:
        """Return the shape of the stage; `fields` override."""
        own = {name: getattr(self, name) for name in ("name", "num_layers", "head", "head_rank", "attach_at")}
        return StageConfig(**{**own, **fields})


@dataclass(frozen=True, kw_only=True)
class BaseRecipe(Plan):
    """How a PoE base is shaped and trained from scratch."""

    vocab_size: int = 32768
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 6
    num_kv_heads: int | None = None
    attention_logit_scale: float = 1.44
    stage_layers: list[int] | None = None  # the layers of each PoE stage, such as [12, 5, 4, 3]; None: one stage
    stage_heads: bool = False  # every stage adds a head of its own to the shared one
    combiner: Literal["last", "log_op"] = "last"  # what the base predicts: its last stage's view, or that of all
    network: dict[str, Any] = field(default_factory=dict)  # further values of PoEConfig, as in {layer_scalars: true}
    learning: Literal["local", "backprop"] = "local"  # each stage by its own loss, or all by the last one's
    head_lr: float = 0.004  # AdamW, for the head
    embed_lr: float = 0.2
    warmdown_ratio: float = 0.5
    initial_lr_factor: float = 0.0
    init: str | None = None  # a base folder to continue from, with its tokenizer and shape; more num_layers go below it

    def __post_init__(self) -> None:
        super().__post_init__()
        stages = self.stage_layers or [self.num_layers]
        if min(stages) < 1 or sum(stages) != self.num_layers:
            raise RecipeError(
                f"Recipe {self.name!r}: stage_layers is {stages}, expected positive numbers that sum to the "
                f"{self.num_layers} layers (num_layers)."
            )
        if self.compile and self.learning == "local" and len(stages) > 1:
            raise RecipeError(
                f"Recipe {self.name!r}: compile and local learning do not go together, because the backward pass of a "
                "stage comes before the forward pass of the next. Choose learning: backprop, or leave compile out."
            )


def list_recipes(kind: type[Plan] = Recipe) -> list[str]:
    """Return the names of the shipped recipes."""
    return sorted(path.stem for path in _folder(kind).glob("*.yaml"))


def load_recipe(name: str | os.PathLike[str], **fields: Any) -> Recipe:
    """Return a stage recipe by name, or from a YAML file; `fields` override. Raises `RecipeError`."""
    return _load(Recipe, name, fields)


def load_base_recipe(name: str | os.PathLike[str], **fields: Any) -> BaseRecipe:
    """Return a base recipe by name, or from a YAML file; `fields` override. Raises `RecipeError`."""
    return _load(BaseRecipe, name, fields)


def _folder(kind: type[Plan]) -> Path:
    return RECIPES / "bases" if kind is BaseRecipe else RECIPES


def _load(kind: type[P], name: str | os.PathLike[str], fields: dict[str, Any]) -> P:
    given = Path(name)
    path = given if given.suffix in (".yaml", ".yml") else _folder(kind) / f"{name}.yaml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"Unknown recipe {str(name)!r}.{suggest(str(name), list_recipes(kind))}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not YAML: {error}") from None
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of fields, got {type(content).__name__}.")
    known = {f.name for f in dataclasses.fields(kind)}
    merged = {"name": path.stem, **content, **fields}
    for field_name in merged:
        if field_name not in known:
            raise RecipeError(f"Recipe {str(name)!r} has no field {field_name!r}.{suggest(field_name, known)}")
    return kind(**merged)


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin is Literal:
        return value in typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in typing.get_args(hint))
    if origin is list:
        return isinstance(value, list) and all(_fits(part, typing.get_args(hint)[0]) for part in value)
    if origin is dict:
        return isinstance(value, dict)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _readable(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
