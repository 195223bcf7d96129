"""Find a stage's parents and base from its config.json, and verify them by fingerprint."""

import copy
import dataclasses
import inspect
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    cache_utils,
    masking_utils,
    modeling_rope_utils,
    modeling_utils,
)
from transformers.utils.hub import extract_commit_hash

from .access import Access, fetch, is_path, read_config, read_json
from .delta_file import DELTA_NAME, FORMATS, DeltaHeader, check_no_pickles, read_delta_header, verify_delta
from .failures import DeltaError, FingerprintError, LineageError, SourceError, StageError
from .fingerprint import file_state, fingerprint_files_cached
from .modeling_poe import PoEConfig
from .stage_config import StageConfig

LONGEST_CHAIN = 16
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_ADAPTER = "adapter_config.json"
# Fields of config.json that do not change what a network computes: notes, output formats, and what only training or
# `generate` reads. transformers ties the head if the weights are tied, so `tie_word_embeddings` decides nothing.
_NEUTRAL = set(
    "transformers_version _name_or_path name_or_path architectures dtype torch_dtype use_cache return_dict "
    "output_hidden_states output_attentions tokenizer_class task_specific_params problem_type finetuning_task id2label "
    "label2id num_labels initializer_range chunk_size_feed_forward gradient_checkpointing tie_word_embeddings "
    "_attn_implementation_autoset _attn_implementation_internal _experts_implementation_internal max_window_layers "
    "is_encoder_decoder is_decoder torchscript pretraining_tp".split()
)
_NEUTRAL_ENDS = ("_token_id", "dropout", "_pdrop")
# Fields that choose the code that runs, or the form of the weights; config classes do not write them back.
_DECISIVE = ("auto_map", "quantization_config", "fusion_config", "attn_implementation", "_attn_implementation")


@dataclass(frozen=True)
class BaseSource:
    """The location of a base: `repo` is a folder or Hub name (None for a model in memory), `revision` a commit.

    `config` is its config.json (of a model in memory: its config), None if it was not read.
    """

    repo: str | None
    revision: str | None = None
    access: Access = field(default_factory=Access)
    known_fingerprint: str | None = None
    config: dict[str, Any] | None = field(default=None, compare=False, repr=False)

    @cached_property
    def fingerprint(self) -> str:
        """The fingerprint of the base's weights as stored, 64 hexadecimal digits.

        Raises `FingerprintError` if the files have changed since they were first looked at.
        """
        return self.find_fingerprint(fingerprint_files_cached)

    def find_fingerprint(self, hash_files: Callable[[Sequence[str]], str]) -> str:
        """Return the fingerprint that `hash_files` computes from the base's weight files; see `fingerprint`."""
        if self.known_fingerprint is not None:
            return self.known_fingerprint
        assert self.first_states
        fingerprint = hash_files(self.weight_files)
        self.check_unchanged()
        return fingerprint

    @cached_property
    def weight_files(self) -> list[str]:
        """The local paths of the base's safetensors files. Missing files of a Hub repository are fetched.

        Raises `SourceError` unless transformers must read the same files.
        """
        assert self.repo is not None
        self._check_no_other_weights()
        single = fetch(self.repo, _SINGLE, self.access, self.revision)
        if single is not None:
            return [single]
        index = fetch(self.repo, _INDEX, self.access, self.revision)
        if index is None:
            raise SourceError(
                f"{self.repo} has no {_SINGLE} (nor shards of one): expected a base in safetensors. "
                "Convert it first: weights are never unpickled."
            )
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise SourceError(f"{index} is not an index of safetensors shards: it lacks weight_map. Fetch it again.")
        names = sorted({str(name) for name in shards.values()})
        for name in names:
            if not name.endswith(".safetensors") or os.path.basename(name) != name:
                raise SourceError(
                    f"{self.repo}: {_INDEX} names {name!r}, expected safetensors files of its own folder."
                )
        paths = [fetch(self.repo, name, self.access, self.revision) for name in names]
        if None in paths:
            raise SourceError(f"{self.repo} lacks {names[paths.index(None)]}, which {_INDEX} names. Fetch it again.")
        return [path for path in paths if path is not None]

    @cached_property
    def first_states(self) -> list[Any]:
        """The states of the weight files and config.json when they were first looked at, before they were loaded."""
        return self._file_states()

    def check_unchanged(self) -> None:
        """Raise `FingerprintError` if the base's files were changed since they were first looked at."""
        if self._file_states() != self.first_states:
            raise FingerprintError(
                f"The files of {self.repo} were changed after they were opened: open the base again when nothing "
                "writes to them."
            )

    def _file_states(self) -> list[Any]:
        assert self.repo is not None
        calm = dataclasses.replace(self.access, force_download=False)
        paths = [*self.weight_files, fetch(self.repo, "config.json", calm, self.revision)]
        try:
            return [file_state(path) for path in paths if path is not None]
        except OSError as error:
            raise SourceError(f"The files of {self.repo} are gone: {error}. Fetch it again.") from error

    def _check_no_other_weights(self) -> None:
        """Raise `SourceError` if transformers would read other weights than the files that the fingerprint covers."""
        assert self.repo is not None
        other = (self.config or {}).get("transformers_weights")
        shards = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
        parts = filter(shards.fullmatch, os.listdir(self.repo) if os.path.isdir(self.repo) else ())
        if other is not None:
            found = f"config.json names weights of its own (transformers_weights: {other!r})"
        elif fetch(self.repo, _ADAPTER, self.access, self.revision) is not None:
            found = f"{_ADAPTER} belongs to an adapter, which transformers adds to the base where PEFT is installed"
        elif part := next(parts, None):
            found = f"{part} is part of a distributed checkpoint, which transformers reads instead"
        else:
            return
        raise SourceError(f"{self.repo} is not only a base in {_SINGLE}: {found}. Move that elsewhere.")

    def describe(self) -> str:
        """Return `repo (revision, fingerprint)` for messages."""
        return f"{self.repo or 'a model in memory'} (revision {self.revision or 'none'}, {self.fingerprint[:12]})"


