"""One stage becomes a folder in the delta format, complete: weights, code, tokenizer, card."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import GenerationConfig
from transformers.dynamic_module_utils import get_relative_import_files

from poe.errors import DeltaError
from poe.loaders.card import example_prompt, notice, stage_card
from poe.loaders.output import staged
from poe.modeling import modeling_poe_stage
from poe.modeling.access import Access, fetch, read_config
from poe.modeling.delta_file import DELTA_NAME, POE_FORMAT, as_stored, write_delta
from poe.modeling.fingerprint import fingerprint_tensors
from poe.modeling.stage import Stage

if TYPE_CHECKING:
    from poe.cascade import Cascade

ENTRY = "modeling_poe_stage"
PLOT = "report.png"
AUTO_MAP = {"AutoConfig": f"{ENTRY}.PoEStageConfig", "AutoModelForCausalLM": f"{ENTRY}.PoEStageForCausalLM"}


def save_stage_folder(
    cascade: "Cascade",
    stage: Stage,
    folder: Path,
    *,
    training: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    prompt: Mapping[str, Any] | None = None,
) -> Path:
    """Write a stage's folder, whole or not at all, and remember in `stage.source` where it is.

    `prompt` (`name`, `version`, `stop`: list of strings) is recorded in config.json, and stop strings that are single
    tokens end generation. Raises `OutputError` if the disk refuses, `DeltaError` for weights that are not finite or a
    parent that has no files of its own yet.
    """
    folder = folder.expanduser().absolute()
    dtype = dtype or stage.saved_dtype or torch.bfloat16
    stage.prompt = dict(prompt) if prompt is not None else stage.prompt
    generation = _generation_config(cascade, stage)
    parent = _saved(stage.parent)
    with staged(folder) as temporary:
        fingerprint = write_delta(
            temporary / DELTA_NAME,
            stage.delta_state_dict(),
            stage=stage.name,
            attach_at=stage.below,
            base_fingerprint=cascade.base_source.fingerprint,
            parent_fingerprint=str(parent["fingerprint"]) if parent else "",
            dtype=dtype,
        )
        config = stage_config_json(cascade, stage, folder, dtype)
        _write_json(temporary / "config.json", config)
        for path in network_files():
            shutil.copyfile(path, temporary / path.name)
        if cascade.tokenizer is not None:
            cascade.tokenizer.save_pretrained(temporary)
        generation.save_pretrained(temporary)
        details = dict(training or {})
        if training is not None:
            _write_json(temporary / "training.json", details, sort=False)  # the card is made again in this order
        card = stage_card(
            config,
            details,
            parameters=stage.num_parameters(),
            example=example_prompt(cascade.tokenizer),
            plot=PLOT if (folder / PLOT).is_file() else None,
        )
        (temporary / "README.md").write_text(card, encoding="utf-8")
        (temporary / "NOTICE").write_text(notice(config, details), encoding="utf-8")
    stage.source = {"repo": str(folder), "revision": None, "fingerprint": fingerprint}
    stage.saved_dtype, stage.generation_config = dtype, generation
    return folder


def network_files() -> list[Path]:
    """Return the Python files that must travel beside a delta: the entry point and all that it imports of ours."""
    entry = Path(modeling_poe_stage.__file__)
    return sorted({entry, *(Path(path) for path in get_relative_import_files(entry))})


def training_record(stage: Stage) -> dict[str, Any] | None:
    """Return the training.json beside a stage's files, None if it has no files or they have none."""
    if stage.source is None or stage.source["repo"] is None:
        return None
    path = fetch(stage.source["repo"], "training.json", Access(), stage.source["revision"])
    return None if path is None else dict(json.loads(Path(path).read_text(encoding="utf-8")))


