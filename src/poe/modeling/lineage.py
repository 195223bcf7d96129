"""From a stage's config.json to everything it stands on: parents, base, and whether they are what they should be."""

import json
import os
import socket
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from transformers.utils.hub import cached_file, extract_commit_hash

from .delta_file import DELTA_NAME, POE_FORMAT, DeltaHeader, read_delta_header, refuse_pickles, verify_delta
from .failures import DeltaError, FingerprintError, LineageError, SourceError
from .fingerprint import fingerprint_files_cached
from .stage_config import StageConfig

LONGEST_CHAIN = 16
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Access:
    """How repositories are reached; the names are those of `from_pretrained`."""

    token: str | bool | None = None
    cache_dir: str | None = None
    local_files_only: bool = False
    force_download: bool = False

    def kwargs(self, repo: str) -> dict[str, Any]:
        """Return the fields that are set as keyword arguments for transformers.

        If `repo` is not a folder and nobody answers at the Hub's address, only local files are asked for: the Hub
        client would try for half a minute per file before it looks into its cache.
        """
        fields = {name: value for name, value in vars(self).items() if value not in (None, False)}
        if not os.path.isdir(repo) and not _hub_answers():
            fields["local_files_only"] = True
        return fields


def _hub_answers() -> bool:
    """Return whether a connection to the Hub can be opened; behind a proxy that cannot be known, so it is assumed."""
    address = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    if getproxies().get(address.scheme) or not address.hostname:
        return True
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((address.hostname, port), timeout=5).close()
    except OSError:
        return False
    return True


def fetch(repo: str, filename: str, access: Access, revision: str | None = None) -> str | None:
    """Return the local path of a file in a folder or Hub repository, None if the repository has no such file.

    Raises `SourceError` when the folder or repository is not there or cannot be reached.
    """
    if os.path.isdir(repo):
        path = os.path.join(repo, filename)
        return path if os.path.isfile(path) else None
    if is_path(repo):
        raise SourceError(f"There is no folder {repo}: expected a model folder or a Hub repository such as 'me/model'.")
    try:
        return cached_file(
            repo, filename, revision=revision, _raise_exceptions_for_missing_entries=False, **access.kwargs(repo)
        )
    except Exception as error:  # the client's own errors, of the HTTP library, of the file system
        raise SourceError(
            f"{filename} of {repo} (revision {revision or 'main'}) could not be reached: {_first_line(error)} "
            "Check the name, the network and your token, or give a local folder."
        ) from error


def is_path(repo: str) -> bool:
    """Return whether a name can only mean a folder (a Hub name is `name` or `owner/name`)."""
    return (
        repo.startswith((".", "~")) or os.path.isabs(repo) or repo.count("/") > 1 or (os.sep != "/" and os.sep in repo)
    )


def read_config(repo: str, access: Access, revision: str | None = None) -> tuple[dict[str, Any], str]:
    """Return a repository's config.json and its local path; `SourceError` if there is none or it is not JSON."""
    path = fetch(repo, "config.json", access, revision)
    if path is None:
        raise SourceError(
            f"{repo} (revision {revision or 'main'}) has no config.json, or it could not be reached: expected the "
            "folder or repository of a model or stage. Check the name, the network and your token."
        )
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
    except (OSError, ValueError) as error:
        raise SourceError(f"{path} is not readable JSON ({_first_line(error)}). Fetch it again.") from error
    if not isinstance(config, dict):
        raise SourceError(f"{path} should hold a JSON object, got {type(config).__name__}.")
    return config, path


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
        with open(index, encoding="utf-8") as file:
            names = sorted(set(json.load(file)["weight_map"].values()))
        paths = [fetch(self.repo, name, self.access, self.revision) for name in names]
        if None in paths:
            raise SourceError(f"{self.repo} lacks {names[paths.index(None)]}, which {_INDEX} names. Fetch it again.")
        return [path for path in paths if path is not None]

    def describe(self) -> str:
        """Return `repo (revision, fingerprint)` for messages."""
        return f"{self.repo or 'a model in memory'} (revision {self.revision or 'none'}, {self.fingerprint[:12]})"


def base_source(repo: str, access: Access, revision: str | None = None) -> tuple[BaseSource, dict[str, Any]]:
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
        return header