def find_base(repo: str, access: Access, revision: str | None = None) -> tuple[BaseSource, dict[str, Any]]:
    """Return the location of a base, with its revision resolved to a commit, and its config.json."""
    config, path = read_config(repo, access, revision)
    commit = None if os.path.isdir(repo) else extract_commit_hash(path, None) or revision
    return BaseSource(repo, commit, access, config=config), config


@dataclass(frozen=True)
class StageSource:
    """The files of one stage of a chain: its location, local folder and config.json."""

    repo: str
    revision: str | None
    folder: str
    config: dict[str, Any]
    access: Access

    @property
    def name(self) -> str:
        """The stage's name."""
        return str(self.config["stage"]["name"])

    def stage_config(self, parent: str | None, name: str | None = None) -> StageConfig:
        """Return the stage's config, with its name (default: that in its files) and its parent's in the cascade."""
        stage = self.config["stage"]
        if stage.get("own_norm"):
            raise DeltaError(
                f"Stage {self.name!r} has a final norm of its own, which this version cannot load: update poe-cascade."
            )
        return _read_stage_config({**stage, "name": name or self.name}, parent)

    @cached_property
    def delta_path(self) -> str:
        """The local path of delta.safetensors, which is fetched if it is missing."""
        path = fetch(self.repo, DELTA_NAME, self.access, self.revision)
        if path is None:
            raise DeltaError(f"{self.repo} has no {DELTA_NAME}: expected a complete stage folder. Fetch it again.")
        return path

    @cached_property
    def header(self) -> DeltaHeader:
        """The header of the delta file."""
        header = read_delta_header(self.delta_path)
        if header.stage != self.name:
            raise DeltaError(
                f"{self.repo}: config.json names stage {self.name!r}, {DELTA_NAME} names {header.stage!r}. "
                "The two files are not from one save."
            )
        if problem := header.find_misfit(self.config["stage"]):
            raise DeltaError(f"{self.repo}: {problem} The two files are not from one save.")
        if header.attach_at != str(self.config["stage"]["attach_at"]):
            raise DeltaError(
                f"{self.repo}: config.json attaches stage {self.name!r} at {self.config['stage']['attach_at']!r}, "
                f"{DELTA_NAME} at {header.attach_at}. The two files are not from one save."
            )
        if header.active != self.config["stage"].get("active", "all"):
            raise DeltaError(
                f"{self.repo}: config.json says that stage {self.name!r} is active on "
                f"{self.config['stage'].get('active', 'all')!r}, {DELTA_NAME} on {header.active!r}. The two "
                "files are not from one save."
            )
        return header

    @property
    def parent(self) -> dict[str, Any]:
        """The parent's entry in config.json, empty if the stage stands on the base."""
        return self.config.get("parent") or {}


