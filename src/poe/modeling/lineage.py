"""Find a stage's parents and base from its config.json, and verify them by fingerprint."""

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from transformers.utils.hub import extract_commit_hash

from .access import Access, fetch, is_path, read_config
from .delta_file import DELTA_NAME, FORMATS, DeltaHeader, check_no_pickles, read_delta_header, verify_delta
from .failures import DeltaError, FingerprintError, LineageError, SourceError
from .fingerprint import fingerprint_files_cached
from .stage_config import StageConfig

LONGEST_CHAIN = 16
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class BaseSource:
    """The location of a base: `repo` is a folder or Hub name (None for a model in memory), `revision` a commit."""

    repo: str | None
    revision: str | None = None
    access: Access = field(default_factory=Access)
    known_fingerprint: str | None = None

    @cached_property
    def fingerprint(self) -> str:
        """The fingerprint of the base's weights as stored, 64 hexadecimal digits."""
        if self.known_fingerprint is not None:
            return self.known_fingerprint
        return fingerprint_files_cached(self.weight_files())

    def weight_files(self) -> list[str]:
        """Return the local paths of the base's safetensors files. Missing files of a Hub repository are fetched."""
        assert self.repo is not None
        single = fetch(self.repo, _SINGLE, self.access, self.revision)
        if single is not None:
            return [single]
        index = fetch(self.repo, _INDEX, self.access, self.revision)
        if index is None:
            raise SourceError(
                f"{self.repo} has no {_SINGLE} (nor shards of one): expected a base in safetensors. "
                "Convert it first: weights are never unpickled."
            )
        try:
            with open(index, encoding="utf-8") as file:
                names = sorted({str(name) for name in json.load(file)["weight_map"].values()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise SourceError(f"{index} is not an index of safetensors shards ({error}). Fetch it again.") from error
        for name in names:
            if not name.endswith(".safetensors") or os.path.basename(name) != name:
                raise SourceError(
                    f"{self.repo}: {_INDEX} names {name!r}, expected safetensors files of its own folder."
                )
        paths = [fetch(self.repo, name, self.access, self.revision) for name in names]
        if None in paths:
            raise SourceError(f"{self.repo} lacks {names[paths.index(None)]}, which {_INDEX} names. Fetch it again.")
        return [path for path in paths if path is not None]

    def describe(self) -> str:
        """Return `repo (revision, fingerprint)` for messages."""
        return f"{self.repo or 'a model in memory'} (revision {self.revision or 'none'}, {self.fingerprint[:12]})"


def find_base(repo: str, access: Access, revision: str | None = None) -> tuple[BaseSource, dict[str, Any]]:
    """Return the location of a base, with its revision resolved to a commit, and its config.json."""
    config, path = read_config(repo, access, revision)
    commit = None if os.path.isdir(repo) else extract_commit_hash(path, None) or revision
    return BaseSource(repo, commit, access), config


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

    def stage_config(self, parent: str | None) -> StageConfig:
        """Return the stage's config. `parent` is the name of its parent in the cascade."""
        stage = self.config["stage"]
        if stage.get("own_norm"):
            raise DeltaError(
                f"Stage {self.name!r} has a final norm of its own, which this version cannot load: update poe-cascade."
            )
        return StageConfig(
            name=stage["name"],
            num_layers=stage["num_layers"],
            head=stage["head"],
            head_rank=stage.get("head_rank") or 1,
            parent=parent,
            attach_at=stage["attach_at"],
            **{name: stage[name] for name in ("layers", "rank", "active") if name in stage},
        )

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
        """Check base, parents and stage by fingerprint. Raises `FingerprintError` or `DeltaError`."""
        check_base(self.base, self.stages[-1].config["base"], self.stages[-1].repo)
        self.verify_headers()
        for stage in self.stages:
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
