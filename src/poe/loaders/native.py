"""Export a stage with its base and parents as an ordinary checkpoint of the base's family.

The layers keep their tensors and the folded head is the only new one. A plain `AutoModelForCausalLM`, and every other
program that reads checkpoints of the family, computes the same logits.
"""

import copy
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCardData, split_torch_state_dict_into_shards
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

from poe.errors import FamilyError, OutputError, StageError
from poe.files.output import OWN_FILES, atomic_folder
from poe.loaders.base import Base
from poe.loaders.llama_cpp import find_differences
from poe.loaders.stage_folder import write_generation_config
from poe.loaders.tokenizer_files import save_tokenizer
from poe.modeling.access import read_config
from poe.modeling.families import family_of
from poe.modeling.lineage import BaseSource
from poe.modeling.placement import is_offloaded, quantization_of
from poe.modeling.recurrent import raise_no_checkpoint
from poe.modeling.stage import Stage
from poe.modeling.tensor_file import write_tensors

_RESERVED_BYTES = 64 << 20  # free space for the tokenizer, the configs and the file system


def export_native(
    base: Base,
    stage: Stage,
    model: PreTrainedModel,
    folder: Path,
    *,
    max_shard_size: int | str = "5GB",
    all_tokens: bool = False,
) -> Path:
    """Write `model`, the native model that ends in `stage`, atomically as a checkpoint of its family.

    Weights are in the base's dtype and are written tensor by tensor. A file holds at most `max_shard_size` (bytes, or
    text with a unit), or one tensor. The logits equal the cascade's bit for bit if the stages are in the base's dtype;
    stages from files are. Raises `FamilyError` for a base that is quantized, offloaded or recurrent, `OutputError` for
    a folder that is not empty or a disk that is too small.

    The weights of a fork are merged, W + dW in the base's dtype, so its logits are the cascade's up to that rounding.
    A fork that is active on the answer would act on every token: that is another function, and refused with a
    `StageError` unless `all_tokens` is True.
    """
    target = folder.expanduser().absolute()
    _check_empty(target)
    if not all_tokens and any(link.config.active == "answer" for link in stage.chain):
        raise StageError(
            f"Stage {stage.name!r} is active on the answer alone, and an ordinary checkpoint acts on every token: "
            "measure what that costs, then export it with all_tokens=True (--all-tokens)."
        )
    base.check_unchanged(stage, weights=False)
    family = family_of(base.model)
    if family.recurrent:
        raise_no_checkpoint(base.model.config.model_type)
    _check_plain_weights(base.model)
    is_tied = _is_tied(base.model) and all(link.config.head == "none" for link in stage.chain)
    differences = find_differences(model.config, has_head=not is_tied)
    if differences:
        warnings.warn(
            f"llama.cpp would not compute what transformers computes from this export: {'; '.join(differences)}.",
            stacklevel=2,
        )
    with torch.no_grad():
        tensors: dict[str, torch.Tensor] = model.state_dict()
    if is_tied:
        del tensors[f"{family.head}.weight"]
    # Meta tensors have the sizes of the file without a copy of the weights.
    below = stage.foot
    planned = {
        name: torch.empty(tensor.shape, dtype=_stored_dtype(base.model, name, tensor, below), device="meta")
        for name, tensor in tensors.items()
    }
    _check_disk_space(target, sum(tensor.nbytes for tensor in planned.values()))
    try:
        split = split_torch_state_dict_into_shards(
            planned, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
        )
    except ValueError:
        raise OutputError(f"max_shard_size should be bytes or text such as '5GB', got {max_shard_size!r}.") from None
    with atomic_folder(target) as temporary:
        _check_empty(target)  # once more, in the locked folder
        for file, names in split.filename_to_tensors.items():
            shard = {name: tensors.pop(name).to(planned[name].dtype) for name in names}
            write_tensors(temporary / file, shard, {"format": "pt"})
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (temporary / "model.safetensors.index.json").write_text(text, encoding="utf-8")
        _save_configs(base.source, stage, model, is_tied, temporary)
        save_tokenizer(base.tokenizer, temporary, base.source)
        (temporary / "README.md").write_text(_render_card(base, stage, model, is_tied, differences), encoding="utf-8")
    return target


def _check_empty(target: Path) -> None:
    if target.is_dir() and not all(path.match(OWN_FILES) for path in target.iterdir()):
        raise OutputError(
            f"{target} is not empty: expected a new folder, because a loader could read the weights of an older "
            "export there. Remove it or choose another."
        )