@dataclass(frozen=True)
class Lineage:
    """A chain of stages and its base: `stages` from the base upwards, the requested stage last."""

    stages: tuple[StageSource, ...]
    base: BaseSource
    base_config: dict[str, Any]

    def verify(self) -> None:
        """Check base, parents and stage by fingerprint. Raises `FingerprintError` or `DeltaError`.

        It reads no base, so that a wrong stage costs little time. What is read later is hashed again (`read_delta`).
        """
        check_base(self.base, self.stages[-1].config["base"], self.stages[-1].repo)
        self.verify_headers()
        for stage in self.stages:
            check_base_config(self.base, stage.config.get("base_config"), stage.repo)
            verify_delta(stage.delta_path, stage.header)

    def verify_headers(self) -> None:
        """Check that each stage names the stage below it and that all name one base. Reads headers, not weights."""
        expected, below = self.stages[-1].config["base"], ""
        for stage in self.stages:
            if stage.header.base_fingerprint != expected["fingerprint"]:
                raise FingerprintError(
                    f"Stage {stage.name!r} ({stage.repo}) was trained on another base: expected "
                    f"{expected['fingerprint'][:12]} ({expected.get('repo')}), "
                    f"got {stage.header.base_fingerprint[:12]}. The stages of a chain share one base."
                )
            if not stage.parent.get("fingerprint", "") == stage.header.parent_fingerprint == below:
                raise FingerprintError(
                    f"Stage {stage.name!r} ({stage.repo}) stands on parent {stage.parent.get('repo')} "
                    f"(revision {stage.parent.get('revision') or 'none'}): expected "
                    f"{stage.header.parent_fingerprint[:12] or 'none'}, got {below[:12] or 'none'}. "
                    "Fetch the parent's revision that is named, or train the stage again."
                )
            below = stage.header.self_fingerprint


def check_base(base: BaseSource, expected: dict[str, Any], stage: str) -> None:
    """Raise `FingerprintError` unless a base has the fingerprint of `expected` (`repo`, `revision`, `fingerprint`)."""
    if base.fingerprint != expected["fingerprint"]:
        raise FingerprintError(
            f"Wrong base for {stage}: expected {expected.get('repo') or 'a model that was never saved'} "
            f"(revision {expected.get('revision') or 'none'}, {expected['fingerprint'][:12]}), got {base.describe()}. "
            "Give the right one with base=... (or the environment variable POE_BASE), or use this with verify=False."
        )


def check_base_config(base: BaseSource, expected: object, stage: str) -> None:
    """Raise `FingerprintError` if a base's config makes another network of its weights than the config `expected`."""
    if base.config is None or not isinstance(expected, dict):
        return
    differences = compare_networks(expected, base.config)
    if differences:
        listed = "; ".join(f"{name} should be {old!r}, got {new!r}" for name, (old, new) in differences.items())
        raise FingerprintError(
            f"{base.repo or 'The base'} has the weights that {stage} was trained on, but its config.json makes another "
            f"network of them: {listed}. Restore its config.json, or use this with verify=False."
        )


