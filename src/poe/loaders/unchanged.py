"""Check that a base and a stage are still what they were when the cascade got them.

A stage is saved under its base's fingerprint, which is that of the base's files. In memory a base can change after
that: a LoRA that is merged or still attached, an edited layer, a resized embedding, a field of the config. Everything
that saves or trains a stage calls `check_unchanged` first.

Moving a base to another device, casting it, compiling it and sharding it are no changes. `find_unequal` says which
weights are compared; those of a sharded base are not.
"""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from poe.errors import FamilyError, FingerprintError, SourceError, StageError
from poe.modeling.families import family_of
from poe.modeling.fingerprint import fingerprint_tensors
from poe.modeling.lineage import BaseSource
from poe.modeling.opening import find_unequal, has_values
from poe.modeling.placement import COMPILED, device_of, is_offloaded, is_plain, plain_name, quantization_of
from poe.modeling.stage import Stage

PROBE_TOKENS = 8
_HALF = (torch.bfloat16, torch.float16)  # a base may have been cast to one of them and back
_KNOWN_HOOKS = ("poe", "transformers", "transformers_modules", "accelerate", "torch")
_RECOMPUTED = ("dynamic", "longrope")  # rotary positions that change their own buffers in the forward pass
_NOT_COMPARED = {"quantization_config", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id"}
_NOT_COMPARED |= PreTrainedConfig().to_dict().keys()
REMEDY = "Undo the change. Or save the changed base as a base of its own, and open that with Cascade.from_pretrained."

Parts = dict[str, type | None]  # the modules by name, and None for each of their own tensors


class Record:
    """The state of a base, its stages and its grown models when the cascade got them, as far as no file has it."""

    def __init__(self, base: PreTrainedModel) -> None:
        self.parts: WeakKeyDictionary[nn.Module, Parts] = WeakKeyDictionary()
        self.parts[base] = list_parts(base)
        self.config = read_function(base.config)
        self.buffers = {name: buffer.detach().cpu().clone() for name, buffer in _unsaved_buffers(base)}
        self.dtypes = {name: tensor.dtype for name, tensor in base.state_dict().items()}
        self.models: WeakKeyDictionary[Stage, ref[PreTrainedModel]] = WeakKeyDictionary()

    def add(self, stage: Stage, model: PreTrainedModel | None = None) -> None:
        """Record a stage, or the model that ends in it."""
        if model is None:
            self.parts[stage] = list_parts(stage)
        else:
            self.parts[model] = list_parts(model)
            self.models[stage] = ref(model)


def list_parts(model: nn.Module) -> Parts:
    """Return the modules and tensors of a model by name, without the wrappers of torch.compile."""
    parts: Parts = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if COMPILED not in module._modules:
            parts[plain_name(name)] = type(module)
            parts |= {plain_name(f"{name}.{own}"): None for own in (*module._parameters, *module._buffers)}
    return parts


def read_function(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the fields of a config that decide what a model computes."""
    fields = json.loads(config.to_json_string(use_diff=False))
    return {name: value for name, value in fields.items() if name not in _NOT_COMPARED and not name.startswith("_")}


def check_plain_model(base: Any) -> None:
    """Raise `FamilyError` unless a base has the modules of its own class, so that its files can describe it."""
    if not isinstance(base, PreTrainedModel):
        raise FamilyError(
            f"Expected a model of transformers, got {type(base).__module__}.{type(base).__qualname__}: give the model "
            "inside it. Adapters must be merged first (merge_and_unload)."
        )
    if quantization_of(base):
        return
    with torch.device("meta"):
        expected = list_parts(type(base)(base.config))
    if difference := _compare_parts(expected, list_parts(base)):
        raise FamilyError(f"The base has not the modules of {type(base).__name__}: {difference}.")


def check_unchanged(base: PreTrainedModel, record: Record, stage: Stage | None = None) -> None:
    """Raise an error if a base, or a stage on it with its parents and grown models, has changed since it was recorded.

    `find_changed_weight` checks the base's weights. Raises `FamilyError` for other modules and hooks,
    `FingerprintError` for another config or other buffers, `StageError` for a quantized stage.
    """
    chain = [] if stage is None else stage.chain
    models = {link: model for link in chain if (known := record.models.get(link)) and (model := known())}
    for module in (base, *chain, *models.values()):
        if difference := _compare_parts(record.parts[module], list_parts(module)):
            raise FamilyError(f"{_title(module)} cannot be saved: {difference}.")
    if stage is not None and not _is_sharded(stage) and not all(map(is_plain, stage.parameters())):
        raise StageError(f"Stage {stage.name!r} is quantized: expected plain weights. `poe compress` makes it smaller.")
    for link, model in models.items():
        head: Any = family_of(base).head_of(model)
        if head.deltas[-1] is not link.head:
            raise FamilyError(f"{_title(link)} cannot be saved: the head of its model was replaced by another.")
    _check_hooks(base if stage is None else models.get(stage, base))
    now = read_function(base.config)
    for name, value in record.config.items():
        if now.get(name) != value:
            raise FingerprintError(
                f"The config of the base has changed in memory: {name} was {value!r}, now {now.get(name)!r}. {REMEDY}"
            )
    buffers = dict(_unsaved_buffers(base))
    for name, value in record.buffers.items():
        if not has_values(buffers.get(name), value, _HALF):
            raise FingerprintError(f"The base has changed in memory: its buffer {name} has other values. {REMEDY}")


def find_changed_weight(base: PreTrainedModel, record: Record, source: BaseSource) -> str | None:
    """Return the name of a weight that differs from the base's files, or from its fingerprint if it has no files."""
    if _is_sharded(base):
        return None
    if source.repo is not None:
        try:
            return next(iter(find_unequal(base, source, _HALF)), None)
        except (OSError, SafetensorError, SourceError) as error:
            # What was trained on the base must not be lost because the base's files are gone.
            warnings.warn(f"The base could not be compared with its files in {source.repo}: {error}", stacklevel=4)
            return None
    if quantization_of(base) or is_offloaded(base):
        return None
    tensors = {plain_name(name): tensor for name, tensor in base.state_dict().items()}
    # A wider dtype keeps all values, a narrower one does not: then there is nothing to compare with.
    if any(tensor.dtype.itemsize < record.dtypes[name].itemsize for name, tensor in tensors.items()):
        return None
    cast = {name: tensor.to(record.dtypes[name]) for name, tensor in tensors.items()}
    saved = revert_weight_conversion(base, cast)
    return None if fingerprint_tensors(saved) == source.fingerprint else "a weight"


def _compare_parts(expected: Parts, parts: Parts) -> str:
    """Describe the first difference of two lists of parts; "" if there is none. A subclass counts as its class."""
    for name, kind in parts.items():
        if name not in expected:
            return f"{name} is new" + (f" ({kind.__module__}.{kind.__qualname__})" if kind else "")
        wanted = expected[name]
        if kind is not None and wanted is not None and not issubclass(kind, wanted):
            return (
                f"{name} is {kind.__module__}.{kind.__qualname__}, expected {wanted.__qualname__}. Merge adapters "
                "first (merge_and_unload), and remove what replaced modules"
            )
    missing = next((name for name in expected if name not in parts), None)
    return "" if missing is None else f"{missing} is missing"


def _check_hooks(model: PreTrainedModel) -> None:
    """Raise `FamilyError` if forward hooks of others change what a model computes. Without hooks nothing is run."""
    hooks = [
        (table, key, name)
        for name, module in model.named_modules()
        for table in (module._forward_hooks, module._forward_pre_hooks)
        for key, hook in table.items()
        if _origin(hook).partition(".")[0] not in _KNOWN_HOOKS
    ]
    if not hooks or _is_sharded(model):
        return
    ids = torch.arange(PROBE_TOKENS, device=device_of(model.get_input_embeddings()))[None] % model.config.vocab_size
    training = model.training
    try:
        model.eval()
        with torch.no_grad():
            hooked = model(input_ids=ids, use_cache=False).logits
            with _without([(table, key) for table, key, _ in hooks]):
                plain = model(input_ids=ids, use_cache=False).logits
    finally:
        model.train(training)
    if not torch.equal(hooked, plain):
        names = ", ".join(dict.fromkeys(name or "the model" for _, _, name in hooks))
        raise FamilyError(
            f"Forward hooks change what the model computes, and hooks cannot be saved: remove those of {names}."
        )


@contextmanager
def _without(hooks: list[tuple[Any, int]]) -> Iterator[None]:
    tables = {id(table): (table, dict(table)) for table, _ in hooks}
    try:
        for table, key in hooks:
            del table[key]
        yield
    finally:
        for table, content in tables.values():
            table.clear()
            table.update(content)


def _origin(hook: Any) -> str:
    """Return the name of the Python module that a hook is from."""
    hook = getattr(hook, "func", hook)  # functools.partial
    return str(getattr(hook, "__module__", None) or type(hook).__module__)


def _unsaved_buffers(base: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the buffers that are in no file and that the model does not change itself."""
    for name, module in base.named_modules():
        if not any(kind in str(getattr(module, "rope_type", "")) for kind in _RECOMPUTED):
            for own in module._non_persistent_buffers_set:
                if (buffer := module._buffers.get(own)) is not None and not buffer.is_meta:
                    yield plain_name(f"{name}.{own}"), buffer


def _is_sharded(module: nn.Module) -> bool:
    return any(hasattr(parameter, "device_mesh") for parameter in module.parameters())


def _title(module: nn.Module) -> str:
    return f"Stage {module.name!r}" if isinstance(module, Stage) else "The model"
