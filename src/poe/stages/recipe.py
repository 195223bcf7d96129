"""Recipes: the same fields are a YAML file, a dataclass, the options of `poe-train`, and a part of training.json.

The sentence under a field is its documentation everywhere. `fields.py` checks the types and ranges.
"""

import dataclasses
import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import yaml

from poe.errors import RecipeError, StageError, suggest
from poe.modeling.stage_config import StageConfig
from poe.stages.augmentation import Augmentation
from poe.stages.familiar_fields import advise
from poe.stages.fields import (
    FieldInfo,
    LayerCount,
    Limit,
    Momentum,
    NonNegative,
    NonNegativeInt,
    Positive,
    PositiveInt,
    Ratio,
    UpTo,
    VocabularySize,
    check_fields,
    describe_fields,
    parse_limit,
)

LIMITS = ("seq_len", "tokens_per_step", "validation_every")  # fields of a stage recipe that follow the data
P = TypeVar("P", bound="Plan")
RECIPES = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The fields of every training run: data, length, learning rates, and how it runs.

    Learning rates are given for width 768. AdamW rates are multiplied by `(width / 768) ** -0.5`. The schedule
    multiplies every rate by a factor that starts at `initial_lr_factor`, rises to 1, and falls to `final_lr_factor`.
    """

    name: str
    """Name of the stage or base that the recipe trains."""
    description: str = ""
    """What the recipe is for, in one sentence."""
    data: str = ""
    """Training data as a SPEC: name[=path][*epochs][:weight], comma-separated."""
    seq_len: PositiveInt = 2048
    """Length of a packed row in tokens."""
    tokens_per_step: PositiveInt = 131072
    """Tokens in one optimizer step, over all rows and processes; a multiple of seq_len."""
    max_tokens_per_batch: PositiveInt = 16384
    """Largest number of tokens in one forward pass; a step accumulates the gradients of as many passes as it needs."""
    max_steps: PositiveInt | None = None
    """Number of optimizer steps. Null: as many as the data and its epochs give (a base: 1000)."""
    matrix_lr: NonNegative = 0.002
    """Learning rate of the matrices in the layers and of a fork's changes. For adamw it is the one at width 768."""
    head_lr: NonNegative = 1e-4
    """AdamW learning rate of the head delta at width 768."""
    weight_decay: NonNegative = 0.1
    """Decoupled weight decay of the matrices in the layers and of the head."""
    momentum: Momentum = 0.95
    """Momentum of Muon."""
    initial_momentum: Momentum | None = None
    """Momentum of Muon in the first step, from which it rises to momentum over warmup_ratio. Null: constant."""
    matrix_optimizer: Literal["muon", "adamw"] = "muon"
    """Optimizer of the matrices in the layers."""
    initial_lr_factor: Ratio = 0.2
    """Factor on every learning rate in the first step."""
    warmup_ratio: Ratio = 0.05
    """Share of the steps over which the learning rates rise to their full values."""
    warmdown_ratio: Ratio = 0.9
    """Share of the steps, at the end, over which the learning rates fall."""
    final_lr_factor: Ratio = 0.0
    """Factor on every learning rate after the last step."""
    max_grad_norm: Positive | None = None
    """Largest norm of all gradients together, to which larger ones are scaled down. Null: no limit."""
    z_loss: NonNegative = 0.0
    """Weight of the mean of (log Z)^2 in the loss, which keeps logits from drifting (PaLM: 1e-4)."""
    validation_every: PositiveInt = 200
    """Steps between two measurements of the validation bits per byte."""
    checkpoint_every: NonNegative = 300.0
    """Seconds between two checkpoints."""
    keep_checkpoints: PositiveInt = 1
    """Number of newest checkpoints to keep during the run."""
    track: str = ""
    """Trackers that receive the metrics of every step, comma-separated: trackio, wandb, tensorboard."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Dtype of weights and activations. Auto: bfloat16 where the hardware multiplies it, else float32."""
    compile: bool | Literal["auto"] = False
    """Compile the forward pass with torch.compile: about a minute at the start, then faster steps. Auto: on a GPU."""
    checkpoint_activations: bool = False
    """Recompute the trained layers in the backward pass: slower steps, less memory."""
    seed: NonNegativeInt = 0
    """Seed of the initial weights and of the choice and order of the rows."""

    def __post_init__(self) -> None:
        check_fields(self, f"Recipe {self.name!r}: ")
        try:
            StageConfig(self.name)
        except StageError as error:
            raise RecipeError(str(error)) from None
        is_open = isinstance(self.seq_len, UpTo) or isinstance(self.tokens_per_step, UpTo)
        if not is_open and self.tokens_per_step % self.seq_len:
            raise RecipeError(
                f"Recipe {self.name!r}: tokens_per_step ({self.tokens_per_step}) must be a multiple of seq_len "
                f"({self.seq_len})."
            )

    def replace(self, **fields: Any) -> Self:
        """Return a copy with some fields changed. Raises `RecipeError` for an unknown field or a bad value."""
        known = {f.name for f in dataclasses.fields(self)}
        for name in fields:
            if name not in known:
                raise RecipeError(f"A recipe has no field {name!r}.{advise(name) or suggest(name, known)}")
        return dataclasses.replace(self, **fields)

    @property
    def learning_rates(self) -> dict[str, Any]:
        """The learning rates, by the parameters of `build_optimizer`."""
        return {"matrix_lr": self.matrix_lr, "head_lr": self.head_lr}

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        """Return the fields as YAML that `load_recipe` reads."""
        return yaml.safe_dump(self.as_dict(), sort_keys=False, allow_unicode=True)


