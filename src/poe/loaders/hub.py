"""Publish stages and bases on the Hub: check the folder, then upload all files in one commit."""

import hashlib
import json
import os
import re
import stat
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors.torch import load_file

from poe.errors import DeltaError, FingerprintError, LineageError, PoEError, SourceError, StageError, printable
from poe.files.output import OWN_FILES
from poe.loaders.base import Base
from poe.loaders.card import example_prompt, notice, stage_card
from poe.loaders.outcome import describe_failure, describe_untrained
from poe.loaders.repository import read_remote_header
from poe.loaders.stage_folder import PLOT, network_files, save_stage_folder
from poe.loaders.tokenizer import load_tokenizer
from poe.loaders.verify import verify
from poe.modeling.access import (
    MOST_JSON_BYTES,
    Access,
    check_file,
    first_line,
    hub_error,
    hub_url,
    is_path,
    read_config,
    read_json,
)
from poe.modeling.delta_file import DELTA_NAME, check_no_pickles, read_delta_header
from poe.modeling.lineage import StageSource, check_stage_config, find_base, is_stage
from poe.modeling.stage import Stage

# The names of the files of a published stage or base besides its weights and Python files.
PUBLISHED = set(
    "config.json generation_config.json training.json report.png README.md .gitattributes tokenizer.json "
    "NOTICE NOTICE.md NOTICE.txt LICENSE LICENSE.md LICENSE.txt "
    "tokenizer_config.json special_tokens_map.json added_tokens.json tokenizer.model spiece.model "
    "vocab.json vocab.txt merges.txt chat_template.jinja chat_template.json".split()
)
BASE_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt")  # too large to search, and no secrets
_SECRET = re.compile(
    r"\b(hf|api_org|gh[pousr]|github_pat|glpat|npm)[_-][A-Za-z0-9_]{16,}|\bsk-[A-Za-z0-9_-]{16,}|\bAKIA[A-Z0-9]{16}\b"
    r"|\bAIza[\w-]{30,}|\bxox[abprs]-[\w-]{10,}|\beyJ[\w-]{10,}\.eyJ[\w-]{10,}|\bBearer\s+[\w.~+/-]{16,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----|://[^/\s:@\"']+:[^/\s:@\"']+@"
)
_PATH = re.compile(r"""(?<![\w.:/\\])(?:~|[A-Za-z]:|file://)?[/\\](?:[^\s,:*"'/\\]+[/\\])+([^\s,:*"'/\\]*)""")
# The files of a training run that are never uploaded: checkpoints, rows as they were read, files of trackers.
UNPUBLISHED = (
    *("checkpoint*", "metrics.jsonl", "dropped.jsonl", "tensorboard", "wandb"),
    *(".cache", ".git", ".gitignore", ".DS_Store", OWN_FILES),
)


@dataclass(frozen=True)
class UploadPlan:
    """The files of an upload: name -> a path, or bytes that replace the folder's file.

    `left_out` stays local. `problems` are reasons not to publish the result, as sentences: it learned nothing, or was
    never trained.
    """

    repo_id: str
    title: str
    files: Mapping[str, Path | bytes]
    left_out: tuple[str, ...]
    problems: tuple[str, ...] = ()

    def sizes(self) -> dict[str, int]:
        """Return each file's size in bytes."""
        return {n: len(f) if isinstance(f, bytes) else f.stat().st_size for n, f in self.files.items()}


