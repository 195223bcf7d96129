"""Stages and bases go to the Hub: checked first, then everything in one commit or nothing."""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import AutoTokenizer

from poe.errors import DeltaError, FingerprintError, LineageError, PoEError, SourceError
from poe.loaders.card import example_prompt, notice, stage_card
from poe.loaders.remote import delta_header
from poe.loaders.stage_folder import PLOT, network_files, save_stage_folder
from poe.loaders.verify import verify
from poe.modeling.access import Access, is_path, read_config, refused
from poe.modeling.delta_file import DELTA_NAME, read_delta_header, refuse_pickles
from poe.modeling.lineage import Link, base_source, check_stage_config, is_stage
from poe.modeling.stage import Stage

if TYPE_CHECKING:
    from poe.cascade import Cascade

# What a published stage or base may hold besides its weights and Python files; `*` stands for the rest of a name.
PUBLISHED = (
    "config.json generation_config.json training.json report.png README.md NOTICE* LICENSE* .gitattributes "
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json tokenizer.model spiece.model "
    "vocab.json vocab.txt merges.txt chat_template.jinja chat_template.json"
).split()
BASE_WEIGHTS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
# What a run leaves beside a stage that is nobody else's business: checkpoints, rows as they were read, trackers' files.
STAYS = (
    *("checkpoint*", "metrics.jsonl", "dropped.jsonl", "tensorboard", "wandb"),
    *(".cache", ".git", ".gitignore", ".DS_Store"),
)


@dataclass(frozen=True)
class UploadPlan:
    """What would be uploaded: file name -> a path, or bytes that replace the folder's own; and what stays behind."""

    repo_id: str
    title: str
    files: Mapping[str, Path | bytes]
    stays: tuple[str, ...]

    def sizes(self) -> dict[str, int]:
        """Return each file's size in bytes."""
        return {n: len(f) if isinstance(f, bytes) else f.stat().st_size for n, f in self.files.items()}


def pack(
    folder: Path | str,
    repo_id: str,
    *,
    base: str | None = None,
    parent: str | None = None,
    token: str | bool | None = None,
) -> UploadPlan:
    """Check a stage's or base's folder and return what a push of it uploads; nothing is uploaded.

    A stage must name its base, and its parent if it has one, by their place on the Hub: `base` and `parent` say where
    that is if the folder's config.json names a folder. The fingerprint decides whether it is the right one. Raises
    `DeltaError` for a file that does not belong to a stage or a check of `verify` that fails, `LineageError` for a base
    or parent that others cannot reach, `FingerprintError` for a wrong one, `SourceError` for a name that is none.
    """
    folder, access = Path(folder).expanduser().absolute(), Access(token)
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise SourceError(f"{repo_id!r} is not a repository's name: expected 'me/name'. {error}") from None
    if not folder.is_dir():
        raise SourceError(f"There is no folder {folder}: expected the folder of a stage or base.")
    config, path = read_config(str(folder), access)
    files, stays = _sort_out(folder, config)
    changed: dict[str, bytes] = {}
    if is_stage(config):
        check_stage_config(config, path)
        changed = _for_others(folder, config, repo_id, base, parent, access)
    elif base or parent:
        raise DeltaError(f"{folder} is a base: it stands on nothing, so base= and parent= do not apply.")
    failed = [check for check in verify(folder, base=base, access=access) if not check.ok]
    if failed:
        raise DeltaError(
            f"{folder} is not fit to be published: "
            + "; ".join(f"{check.name}: {check.detail}" for check in failed)
            + " (`poe verify` shows every check.)"
        )
    title = f"Stage {config['stage']['name']}" if is_stage(config) else f"Base {folder.name}"
    return UploadPlan(repo_id, title, {**files, **changed}, tuple(stays))