@dataclass(frozen=True, kw_only=True)
class Recipe(Plan):
    """The shape and the training of a stage. The defaults are those of the published 1.3B stages of Cognica PoE."""

    seq_len: Limit = UpTo(2048)
    """Length of a packed row in tokens. At most N: as long as the longest row of the data, up to N and the base's own
    limit."""
    tokens_per_step: Limit = UpTo(131072)
    """Tokens in one optimizer step, over all rows and processes; a multiple of seq_len. At most N: few enough that a
    pass of the data has 400 steps, or one row."""
    max_steps: PositiveInt | None = None
    """Number of optimizer steps. Null: as many as the data and its epochs give; without epochs at least 50, in several
    passes of small data."""
    validation_every: Limit = UpTo(200)
    """Steps between two measurements of the validation bits per byte. At most N: a fifth of the steps, up to N."""
    train_on: Literal["assistant", "calls"] = "assistant"
    """Turns to learn: all turns of the assistant, or only those with calls."""
    isolate_documents: bool = True
    """Mask attention between the documents that are packed into one row."""
    augment: Augmentation = field(default_factory=Augmentation)
    """Changes to the training rows, by name, as in {mask: 0.33, formats: 0.5}."""
    layers: Literal["new", "fork"] = "new"
    """New layers above the base, or a fork: the stage's own version of the base's layers from attach_at up."""
    num_layers: LayerCount = 4
    """Number of new decoder layers. A fork has one for every layer of the base above attach_at."""
    rank: PositiveInt | None = 16
    """Rank of a fork's change of each linear layer. Null: full rank."""
    active: Literal["all", "answer"] = "all"
    """Tokens on which a fork acts: all, or the answer alone, over a prompt that the base reads."""
    head: Literal["dense", "low_rank", "none"] = "dense"
    """Kind of head delta, which is added to the head of the base."""
    head_rank: PositiveInt | Literal["auto"] = 64
    """Rank of a low_rank head. Auto: the largest power of two with which it is no larger than the layers."""
    attach_at: NonNegativeInt | Literal["auto"] | None = None
    """Number of layers of the base below the stage. Null: all. Auto, for a fork: the lowest layer that copies."""
    epochs: dict[str, PositiveInt] = field(default_factory=dict)
    """Passes over the rows of each reader, as in {glaive: 4}, unless the SPEC gives them."""
    validation_ratio: Ratio | Literal["auto"] = "auto"
    """Share of the queries to keep for validation, at least one query. Auto: 0.02, and of small data more: 20 queries,
    but no more than a tenth."""
    eval_data: str = ""
    """Questions to answer after training, as a SPEC; training rows with the same query or call are dropped."""
    near_duplicates: Ratio | None = 0.9
    """Similarity from which a row counts as a repetition of another. Null: only equal rows do."""
    eval_rows: NonNegativeInt = 200
    """Number of rows of each held-out split to answer after training."""
    cache_hidden: bool = False
    """Compute the base's hidden states once, write them to disk, and train from there."""
    shard_base: bool = False
    """Divide the base's layers among the processes, for a base that one device cannot hold."""

    def __post_init__(self) -> None:
        if not isinstance(self.augment, Augmentation):
            object.__setattr__(self, "augment", Augmentation.from_dict(self.augment))
        for name in LIMITS:
            object.__setattr__(self, name, parse_limit(getattr(self, name)))
        super().__post_init__()
        if self.attach_at == 0 and self.layers == "new":
            raise RecipeError(f"Recipe {self.name!r}: attach_at should be at least 1 for new layers, got 0.")
        if self.layers == "fork" and self.shard_base:
            raise RecipeError(
                f"Recipe {self.name!r}: shard_base divides the base's layers, and a fork reads their weights. Remove "
                "shard_base, or use layers: new."
            )
        if self.cache_hidden and self.shard_base:
            raise RecipeError(
                f"Recipe {self.name!r}: cache_hidden and shard_base cannot be combined: training from the cache has no "
                "base to shard. Choose one of them."
            )
        self.stage_config()  # raises StageError before any data is read

    def as_dict(self) -> dict[str, Any]:
        fields = {**super().as_dict(), "augment": self.augment.as_dict()}
        return {name: str(value) if isinstance(value, UpTo) else value for name, value in fields.items()}

    def stage_config(self, **fields: Any) -> StageConfig:
        """Return the shape of the stage, with some fields changed."""
        names = ("name", "num_layers", "head", "head_rank", "attach_at", "layers", "rank", "active")
        own = {name: getattr(self, name) for name in names}
        return StageConfig(**{**own, **fields})