def folded_record(chain: Sequence[Stage]) -> dict[str, Any] | None:
    """Return the record of a stage that carries a chain: the last one's, with the data of all, None if none has one.

    A license is stated only where all of them state the same.
    """
    records = {link.name: training_record(link) or {} for link in chain}
    if not any(records.values()):
        return None
    own = records[chain[-1].name]
    sources = {
        f"{name}/{source}": facts
        for name, record in records.items()
        for source, facts in record.get("data", {}).get("sources", {}).items()
    }
    licenses = {record.get("license") for record in records.values()}
    return {
        **own,
        "data": {**own.get("data", {}), "sources": sources},
        "license": licenses.pop() if len(licenses) == 1 else None,
        "folded": list(records),
    }


def stage_config_json(cascade: "Cascade", stage: Stage, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Return config.json of a stage that will lie in `folder`."""
    base, parent = cascade.base_source, _saved(stage.parent)
    if base.repo is not None:
        base_config, _ = read_config(base.repo, base.access, base.revision)
    else:
        base_config = json.loads(cascade.config.to_json_string(use_diff=False))
    base_config.pop("_name_or_path", None)
    return {
        "architectures": ["PoEStageForCausalLM"],
        "auto_map": AUTO_MAP,
        "model_type": "poe_stage",
        "poe_format": POE_FORMAT,
        "stage": {
            "name": stage.name,
            "num_layers": stage.config.num_layers,
            "attach_at": stage.below,
            "head": stage.config.head,
            "head_rank": stage.config.head_rank if stage.config.head == "low_rank" else None,
            "own_norm": False,
            "dtype": str(dtype).removeprefix("torch."),
        },
        "parent": None if parent is None else {**parent, "repo": _reference(parent["repo"], folder)},
        "base": {"repo": _reference(base.repo, folder), "revision": base.revision, "fingerprint": base.fingerprint},
        "base_config": base_config,
        "prompt": stage.prompt,
        "transformers_version": transformers.__version__,
    }


def _saved(parent: Stage | None) -> dict[str, str | None] | None:
    """Return where a parent's files are, after making sure that they still hold what is in memory."""
    if parent is None:
        return None
    if parent.source is None or parent.saved_dtype is None:
        raise DeltaError(f"Its parent {parent.name!r} has no files yet: save_stage({parent.name!r}, ...) first.")
    tensors = parent.delta_state_dict()
    in_memory = next(iter(tensors.values())).dtype
    if in_memory.itemsize >= parent.saved_dtype.itemsize:
        now = fingerprint_tensors(as_stored(tensors, parent.saved_dtype))
        if now != parent.source["fingerprint"]:
            raise DeltaError(
                f"Its parent {parent.name!r} has changed since it was saved in {parent.source['repo']}: save it again "
                "first, so that the child names the parent it was trained on."
            )
    return parent.source


def _reference(repo: str | None, folder: Path) -> str | None:
    """Return how a stage in `folder` names a repository: a folder as a path relative to its own, never absolute."""
    if repo is None or not os.path.isdir(repo):
        return repo
    relative = os.path.relpath(os.path.realpath(repo), os.path.realpath(folder)).replace(os.sep, "/")
    return relative if relative.startswith(".") else f"./{relative}"


def _generation_config(cascade: "Cascade", stage: Stage) -> GenerationConfig:
    """Return the base's generation config; stop strings of the prompt format that are one token end generation."""
    base = stage.generation_config or getattr(cascade.base, "generation_config", None) or GenerationConfig()
    config = GenerationConfig.from_dict(base.to_dict())
    stops: list[int] = []
    for text in (stage.prompt or {}).get("stop", []):
        ids = cascade.tokenizer.encode(text, add_special_tokens=False) if cascade.tokenizer is not None else []
        stops += ids if len(ids) == 1 else []
    if stops:
        known = config.eos_token_id
        known = known if isinstance(known, list) else [] if known is None else [known]
        config.eos_token_id = list(dict.fromkeys([*known, *stops]))
    return config


def _write_json(path: Path, content: Mapping[str, Any], sort: bool = True) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=sort, ensure_ascii=False) + "\n", encoding="utf-8")