def plan_upload(
    folder: Path | str,
    repo_id: str,
    *,
    base: str | None = None,
    parent: str | None = None,
    license: str | None = None,
    measured: Mapping[str, Any] | None = None,
    token: str | bool | None = None,
) -> UploadPlan:
    """Check a stage's or base's folder and return the plan of its upload. Nothing is uploaded.

    A published stage must name Hub repositories for its base and parent. If config.json names folders, `base` and
    `parent` replace them; their fingerprints must match. `license` is the stage's license in the card, the notice and
    training.json: an identifier of the Hub such as "apache-2.0", or "other". `measured` is what the card shows of an
    evaluation of the stage (`poe.evaluation.results.describe_for_card`). Raises `DeltaError` for a file that does
    not belong to a stage or base and for a failed check of `verify`, `LineageError` for a base or parent that is not
    on the Hub, `FingerprintError` for a wrong one and for an evaluation of another stage, `SourceError` for an invalid
    repository name.
    """
    folder, access = Path(folder).expanduser().absolute(), Access(token)
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise SourceError(f"{repo_id!r} is not a repository name: expected 'me/name'. {error}") from None
    if not folder.is_dir():
        raise SourceError(f"There is no folder {folder}: expected the folder of a stage or base.")
    config, path = read_config(str(folder), access)
    files, left_out = _select_files(folder, config)
    changed: dict[str, bytes] = {}
    if is_stage(config):
        check_stage_config(config, path)
        _check_measured(folder, config, measured)
    record = read_json(files["training.json"]) if "training.json" in files else {}
    public = _make_public(record, license, measured)
    if "training.json" in files and public != record:
        changed["training.json"] = (json.dumps(public, indent=2, ensure_ascii=False) + "\n").encode()
    if is_stage(config):
        changed |= _rewrite_files(folder, config, repo_id, base, parent, license, public, access)
    elif base or parent or license or measured:
        raise StageError(f"{folder} is a base, so base=, parent=, measured= and license= do not apply: leave them out.")
    failed = [check for check in verify(folder, base=base, access=access) if not check.ok]
    if failed:
        raise DeltaError(
            f"{folder} cannot be published: "
            + "; ".join(f"{check.name}: {check.detail}" for check in failed)
            + " (`poe verify` shows every check.)"
        )
    title = f"Stage {config['stage']['name']}" if is_stage(config) else f"Base {folder.name}"
    problems = [*find_problems(files)]
    if measured and "README.md" not in changed:
        problems.append("README.md was edited, so it does not show the results: add them, or delete it")
    return UploadPlan(repo_id, title, {**files, **changed}, tuple(left_out), tuple(problems))


def find_problems(files: Mapping[str, Path]) -> Iterator[str]:
    """Yield what a folder's training record, or else its delta, says against publishing it."""
    record = read_json(files["training.json"]) if "training.json" in files else {}
    problem = describe_failure(record)
    if not record and DELTA_NAME in files:
        problem = describe_untrained(load_file(files[DELTA_NAME]))
    if problem:
        yield problem


