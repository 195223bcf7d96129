"""The object a user holds: a frozen base and its named stages."""

import contextlib
import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import ModelOutput

from poe.decoding.adaptive import Confidence
from poe.decoding.branches import Tip, branch_out
from poe.decoding.depth import AdaptiveDepth, calibrate_depth
from poe.decoding.drafts import calibrate_draft
from poe.decoding.products import Product, compose
from poe.decoding.routing import Routed, Routing, generate_routed
from poe.decoding.speculation import SelfSpeculation, drafting, generate_with
from poe.errors import DecodingError, DeltaError, FamilyError, FingerprintError, suggest
from poe.loaders.places import embedded_folders, place
from poe.loaders.tokenizer import load_tokenizer
from poe.modeling.access import Access, read_config
from poe.modeling.exits import leave_at
from poe.modeling.fingerprint import fingerprint_tensors
from poe.modeling.growth import sync_attention
from poe.modeling.lineage import BaseSource, Lineage, base_source, is_stage, resolve, warn_unverified
from poe.modeling.modeling_poe import PoEConfig, PoEForCausalLM
from poe.modeling.modeling_poe_stage import PoEStageConfig, PoEStageForCausalLM
from poe.modeling.opening import load_base, load_stages
from poe.modeling.placement import is_offloaded, quantization_of
from poe.modeling.recognition import recognize_family
from poe.modeling.stage import Stage, assemble, build_stage, cut_graph_below, stop_input_gradients
from poe.modeling.stage_config import StageConfig
from poe.stages.compress import HeadReport, compress_head
from poe.stages.fold import fold_chain

AutoConfig.register("poe", PoEConfig, exist_ok=True)
AutoModelForCausalLM.register(PoEConfig, PoEForCausalLM, exist_ok=True)
AutoConfig.register("poe_stage", PoEStageConfig, exist_ok=True)
AutoModelForCausalLM.register(PoEStageConfig, PoEStageForCausalLM, exist_ok=True)

_ACTIVE = object()