def _check_plain_weights(base: PreTrainedModel) -> None:
    quantized = quantization_of(base)
    if quantized is not None:
        raise FamilyError(
            f"The base is quantized ({quantized}), and an export needs plain weights: open the stage on "
            "the base in floating point (without quantization_config), export that, and quantize the export."
        )
    if is_offloaded(base):
        raise FamilyError("A part of the base is offloaded: open it without a device_map, then export.")


def _is_tied(base: PreTrainedModel) -> bool:
    """Return whether a base's head is its embedding."""
    return family_of(base).head_of(base).weight is base.get_input_embeddings().weight


def _stored_dtype(base: PreTrainedModel, name: str, tensor: torch.Tensor, below: int) -> torch.dtype:
    """Return a tensor's dtype in the file: the base's dtype for the stages' layers, the tensor's own for the rest."""
    family = family_of(base)
    prefix = f"{family.backbone}.{family.layers}."
    if name.startswith(prefix) and int(name.removeprefix(prefix).split(".")[0]) >= below:
        return base.dtype
    return tensor.dtype


def _check_disk_space(target: Path, size: int) -> None:
    """Raise `OutputError` unless the disk has room for `size` bytes of weights and the small files beside them."""
    free = shutil.disk_usage(next(folder for folder in (target, *target.parents) if folder.is_dir())).free
    if free < size + _RESERVED_BYTES:
        raise OutputError(
            f"{target} needs {(size + _RESERVED_BYTES) / 1e9:.2f} GB, but its disk has {free / 1e9:.2f} GB free: "
            "free some space or choose another folder. Nothing was written."
        )


def _save_configs(source: BaseSource, stage: Stage, model: PreTrainedModel, is_tied: bool, folder: Path) -> None:
    """Write config.json and generation_config.json, and for a PoE model the file that defines it.

    config.json is the base's own file with the changed fields of the deeper model. It keeps the base's spelling
    (`rope_theta`, `torch_dtype`) for programs that read that.
    """
    config = copy.deepcopy(model.config)
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    config.tie_word_embeddings = is_tied
    if type(model)._auto_class is not None:
        custom_object_save(model, folder, config=config)  # type: ignore[arg-type]
    config.save_pretrained(folder)
    if source.repo is not None:
        original, _ = read_config(source.repo, source.access, source.revision)
        before, after = (_config_fields(each) for each in (type(config).from_dict(dict(original)), config))
        changed = {name: value for name, value in after.items() if before.get(name) != value}
        if "torch_dtype" in original and "dtype" in changed:
            changed["torch_dtype"] = changed.pop("dtype")
        original.pop("_name_or_path", None)
        text = json.dumps(original | changed, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")
    # The stage's generation config may have got its stop tokens after `model` was assembled.
    generation = stage.generation_config or getattr(model, "generation_config", None)
    if isinstance(generation, GenerationConfig):
        write_generation_config(generation, folder)


def _config_fields(config: PreTrainedConfig) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return {name: value for name, value in fields.items() if name not in ("transformers_version", "_name_or_path")}


def _render_card(base: Base, stage: Stage, model: PreTrainedModel, is_tied: bool, differences: list[str]) -> str:
    """Return README.md: the contents of the checkpoint, how to open it, and how llama.cpp differs.

    A checkpoint has all weights, so a base that was changed in memory (by a merged adapter) can be exported; the card
    says so then.
    """
    source = base.source
    is_changed = base.find_changed_weight() is not None
    origin = "changed since it was opened" if is_changed else f"fingerprint `{source.fingerprint[:12]}`"
    weights = "" if is_changed else " unchanged"
    on_hub = source.repo if source.repo and not Path(source.repo).is_dir() else None
    data = ModelCardData(
        base_model=on_hub, library_name="transformers", pipeline_tag="text-generation", tags=["poe", "poe-export"]
    )
    depth = model.config.num_hidden_layers
    chain = " -> ".join(link.name for link in stage.chain)
    trust = ", trust_remote_code=True" if type(model)._auto_class is not None else ""
    head = "the embedding as its head, as in the base" if is_tied else "the head folded in and untied"
    note = f"\nllama.cpp would compute another model: {'; '.join(differences)}.\n" if differences else ""
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {stage.name}\n\n"
        f"The base {f'`{on_hub}`' if on_hub else 'model'} ({origin}) with the stages "
        f"{chain} as an ordinary checkpoint: {depth} layers, {head}. The "
        f"base's weights are in it{weights}, so the base's license applies to it.\n\n"
        "```python\nfrom transformers import AutoModelForCausalLM\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("<this repository>"{trust})\n```\n{note}'
    )