def upload(
    plan: UploadPlan,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
) -> CommitInfo:
    """Upload the files of a plan in one commit. Missing repositories and branches (`revision`) are created.

    A failed upload changes nothing on the Hub, so it can be repeated. If the answer to the commit is lost, the Hub is
    asked whether it has the files. Raises `SourceError` if the Hub refuses or cannot be reached, or if `private` is set
    and the repository is public.
    """
    api, repo_id = HfApi(token=token), plan.repo_id
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private and not api.model_info(repo_id).private:
            raise SourceError(
                f"{repo_id} exists and is public: make it private in its settings, or choose another name."
            )
        if revision not in (None, "main"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        before = api.model_info(repo_id, revision=revision).sha
        message = commit_message or plan.title
        try:
            operations = [CommitOperationAdd(name, content) for name, content in plan.files.items()]
            return api.create_commit(repo_id, operations, commit_message=message, revision=revision)
        except Exception:
            if (made := _find_commit(api, plan, repo_id, revision, before)) is None:
                raise
            url = f"{hub_url()}/{repo_id}/commit/{made}"
            return CommitInfo(commit_url=url, commit_message=message, commit_description="", oid=made)
    except PoEError:
        raise
    except Exception as error:  # the errors of the Hub client and of the HTTP library have no common type
        raise hub_error(f"{plan.title} could not be pushed: {repo_id}", repo_id, error) from error


def _find_commit(api: HfApi, plan: UploadPlan, repo_id: str, revision: str | None, before: str | None) -> str | None:
    """Return the commit that an upload made although it failed; None if the branch is still at `before`.

    Raises `SourceError` if the Hub does not tell, or if the branch has other files than the plan.
    """
    page = f"{hub_url()}/{repo_id}"
    try:
        head = api.model_info(repo_id, revision=revision).sha
        if head == before:
            return None
        found = {entry.path: entry for entry in api.list_repo_tree(repo_id, revision=head)}
    except Exception as error:  # the errors of the Hub client and of the HTTP library have no common type
        raise SourceError(
            f"{plan.title} may have been pushed to {repo_id}: the connection was lost during the commit, and the Hub "
            f"cannot be asked ({first_line(error)}). Look at {page}/commits before you push again."
        ) from error
    if not all(_is_content(found.get(name), content) for name, content in plan.files.items()):
        raise SourceError(
            f"{plan.title} was not pushed: the commit failed while somebody else changed {repo_id}. Look at "
            f"{page}/commits, then push again."
        )
    return head


def _is_content(entry: Any, content: Path | bytes) -> bool:
    """Return whether a file of the Hub (`RepoFile`) has this content, by the hash that the Hub stores."""
    data = content if isinstance(content, bytes) else content.read_bytes()
    if getattr(entry, "lfs", None):
        return bool(entry.lfs.sha256 == hashlib.sha256(data).hexdigest())
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    return bool(getattr(entry, "blob_id", None) == blob)


def push_stage(
    base: Base,
    stage: Stage,
    repo_id: str,
    *,
    base_repo: str | None = None,
    parent_repo: str | None = None,
    license: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    **save_options: Any,
) -> str:
    """Write a stage's folder, check it (`plan_upload`) and upload it (`upload`); return the commit's URL.

    `base_repo`, `parent_repo` and `license` are `base`, `parent` and `license` of `plan_upload`. `save_options` are
    those of `save_stage_folder`, which can also raise `OutputError`.
    """
    source = stage.source
    with tempfile.TemporaryDirectory(prefix="poe-push-", ignore_cleanup_errors=True) as scratch:
        try:
            folder = save_stage_folder(base, stage, Path(scratch) / "stage", **save_options)
            fingerprint = stage.source["fingerprint"] if stage.source else None
        finally:
            stage.source = source  # the temporary folder is deleted below
        plan = plan_upload(folder, repo_id, base=base_repo, parent=parent_repo, license=license, token=token)
        commit = upload(plan, private=private, revision=revision, token=token, commit_message=commit_message)
    stage.source = {"repo": repo_id, "revision": commit.oid, "fingerprint": fingerprint}
    return str(commit.commit_url)


def _select_files(folder: Path, config: Mapping[str, Any]) -> tuple[dict[str, Path], list[str]]:
    """Return the files to publish, and the names of those to leave out.

    Raises `DeltaError` for a file of another name, for anything that is not a regular file (the target of a link may be
    private), for a Python file that is not this package's, and for text with a secret.
    """
    check_no_pickles(folder)
    kind = "stage" if is_stage(config) else "base"
    code = {path.name: path for path in network_files()}
    files: dict[str, Path] = {}
    left_out: list[str] = []
    refused: list[str] = []
    for path in sorted(_walk(folder)):
        name = path.relative_to(folder)
        if any(fnmatch(name.parts[0], pattern) for pattern in UNPUBLISHED):
            left_out.append(name.as_posix())
        elif not stat.S_ISREG(path.lstat().st_mode):
            refused.append(f"{name.as_posix()} (a link, or no file at all)")
        elif len(name.parts) > 1 or not (
            name.name in PUBLISHED
            or name.name in code
            or (name.name == DELTA_NAME if kind == "stage" else BASE_WEIGHTS.fullmatch(name.name))
        ):
            refused.append(name.as_posix())
        elif kind == "base" and name.name in code and path.read_bytes() != code[name.name].read_bytes():
            refused.append(f"{name.name} (changed, or of another version of this package)")
        else:
            files[name.name] = path
    if refused:
        names = ", ".join(refused[:5]) + (", ..." if len(refused) > 5 else "")
        raise DeltaError(
            f"{folder} holds {names}, which does not belong to a {kind}. Move it elsewhere, then push again."
        )
    for path in files.values():
        if path.suffix not in (".safetensors", ".png", ".py", ".model") and path.name not in _VOCABULARIES:
            _check_no_secrets(path)
    return files, left_out


def _walk(folder: Path) -> Iterator[Path]:
    """Yield everything in a folder that is not a folder itself. Links are not followed."""
    for where, folders, names in os.walk(folder):
        yield from (Path(where) / name for name in names)
        yield from (path for path in (Path(where) / name for name in folders) if path.is_symlink())


def _check_no_secrets(path: Path) -> None:
    """Raise `DeltaError` if a text file holds what looks like a token, a password or a private key."""
    check_file(path, MOST_JSON_BYTES)
    found = _SECRET.search(path.read_text(encoding="utf-8", errors="replace"))
    if found:
        raise DeltaError(
            f"{path.name} holds what looks like a secret ({found[0][:6]}..., {len(found[0])} characters): "
            "expected nothing private in a published file. Remove it, and withdraw the secret if others could read it."
        )


def _without_paths(value: Any) -> Any:
    """Return a JSON value in which each absolute path has only its last part, because the others are private."""
    if isinstance(value, dict):
        return {_PATH.sub(r"\1", key): _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    return _PATH.sub(r"\1", value) if isinstance(value, str) else value


def _make_public(training: dict[str, Any], license: str | None, measured: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return training.json without private paths, with the license and the results of an evaluation, if given."""
    added = {"license": license, "measured": measured and _without_paths(measured)}
    return {**_without_paths(training), **{name: value for name, value in added.items() if value}}


def _check_measured(folder: Path, config: Mapping[str, Any], measured: Mapping[str, Any] | None) -> None:
    """Raise `FingerprintError` unless the evaluation measured this stage on its base."""
    if measured is None:
        return
    for model, own, found in (
        ("stage", read_delta_header(folder / DELTA_NAME).self_fingerprint, measured["stage"].partition(" ")[0]),
        ("base", config["base"]["fingerprint"], measured["base"]),
    ):
        if own != found:
            raise FingerprintError(
                f"The results are of another {model}: {folder} has the {model} {own[:12]}, and {printable(found, 12)} "
                "was evaluated. Evaluate this stage again, or move the results away."
            )


def _rewrite_files(
    folder: Path,
    config: dict[str, Any],
    repo_id: str,
    base: str | None,
    parent: str | None,
    license: str | None,
    public: Mapping[str, Any],
    access: Access,
) -> dict[str, bytes]:
    """Return the files that change for the Hub: config.json, README.md and NOTICE with Hub names."""
    published = dict(config)
    stage = config["stage"]["name"]
    for role, repo in (("parent", parent), ("base", base)):
        if config.get(role):
            published[role] = {**config[role], **_find_on_hub(stage, role, config[role], repo, access)}
        elif repo is not None:
            raise StageError(f"Stage {stage!r} has no {role}, so {role}= does not apply: leave it out.")
    changed = {}
    if published != config:
        text = json.dumps(published, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        changed["config.json"] = text.encode()
    record = folder / "training.json"
    training = read_json(record) if record.is_file() else {}
    for file, before, after in (
        ("README.md", _render_card(folder, config, training), _render_card(folder, published, public, repo_id)),
        ("NOTICE", notice(config, training), notice(published, public)),
    ):
        # A file that the user has edited is kept; only a generated one is generated again.
        if not (folder / file).is_file() or (folder / file).read_text(encoding="utf-8") == before:
            changed[file] = after.encode()
        elif license and file == "README.md":
            card = ModelCard((folder / file).read_text(encoding="utf-8"))
            card.data["license"] = license
            changed[file] = str(card).encode()
    return changed


def _find_on_hub(
    stage: str, role: str, named: Mapping[str, Any], repo: str | None, access: Access
) -> dict[str, str | None]:
    """Return the Hub repository and revision of a stage's base or parent (`role`), empty if config.json names it.

    Raises `LineageError` if it is not on the Hub, `FingerprintError` if `repo` is not the parent.
    """
    if repo is None:
        if named["repo"] is None or is_path(named["repo"]):
            raise LineageError(
                f"Stage {stage!r} stands on a {role} that only this machine has ({named['repo'] or 'never saved'}): "
                f"push that first, then name its repository (--{role} me/NAME, or {role}='me/NAME')."
            )
        return {}
    if is_path(repo) or os.path.isdir(repo):
        raise LineageError(f"{role} should be a repository on the Hub, got the folder {repo}.")
    config, path = read_config(repo, access)
    revision = find_base(repo, access)[0].revision
    if role == "parent":
        if not is_stage(config):
            raise LineageError(f"{repo} is not a stage: expected the parent of {stage!r}.")
        header, _ = read_remote_header(StageSource(repo, revision, str(Path(path).parent), config, access))
        if header.self_fingerprint != named["fingerprint"]:
            raise FingerprintError(
                f"{repo} is not the parent of {stage!r}: expected {named['fingerprint'][:12]}, "
                f"got {header.self_fingerprint[:12]}. Push the parent that the stage was trained on."
            )
    return {"repo": repo, "revision": revision}


def _render_card(folder: Path, config: Mapping[str, Any], training: Mapping[str, Any], repo: str | None = None) -> str:
    entries = read_delta_header(folder / DELTA_NAME).tensors.values()
    numbers = sum((entry.end - entry.start) // (4 if entry.dtype == "F32" else 2) for entry in entries)
    return stage_card(
        config,
        training,
        parameters=numbers,
        example=example_prompt(load_tokenizer(str(folder))),
        plot=PLOT if (folder / PLOT).is_file() else None,
        repo=repo,
    )
