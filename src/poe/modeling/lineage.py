"""From a stage's config.json to everything it stands on: parents, base, and whether they are what they should be."""

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from transformers.utils.hub import extract_commit_hash

from .access import Access, fetch, is_path, read_config
from .delta_file import DELTA_NAME, POE_FORMAT, DeltaHeader, read_delta_header, refuse_pickles, verify_delta
from .failures import DeltaError, FingerprintError, LineageError, SourceError
from .fingerprint import fingerprint_files_cached
from .stage_config import StageConfig

LONGEST_CHAIN = 16
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class BaseSource:
    """Where a base is: `repo`, a folder or Hub name (None if made in memory), at `revision`, a commit or None."""

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
        """Return the local paths of the base's safetensors files, fetching them if need be."""
        assert self.repo is not None
        single = fetch(self.repo, _SINGLE, self.access, self.revision)
        if single is not None:
            return [single]
        index = fetch(self.repo, _INDEX, self.access, self.revision)
        if index is None:
            raise SourceError(
                f"{self.repo} has no {_SINGLE} (nor shards of one): expected a base in safetensors. "
                "Convert it first; nothing here unpickles weights."
            )
        try:
            with open(index, encoding="utf-8") as file:
                names = sorted({str(name) for name in json.load(file)["weight_map"].values()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise SourceError(f"{index} is not an index of safetensors shards ({error}). Fetch it again.") from error
        for name in names:
            if not name.endswith(".safetensors") or os.path.basename(name) != name:
                raise SourceError(
                    f"{self.repo}: {_INDEX} names {name!r}; expected safetensors files of its own folder."
                )
        paths = [fetch(self.repo, name, self.access, self.revision) for name in names]
        if None in paths:
            raise SourceError(f"{self.repo} lacks {names[paths.index(None)]}, which {_INDEX} names. Fetch it again.")
        return [path for path in paths if path is not None]

    def describe(self) -> str:
        """Return `repo (revision, fingerprint)` for messages."""
        return f"{self.repo or 'a model in memory'} (revision {self.revision or 'none'}, {self.fingerprint[:12]})"


def find_base(repo: str, access: Access, revision: str | None = None) -> tuple[BaseSource, dict[str, Any]]:
    """Return where a base is, its revision resolved to a commit, and its config.json."""
    config, path = read_config(repo, access, revision)
    commit = None if os.path.isdir(repo) else extract_commit_hash(path, None) or revision
    return BaseSource(repo, commit, access), config


@dataclass(frozen=True)
class Link:
    """One stage of a chain: where it is, and what its config.json says."""

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
        """Return the stage's fields; `parent` is the name under which its parent is known here."""
        stage = self.config["stage"]
        if stage.get("own_norm"):
            raise DeltaError(
                f"Stage {self.name!r} trains its own final norm, which this version cannot load. Update it."
            )
        return StageConfig(
            name=stage["name"],
            num_layers=stage["num_layers"],
            head=stage["head"],
            head_rank=stage.get("head_rank") or 1,
            parent=parent,
            attach_at=stage["attach_at"],
        )

    @cached_property
    def delta_path(self) -> str:
        """The local path of delta.safetensors, fetched if need be."""
        path = fetch(self.repo, DELTA_NAME, self.access, self.revision)
        if path is None:
            raise DeltaError(f"{self.repo} has no {DELTA_NAME}: expected a complete stage folder. Fetch it again.")
        return path

    @cached_property
    def header(self) -> DeltaHeader:
        """What the delta file declares."""
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
        return header

    @property
    def parent(self) -> dict[str, Any]:
        """What config.json says about the stage below, empty if it stands on the base."""
        return self.config.get("parent") or {}


@dataclass(frozen=True)
class Lineage:
    """A whole chain: `links` from the stage that stands on the base upwards, the requested one last; and the base."""

    links: tuple[Link, ...]
    base: BaseSource
    base_config: dict[str, Any]

    def verify(self) -> None:
        """Check base, parents and the stage itself by fingerprint; raises `FingerprintError` or `DeltaError`."""
        check_base(self.base, self.links[-1].config["base"], self.links[-1].repo)
        self.verify_links()
        for link in self.links:
            verify_delta(link.delta_path, link.header)

    def verify_links(self) -> None:
        """Check that every stage names the one below it and the same base; reads headers, not weights."""
        expected, below = self.links[-1].config["base"], ""
        for link in self.links:
            if link.header.base_fingerprint != expected["fingerprint"]:
                raise FingerprintError(
                    f"Stage {link.name!r} ({link.repo}) was trained on another base: expected "
                    f"{expected['fingerprint'][:12]} ({expected.get('repo')}), "
                    f"got {link.header.base_fingerprint[:12]}. The stages of a chain share one base."
                )
            if not link.parent.get("fingerprint", "") == link.header.parent_fingerprint == below:
                raise FingerprintError(
                    f"Stage {link.name!r} ({link.repo}) stands on parent {link.parent.get('repo')} "
                    f"(revision {link.parent.get('revision') or 'none'}): expected "
                    f"{link.header.parent_fingerprint[:12] or 'none'}, got {below[:12] or 'none'}. "
                    "Fetch the parent's revision that is named, or train the stage again."
                )
            below = link.header.self_fingerprint


def check_base(base: BaseSource, expected: dict[str, Any], stage: str) -> None:
    """Raise `FingerprintError` unless a base is the one that `expected` (`repo`, `revision`, `fingerprint`) names."""
    if base.fingerprint != expected["fingerprint"]:
        raise FingerprintError(
            f"Wrong base for {stage}: expected {expected.get('repo') or 'a model that was never saved'} "
            f"(revision {expected.get('revision') or 'none'}, {expected['fingerprint'][:12]}), got {base.describe()}. "
            "Give the right one with base=... (or the environment variable POE_BASE), or verify=False to use this."
        )


def warn_unverified(what: str) -> None:
    """Say that fingerprints were not compared."""
    warnings.warn(f"{what}: verify=False, the weights were not compared with their fingerprints.", stacklevel=3)


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
    """Follow a stage to its base. Nothing but small files is read.

    The base is at `base`, else at the environment variable `POE_BASE`, else where the stage names it. If it is not
    there, the `embedded` folders are searched. `known_base` is a base that is open already; then none is searched.
    Raises `LineageError` (which prints the chain) for a cycle, a missing link or more than 16 stages, `SourceError`
    if the first one cannot be reached.
    """
    links = _climb(repo, access, revision)
    if known_base is not None:
        return Lineage(links, known_base, links[-1].config.get("base_config") or {})
    chain = _print_chain(links)
    named = links[0].config["base"]
    override = base or os.environ.get("POE_BASE")
    where = override or named.get("repo")
    if not where:
        raise LineageError(f"{chain} -> a base that was never saved: say where it is with base=... or POE_BASE.")
    try:
        where = override or _named_place(links[0], where)
        # A base that was overridden is another place: the revision that was named means nothing there.
        source, config = find_base(where, access, None if override else named.get("revision"))
    except SourceError as error:
        if not override:
            for folder in embedded:
                source, config = find_base(folder, access)
                if source.fingerprint == named["fingerprint"]:
                    return Lineage(links, source, config)
        raise LineageError(
            f"The chain {chain} -> {where} ends before its base ({named['fingerprint'][:12]}): {error} "
            "Or say where the base is with base=... or the environment variable POE_BASE."
        ) from error
    return Lineage(links, source, config)


def _climb(repo: str, access: Access, revision: str | None) -> tuple[Link, ...]:
    links: list[Link] = []
    seen: set[tuple[str, str | None]] = set()
    where: str | None = repo
    while where is not None:
        place = (os.path.realpath(where) if os.path.isdir(where) else where, revision)
        if place in seen:
            raise LineageError(
                f"The chain {_print_chain(links[::-1])} -> {where} is a cycle: a parent names its child."
            )
        if len(links) == LONGEST_CHAIN:
            raise LineageError(f"The chain {_print_chain(links[::-1])} -> ... is longer than {LONGEST_CHAIN} stages.")
        seen.add(place)
        try:
            config, path = read_config(where, access, revision)
        except SourceError as error:
            if not links:
                raise
            raise LineageError(f"The chain {_print_chain(links[::-1])} -> {where} is broken: {error}") from error
        folder = os.path.dirname(path)
        refuse_pickles(folder)
        check_stage_config(config, path)
        commit = None if os.path.isdir(where) else extract_commit_hash(path, None) or revision
        links.append(Link(where, commit, folder, config, access))
        where, revision = None, None
        if parent := links[-1].parent:
            try:
                where, revision = _named_place(links[-1], parent["repo"]), parent.get("revision")
            except SourceError as error:
                raise LineageError(f"The chain {_print_chain(links[::-1])} ends before its parent: {error}") from error
    return tuple(links[::-1])


def check_stage_config(config: dict[str, Any], path: str) -> None:
    """Raise `LineageError` or `DeltaError` unless a config.json has all that a stage's must have, as it must be."""
    if not is_stage(config):
        raise LineageError(
            f"{path} is not a stage's: expected model_type 'poe_stage', got {config.get('model_type')!r}."
        )
    if str(config.get("poe_format")) != POE_FORMAT:
        raise DeltaError(
            f"{path} is of format {config.get('poe_format')!r}, expected {POE_FORMAT!r}. Update poe-cascade to read it."
        )
    needed = {"stage": ("name", "num_layers", "attach_at", "head"), "base": ("fingerprint",)}
    if config.get("parent"):
        needed["parent"] = ("repo", "fingerprint")
    for name, keys in needed.items():
        value = config.get(name) or {}
        missing = [key for key in keys if value.get(key) is None] if isinstance(value, dict) else keys
        if missing:
            raise DeltaError(f"{path}: {name!r} lacks {', '.join(missing)}. Fetch it again.")
        for key in ("name", "head", "dtype", "repo", "revision", "fingerprint"):
            if not isinstance(value.get(key, ""), str | None):
                raise DeltaError(f"{path}: {key!r} of {name!r} should be text, got {value[key]!r}. Fetch it again.")


def _named_place(link: Link, repo: str) -> str:
    """Return where the parent or base is that a stage names; raises `SourceError` if it may not lead there.

    A path is relative to the stage's own folder, never absolute. What comes from the Hub leads to the Hub alone: a
    stranger's repository must not choose which folder of this machine is read.
    """
    if not is_path(repo):
        if os.path.isdir(repo):
            raise SourceError(
                f"{link.repo} names the repository {repo}, but the working directory holds a folder of that name, "
                "which would be read instead. Work in another directory."
            )
        return repo
    if not os.path.isdir(link.repo):
        raise SourceError(
            f"{link.repo} comes from the Hub and names a folder, {repo!r}; it may name repositories only."
        )
    if not repo.startswith("."):
        raise SourceError(f"{link.repo} names the folder {repo!r}; expected a path that is relative to its own.")
    return os.path.normpath(os.path.join(os.path.realpath(link.folder), repo))


def _print_chain(links: Sequence[Link]) -> str:
    return " -> ".join(f"{link.name} ({link.repo})" for link in reversed(links)) or "(empty)"
