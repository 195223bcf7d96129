"""Whether every byte of a base or stage is what it says, one check at a time; a failed one does not stop the others."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import AutoTokenizer

from poe.errors import DeltaError, PoEError, SourceError
from poe.loaders.repository import embedded_folders, list_files, locate
from poe.loaders.stage_folder import AUTO_MAP, network_files
from poe.modeling import modeling_poe
from poe.modeling.access import Access, fetch, read_config
from poe.modeling.delta_file import PICKLES, check_finite, read_delta, verify_delta
from poe.modeling.lineage import BaseSource, Link, check_base, find_base, is_stage, resolve_lineage

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True)
class Check:
    """One question about a folder or repository: what was asked, whether all is well, and what was found."""

    name: str
    ok: bool
    detail: str


def verify(
    repo: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    access: Access | None = None,
    revision: str | None = None,
) -> Iterator[Check]:
    """Yield the checks of a base, or of a stage and everything it stands on, as they are made.

    Everything that is named is fetched and read whole, except what may be a pickle: that is refused by its name.
    Raises `SourceError` if there is nothing to check.
    """
    access, where = access or Access(), locate(repo)
    config, path = read_config(where, access, revision)
    source, _ = find_base(where, access, revision)
    folder = _Folder(where, source.revision, access, config)
    yield _check("file names", folder.names)
    if is_stage(config):
        yield from _stage(folder, Path(path).parent, None if base is None else locate(base))
    else:
        yield _check("network files", lambda: folder.network([Path(modeling_poe.__file__)], None))
        yield _check("tokenizer", folder.tokenizer)
        yield _check("weights are finite", lambda: _finite(source))
        yield _check("fingerprint", lambda: source.fingerprint)


@dataclass(frozen=True)
class _Folder:
    """What is asked of any folder or repository, stage or base."""

    repo: str
    revision: str | None
    access: Access
    config: dict[str, Any]

    def names(self) -> str:
        files = list_files(self.repo, self.access, self.revision)
        odd = [name for name in files if name.lower().endswith(PICKLES)]
        if odd:
            raise DeltaError(f"expected no file that can carry a pickle, got {', '.join(odd[:5])}. Remove them.")
        return f"{len(files)} files, none of which can carry a pickle"

    def network(self, own: Sequence[Path], auto_map: dict[str, str] | None) -> str:
        """Compare the Python files that remote code would run with those of this package."""
        named = self.config.get("auto_map")
        if auto_map is None and not named:
            return "the classes are those of transformers: it brings no code"
        if auto_map is not None and named != auto_map:
            raise DeltaError(f"auto_map should be {json.dumps(auto_map)}, got {json.dumps(named)}.")
        for file in own:
            path = fetch(self.repo, file.name, self.access, self.revision)
            if path is None:
                raise DeltaError(f"{file.name} is missing: it cannot be opened without the package. Save it again.")
            if Path(path).read_bytes() != file.read_bytes():
                raise DeltaError(
                    f"{file.name} is not the one of this package: it was changed, or comes from another version. "
                    "Read it before you trust it; the package itself never runs it."
                )
        return f"{len(own)} Python files, each the same as in this package"

    def tokenizer(self) -> str:
        present = [n for n in VOCABULARIES if fetch(self.repo, n, self.access, self.revision) is not None]
        if not present:
            raise DeltaError("there is no tokenizer: expected tokenizer.json and tokenizer_config.json beside it.")
        options = self.access.kwargs(self.repo)
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                self.repo, revision=self.revision or "main", trust_remote_code=False, **options
            )
        except Exception as error:  # files of somebody else's making can fail in any way
            raise DeltaError(f"the tokenizer cannot be opened without running code: {error}") from error
        return f"{len(tokenizer):,} tokens, {'with a' if tokenizer.chat_template else 'no'} chat template"


def _stage(folder: _Folder, path: Path, base: str | None) -> Iterator[Check]:
    yield _check("network files", lambda: folder.network(network_files(), AUTO_MAP))
    yield _check("tokenizer", folder.tokenizer)
    own = Link(folder.repo, folder.revision, str(path), folder.config, folder.access)
    try:
        lineage = resolve_lineage(
            folder.repo, folder.access, revision=folder.revision, base=base, embedded=embedded_folders()
        )
    except PoEError as error:
        yield Check("lineage", False, str(error))
        yield from _delta(own)
        return
    yield _check("lineage", lambda: " -> ".join([*(k.name for k in reversed(lineage.links)), str(lineage.base.repo)]))
    for link in reversed(lineage.links):
        yield from _delta(link)
    yield _check("fingerprints agree", lineage.verify_links, lambda: "every stage names the one below and the base")
    expected = folder.config["base"]
    yield _check("base", lambda: check_base(lineage.base, expected, own.name), lineage.base.describe)


def _delta(link: Link) -> Iterator[Check]:
    name = str((link.config.get("stage") or {}).get("name"))
    yield _check(f"{name}: header", lambda: f"{len(link.header.tensors)} tensors of stage {link.header.stage}")
    yield _check(
        f"{name}: fingerprint",
        lambda: verify_delta(link.delta_path, link.header),
        lambda: link.header.self_fingerprint,
    )
    yield _check(f"{name}: weights are finite", lambda: f"{len(read_delta(link.delta_path, name))} tensors")


def _finite(source: BaseSource) -> str:
    count = 0
    for path in source.weight_files():
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    check_finite(str(source.repo), {name: file.get_tensor(name)})
                    count += 1
        except PoEError:
            raise
        except Exception as error:  # the library's own type, which is not exported everywhere
            raise SourceError(f"{path} cannot be read as safetensors ({error}). Fetch it again.") from error
    return f"{count} tensors"


def _check(name: str, action: Callable[[], object], detail: Callable[[], str] | None = None) -> Check:
    """Do something that raises if all is not well; `detail`, else what it returns, is what was found."""
    try:
        found = action()
        return Check(name, True, str(found) if detail is None else detail())
    except PoEError as error:
        return Check(name, False, str(error))
