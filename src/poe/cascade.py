"""The object a user holds: a frozen base and its named stages."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from poe.errors import DeltaError, suggest
from poe.loaders.places import embedded_folders, place
from poe.modeling.access import Access, read_config
from poe.modeling.families import family_of
from poe.modeling.fingerprint import fingerprint_tensors
from poe.modeling.growth import keep_in_step
from poe.modeling.lineage import BaseSource, Lineage, base_source, is_stage, resolve, warn_unverified
from poe.modeling.modeling_poe import PoEConfig, PoEForCausalLM
from poe.modeling.modeling_poe_stage import PoEStageConfig, PoEStageForCausalLM
from poe.modeling.opening import load_base, load_stages
from poe.modeling.stage import Stage, assemble, build_stage, cut_graph_below, stop_input_gradients
from poe.modeling.stage_config import StageConfig

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
        family_of(base_model.config)
        self.base = base_model.requires_grad_(False)
        self.tokenizer = tokenizer
        self.stages: dict[str, Stage] = {}
        self.active: str | None = None
        self._source = source
        self._models: dict[str, PreTrainedModel] = {}

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
        (attn_implementation, quantization_config, ...). Raises `SourceError`, `LineageError`, `FingerprintError`,
        `DeltaError` or `FamilyError`; `verify=False` skips the fingerprints and warns.
        """
        access = Access(token, cache_dir, local_files_only)
        where = place(repo)
        config, _ = read_config(where, access, revision)
        options |= {"dtype": dtype, "device_map": device_map, "trust_remote_code": trust_remote_code}
        if not is_stage(config):
            source, config = base_source(where, access, revision)
            return cls(
                load_base(source, config, **options),
                _tokenizer(where, source.revision, access, trust_remote_code),
                source=source,
            )
        override = None if base is None else place(base)
        lineage = resolve(where, access, revision=revision, base=override, embedded=embedded_folders())
        if verify:
            lineage.verify()
        else:
            warn_unverified(where)
        model = load_base(lineage.base, lineage.base_config, **options)
        tokenizer = _tokenizer(where, lineage.links[-1].revision, access, trust_remote_code)
        cascade = cls(model, tokenizer, source=lineage.base)
        return cascade._attach(lineage)

    @property
    def config(self) -> PreTrainedConfig:
        """The base's config."""
        return self.base.config

    @property
    def base_source(self) -> BaseSource:
        """Where the base is (`repo`, `revision`) and what it is (`fingerprint`)."""
        if self._source is None:
            self._source = BaseSource(None, known_fingerprint=fingerprint_tensors(self.base.state_dict()))
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
        if config.name in self.stages:
            raise DeltaError(f"There is a stage {config.name!r} already: choose another name, or build a new cascade.")
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

    def activate(self, name: str | None) -> "Cascade":
        """Choose the stage that `generate` and calls use; None is the base alone."""
        if name is not None:
            self._stage(name)
        self.active = name
        return self

    def model(self, name: str | None) -> PreTrainedModel:
        """Return the native model that ends in a stage, or the base for None; all of them share the base's tensors."""
        if name is None:
            return self.base
        stage = self._stage(name)
        if name not in self._models:
            model = assemble(self.base, stage)
            keep_in_step(self.base, model)
            stop_input_gradients(model, stage)
            self._models[name] = model
        return self._models[name]

    def generate(self, *args: Any, stage: Any = _ACTIVE, **kwargs: Any) -> Any:
        """Call `generate` of the model that ends in `stage` (default: the active one, None: the base)."""
        return self.model(self.active if stage is _ACTIVE else stage).generate(*args, **kwargs)  # type: ignore[operator]

    def __call__(self, *args: Any, stage: Any = _ACTIVE, **kwargs: Any) -> Any:
        """Call the model that ends in `stage` (default: the active one, None: the base)."""
        return self.model(self.active if stage is _ACTIVE else stage)(*args, **kwargs)

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
        format. `dtype` is bf16, or that of the files the stage came from. Raises `OutputError`, leaving what was there.
        """
        from poe.loaders.stage_folder import save_stage_folder

        stage = self._stage(name)
        return save_stage_folder(self, stage, Path(folder), training=training, dtype=dtype, prompt=prompt)

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

    def _stage(self, name: str) -> Stage:
        if name not in self.stages:
            raise DeltaError(f"There is no stage {name!r} here.{suggest(name, self.stages)}")
        return self.stages[name]

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


def _tokenizer(where: str, revision: str | None, access: Access, trust_remote_code: bool) -> Any:
    """Return the tokenizer that lies beside a model, None if there is none."""
    try:
        # Said explicitly, because left unsaid transformers asks on the terminal for models it does not know.
        return AutoTokenizer.from_pretrained(
            where, revision=revision or "main", trust_remote_code=trust_remote_code, **access.kwargs(where)
        )
    except (OSError, ValueError, KeyError):
        return None