@dataclass(frozen=True, kw_only=True)
class BaseRecipe(Plan):
    """The shape and the training of a PoE base from scratch."""

    vocab_size: VocabularySize = 32768
    """Number of tokens in the vocabulary."""
    hidden_size: PositiveInt = 768
    """Width of the residual stream."""
    num_layers: LayerCount = 12
    """Number of decoder layers."""
    num_heads: PositiveInt = 6
    """Number of attention heads."""
    num_kv_heads: PositiveInt | None = None
    """Number of key and value heads. Null: num_heads."""
    attention_logit_scale: Positive = 1.44
    """Factor on the attention logits after QK-norm: the largest is attention_logit_scale * sqrt(head size)."""
    stage_layers: list[PositiveInt] | None = None
    """Number of layers of each stage, as in [12, 5, 4, 3], with the sum num_layers. Null: one stage."""
    stage_heads: bool = False
    """Give every stage its own head, which is added to the shared one."""
    combiner: Literal["last", "log_op"] = "last"
    """Prediction of the base: that of its last stage, or the normalized mean of all stages' log-probabilities."""
    network: dict[str, Any] = field(default_factory=dict)
    """Further fields of PoEConfig, as in {layer_scalars: true}."""
    learning: Literal["local", "backprop"] = "local"
    """Loss of each stage: that of its own prediction (local), or of the last stage's (backprop)."""
    head_lr: NonNegative = 0.004
    """AdamW learning rate of the head at width 768."""
    embed_lr: NonNegative = 0.2
    """AdamW learning rate of the embedding at width 768."""
    warmdown_ratio: Ratio = 0.5
    initial_lr_factor: Ratio = 0.0
    init: str | None = None
    """Folder of a base to continue, with its tokenizer and shape; additional layers go below it. Null: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        stages = self.stage_layers or [self.num_layers]
        if sum(stages) != self.num_layers:
            raise RecipeError(
                f"Recipe {self.name!r}: stage_layers is {stages}, expected positive numbers that sum to the "
                f"{self.num_layers} layers (num_layers)."
            )
        if self.compile is True and self.learns_locally:
            raise RecipeError(
                f"Recipe {self.name!r}: compile and local learning cannot be combined, because the backward pass of a "
                "stage runs before the forward pass of the next one. Choose learning: backprop, or leave compile out."
            )

    @property
    def learns_locally(self) -> bool:
        """Whether several stages learn, each from its own loss."""
        return self.learning == "local" and len(self.stage_layers or ()) > 1

    @property
    def learning_rates(self) -> dict[str, Any]:
        """The learning rates, by the parameters of `build_optimizer`. The head of a base is its unembedding."""
        return {"matrix_lr": self.matrix_lr, "unembed_lr": self.head_lr, "embed_lr": self.embed_lr}


GROUPS = {
    "Data": (
        "data train_on isolate_documents augment epochs seq_len validation_ratio near_duplicates eval_data eval_rows"
    ),
    "Shape": (
        "layers num_layers attach_at rank active head head_rank vocab_size hidden_size num_heads num_kv_heads "
        "attention_logit_scale stage_layers stage_heads combiner network init"
    ),
    "Optimizer": (
        "matrix_optimizer matrix_lr head_lr embed_lr weight_decay momentum initial_momentum max_grad_norm z_loss "
        "learning"
    ),
    "Schedule": "max_steps tokens_per_step initial_lr_factor warmup_ratio warmdown_ratio final_lr_factor",
    "Run": (
        "name description seed dtype max_tokens_per_batch checkpoint_activations compile cache_hidden shard_base "
        "validation_every checkpoint_every keep_checkpoints track"
    ),
}


def group_fields(kind: type[Plan]) -> dict[str, list[FieldInfo]]:
    """Return the fields of a recipe class by group, in the order of `GROUPS`."""
    fields = describe_fields(kind)
    return {group: [fields[name] for name in names.split() if name in fields] for group, names in GROUPS.items()}


def list_recipes(kind: type[Plan] = Recipe) -> list[str]:
    """Return the names of the shipped recipes of a class."""
    return sorted(path.stem for path in _folder(kind).glob("*.yaml"))


def load_recipe(recipe: str | os.PathLike[str], /, **fields: Any) -> Recipe:
    """Return a stage recipe by its name or YAML file, with some fields changed. Raises `RecipeError`."""
    return load_plan(Recipe, recipe, **fields)


def load_base_recipe(recipe: str | os.PathLike[str], /, **fields: Any) -> BaseRecipe:
    """Return a base recipe by its name or YAML file, with some fields changed. Raises `RecipeError`."""
    return load_plan(BaseRecipe, recipe, **fields)


class _PlainLoader(yaml.SafeLoader):
    """A loader without aliases, a few lines of which stand for gigabytes, and without a field that is given twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        names = [key.value for key, _ in node.value]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise yaml.YAMLError(f"the field {str(twice)[:80]!r} is given twice: expected each field once.")
        return super().construct_mapping(node, deep)

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"an alias (*{self.peek_event().anchor}): write the value itself.")
        return super().compose_node(parent, index)


