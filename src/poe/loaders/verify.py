"""Check every file of a base or stage, one check at a time. A failed check does not stop the others."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open

from poe.errors import DeltaError, PoEError, SourceError
from poe.loaders.repository import embedded_folders, list_files, locate
from poe.loaders.stage_folder import AUTO_MAP, network_files
from poe.loaders.tokenizer import load_tokenizer
from poe.modeling import modeling_poe
from poe.modeling.access import Access, fetch, read_config
from poe.modeling.delta_file import PICKLES, check_finite, read_delta, verify_delta
from poe.modeling.fingerprint import fingerprint_files
from poe.modeling.lineage import (
    BaseSource,
    StageSource,
    check_base,
    check_base_config,
    find_base,
    is_stage,
    resolve_lineage,
)


@dataclass(frozen=True)
class Check:
    """The result of one check of a folder or repository: its name, whether it passed, and details."""

    name: str
    ok: bool
    detail: str


def verify(
    repo: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    access: Access | None = None,
    revision: str | None = None,
) -> Iterator[Check]:
    """Run the checks of a base, or of a stage with its parents and base, and yield each result.

    All their files are fetched and read completely, except files that may be pickles, which fail by their name. Raises
    `SourceError` if the folder or repository cannot be reached.
    """
    access, location = access or Access(), locate(repo)
    config, path = read_config(location, access, revision)
    source, _ = find_base(location, access, revision)
    files = _Files(location, source.revision, access, config)
    yield _run_check("file names", files.check_names)
    if is_stage(config):
        yield from _check_stage(files, Path(path).parent, None if base is None else locate(base))
    else:
        yield _run_check("network files", lambda: files.check_network([Path(modeling_poe.__file__)], None))
        yield _run_check("tokenizer", files.check_tokenizer)
        yield _run_check("weights are finite", lambda: _check_finite(source))
        yield _run_check("fingerprint", lambda: source.find_fingerprint(fingerprint_files))  # reads all bytes


@dataclass(frozen=True)
class _Files:
    """The files of a stage or base in a folder or repository. Each method returns details or raises `DeltaError`."""

    repo: str
    revision: str | None
    access: Access
    config: dict[str, Any]

    def check_names(self) -> str:
        names = list_files(self.repo, self.access, self.revision)
        pickles = [name for name in names if name.lower().endswith(PICKLES)]
        if pickles:
            raise DeltaError(f"expected no file that can carry a pickle, got {', '.join(pickles[:5])}. Remove them.")
        return f"{len(names)} files, none of which can carry a pickle"

    def check_network(self, package_files: Sequence[Path], auto_map: dict[str, str] | None) -> str:
        """Compare the Python files of remote code with those of this package."""
        named = self.config.get("auto_map")
        if auto_map is None and not named:
            return "no remote code: the classes are those of transformers"
        if auto_map is not None and named != auto_map:
            raise DeltaError(f"auto_map should be {json.dumps(auto_map)}, got {json.dumps(named)}.")
        for file in package_files:
            path = fetch(self.repo, file.name, self.access, self.revision)
            if path is None:
                raise DeltaError(f"{file.name} is missing, which the stage needs without the package: save it again.")
            if Path(path).read_bytes() != file.read_bytes():
                raise DeltaError(
                    f"{file.name} is not the one of this package: it was changed, or comes from another version. "
                    "Read it before you trust it; this package never runs it."
                )
        return f"{len(package_files)} Python files, each the same as in this package"

    def check_tokenizer(self) -> str:
        tokenizer = load_tokenizer(self.repo, self.revision, self.access)
        if tokenizer is None:
            raise DeltaError("there is no tokenizer: expected tokenizer.json and tokenizer_config.json beside it.")
        return f"{len(tokenizer):,} tokens, {'with a' if tokenizer.chat_template else 'no'} chat template"


def _check_stage(files: _Files, folder: Path, base: str | None) -> Iterator[Check]:
    yield _run_check("network files", lambda: files.check_network(network_files(), AUTO_MAP))
    yield _run_check("tokenizer", files.check_tokenizer)
    top = StageSource(files.repo, files.revision, str(folder), files.config, files.access)
    try:
        lineage = resolve_lineage(
            files.repo, files.access, revision=files.revision, base=base, embedded=embedded_folders()
        )
    except PoEError as error:
        yield Check("lineage", False, str(error))
        yield from _check_delta(top)
        return
    yield _run_check(
        "lineage", lambda: " -> ".join([*(k.name for k in reversed(lineage.stages)), str(lineage.base.repo)])
    )
    for stage in reversed(lineage.stages):
        yield from _check_delta(stage)
    yield _run_check(
        "fingerprints agree", lineage.verify_headers, lambda: "each stage names the one below it and the base"
    )
    expected, source = files.config["base"], lineage.base

    def check_weights() -> str:
        hashed = replace(source, known_fingerprint=source.find_fingerprint(fingerprint_files))
        check_base(hashed, expected, top.name)
        return hashed.describe()

    yield _run_check("base", check_weights)
    yield _run_check(
        "base config",
        lambda: check_base_config(source, files.config.get("base_config"), top.name),
        lambda: "it makes the network that the stage was trained on",
    )


def _check_delta(stage: StageSource) -> Iterator[Check]:
    name = str((stage.config.get("stage") or {}).get("name"))
    yield _run_check(f"{name}: header", lambda: f"{len(stage.header.tensors)} tensors of stage {stage.header.stage}")
    yield _run_check(
        f"{name}: fingerprint",
        lambda: verify_delta(stage.delta_path, stage.header),
        lambda: stage.header.self_fingerprint,
    )
    yield _run_check(f"{name}: weights are finite", lambda: f"{len(read_delta(stage.delta_path, name))} tensors")


def _check_finite(source: BaseSource) -> str:
    count = 0
    for path in source.weight_files:
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    check_finite(str(source.repo), {name: file.get_tensor(name)})
                    count += 1
        except PoEError:
            raise
        except Exception as error:  # safetensors does not export its error type everywhere
            raise SourceError(f"{path} cannot be read as safetensors ({error}). Fetch it again.") from error
    return f"{count} tensors"


def _run_check(name: str, action: Callable[[], object], detail: Callable[[], str] | None = None) -> Check:
    """Run an action that raises if the check fails. The details are those of `detail`, or the action's result."""
    try:
        result = action()
        return Check(name, True, str(result) if detail is None else detail())
    except PoEError as error:
        return Check(name, False, str(error))
