"""Stages go to the Hub."""

import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi

from poe.errors import SourceError
from poe.loaders.stage_folder import save_stage_folder
from poe.modeling.delta_file import PICKLES
from poe.modeling.stage import Stage

if TYPE_CHECKING:
    from poe.cascade import Cascade


def push_stage(
    cascade: "Cascade",
    stage: Stage,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    **save_options: Any,
) -> str:
    """Write a stage's folder and upload it to a Hub repository, made if need be; return the commit's address.

    `save_options` are those of `save_stage_folder`. Warns if the stage names a base or parent that only this machine
    has. Raises `SourceError` if the Hub refuses or cannot be reached, `OutputError` if the disk refuses.
    """
    parent = stage.parent.source if stage.parent is not None else None
    for what, repo in (("base", cascade.base_source.repo), ("parent", parent["repo"] if parent else "-")):
        if repo is None or Path(repo).is_dir():
            warnings.warn(
                f"Stage {stage.name!r} names a {what} that is only on this machine ({repo}): push it first, or "
                "others must say where it is with base=... or POE_BASE.",
                stacklevel=3,
            )
    source = stage.source
    with tempfile.TemporaryDirectory(prefix="poe-push-") as scratch:
        try:
            folder = save_stage_folder(cascade, stage, Path(scratch) / "stage", **save_options)
            fingerprint = stage.source["fingerprint"] if stage.source else None
        finally:
            stage.source = source  # the scratch folder is not where the stage lives
        api = HfApi(token=token)
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                commit_message=commit_message or f"Stage {stage.name}",
                ignore_patterns=[f"*{ending}" for ending in PICKLES],
            )
        except Exception as error:  # the Hub's refusals and the HTTP library's own errors have no common type
            raise SourceError(
                f"Stage {stage.name!r} could not be pushed to {repo_id}: {error}. Check the name, the network and your "
                "token (`hf auth login`)."
            ) from error
    stage.source = {"repo": repo_id, "revision": commit.oid, "fingerprint": fingerprint}
    return str(commit.commit_url)