def load_plan(kind: type[P], recipe: str | os.PathLike[str], /, **fields: Any) -> P:
    """Return a recipe of a class by its name or YAML file, with some fields changed. Raises `RecipeError`."""
    path = Path(recipe)
    path = path if path.suffix in (".yaml", ".yml") else _folder(kind) / f"{recipe}.yaml"
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _PlainLoader)
    except FileNotFoundError:
        shipped = list_recipes(kind)
        if path.parent != _folder(kind):
            raise RecipeError(
                f"There is no such file: {path} (from the folder {Path.cwd()}). Give the path of a YAML file, or a "
                f"shipped recipe: {', '.join(shipped)}."
            ) from None
        raise RecipeError(f"Unknown recipe {str(recipe)!r}.{suggest(str(recipe), shipped)}") from None
    except OSError as error:
        raise RecipeError(f"The recipe {path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise RecipeError(f"{path} is not YAML: {error}") from None
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: expected a mapping of recipe fields, got {type(content).__name__}.")
    known = {f.name for f in dataclasses.fields(kind)}
    merged = {"name": path.stem, **content, **fields}
    for field_name in merged:
        if field_name not in known:
            raise RecipeError(
                f"Recipe {str(recipe)!r} has no field {field_name!r}.{advise(field_name) or suggest(field_name, known)}"
            )
    return kind(**merged)


def make_stage_config(recipe: Any, fields: Mapping[str, Any]) -> StageConfig:
    """Return the config of a new stage from a recipe and fields of `StageConfig`, which override the recipe's.

    `recipe` is a recipe's name, a `Recipe`, a `StageConfig` or None. A text that names no recipe is the name of a stage
    if there are fields. Raises `StageError` or `RecipeError`.
    """
    known = [field.name for field in dataclasses.fields(StageConfig)]
    for name in fields:
        if name not in known:
            raise StageError(f"A stage has no field {name!r}.{suggest(name, known)}")
    if isinstance(recipe, (str, os.PathLike)):
        name = os.fspath(recipe)
        recipes = list_recipes()
        is_new = fields and "name" not in fields and not name.endswith((".yaml", ".yml"))
        if is_new and not difflib.get_close_matches(name, recipes, n=1, cutoff=0.8):
            return StageConfig(name=name, **fields)
        recipe = load_recipe(recipe)
    if recipe is None and "name" not in fields:
        raise StageError("A new stage needs a name: expected add_stage(name='...') or add_stage(RECIPE).")
    if recipe is None:
        return StageConfig(**fields)
    if isinstance(recipe, StageConfig):
        return dataclasses.replace(recipe, **fields)
    if not isinstance(recipe, Recipe):
        raise StageError(f"Expected a recipe's name, a Recipe or a StageConfig, got {recipe!r}.")
    return recipe.stage_config(**fields)


def _folder(kind: type[Plan]) -> Path:
    return RECIPES / "bases" if kind is BaseRecipe else RECIPES
