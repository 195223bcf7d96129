"""The object that a user holds: a frozen base and its named stages."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from poe.chat import Answer, answer_messages, read_call_threshold, route_messages
from poe.decoding.adaptive import Confidence
from poe.decoding.depth import AdaptiveDepth, calibrate_depth
from poe.decoding.drafts import calibrate_draft
from poe.decoding.products import Product, compose
from poe.decoding.routing import Routing, generate_routed, route
from poe.decoding.speculation import SelfSpeculation
from poe.decoding.strategy import Expert, Strategy, check_strategy
from poe.errors import DecodingError, DeltaError, StageError, suggest
from poe.loaders import describe, foreign, hub, native, peft, stage_folder
from poe.loaders.base import Base
from poe.loaders.chains import find_lineage, load_chain, open_repository
from poe.loaders.familiar_names import explain_name
from poe.loaders.repository import locate
from poe.loaders.unchanged import check_plain_model
from poe.modeling.access import Access
from poe.modeling.growth import sync_attention
from poe.modeling.lineage import BaseSource, Lineage
from poe.modeling.recognition import recognize_family
from poe.modeling.stage import Stage, assemble, build_stage, detach_stage_input, set_gradient_input
from poe.stages.compress import HeadReport, compress_head
from poe.stages.copying import find_copying_layer
from poe.stages.fold import fold_chain
from poe.stages.recipe import make_stage_config

_ACTIVE = object()  # the default of `stage=`: the active stage


class Cascade:
    """A frozen base and the stages on it.

    `stages` maps names to `Stage` objects in the order in which they were added. `active` is the name of the stage that
    `generate` and calls use, None for the base alone.
    """

    def __init__(self, base_model: PreTrainedModel, tokenizer: Any = None, *, source: BaseSource | None = None) -> None:
        check_plain_model(base_model)
        recognize_family(base_model)
        self._base = Base(base_model.requires_grad_(False), tokenizer, source)
        self._base.record  # noqa: B018 - taken now
        self.stages: dict[str, Stage] = {}
        self.active: str | None = None
        self._models: dict[str, PreTrainedModel] = {}

    @classmethod
    def from_pretrained(
        cls,
        repo: str | os.PathLike[str],
        *,
        dtype: str | torch.dtype = "auto",
        device_map: Any = None,
        revision: str | None = None,
        base: str | os.PathLike[str] | None = None,
        verify: bool = True,
        token: str | bool | None = None,
        cache_dir: str | None = None,
        local_files_only: bool = False,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> "Cascade":
        """Open a base, or a stage with its base and parents. An opened stage is active.

        `repo` is a folder, a Hub repository, or "demo" for the base inside this package. `base` is the location of a
        stage's base (default: the environment variable POE_BASE, then the location that the stage names). `options` are
        other keywords of transformers (`poe.loaders.options`). A base may be quantized or offloaded; stages stay in
        plain tensors. `verify=False` skips the comparison of fingerprints and warns.
        Raises `SourceError`, `LineageError`, `FingerprintError`, `DeltaError` or `FamilyError`.
        """
        opened, lineage = open_repository(
            repo,
            revision=revision,
            base=base,
            verify=verify,
            access=Access(token, cache_dir, local_files_only, options.pop("force_download", False)),
            dtype=dtype,
            options=options,
            device_map=device_map,
            trust_remote_code=trust_remote_code,
        )
        cascade = cls(opened.model, opened.tokenizer, source=opened.known_source)
        return cascade if lineage is None else cascade._attach(lineage, None, verify)

    @property
    def base(self) -> PreTrainedModel:
        """The base model as transformers loaded it. It is frozen and never changed."""
        return self._base.model

    @property
    def tokenizer(self) -> Any:
        """The base's tokenizer, or that of the opened stage. None if there is none."""
        return self._base.tokenizer

    @property
    def config(self) -> PreTrainedConfig:
        """The base's config."""
        return self.base.config

    @property
    def base_source(self) -> BaseSource:
        """The base's location and fingerprint; see `poe.loaders.base.Base.source`."""
        return self._base.source

    def add_stage(
        self, recipe: Any = None, *, seed: int = 0, dtype: torch.dtype | None = None, **fields: Any
    ) -> "Cascade":
        """Add a new stage and make it active. A new stage does not change the model's output.

        `recipe` is a recipe's name, a recipe, a `StageConfig`, or None. `fields` are fields of `StageConfig` and
        override the recipe's: `add_stage(name="mine", num_layers=2)`. The weights depend only on `seed` and are in
        `dtype` (default: the base's). Raises `StageError` for a wrong field or a name that is taken.
        """
        config = make_stage_config(recipe, fields)
        self._check_name_is_free(config.name)
        parent = None if config.parent is None else self._find_stage(config.parent)
        if config.attach_at == "auto":
            config = dataclasses.replace(config, attach_at=find_copying_layer(self.base))
        stage = build_stage(self.base, config, parent, seed=seed, dtype=dtype)
        return self._insert(stage).activate(config.name)

    def load_stage(
        self,
        repo: str | os.PathLike[str],
        *,
        name: str | None = None,
        revision: str | None = None,
        verify: bool = True,
        token: str | bool | None = None,
        cache_dir: str | None = None,
        local_files_only: bool = False,
    ) -> "Cascade":
        """Add a saved stage and its parents, and make the stage active.

        `name` is what the stage is called here (default: as in its files), so that stages of one name stand side by
        side. It changes neither weights nor fingerprint; `save_stage` writes it. Raises `FingerprintError` if the stage
        was trained on another base, `StageError` for a name that is taken, and the errors of `from_pretrained`.
        """
        access = Access(token, cache_dir, local_files_only)
        lineage = find_lineage(locate(repo), access, revision, verify=verify, known_base=self.base_source)
        return self._attach(lineage, name, verify)

    def import_stage(self, folder: str | os.PathLike[str], name: str) -> "Cascade":
        """Add a stage that another project trained, and make it active: `save_stage` then writes it as a delta.

        A LoRA adapter of PEFT becomes a fork of the base. A stage in the layout of Cognica's releases or of nanochat is
        added on top of the active one. Raises `SourceError` for an unknown layout or one that no stage can compute,
        `FingerprintError` for a stage of another base, `FamilyError` for a base that such stages do not stand on.
        """
        config, tensors = foreign.read_foreign_stage(
            Path(folder).expanduser(), name, self.base, self.active, self.model
        )
        self.add_stage(config, dtype=next(iter(tensors.values())).dtype)
        try:
            self.stages[name].load_delta(tensors)
        except DeltaError:
            self.remove_stage(name)
            raise
        return self

    def fold(self, stage: str, name: str | None = None) -> "Cascade":
        """Add a stage that combines a stage and its parents (default name: STAGE-folded), and make it active.

        The new stage stands on the base and computes what `stage` computes, so it can be published without the
        parents. The original stages stay unchanged. `poe.stages.fold.fold_heads` bounds the rounding error.
        """
        original, name = self._find_stage(stage), name or f"{stage}-folded"
        self._check_name_is_free(name)
        self.check_unchanged(stage, weights=False)
        return self._insert(fold_chain(self.base, original, name)).activate(name)

    @torch.no_grad()
    def compress_head(self, name: str, rank: int, input_ids: torch.Tensor | None = None) -> HeadReport:
        """Replace a stage's head delta by the nearest one of rank `rank`, and return the error of doing so.

        With `input_ids` (B, T) the report has the largest and the mean absolute change of their logits. Raises
        `StageError` while another stage stands on it, or if the head would not get smaller.
        """
        self._check_no_children(stage := self._find_stage(name), "changed")
        self.check_unchanged(name, weights=False)
        before = None if input_ids is None else self.model(name)(input_ids).logits
        report = compress_head(stage, rank)
        self._models.pop(name, None)
        self._base.record.add(stage)
        return report if before is None else report.with_change(before, self.model(name)(input_ids).logits)

    def remove_stage(self, name: str) -> "Cascade":
        """Remove a stage. If it was active, its parent (or the base) becomes active; the parent stays frozen.

        Raises `StageError` while another stage stands on it.
        """
        stage = self._find_stage(name)
        self._check_no_children(stage, "removed")
        del self.stages[name]
        self._models.pop(name, None)
        if self.active == name:
            self.active = None if stage.parent is None else stage.parent.name
        return self

    @contextlib.contextmanager
    def activated(self, name: str | None) -> Iterator["Cascade"]:
        """Make a stage (None: the base) active inside a `with` block."""
        before = self.active
        try:
            yield self.activate(name)
        finally:
            self.active = before if before in self.stages else None

    def activate(self, name: str | None) -> "Cascade":
        """Make a stage (None: the base) the one that `generate` and calls use."""
        if name is not None:
            self._find_stage(name)
        self.active = name
        return self

    def model(self, name: str | None, strategy: Strategy | None = None) -> PreTrainedModel:
        """Return the native model that ends in a stage, or the base for None. It shares the base's tensors.

        With `strategy` it is the model that the strategy runs: `cascade.model(None, Exit(6))` has six layers.
        """
        if strategy is not None:
            return check_strategy(strategy).build_model(self.expert(name))
        if name is None:
            return self.base
        stage = self._find_stage(name)
        if name not in self._models:
            model = assemble(self.base, stage)
            sync_attention(self.base, model)
            set_gradient_input(model, stage)
            self._base.record.add(stage, model)
            self._models[name] = model
        return self._models[name]

    def expert(self, name: str | None) -> Expert:
        """Return a stage (None: the base) as `poe.decoding` takes it: with its native model and its base."""
        stage = None if name is None else self._find_stage(name)
        return Expert(self.base, stage, self.model(name), lambda: self.base_source.fingerprint)

    def generate(self, *args: Any, stage: Any = _ACTIVE, strategy: Strategy | None = None, **kwargs: Any) -> Any:
        """Call `generate` of the model that ends in `stage` (default: the active one, None: the base).

        `strategy` is one of `poe.decoding`: `Exit(depth)` uses the first layers of the base; `AdaptiveDepth` (from
        `calibrate_depth`) lets each token leave at the first exit that is confident enough; `SelfSpeculation` (from
        `calibrate_draft`, or `SelfSpeculation(depth)`) drafts with an exit and verifies with full depth, which changes
        only the time.

        A list of stages has one for each row of the batch, in one pass through the base; "auto" chooses with `route`.
        With `return_dict_in_generate` the output then has the rows' `stages`, and after "auto" the `routing`.
        """
        if isinstance(stage, (list, tuple)) or (stage == "auto" and stage not in self.stages):
            if strategy is not None:
                raise DecodingError("A strategy decodes with one stage: expected strategy=None with a list or 'auto'.")
            return generate_routed(self.base, stage, self.expert, self.stages, *args, **kwargs)
        name = self._choose(stage)
        if strategy is not None:
            return check_strategy(strategy).generate(self.expert(name), *args, **kwargs)
        model: Any = self.model(name)
        return model.generate(*args, **kwargs)

    def call(self, question: str, tools: Any, *, system: str | None = None, **options: Any) -> Answer:
        """Answer a question with calls of `tools`, and check them: `answer.calls`, `answer.text`, `answer.problems`.

        `system` is a system message. `options` are the other arguments of `chat`.
        """
        messages = [{"role": "system", "content": system}] if system else []
        answer: Answer = self.chat([*messages, {"role": "user", "content": question}], tools, **options)
        return answer

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Any = (),
        *,
        stage: Any = _ACTIVE,
        strategy: Strategy | None = None,
        max_new_tokens: int = 256,
        **options: Any,
    ) -> Any:
        """Return the `poe.chat.Answer` to messages in OpenAI's form; `answer.message` is the next one.

        `tools` are Python functions with type hints and a docstring, or in any spelling of `poe.calls.tools`. With
        `stream=True` the result is an `AnswerStream`, which yields the text piece by piece and has the `answer` at the
        end. `tool_choice` ("auto", "none", "required" or a function), `parallel_tool_calls` and `response_format` are
        those of OpenAI's API. Decoding is constrained to what they and the tools allow; with `constrain=False` calls
        are only checked. With "auto", a stage for which a threshold was fitted decides by it whether to call. Other
        `options` are those of `generate`; without them decoding is greedy. With `stage="auto"` the stage of `route`
        answers, and a note says which. Raises `DataError` for arguments that cannot be used.
        """
        if stage == "auto" and stage not in self.stages:
            stage, note = route_messages(self.tokenizer, self.config.vocab_size, messages, tools, self.route)
            options["notes"] = [note]
        name = self._choose(stage)
        if strategy is not None:
            options["generate"] = functools.partial(self.generate, stage=name, strategy=strategy)
        options.setdefault("threshold", None if name is None else read_call_threshold(self._find_stage(name).prompt))
        return answer_messages(
            self.model(name), self.tokenizer, messages, tools, max_new_tokens=max_new_tokens, **options
        )

    def calibrate_depth(
        self,
        rows: Sequence[Sequence[int]],
        *,
        agreement: float = 0.99,
        confidence: Confidence = "margin",
        stage: Any = _ACTIVE,
    ) -> AdaptiveDepth:
        """Find the strategy with which `agreement` of the tokens (a share) are full depth's most likely ones.

        `rows` are rows of token ids. `confidence` is "margin", "probability" or "agreement" (of consecutive exits). The
        result reports its agreement on the half of the rows that were held out, and can be saved.
        """
        expert = self.expert(self._choose(stage))
        return calibrate_depth(expert, rows, agreement=agreement, confidence=confidence)

    def calibrate_draft(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int = 48, stage: Any = _ACTIVE
    ) -> SelfSpeculation:
        """Find the draft that decodes the prompts (rows of token ids) fastest, with or without prompt lookup.

        Raises `DecodingError`, with the times, if plain decoding is as fast.
        """
        expert = self.expert(self._choose(stage))
        return calibrate_draft(expert, prompts, max_new_tokens=max_new_tokens)

    def __call__(self, *args: Any, stage: Any = _ACTIVE, strategy: Strategy | None = None, **kwargs: Any) -> Any:
        """Call `model(stage, strategy)`; `stage` defaults to the active one."""
        return self.model(self._choose(stage), strategy)(*args, **kwargs)

    def compose(self, stages: Mapping[str | None, float] | Iterable[str | None], mode: str = "log_op") -> Product:
        """Return a model, with `generate`, `logits` and `fit`, that combines the predictions of several stages.

        `stages` maps names (None: the base) to weights, or lists names with equal weights for `fit` to learn. "log_op"
        is the product of experts, `sum w_i log p_i` renormalized, with weights that sum to one. "delta" adds the
        changes of the stages, `base + sum w_i (stage_i - base)` on logits, with any weights. All stages share one pass
        through the base. Raises `DecodingError` for an unknown mode or invalid weights.
        """
        return compose(self.base, stages, self.expert, mode)

    def route(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Routing:
        """Return the stage of each prompt (B, T), among all stages and the base, and every score.

        Trained stages know their training prompts: a prompt goes to the stage whose prompts it is most like, and to the
        base if it is like none. Raises `DecodingError` for a stage without them (`poe.decoding.fit_prompt_center`).
        """
        return route(self.base, [self.expert(name) for name in (None, *self.stages)], input_ids, attention_mask)

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

        `training` becomes training.json and part of the model card. `prompt` is `{name, version, stop}` of the prompt
        format. `dtype` defaults to that of the stage's files, or bfloat16. `torch.int8` stores matrices with scales;
        `stages[name].storage_error(torch.int8)` is its error. A failed write leaves the previous content.
        """
        stage = self._find_stage(name)
        return stage_folder.save_stage_folder(
            self._base, stage, Path(folder), training=training, dtype=dtype, prompt=prompt
        )

    def rehearse_save(self, name: str, **options: Any) -> None:
        """Raise what `save_stage` with these options would raise, without the weights. Nothing is written."""
        stage_folder.rehearse_save(self._base, self._find_stage(name), **options)

    def export_native(
        self,
        name: str,
        folder: str | os.PathLike[str],
        *,
        max_shard_size: int | str = "5GB",
        all_tokens: bool = False,
    ) -> Path:
        """Write the model that ends in a stage as an ordinary checkpoint of the base's family and return its path.

        Plain `AutoModelForCausalLM.from_pretrained(folder)` then gives the same logits without this package (for a PoE
        base with `trust_remote_code=True`). Weights are in the base's dtype, in files of at most `max_shard_size`.
        Raises `FamilyError` for a quantized, offloaded or recurrent base, `OutputError` for a folder that is not empty
        or a full disk. A fork's weights are merged; one that is active on the answer is refused (`StageError`) unless
        `all_tokens` says that it may act on every token.
        """
        stage, model = self._find_stage(name), self.model(name)
        return native.export_native(
            self._base, stage, model, Path(folder), max_shard_size=max_shard_size, all_tokens=all_tokens
        )

    def export_peft(
        self, name: str, folder: str | os.PathLike[str], *, invocation_tokens: Sequence[int] | None = None
    ) -> Path:
        """Write a low-rank fork as a LoRA adapter that PEFT loads, and return its path.

        `invocation_tokens` are the token ids that end a prompt: with them a stage that is active on the answer becomes
        an Activated LoRA; without them the adapter acts on all tokens. Raises `FamilyError` for a stage that no LoRA
        can hold, `OutputError` if the folder cannot be written.
        """
        return peft.export_peft(self._base, self._find_stage(name), Path(folder), invocation_tokens)

    def push_to_hub(
        self,
        repo_id: str,
        stage: str | None = None,
        *,
        base: str | None = None,
        parent: str | None = None,
        **options: Any,
    ) -> str:
        """Upload a stage (default: the active one) to a Hub repository and return the commit's URL.

        `base` and `parent` are the Hub repositories of the stage's base and parent, if the stage names folders.
        `options` are those of `poe.loaders.hub.push_stage`: `private`, `token`, `revision`, `commit_message`, ...
        """
        name = stage or self._active_name("push_to_hub(repo_id, stage='...')")
        return hub.push_stage(
            self._base, self._find_stage(name), repo_id, base_repo=base, parent_repo=parent, **options
        )

    def save_pretrained(self, folder: str | os.PathLike[str], **options: Any) -> Path:
        """Write the active stage: `save_stage` under the name that transformers and PEFT use."""
        return self.save_stage(self._active_name("save_stage(name, folder)"), folder, **options)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters of the active model are trained, in PEFT's form."""
        print(describe.count_trainable(self.model(self.active)))

    if not TYPE_CHECKING:  # a type checker finds wrong names by itself

        def __getattr__(self, name: str) -> Any:
            """Answer the words of transformers and PEFT with ours."""
            raise AttributeError(explain_name(name), name=name, obj=self)

    def __repr__(self) -> str:
        return describe.summarize(self.base, self.stages, self.active)

    def _choose(self, stage: Any) -> Any:
        return self.active if stage is _ACTIVE else stage

    def _active_name(self, expected: str) -> str:
        if self.active is None:
            raise StageError(f"No stage is active: expected {expected}.")
        return self.active

    def _find_stage(self, name: str) -> Stage:
        if name not in self.stages:
            raise StageError(f"There is no stage {name!r} here.{suggest(name, self.stages)}")
        return self.stages[name]

    def _check_name_is_free(self, name: str) -> None:
        if name in self.stages:
            raise StageError(f"There is a stage {name!r} already: choose another name, or build a new cascade.")

    def _check_no_children(self, stage: Stage, action: str) -> None:
        children = [other.name for other in self.stages.values() if other.parent is stage]
        if children:
            raise StageError(
                f"Stage {stage.name!r} cannot be {action} while {', '.join(children)} stands on it: remove that first."
            )

    def _attach(self, lineage: Lineage, name: str | None, verify: bool) -> "Cascade":
        """Add the stages of a lineage that are not here yet, the last one as `name`, and make that active."""
        chain = load_chain(self.base, self.stages, lineage, name, verify=verify)
        for stage in chain:
            if stage.name not in self.stages:
                self._insert(stage)
        return self.activate(chain[-1].name)

    def _insert(self, stage: Stage) -> "Cascade":
        detach_stage_input(stage, self.base.dtype)
        if stage.parent is not None:
            stage.parent.requires_grad_(False)  # only the top stage of a chain is trained
        self.stages[stage.name] = stage
        self._base.record.add(stage)
        return self

    def check_unchanged(self, name: str | None = None, *, weights: bool = True) -> None:
        """Raise `FamilyError` or `FingerprintError` if the base or a stage was changed in memory; see `Base`."""
        self._base.check_unchanged(None if name is None else self._find_stage(name), weights=weights)