@dataclass(frozen=True)
class Lineage:
    """A whole chain: `links` from the stage that stands on the base upwards, the requested one last; and the base."""

    links: tuple[Link, ...]
    base: BaseSource
    base_config: dict[str, Any]

    def verify(self) -> None:
        """Check base, parents and the stage itself by fingerprint; raises `FingerprintError` or `DeltaError`."""
        expected = self.links[-1].config["base"]
        check_base(self.base, expected, self.links[-1].repo)
        below = ""
        for link in self.links:
            if link.header.base_fingerprint != expected["fingerprint"]:
                raise FingerprintError(
                    f"Stage {link.name!r} ({link.repo}) was trained on another base: expected "
                    f"{expected['fingerprint'][:12]} ({expected.get('repo')}), "
                    f"got {link.header.base_fingerprint[:12]}. The stages of a chain share one base."
                )
            parent = link.config.get("parent") or {}
            if not parent.get("fingerprint", "") == link.header.parent_fingerprint == below:
                raise FingerprintError(
                    f"Stage {link.name!r} ({link.repo}) stands on parent {parent.get('repo')} "
                    f"(revision {parent.get('revision') or 'none'}): expected "
                    f"{link.header.parent_fingerprint[:12] or 'none'}, got {below[:12] or 'none'}. "
                    "Fetch the parent's revision that is named, or train the stage again."
                )
            verify_delta(link.delta_path, link.header)
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


def is_stage(config: dict[str, Any]) -> bool:
    """Return whether a config.json is a stage's."""
    return config.get("model_type") == "poe_stage"


def resolve(
    repo: str,
    access: Access,
    *,
    revision: str | None = None,
    base: str | None = None,
    embedded: Sequence[str] = (),
    own: BaseSource | None = None,
) -> Lineage:
    """Follow a stage to its base. Nothing but small files is read.

    `base`, else the environment variable `POE_BASE`, else what the stage names says where the base is; `embedded`
    are folders to look in when that is not there. With `own`, a base that is open already, no base is looked for.
    Raises `LineageError` (which prints the chain) for a cycle, a missing link or more than 16 stages, `SourceError`
    if the first one cannot be reached.
    """
    links = _climb(repo, access, revision)
    if own is not None:
        return Lineage(links, own, links[-1].config.get("base_config") or {})
    chain = _print_chain(links)
    named = links[0].config["base"]
    override = base or os.environ.get("POE_BASE")
    where = override or named.get("repo")
    if not where:
        raise LineageError(f"{chain} -> a base that was never saved: say where it is with base=... or POE_BASE.")
    if not override:
        where = _beside(links[0], where)
    try:
        # A base that was overridden is another place: the revision that was named means nothing there.
        source, config = base_source(where, access, None if override else named.get("revision"))
    except SourceError as error:
        if not override:
            for folder in embedded:
                source, config = base_source(folder, access)
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
        _check_stage_config(config, path)
        commit = None if os.path.isdir(where) else extract_commit_hash(path, None) or revision
        links.append(Link(where, commit, folder, config, access))
        parent = config.get("parent")
        where, revision = (_beside(links[-1], parent["repo"]), parent.get("revision")) if parent else (None, None)
    return tuple(links[::-1])


def _check_stage_config(config: dict[str, Any], path: str) -> None:
    if not is_stage(config):
        raise LineageError(
            f"{path} is not a stage's: expected model_type 'poe_stage', got {config.get('model_type')!r}."
        )
    if str(config.get("poe_format")) != POE_FORMAT:
        raise DeltaError(
            f"{path} is of format {config.get('poe_format')!r}, expected {POE_FORMAT!r}. Update poe-cascade to read it."
        )
    for name, keys in (("stage", ("name", "num_layers", "attach_at", "head")), ("base", ("fingerprint",))):
        missing = [key for key in keys if key not in (config.get(name) or {})]
        if missing:
            raise DeltaError(f"{path}: {name!r} lacks {', '.join(missing)}. Fetch it again.")


def _beside(link: Link, repo: str) -> str:
    """Return where a parent or base is: a path is relative to the stage's own folder."""
    return os.path.normpath(os.path.join(os.path.realpath(link.folder), repo)) if repo.startswith(".") else repo


def _print_chain(links: Sequence[Link]) -> str:
    return " -> ".join(f"{link.name} ({link.repo})" for link in reversed(links)) or "(empty)"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
