"""Write one stage as a complete folder in the delta format: weights, code, tokenizer, model card."""

import copy
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationConfig
from transformers.dynamic_module_utils import get_relative_import_files

from poe.errors import StageError
from poe.files.output import atomic_folder
from poe.loaders.base import Base
from poe.loaders.card import example_prompt, notice, stage_card
from poe.loaders.outcome import describe_untrained
from poe.loaders.tokenizer_files import save_tokenizer
from poe.modeling import modeling_poe_stage
from poe.modeling.access import Access, fetch, first_line, read_config, read_json
from poe.modeling.delta_file import DELTA_NAME, as_stored, format_of, write_delta
from poe.modeling.fingerprint import fingerprint_tensors
from poe.modeling.layer_pattern import pattern_fields
from poe.modeling.stage import Stage

ENTRY = "modeling_poe_stage"
PLOT = "report.png"
AUTO_MAP = {"AutoConfig": f"{ENTRY}.PoEStageConfig", "AutoModelForCausalLM": f"{ENTRY}.PoEStageForCausalLM"}


def save_stage_folder(
    base: Base,
    stage: Stage,
    folder: Path,
    *,
    training: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    prompt: Mapping[str, Any] | None = None,
) -> Path:
    """Write a stage's folder atomically, and record its location in `stage.source`.

    `training` becomes training.json. `prompt` (`name`, `version`, `stop`: list of strings) goes into config.json; each
    stop string that is a single token ends generation. `dtype` defaults to that of the stage's files, or bfloat16.
    Raises `OutputError` if the folder cannot be written, `DeltaError` for weights that are not finite, `StageError`
    for a parent that was not saved since its last change. Warns if the stage was never trained.
    """
    if training is None and (problem := describe_untrained(stage.delta_state_dict())):
        warnings.warn(f"Stage {stage.name!r}: {problem}", stacklevel=3)
    folder = folder.expanduser().absolute()
    dtype = dtype or stage.saved_dtype or torch.bfloat16
    stage.prompt = dict(prompt) if prompt is not None else stage.prompt
    base.check_unchanged(stage)
    parent = _find_parent_files(stage.parent)
    with atomic_folder(folder) as temporary:
        fingerprint = write_delta(
            temporary / DELTA_NAME,
            stage.delta_state_dict(),
            stage=stage.name,
            attach_at=stage.below,
            base_fingerprint=base.source.fingerprint,
            parent_fingerprint=str(parent["fingerprint"]) if parent else "",
            active=stage.config.active,
            dtype=dtype,
        )
        generation = _write_companions(base, stage, parent, temporary, folder, training, dtype)
    stage.source = {"repo": str(folder), "revision": None, "fingerprint": fingerprint}
    stage.saved_name, stage.saved_dtype, stage.generation_config = stage.name, dtype, generation
    return folder


def rehearse_save(
    base: Base, stage: Stage, *, training: Mapping[str, Any] | None = None, prompt: Mapping[str, Any] | None = None
) -> None:
    """Do what `save_stage_folder` does, in a temporary folder that is removed and without the weights.

    Call it before a long training, so that what would raise at its end raises now.
    """
    before = stage.prompt
    stage.prompt = dict(prompt) if prompt is not None else before
    try:
        base.check_unchanged(stage)
        parent = _find_parent_files(stage.parent)
        with tempfile.TemporaryDirectory(prefix="poe-rehearsal-") as scratch:
            dtype = stage.saved_dtype or torch.bfloat16
            _write_companions(base, stage, parent, Path(scratch), Path(scratch), training, dtype)
    finally:
        stage.prompt = before


def _write_companions(
    base: Base,
    stage: Stage,
    parent: Mapping[str, str | None] | None,
    temporary: Path,
    folder: Path,
    training: Mapping[str, Any] | None,
    dtype: torch.dtype,
) -> GenerationConfig:
    """Write all files beside the delta into `temporary`, for a stage in `folder`; return its generation config."""
    generation = _build_generation_config(base, stage)
    config = _build_config(base, stage, parent, folder, dtype)
    _write_json(temporary / "config.json", config)
    for path in network_files():
        shutil.copyfile(path, temporary / path.name)
    save_tokenizer(base.tokenizer, temporary, base.source)
    write_generation_config(generation, temporary)
    details = dict(training or {})
    if training is not None:
        _write_json(temporary / "training.json", details, sort=False)  # `push` renders the card from this order
    card = stage_card(
        config,
        details,
        parameters=stage.num_parameters(),
        example=example_prompt(base.tokenizer),
        plot=PLOT if (folder / PLOT).is_file() else None,
    )
    (temporary / "README.md").write_text(card, encoding="utf-8")
    (temporary / "NOTICE").write_text(notice(config, details), encoding="utf-8")
    return generation


def write_generation_config(config: GenerationConfig, folder: Path) -> None:
    """Write generation_config.json as it is.

    `GenerationConfig.save_pretrained` refuses combinations that it loads, such as `temperature` without `do_sample`,
    and published bases have them. Raises `StageError` for a value that JSON cannot hold.
    """
    config = copy.copy(config)
    config.compile_config = None  # it is for this process
    try:
        text = config.to_json_string()
    except (TypeError, ValueError) as error:
        raise StageError(
            f"The generation config cannot be saved: {error}. Set model.generation_config to plain values."
        ) from error
    (folder / "generation_config.json").write_text(text, encoding="utf-8")


