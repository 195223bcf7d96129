"""A stage and all it stands on become an ordinary checkpoint of the base's family: a deeper model, nothing of ours.

The layers keep their tensors, the folded head is the only new one, so a plain `AutoModelForCausalLM` (and whatever
else reads the family's checkpoints) computes the same logits.
"""

import copy
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import ModelCardData, split_torch_state_dict_into_shards
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

from poe.errors import FamilyError, OutputError
from poe.loaders.output import staged
from poe.modeling.access import read_config
from poe.modeling.families import family_of
from poe.modeling.placement import is_offloaded, quantization_of
from poe.modeling.recurrent import refuse_checkpoint
from poe.modeling.stage import Stage
from poe.modeling.tensor_file import write_tensors

if TYPE_CHECKING:
    from poe.cascade import Cascade

_SMALL_FILES = 64 << 20  # bytes kept free for the tokenizer, the configs and the file system


def export_native(cascade: "Cascade", stage: Stage, folder: Path, *, max_shard_size: int | str = "5GB") -> Path:
    """Write the model that ends in `stage` as a checkpoint of its family; whole or not at all.

    Weights are in the base's dtype and go to the disk tensor by tensor; files hold at most `max_shard_size` (bytes, or
    a number with a unit), or one tensor. The logits are those of the cascade, bit for bit, if the stages are in the
    base's dtype, as they are when they come from files. Raises `FamilyError` for a base that is quantized,
    offloaded or recurrent, `OutputError` for a folder that holds anything or a disk that is too small.
    """
    target = folder.expanduser().absolute()
    if target.is_dir() and any(target.iterdir()):
        raise OutputError(
            f"{target} is not empty: expected a new folder, because weights of another export beside these would be "
            "read in their place. Remove it or choose another."
        )
    if family_of(cascade.base).recurrent:
        refuse_checkpoint(cascade.config.model_type)
    _refuse_what_has_no_plain_weights(cascade.base)
    with torch.no_grad():
        model = cascade.model(stage.name)
        tensors: dict[str, torch.Tensor] = model.state_dict()
    # On the meta device: sizes in the dtype of the file, without a copy of anything.
    below = stage.chain[0].below
    planned = {
        name: torch.empty(tensor.shape, dtype=_stored_dtype(cascade.base, name, tensor, below), device="meta")
        for name, tensor in tensors.items()
    }
    _check_room(target, sum(tensor.nbytes for tensor in planned.values()))
    try:
        split = split_torch_state_dict_into_shards(
            planned, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
        )
    except ValueError:
        raise OutputError(f"max_shard_size should be bytes or text such as '5GB', got {max_shard_size!r}.") from None
    with staged(target) as temporary:
        for file, names in split.filename_to_tensors.items():
            shard = {name: tensors.pop(name).to(planned[name].dtype) for name in names}
            write_tensors(temporary / file, shard, {"format": "pt"})
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (temporary / "model.safetensors.index.json").write_text(text, encoding="utf-8")
        _save_configs(cascade, stage, model, temporary)
        if cascade.tokenizer is not None:
            cascade.tokenizer.save_pretrained(temporary)
        (temporary / "README.md").write_text(_card(cascade, stage), encoding="utf-8")
    return target


def _refuse_what_has_no_plain_weights(base: PreTrainedModel) -> None:
    quantized = quantization_of(base)
    if quantized is not None:
        raise FamilyError(
            f"The base is quantized ({quantized}), and nothing is merged into quantized weights: open the stage on the "
            "base in floating point, export that, and quantize the export."
        )
    if is_offloaded(base):
        raise FamilyError("Part of the base is offloaded: open it without a device_map, then export.")


def _stored_dtype(base: PreTrainedModel, name: str, tensor: torch.Tensor, below: int) -> torch.dtype:
    """Return the dtype in the file: a stage's layers are in the base's, what is the base's own stays as it is."""
    family = family_of(base)
    prefix = f"{family.backbone}.{family.layers}."
    if name.startswith(prefix) and int(name.removeprefix(prefix).split(".")[0]) >= below:
        return base.dtype
    return tensor.dtype


def _check_room(target: Path, size: int) -> None:
    """Raise `OutputError` unless the disk has room for `size` bytes of weights and the small files beside them."""
    free = shutil.disk_usage(next(place for place in (target, *target.parents) if place.is_dir())).free
    if free < size + _SMALL_FILES:
        raise OutputError(
            f"{target} needs {(size + _SMALL_FILES) / 1e9:.2f} GB, but its disk has {free / 1e9:.2f} GB free: "
            "free some space or choose another folder. Nothing was written."
        )


def _save_configs(cascade: "Cascade", stage: Stage, model: PreTrainedModel, folder: Path) -> None:
    """Write config.json and generation_config.json; for a model defined by a file of ours, that file too.

    config.json is the base's own with the few fields changed that make a deeper model: programs that read the base's
    spelling (`rope_theta`, `torch_dtype`) find it in the export too.
    """
    config = copy.deepcopy(model.config)
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    if type(model)._auto_class is not None:
        custom_object_save(model, folder, config=config)  # type: ignore[arg-type]
    config.save_pretrained(folder)
    base = cascade.base_source
    if base.repo is not None:
        own, _ = read_config(base.repo, base.access, base.revision)
        before, after = (_plain(each) for each in (type(config).from_dict(dict(own)), config))
        changed = {name: value for name, value in after.items() if before.get(name) != value}
        if "torch_dtype" in own and "dtype" in changed:
            changed["torch_dtype"] = changed.pop("dtype")
        own.pop("_name_or_path", None)
        text = json.dumps(own | changed, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")
    # The stage's own, because the model may have been assembled before the stage learned its stop tokens.
    generation = stage.generation_config or getattr(model, "generation_config", None)
    if isinstance(generation, GenerationConfig):
        generation.save_pretrained(folder)


def _plain(config: PreTrainedConfig) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return {name: value for name, value in fields.items() if name not in ("transformers_version", "_name_or_path")}


def _card(cascade: "Cascade", stage: Stage) -> str:
    """Return README.md: what was put together, and how it is opened."""
    base = cascade.base_source
    on_hub = base.repo if base.repo and not Path(base.repo).is_dir() else None
    data = ModelCardData(
        base_model=on_hub, library_name="transformers", pipeline_tag="text-generation", tags=["poe", "poe-export"]
    )
    depth = cascade.model(stage.name).config.num_hidden_layers
    chain = " -> ".join(link.name for link in stage.chain)
    trust = ", trust_remote_code=True" if type(cascade.base)._auto_class is not None else ""
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {stage.name}\n\n"
        f"The base {f'`{on_hub}`' if on_hub else 'model'} (fingerprint `{base.fingerprint[:12]}`) with the stages "
        f"{chain} as an ordinary checkpoint: {depth} layers, the head folded in and untied. The "
        "base's weights are in it unchanged, so the base's license applies to it.\n\n"
        "```python\nfrom transformers import AutoModelForCausalLM\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("<this repository>"{trust})\n```\n'
    )