class Cascade:
    """A frozen base and the stages on it.

    `base` is the base model as transformers loaded it; it is frozen here and never written to. `stages` maps names to
    `Stage`s in the order in which they came; `active` is the name of the one that `generate` and calls use, None for
    the base. `tokenizer` is None if the base has none.
    """

    def __init__(self, base_model: PreTrainedModel, tokenizer: Any = None, *, source: BaseSource | None = None) -> None:
        recognize_family(base_model)
        self.base = base_model.requires_grad_(False)
        self.tokenizer = tokenizer
        self.stages: dict[str, Stage] = {}
        self.active: str | None = None
        self._source = source
        self._models: dict[str, PreTrainedModel] = {}
        self._exits: dict[int, PreTrainedModel] = {}

    @classmethod
    def from_pretrained(
        cls,
        repo: str | os.PathLike[str],
        dtype: str | torch.dtype = "auto",
        device_map: Any = None,
        revision: str | None = None,
        base: str | os.PathLike[str] | None = None,
        verify: bool = True,
        *,
        token: str | bool | None = None,
        cache_dir: str | None = None,
        local_files_only: bool = False,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> "Cascade":
        """Open a base, or a stage with all it stands on; the stage is then active.

        `repo` is a folder, a Hub repository, or "demo" for the base inside this package. `base` says where a stage's
        base is (else POE_BASE, else what the stage names). `options` go to the base's own `from_pretrained`
        (attn_implementation, quantization_config, offload_folder, ...). A base may be quantized or offloaded; stages
        stay in plain tensors beside it. Raises `SourceError`, `LineageError`, `FingerprintError`, `DeltaError` or
        `FamilyError`; `verify=False` skips the fingerprints and warns.
        """
        access = Access(token, cache_dir, local_files_only)
        where = place(repo)
        config, _ = read_config(where, access, revision)
        options |= {"dtype": dtype, "device_map": device_map, "trust_remote_code": trust_remote_code}
        if not is_stage(config):
            source, config = base_source(where, access, revision)
            return cls(
                load_base(source, config, **options),
                load_tokenizer(where, source.revision, access, trust_remote_code),
                source=source,
            )
        override = None if base is None else place(base)
        lineage = resolve(where, access, revision=revision, base=override, embedded=embedded_folders())
        if verify:
            lineage.verify()
        else:
            warn_unverified(where)
        model = load_base(lineage.base, lineage.base_config, **options)
        tokenizer = load_tokenizer(where, lineage.links[-1].revision, access, trust_remote_code)
        cascade = cls(model, tokenizer, source=lineage.base)
        return cascade._attach(lineage)

    @property
    def config(self) -> PreTrainedConfig:
        """The base's config."""
        return self.base.config

    @property
    def base_source(self) -> BaseSource:
        """Where the base is (`repo`, `revision`) and what it is (`fingerprint`, that of its files as stored).

        A base that was quantized while it was loaded thus has the fingerprint of the original. Raises
        `FingerprintError` for a model in memory that is quantized or offloaded.
        """
        if self._source is None:
            held = "quantized" if quantization_of(self.base) else "offloaded" if is_offloaded(self.base) else None
            if held is not None:
                raise FingerprintError(
                    f"The base is {held} and was not opened by Cascade.from_pretrained, so it is not known from which "
                    "weights it comes: expected Cascade.from_pretrained(folder or repository, with the same "
                    "quantization_config or device_map), which takes the fingerprint of the files."
                )
            tensors = revert_weight_conversion(self.base, self.base.state_dict())  # as files of it would hold them
            self._source = BaseSource(None, known_fingerprint=fingerprint_tensors(tensors))
        return self._source

    def add_stage(
        self, recipe: Any = None, *, seed: int = 0, dtype: torch.dtype | None = None, **fields: Any
    ) -> "Cascade":
        """Add a new stage, which computes exactly what lies below it, and make it active.

        `recipe` is a recipe's name, a recipe, a `StageConfig`, or nothing if `fields` hold all; `fields` override
        those of the stage's config. The weights depend on `seed` alone and are in `dtype` (default: the base's).
        """
        if isinstance(recipe, str):
            from poe.stages import load_recipe

            recipe = load_recipe(recipe)
        if isinstance(recipe, StageConfig):
            config = dataclasses.replace(recipe, **fields)
        elif recipe is None:
            config = StageConfig(**fields)
        else:
            config = recipe.stage_config(**fields)
        self._refuse_known(config.name)
        parent = None if config.parent is None else self._stage(config.parent)
        stage = build_stage(self.base, config, parent, seed=seed, dtype=dtype)
        return self._insert(stage).activate(config.name)

    def load_stage(
        self, repo: str | os.PathLike[str], revision: str | None = None, verify: bool = True, **access: Any
    ) -> "Cascade":
        """Attach a saved stage, and those it stands on, to this base and make it active.

        `access` are token, cache_dir and local_files_only. The stage must have been trained on this very base.
        """
        where, how = place(repo), Access(**access)
        lineage = resolve(where, how, revision=revision, own=self.base_source)
        if verify:
            lineage.verify()
        else:
            warn_unverified(where)
        return self._attach(lineage)

    def import_stage(self, folder: str | os.PathLike[str], name: str) -> "Cascade":
        """Attach a stage in the layout of Cognica's releases or of nanochat, on top of the active one; make it active.

        Save it with `save_stage` to have it in the delta format. Raises `SourceError` for an unknown layout,
        `FingerprintError` if it was trained on another base.
        """
        from poe.loaders.cognica import read_stage

        if not isinstance(self.base, PoEForCausalLM):
            raise FamilyError(f"Such stages stand on PoE bases: got a base of type {self.config.model_type!r}.")
        parent = self.active
        tensors = read_stage(Path(folder).expanduser(), self.model(parent), self.base.lm_head.weight)
        config = StageConfig(
            name,
            num_layers=1 + max(int(key.split(".")[1]) for key in tensors if key.startswith("layers.")),
            head="dense" if "head.weight" in tensors else "none",
            parent=parent,
        )
        self.add_stage(config, dtype=next(iter(tensors.values())).dtype)
        try:
            self.stages[name].load_delta(tensors)
        except DeltaError:
            self.remove_stage(name)
            raise
        return self

    def fold(self, stage: str, name: str | None = None) -> "Cascade":
        """Add a stage that carries a whole chain (default name: STAGE-folded) and make it active.

        It stands on the base itself and computes what `stage` computes, so it can be published without the parents.
        The chain stays as it is. `poe.stages.fold` says how exact the sum of the heads is.
        """
        own, name = self._stage(stage), name or f"{stage}-folded"
        self._refuse_known(name)
        return self._insert(fold_chain(self.base, own, name)).activate(name)

    @torch.no_grad()
    def compress_head(self, name: str, rank: int, input_ids: torch.Tensor | None = None) -> HeadReport:
        """Replace a stage's head delta by the nearest one of a lower rank, and say what that cost.

        With `input_ids` (batch, tokens) the report has the largest and the mean absolute change of their logits.
        Raises `DeltaError` while another stage stands on it, or if the head would not get smaller.
        """
        stage = self._stage(name)
        self._refuse_parent(stage, "changed")
        before = None if input_ids is None else self.model(name)(input_ids).logits.float()
        report = compress_head(stage, rank)
        self._models.pop(name, None)
        if before is None:
            return report
        change = (self.model(name)(input_ids).logits.float() - before).abs()
        return dataclasses.replace(report, max_logit_error=float(change.max()), mean_logit_error=float(change.mean()))

    def remove_stage(self, name: str) -> "Cascade":
        """Forget a stage; if it was active, what lies below it becomes active. What it stood on stays frozen.

        Raises `DeltaError` while another stage stands on it.
        """
        stage = self._stage(name)
        self._refuse_parent(stage, "removed")
        del self.stages[name]
        self._models.pop(name, None)
        if self.active == name:
            self.active = None if stage.parent is None else stage.parent.name
        return self

    @contextlib.contextmanager
    def activated(self, name: str | None) -> Iterator["Cascade"]:
        """Make a stage (None: the base) the active one inside a `with` block."""
        before = self.active
        try:
            yield self.activate(name)
        finally:
            self.active = before if before in self.stages else None

    def activate(self, name: str | None) -> "Cascade":
        """Choose the stage that `generate` and calls use; None is the base alone."""
        if name is not None:
            self._stage(name)
        self.active = name
        return self

    def model(self, name: str | None, exit: int | None = None) -> PreTrainedModel:
        """Return the native model that ends in a stage, or the base for None; all of them share the base's tensors.

        `exit` is for the base: the model that ends after that many of its layers (a PoE base: after one of its stages).
        """
        if exit is not None:
            if name is not None:
                raise DeltaError(
                    f"exit={exit} leaves the base below stage {name!r}, so the stage would not be used: expected "
                    "stage=None with it. A cheaper specialist is one that is trained with attach_at."
                )
            if exit not in self._exits:
                self._exits[exit] = leave_at(self.base, exit)
            return self._exits[exit]
        if name is None:
            return self.base
        stage = self._stage(name)
        if name not in self._models:
            model = assemble(self.base, stage)
            sync_attention(self.base, model)
            stop_input_gradients(model, stage)
            self._models[name] = model
        return self._models[name]

    def generate(
        self,
        *args: Any,
        stage: Any = _ACTIVE,
        exit: int | None = None,
        adaptive: AdaptiveDepth | None = None,
        draft: SelfSpeculation | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Call `generate` of the model that ends in `stage` (default: the active one, None: the base).

        `exit` leaves the base after that many layers: see `model`. `adaptive` (from `calibrate_depth`) lets every token
        leave at the first exit that is sure of it. `draft` (from `calibrate_draft`, or the depth of an exit) lets an
        exit draft what full depth then verifies, which changes nothing but the time. A list of stages has one for every
        row of the batch, in one pass through the trunk; "auto" asks `route`. With `return_dict_in_generate` the output
        then has the rows' `stages`, and after "auto" the decision as `routing`.
        """
        ways = sum(way is not None for way in (exit, adaptive, draft))
        if isinstance(stage, (list, tuple)) or (stage == "auto" and stage not in self.stages):
            if ways:
                raise DecodingError("exit, adaptive and draft are for one stage: expected none of them with a list.")
            return self._generate_routed(stage, *args, **kwargs)
        if ways > 1:
            raise DecodingError("exit, adaptive and draft are ways to leave early: expected one of them.")
        name = self.active if stage is _ACTIVE else stage
        model: Any = self.model(name, exit)
        own = None if name is None else self._stage(name)
        if adaptive is not None:
            model = adaptive.model(model, self.base, own, self.base_source.fingerprint)
        if draft is not None:
            return generate_with(drafting(model, self.base, own, draft), model, *args, **kwargs)
        return model.generate(*args, **kwargs)

    def calibrate_depth(
        self,
        rows: Sequence[Sequence[int]],
        *,
        agreement: float = 0.99,
        confidence: Confidence = "margin",
        stage: Any = _ACTIVE,
    ) -> AdaptiveDepth:
        """Find out on rows of token ids where tokens may leave, so that `agreement` of them are full depth's likeliest.

        `confidence` is "margin", "probability" or "agreement" (of exits in a row). What comes back says how it did on
        the half of the rows that was kept apart, can be saved, and is given to `generate(adaptive=...)`.
        """
        name = self.active if stage is _ACTIVE else stage
        return calibrate_depth(
            self.model(name),
            self.base,
            None if name is None else self._stage(name),
            rows,
            agreement=agreement,
            confidence=confidence,
            origin=self.base_source.fingerprint,
        )

    def calibrate_draft(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int = 48, stage: Any = _ACTIVE
    ) -> SelfSpeculation:
        """Find out on prompts (rows of token ids) which exit drafts best, by time, for `generate(draft=...)`.

        Also whether it pays to look up what followed the last tokens before.

        Raises `DecodingError`, with the numbers, where plain decoding is as fast.
        """
        name = self.active if stage is _ACTIVE else stage
        own = None if name is None else self._stage(name)
        return calibrate_draft(self.model(name), self.base, own, prompts, max_new_tokens=max_new_tokens)

    def __call__(self, *args: Any, stage: Any = _ACTIVE, exit: int | None = None, **kwargs: Any) -> Any:
        """Call the model that ends in `stage` (default: the active one, None: the base), or the base left at `exit`."""
        return self.model(self.active if stage is _ACTIVE else stage, exit)(*args, **kwargs)

    def compose(self, stages: Mapping[str | None, float] | Iterable[str | None], mode: str = "log_op") -> Product:
        """Return a model, with `generate`, `logits` and `fit`, in which several stages decide together.

        `stages` maps names (None: the base) to weights; where it only lists names the weights are equal, for `fit` to
        learn. "log_op" is the product of experts, `sum w_i log p_i` renormalized, with weights that sum to one;
        "delta" adds up what each stage changes, `base + sum w_i (stage_i - base)` on logits, with any weights. The
        trunk runs once for all. Raises `DecodingError` for weights or a mode that do not fit.
        """
        return compose(self.base, stages, self._tip, mode)

    def route(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Routing:
        """Return the likeliest stage of each prompt (B, T), among all stages and the base, and every score.

        A score is the mean log-probability of the prompt's tokens; all are read in one pass through the trunk. The
        base wins a tie.
        """
        model = branch_out(self.base, [self._tip(name) for name in (None, *self.stages)], Routed)
        decision: Routing = model.route(input_ids, attention_mask)
        return decision

    def save_stage(
        self,
        name: str,
        folder: str | os.PathLike[str],
        training: dict[str, Any] | None = None,
        *,
        dtype: torch.dtype | None = None,
        prompt: dict[str, Any] | None = None,
    ) -> Path:
        """Write a stage as a complete folder in the delta format and return its path.

        `training` becomes training.json and feeds the model card; `prompt` is `{name, version, stop}` of the prompt
        format. `dtype` is bf16, or that of the files the stage came from; `torch.int8` stores matrices in int8 with a
        scale per row (`stages[name].storage_error(torch.int8)` says how exact that is). Raises `OutputError`, leaving
        what was there.
        """
        from poe.loaders.stage_folder import save_stage_folder

        stage = self._stage(name)
        return save_stage_folder(self, stage, Path(folder), training=training, dtype=dtype, prompt=prompt)

    def export_native(self, name: str, folder: str | os.PathLike[str], *, max_shard_size: int | str = "5GB") -> Path:
        """Write the model that ends in a stage as an ordinary checkpoint of the base's family and return its path.

        Plain `AutoModelForCausalLM.from_pretrained(folder)` then gives the same logits without this package (a PoE
        base needs `trust_remote_code=True`: its file travels along). Weights are in the base's dtype, in files of at
        most `max_shard_size`. Raises `FamilyError` for a quantized, offloaded or recurrent base, `OutputError` for a
        folder that is not empty or a disk that is full.
        """
        from poe.loaders.native import export_native

        return export_native(self, self._stage(name), Path(folder), max_shard_size=max_shard_size)

    def push_to_hub(self, repo_id: str, stage: str | None = None, **options: Any) -> str:
        """Upload a stage (default: the active one) to a Hub repository and return its address."""
        from poe.loaders.hub import push_stage

        name = stage or self.active
        if name is None:
            raise DeltaError("Which stage? Name one: push_to_hub(repo_id, stage='...').")
        return push_stage(self, self._stage(name), repo_id, **options)

    def __repr__(self) -> str:
        from poe.loaders.summary import table

        return table(self)

    def _tip(self, name: str | None) -> Tip:
        return Tip(name, None if name is None else self._stage(name), self.model(name))

    def _generate_routed(self, stage: Any, inputs: Any = None, **kwargs: Any) -> Any:
        routing = None
        if stage == "auto":
            routing = self.route(kwargs.get("input_ids", inputs), kwargs.get("attention_mask"))
            stage = routing.stages
        output = generate_routed(self.base, stage, self._tip, inputs, **kwargs)
        if routing is not None and isinstance(output, ModelOutput):
            output.routing = routing
        return output

    def _stage(self, name: str) -> Stage:
        if name not in self.stages:
            raise DeltaError(f"There is no stage {name!r} here.{suggest(name, self.stages)}")
        return self.stages[name]

    def _refuse_known(self, name: str) -> None:
        if name in self.stages:
            raise DeltaError(f"There is a stage {name!r} already: choose another name, or build a new cascade.")

    def _refuse_parent(self, stage: Stage, what: str) -> None:
        children = [other.name for other in self.stages.values() if other.parent is stage]
        if children:
            raise DeltaError(f"Stage {stage.name!r} cannot be {what}: {', '.join(children)} stand(s) on it.")

    def _attach(self, lineage: Lineage) -> "Cascade":
        known = {s.source["fingerprint"]: s for s in self.stages.values() if s.source is not None}
        stages = load_stages(self.base, lineage, {str(key): stage for key, stage in known.items()})
        for stage in stages:
            if self.stages.get(stage.name, stage) is not stage:
                raise DeltaError(
                    f"Two stages are called {stage.name!r}: one is here already, another comes from "
                    f"{stage.source and stage.source['repo']}. Load it into a cascade of its own."
                )
        for stage in stages:
            if stage.name not in self.stages:
                self._insert(stage)
        return self.activate(stages[-1].name)

    def _insert(self, stage: Stage) -> "Cascade":
        cut_graph_below(stage, self.base.dtype)
        if stage.parent is not None:
            stage.parent.requires_grad_(False)  # what others stand on is frozen
        self.stages[stage.name] = stage
        return self