def upload(
    shipment: UploadPlan,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
) -> CommitInfo:
    """Upload a shipment in one commit, to a repository and branch (`revision`) that are made if need be.

    Until the last byte has arrived nobody sees any of it, so a failed push is repeated by pushing again. Raises
    `SourceError` if the Hub refuses or cannot be reached, or has the repository public when `private` is asked for.
    """
    api, repo_id = HfApi(token=token), shipment.repo_id
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private and not api.model_info(repo_id).private:
            raise SourceError(
                f"{repo_id} exists and is public: make it private in its settings, or choose another name."
            )
        if revision not in (None, "main"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.create_commit(
            repo_id,
            [CommitOperationAdd(name, content) for name, content in shipment.files.items()],
            commit_message=commit_message or shipment.title,
            revision=revision,
        )
    except PoEError:
        raise
    except Exception as error:  # the Hub's refusals and the HTTP library's own errors have no common type
        raise refused(f"{shipment.title} could not be pushed: {repo_id}", repo_id, error) from error


def push_stage(
    cascade: "Cascade",
    stage: Stage,
    repo_id: str,
    *,
    base: str | None = None,
    parent: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    **save_options: Any,
) -> str:
    """Write a stage's folder, check it (see `pack`) and upload it (see `upload`); return the commit's address.

    `save_options` are those of `save_stage_folder`, which may also raise `OutputError`.
    """
    source = stage.source
    with tempfile.TemporaryDirectory(prefix="poe-push-") as scratch:
        try:
            folder = save_stage_folder(cascade, stage, Path(scratch) / "stage", **save_options)
            fingerprint = stage.source["fingerprint"] if stage.source else None
        finally:
            stage.source = source  # the scratch folder is not where the stage lives
        shipment = pack(folder, repo_id, base=base, parent=parent, token=token)
        commit = upload(shipment, private=private, revision=revision, token=token, commit_message=commit_message)
    stage.source = {"repo": repo_id, "revision": commit.oid, "fingerprint": fingerprint}
    return str(commit.commit_url)


def _sort_out(folder: Path, config: Mapping[str, Any]) -> tuple[dict[str, Path], list[str]]:
    """Return what belongs to a stage or base, and what stays here; raises `DeltaError` for anything else."""
    refuse_pickles(folder)
    known = (*PUBLISHED, *(path.name for path in network_files()))
    known += (DELTA_NAME,) if is_stage(config) else BASE_WEIGHTS
    files: dict[str, Path] = {}
    stays, odd = [], []
    for path in sorted(path for path in folder.rglob("*") if not path.is_dir()):
        name = path.relative_to(folder)
        if any(fnmatch(name.parts[0], pattern) for pattern in STAYS):
            stays.append(name.as_posix())
        elif len(name.parts) == 1 and any(fnmatch(name.name, pattern) for pattern in known):
            files[name.name] = path
        else:
            odd.append(name.as_posix())
    if odd:
        raise DeltaError(
            f"{folder} holds {', '.join(odd[:5])}{', ...' if len(odd) > 5 else ''}, which does not belong to a "
            f"{'stage' if is_stage(config) else 'base'}. Move it elsewhere, then push again."
        )
    return files, stays


def _for_others(
    folder: Path, config: dict[str, Any], repo_id: str, base: str | None, parent: str | None, access: Access
) -> dict[str, bytes]:
    """Return the files that others need in another form: config.json with names they can reach, and the card."""
    published = dict(config)
    for what, repo in (("parent", parent), ("base", base)):  # in the order in which they are missed
        if config.get(what):
            published[what] = {**config[what], **_on_hub(config["stage"]["name"], what, config[what], repo, access)}
        elif repo is not None:
            raise DeltaError(f"Stage {config['stage']['name']!r} has no {what}, so {what}= does not apply.")
    changed = {}
    if published != config:
        text = json.dumps(published, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        changed["config.json"] = text.encode()
    record = folder / "training.json"
    training = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    for file, before, after in (
        ("README.md", _card(folder, config, training), _card(folder, published, training, repo_id)),
        ("NOTICE", notice(config, training), notice(published, training)),
    ):
        # Whoever wrote something of their own there meant it: only what was generated is generated again.
        if not (folder / file).is_file() or (folder / file).read_text(encoding="utf-8") == before:
            changed[file] = after.encode()
    return changed


def _on_hub(stage: str, what: str, named: Mapping[str, Any], repo: str | None, access: Access) -> dict[str, str | None]:
    """Return where a stage's base or parent is on the Hub, or raise if others could not reach it."""
    if repo is None:
        if named["repo"] is None or is_path(named["repo"]):
            raise LineageError(
                f"Stage {stage!r} stands on a {what} that only this machine has ({named['repo'] or 'never saved'}): "
                f"push that first, then say where it is (--{what} me/NAME, or {what}='me/NAME')."
            )
        return {}
    if is_path(repo) or os.path.isdir(repo):
        raise LineageError(f"{what} should be a repository on the Hub, got the folder {repo}.")
    config, path = read_config(repo, access)
    revision = base_source(repo, access)[0].revision
    if what == "parent":
        if not is_stage(config):
            raise LineageError(f"{repo} is not a stage: expected the parent of {stage!r}.")
        header, _ = delta_header(Link(repo, revision, str(Path(path).parent), config, access))
        if header.self_fingerprint != named["fingerprint"]:
            raise FingerprintError(
                f"{repo} is not the parent of {stage!r}: expected {named['fingerprint'][:12]}, "
                f"got {header.self_fingerprint[:12]}. Push the parent that the stage was trained on."
            )
    return {"repo": repo, "revision": revision}


def _card(folder: Path, config: Mapping[str, Any], training: Mapping[str, Any], repo: str | None = None) -> str:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError):
        tokenizer = None
    entries = read_delta_header(folder / DELTA_NAME).tensors.values()
    numbers = sum((entry.end - entry.start) // (4 if entry.dtype == "F32" else 2) for entry in entries)
    return stage_card(
        config,
        training,
        parameters=numbers,
        example=example_prompt(tokenizer),
        plot=PLOT if (folder / PLOT).is_file() else None,
        repo=repo,
    )