def network_files() -> list[Path]:
    """Return the Python files that are saved beside a delta: the entry point and every file of ours it imports."""
    entry = Path(modeling_poe_stage.__file__)
    return sorted({entry, *(Path(path) for path in get_relative_import_files(entry))})


def read_training_record(stage: Stage) -> dict[str, Any] | None:
    """Return the training.json beside a stage's files, None if there is none."""
    if stage.source is None or stage.source["repo"] is None:
        return None
    path = fetch(stage.source["repo"], "training.json", Access(), stage.source["revision"])
    return None if path is None else read_json(path)


def merge_training_records(chain: Sequence[Stage]) -> dict[str, Any] | None:
    """Return the training record of a folded chain: the last stage's, with the data sources of all stages.

    It has a license only if all stages have the same one. Returns None if no stage has a record.
    """
    records = {link.name: read_training_record(link) or {} for link in chain}
    if not any(records.values()):
        return None
    last = records[chain[-1].name]
    sources = {
        f"{name}/{source}": facts
        for name, record in records.items()
        for source, facts in record.get("data", {}).get("sources", {}).items()
    }
    licenses = {record.get("license") for record in records.values()}
    return {
        **last,
        "data": {**last.get("data", {}), "sources": sources},
        "license": licenses.pop() if len(licenses) == 1 else None,
        "folded": list(records),
    }


def _build_config(
    base: Base, stage: Stage, parent: Mapping[str, str | None] | None, folder: Path, dtype: torch.dtype
) -> dict[str, Any]:
    """Return the config.json of a stage that will be saved in `folder`."""
    source = base.source
    if source.repo is not None:
        base_config, _ = read_config(source.repo, source.access, source.revision)
    else:
        base_config = json.loads(base.model.config.to_json_string(use_diff=False))
    base_config.pop("_name_or_path", None)
    return {
        "architectures": ["PoEStageForCausalLM"],
        "auto_map": AUTO_MAP,
        "model_type": "poe_stage",
        "poe_format": format_of(stage.delta_state_dict()),
        "stage": {
            "name": stage.name,
            "num_layers": stage.config.num_layers,
            "attach_at": stage.below,
            "head": stage.config.head,
            "head_rank": stage.config.head_rank if stage.config.head == "low_rank" else None,
            "own_norm": False,
            **_fork_fields(stage),
            **pattern_fields(base.model, stage.pattern),
            "dtype": str(dtype).removeprefix("torch."),
        },
        "parent": None if parent is None else {**parent, "repo": _relative_repo(parent["repo"], folder)},
        "base": {
            "repo": _relative_repo(source.repo, folder),
            "revision": source.revision,
            "fingerprint": source.fingerprint,
        },
        "base_config": base_config,
        "prompt": stage.prompt,
        "transformers_version": transformers.__version__,
    }


def _fork_fields(stage: Stage) -> dict[str, Any]:
    """Return the fields of a forked stage's config.json; a stage of new layers has none of them."""
    config = stage.config
    return {"layers": "fork", "rank": config.rank, "active": config.active} if config.layers == "fork" else {}


def _find_parent_files(parent: Stage | None) -> dict[str, str | None] | None:
    """Return the location of a parent's files. Raises `StageError` unless they hold the parent's current weights."""
    if parent is None:
        return None
    if parent.source is None or parent.saved_dtype is None:
        raise StageError(f"Its parent {parent.name!r} has no files yet: save_stage({parent.name!r}, ...) first.")
    tensors = parent.delta_state_dict()
    memory_dtype = next(iter(tensors.values())).dtype
    if memory_dtype.itemsize >= parent.saved_dtype.itemsize:
        fingerprint = fingerprint_tensors(as_stored(tensors, parent.saved_dtype))
        if fingerprint != parent.source["fingerprint"]:
            raise StageError(
                f"Its parent {parent.name!r} has changed since it was saved in {parent.source['repo']}: save it again "
                "first, so that the child names the parent it was trained on."
            )
    return parent.source


def _relative_repo(repo: str | None, folder: Path) -> str | None:
    """Return the name of a repository for a config in `folder`: a folder becomes a path relative to `folder`."""
    if repo is None or not os.path.isdir(repo):
        return repo
    relative = os.path.relpath(os.path.realpath(repo), os.path.realpath(folder)).replace(os.sep, "/")
    return relative if relative.startswith(".") else f"./{relative}"


def _build_generation_config(base: Base, stage: Stage) -> GenerationConfig:
    """Return the generation config of a stage, with the prompt format's single-token stop strings as stop tokens."""
    original = stage.generation_config or getattr(base.model, "generation_config", None) or GenerationConfig()
    try:
        config = GenerationConfig.from_dict(original.to_dict())
    except (TypeError, ValueError) as error:
        raise StageError(f"The generation config of {stage.name!r} is not valid: {first_line(error)}") from error
    stop_ids: list[int] = []
    for text in (stage.prompt or {}).get("stop", []):
        ids = base.tokenizer.encode(text, add_special_tokens=False) if base.tokenizer is not None else []
        stop_ids += ids if len(ids) == 1 else []
    if stop_ids:
        eos_ids = config.eos_token_id
        eos_ids = eos_ids if isinstance(eos_ids, list) else [] if eos_ids is None else [eos_ids]
        config.eos_token_id = list(dict.fromkeys([*eos_ids, *stop_ids]))
    return config


def _write_json(path: Path, content: Mapping[str, Any], sort: bool = True) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=sort, ensure_ascii=False) + "\n", encoding="utf-8")