def compare_networks(expected: dict[str, Any], got: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the fields in which two config.json files of one base make different networks: name -> (expected, got).

    Both are read by the installed transformers, so the spelling of the version that wrote them does not matter.
    """
    if expected.get("model_type") != got.get("model_type"):
        return {"model_type": (expected.get("model_type"), got.get("model_type"))}
    model_type = str(got.get("model_type"))
    kind: Any = None
    try:
        kind = PoEConfig if model_type == PoEConfig.model_type else CONFIG_MAPPING[model_type]
        before, after, known = (_config_fields(kind(**copy.deepcopy(fields))) for fields in (expected, got, {}))
    except Exception:  # a config of remote code, or one that its class refuses
        before, after, known = dict(expected), dict(got), {**expected, **got}
    for fields, raw in ((before, expected), (after, got)):
        fields.update({name: raw.get(name) for name in _DECISIVE})
    neutral = set(_NEUTRAL)
    if kind is PoEConfig:
        neutral.add("auto_map")  # the class in this folder is used
    ropes = _find_ropes(after.get("rope_parameters"))
    if all(rope.get("rope_type", "default") in ("default", "linear") for rope in ropes):
        neutral.add("max_position_embeddings")  # other rotary positions depend on it
    return {
        name: (before.get(name), after.get(name))
        for name in sorted({*before, *after} - neutral)
        if before.get(name) != after.get(name)
        and not name.endswith(_NEUTRAL_ENDS)
        and (name in known or name in _DECISIVE or _is_read(name, kind))
    }


def _config_fields(config: PreTrainedConfig) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(json.dumps(config.to_dict(), default=str))
    for rope in _find_ropes(fields.get("rope_parameters")):
        rope.pop("type", None)  # the older name of rope_type
    return fields


def _find_ropes(parameters: Any) -> list[dict[str, Any]]:
    """Return the parameters of rotary positions: one set, or one for each type of layer."""
    if not isinstance(parameters, dict):
        return []
    return [value for value in parameters.values() if isinstance(value, dict)] or [parameters]


def _is_read(name: str, kind: Any) -> bool:
    """Return whether the code of a network mentions a config field that its config class does not declare."""
    try:
        model = AutoModelForCausalLM._model_mapping[kind]
    except KeyError:
        return True
    modules = [sys.modules[model.__module__], cache_utils, masking_utils, modeling_rope_utils, modeling_utils]
    pattern = re.compile(rf"""\bconfig\.{re.escape(name)}\b|["']{re.escape(name)}["']""")
    return any(pattern.search(inspect.getsource(module)) for module in modules)


def warn_unverified(what: str) -> None:
    """Warn that the fingerprints of `what` were not compared."""
    warnings.warn(f"{what}: with verify=False the weights are not compared with their fingerprints.", stacklevel=3)


def is_stage(config: Mapping[str, Any]) -> bool:
    """Return whether a config.json is a stage's."""
    return config.get("model_type") == "poe_stage"


def resolve_lineage(
    repo: str,
    access: Access,
    *,
    revision: str | None = None,
    base: str | None = None,
    embedded: Sequence[str] = (),
    known_base: BaseSource | None = None,
) -> Lineage:
    """Find the parents and the base of a stage. Reads only small files.

    The base is at `base`, else at the environment variable `POE_BASE`, else where the stage names it. If it is not
    there, the `embedded` folders are searched. `known_base` is a base that is open already; then none is searched.
    Raises `LineageError`, with the chain, for a cycle, a missing stage or base, or more than 16 stages, `SourceError`
    if the first stage cannot be reached.
    """
    stages = _follow_parents(repo, access, revision)
    if known_base is not None:
        return Lineage(stages, known_base, stages[-1].config.get("base_config") or {})
    chain = _format_chain(stages)
    named = stages[0].config["base"]
    override = base or os.environ.get("POE_BASE")
    location = override or named.get("repo")
    if not location:
        raise LineageError(f"{chain} -> a base that was never saved: give its location with base=... or POE_BASE.")
    try:
        location = override or _resolve_named_repo(stages[0], location)
        # The named revision does not apply to another location.
        source, config = find_base(location, access, None if override else named.get("revision"))
    except SourceError as error:
        if not override:
            for folder in embedded:
                source, config = find_base(folder, access)
                if source.fingerprint == named["fingerprint"]:
                    return Lineage(stages, source, config)
        raise LineageError(
            f"The chain {chain} -> {location} ends before its base ({named['fingerprint'][:12]}): {error} "
            "Or give the location of the base with base=... or the environment variable POE_BASE."
        ) from error
    return Lineage(stages, source, config)


def _follow_parents(repo: str, access: Access, revision: str | None) -> tuple[StageSource, ...]:
    """Return the stages of a chain, from the one on the base upwards."""
    stages: list[StageSource] = []
    seen: set[tuple[str, str | None]] = set()
    location: str | None = repo
    while location is not None:
        key = (os.path.realpath(location) if os.path.isdir(location) else location, revision)
        if key in seen:
            raise LineageError(
                f"The chain {_format_chain(stages[::-1])} -> {location} is a cycle: a parent names its own child."
            )
        if len(stages) == LONGEST_CHAIN:
            raise LineageError(f"The chain {_format_chain(stages[::-1])} -> ... is longer than {LONGEST_CHAIN} stages.")
        seen.add(key)
        try:
            config, path = read_config(location, access, revision)
        except SourceError as error:
            if not stages:
                raise
            raise LineageError(f"The chain {_format_chain(stages[::-1])} -> {location} is broken: {error}") from error
        folder = os.path.dirname(path)
        check_no_pickles(folder)
        check_stage_config(config, path)
        commit = None if os.path.isdir(location) else extract_commit_hash(path, None) or revision
        stages.append(StageSource(location, commit, folder, config, access))
        location, revision = None, None
        if parent := stages[-1].parent:
            try:
                location, revision = _resolve_named_repo(stages[-1], parent["repo"]), parent.get("revision")
            except SourceError as error:
                raise LineageError(
                    f"The chain {_format_chain(stages[::-1])} ends before its parent: {error}"
                ) from error
    return tuple(stages[::-1])


def check_stage_config(config: dict[str, Any], path: str) -> None:
    """Raise `LineageError` or `DeltaError` unless a config.json has the fields of a stage, with valid types."""
    if not is_stage(config):
        raise LineageError(
            f"{path} is not a stage config: expected model_type 'poe_stage', got {config.get('model_type')!r}."
        )
    if str(config.get("poe_format")) not in FORMATS:
        raise DeltaError(
            f"{path} is of format {config.get('poe_format')!r}, expected {' or '.join(FORMATS)}. "
            "Update poe-cascade to read it."
        )
    required = {"stage": ("name", "num_layers", "attach_at", "head"), "base": ("fingerprint",)}
    if config.get("parent"):
        required["parent"] = ("repo", "fingerprint")
    for name, keys in required.items():
        value = config.get(name) or {}
        missing = [key for key in keys if value.get(key) is None] if isinstance(value, dict) else keys
        if missing:
            raise DeltaError(f"{path}: {name!r} lacks {', '.join(missing)}. Fetch it again.")
        for key in ("name", "head", "dtype", "layers", "active", "repo", "revision", "fingerprint"):
            if not isinstance(value.get(key, ""), str | None):
                raise DeltaError(f"{path}: {key!r} of {name!r} should be text, got {value[key]!r}. Fetch it again.")
    try:
        _read_stage_config(config["stage"])
    except (StageError, TypeError) as error:
        raise DeltaError(f"{path} describes no stage: {error}") from error


def _read_stage_config(stage: Mapping[str, Any], parent: str | None = None) -> StageConfig:
    return StageConfig(
        name=stage["name"],
        num_layers=stage["num_layers"],
        head=stage["head"],
        head_rank=stage.get("head_rank") or 1,
        parent=parent,
        attach_at=stage["attach_at"],
        **{name: stage[name] for name in ("layers", "rank", "active") if name in stage},
    )


def _resolve_named_repo(stage: StageSource, repo: str) -> str:
    """Return the location of the parent or base that a stage names. Raises `SourceError` if it is not allowed.

    A path must be relative to the stage's own folder. A stage from the Hub may name only Hub repositories, so that a
    stranger's repository cannot choose which folder of this machine is read.
    """
    if not is_path(repo):
        if os.path.isdir(repo):
            raise SourceError(
                f"{stage.repo} names the repository {repo}, but the working directory holds a folder of that name, "
                "which would be read instead: change the working directory."
            )
        return repo
    if not os.path.isdir(stage.repo):
        raise SourceError(
            f"{stage.repo} comes from the Hub and names a folder, {repo!r}: it may name only repositories."
        )
    if not repo.startswith("."):
        raise SourceError(f"{stage.repo} names the folder {repo!r}, expected a path relative to its own.")
    return os.path.normpath(os.path.join(os.path.realpath(stage.folder), repo))


def _format_chain(stages: Sequence[StageSource]) -> str:
    return " -> ".join(f"{stage.name} ({stage.repo})" for stage in reversed(stages)) or "(empty)"
