"""Load a base and its stages from files, for the package and for the AutoModel entry point."""

import contextlib
import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from .access import fetch
from .delta_file import read_delta
from .failures import DeltaError, FingerprintError, PoEError, SourceError, StageError
from .families import FAMILIES
from .fingerprint import TIED_HEADS
from .layer_pattern import read_pattern
from .lineage import BaseSource, Lineage
from .modeling_poe import PoEConfig, PoEForCausalLM
from .placement import is_offloaded, load_head_into_memory, plain_name, quantization_of, read_tensors
from .recognition import check_structure, recognize_family
from .stage import Stage, build_stage

# save_pretrained of a PoE model then writes the file that defines it, and its auto_map.
PoEConfig.register_for_auto_class()
PoEForCausalLM.register_for_auto_class("AutoModelForCausalLM")

# Keywords of `from_pretrained` with which transformers reads other files than those of the fingerprint.
_CHOOSE_WEIGHTS = {"adapter_kwargs", "gguf_file", "state_dict", "subfolder", "use_safetensors", "variant"}
_MOST_LAYERS = 10_000  # building more would take forever, before the files show that they lack the tensors


def load_base(
    source: BaseSource,
    config: dict[str, Any],
    *,
    trust_remote_code: bool = False,
    verify: bool = True,
    **options: Any,
) -> PreTrainedModel:
    """Load a base in evaluation mode; `options` are those of `from_pretrained` (dtype, device_map, ...).

    A PoE base is loaded by the class beside this file, any other base by its transformers class. Raises `FamilyError`,
    before reading weights, if the base is no causal language model or its structure cannot be grown, and `SourceError`
    if weights are missing or unreadable. `recognize_family` then checks bases of undeclared families. An output head
    that `device_map` offloads is loaded into memory. `verify` compares what was loaded with the files (`check_loaded`).
    """
    model_type = str(config.get("model_type"))
    loader: Any = PoEForCausalLM if model_type == "poe" else AutoModelForCausalLM
    assert source.repo is not None
    if chosen := sorted(options.keys() & _CHOOSE_WEIGHTS):
        raise SourceError(
            f"{source.repo}: {', '.join(chosen)} would load other weights than model.safetensors, which the "
            "fingerprint covers: expected a folder or repository of its own for them."
        )
    if isinstance(layers := config.get("num_hidden_layers"), int) and not 1 <= layers <= _MOST_LAYERS:
        raise SourceError(f"config.json of {source.repo} declares {layers} layers: expected 1 to {_MOST_LAYERS}.")
    _check_code(source.repo, config, trust_remote_code)
    location = {
        "revision": source.revision or "main",
        "trust_remote_code": trust_remote_code,
        **dataclasses.replace(source.access, force_download=False).kwargs(source.repo),
    }
    try:
        if model_type not in FAMILIES:
            check_structure(source.repo, model_type, **location)
        assert source.first_states  # finds and fetches the files
        model, report = loader.from_pretrained(
            source.repo, use_safetensors=True, output_loading_info=True, **location, **options
        )
    except (PoEError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a damaged or hostile config or file can raise any error
        raise SourceError(f"The base {source.repo} could not be loaded: {error}") from error
    assert isinstance(model, PreTrainedModel)
    if missing := sorted(report["missing_keys"]):
        # transformers only warns, and initializes them at random.
        raise SourceError(
            f"The base {source.repo} is incomplete: {len(missing)} tensors are not in its files "
            f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}). Fetch it again"
            + (", or open it without quantization_config." if options.get("quantization_config") else ".")
        )
    _check_token_ids(model.generation_config, source.repo)
    if verify:
        check_loaded(model, source)
    load_head_into_memory(model)
    return model.eval()


def check_loaded(model: PreTrainedModel, source: BaseSource) -> None:
    """Raise `FingerprintError` unless a model's tensors are those of the files that its fingerprint covers.

    transformers chooses by itself which files it reads.
    """
    source.check_unchanged()
    if unequal := find_unequal(model, source):
        raise FingerprintError(
            f"The base {source.repo} was not loaded as it is in {os.path.basename(source.weight_files[0])}: "
            f"{len(unequal)} tensors differ ({', '.join(unequal[:3])}). Does its folder hold other weights? Remove "
            "them."
        )


@torch.no_grad()
def find_unequal(model: PreTrainedModel, source: BaseSource, dtypes: Sequence[torch.dtype] = ()) -> list[str]:
    """Return the names of a model's tensors that are not those of the base's files.

    Each tensor is compared with the file's in its own dtype; with `dtypes` it may have been cast to one of them before.
    Offloaded tensors are read one by one. Packed and sharded tensors are not compared. In a model with packed or
    offloaded tensors, those that the files hold in another form are not compared either.
    """
    is_whole = quantization_of(model) is None and not is_offloaded(model)
    with contextlib.ExitStack() as opened:
        files = [opened.enter_context(safe_open(path, "pt")) for path in source.weight_files]
        stored = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - not a mapping
        unequal = _compare(read_tensors(model), stored, model.base_model_prefix, dtypes, is_whole)
        if unequal and is_whole:  # the names and shapes of its files, which some families convert
            state = {plain_name(name): tensor for name, tensor in model.state_dict().items()}
            converted = revert_weight_conversion(model, state)
            unequal = _compare(converted.items(), stored, model.base_model_prefix, dtypes, is_whole)
    return unequal


def _compare(
    tensors: Iterable[tuple[str, torch.Tensor]],
    stored: Mapping[str, Any],
    prefix: str,
    dtypes: Sequence[torch.dtype],
    is_whole: bool,
) -> list[str]:
    """Return the names of plain tensors that differ from those of the files (name -> open file).

    Unless the model `is_whole`, a tensor that the files do not hold in this form is left out.
    """
    unequal: dict[str, int] = {}
    equal: set[int] = set()
    for name, tensor in tensors:
        if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.is_meta or not tensor.numel():
            continue
        found = next((n for n in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}") if n in stored), None)
        expected = None if found is None else stored[found].get_tensor(found)
        if expected is not None and has_values(tensor, expected, dtypes):
            equal.add(tensor.data_ptr())
        elif is_whole or (expected is not None and expected.shape == tensor.shape):
            is_tied = is_whole and (found is None or name in TIED_HEADS)  # it may be another name of an equal tensor
            unequal[name] = tensor.data_ptr() if is_tied else 0
    return [name for name, address in unequal.items() if not address or address not in equal]


def has_values(tensor: torch.Tensor | None, stored: torch.Tensor, dtypes: Sequence[torch.dtype] = ()) -> bool:
    """Return whether a tensor has stored values in its own dtype, also if it was cast to one of `dtypes` before."""
    if tensor is None or stored.shape != tensor.shape:
        return False
    stored = stored.to(tensor.device)
    casts = dict.fromkeys((tensor.dtype, *dtypes))
    return any(is_equal(stored.to(dtype).to(tensor.dtype), tensor) for dtype in casts)


def is_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether all numbers of two tensors of one shape are equal, where nan is equal to nan."""
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())


def _check_code(repo: str, config: dict[str, Any], trust_remote_code: bool) -> None:
    """Raise `SourceError` if code would come from another repository than the base's.

    transformers takes an attention implementation with a slash for a repository of compiled kernels.
    """
    kernels = [value for key, value in _fields(config) if key.endswith("_implementation") and "/" in str(value)]
    if kernels:
        raise SourceError(
            f"config.json of {repo} takes code from another repository (attention kernels of {kernels[0]}): remove the "
            "field, and choose kernels yourself with attn_implementation."
        )
    entries = config.get("auto_map") or {}
    others = (
        [str(value) for value in entries.values() if "--" in str(value)] if isinstance(entries, dict) else [entries]
    )
    others = [value for value in others if str(value).partition("--")[0] != repo]
    if trust_remote_code and others:
        raise SourceError(
            f"{repo} takes code from another repository ({others[0]}): trust_remote_code trusts the files of {repo} "
            "alone. Copy the code into a folder with the base, read it, and open that."
        )


def _fields(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the fields of a JSON value, at any depth."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield str(key), inner
        yield from _fields(inner)


def _check_token_ids(config: GenerationConfig | None, repo: str) -> None:
    """Raise `SourceError` unless the special tokens of a generation config are whole numbers."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, name, None)
        if not all(type(number) is int for number in (value if isinstance(value, list) else [value or 0])):
            raise SourceError(
                f"generation_config.json of {repo}: expected token ids as {name}, got {str(value)[:80]!r}."
            )


def load_stages(
    base: PreTrainedModel,
    lineage: Lineage,
    known: Mapping[str, Stage] | None = None,
    *,
    name: str | None = None,
    verify: bool = True,
) -> list[Stage]:
    """Build and fill every stage of a chain on a loaded base; return them from the base upwards.

    `known` are stages on this base that are already loaded, by fingerprint; they are reused. The last stage gets the
    name `name` (default: that in its files) and is then reused only if it has that name. The base does not change.
    Raises `DeltaError`, before copying any tensor, for a delta or config that does not fit, and `FingerprintError` for
    one that was changed; `verify=False` skips the latter.
    """
    recognize_family(base)  # of an undeclared base, before the pattern of its layers is read
    stages: list[Stage] = []
    for files in lineage.stages:
        parent = stages[-1] if stages else None
        stage = (known or {}).get(files.header.self_fingerprint)
        new_name = name if files is lineage.stages[-1] else None
        if stage is None or new_name not in (None, stage.name):
            try:
                config = files.stage_config(parent.name if parent else None, new_name)
                below = config.layers_below(base.config.num_hidden_layers if parent is None else parent.depth)
                pattern = read_pattern(base, files.config["stage"], below) if config.layers == "new" else None
                stage = build_stage(base, config, parent, pattern=pattern)
            except StageError as error:
                raise DeltaError(f"config.json of {files.repo} does not fit its base: {error}") from error
            stage.check_fits(files.header.parameters)  # before a file of any size is read
            fingerprint = files.header.self_fingerprint if verify else None
            stage.load_delta(read_delta(files.delta_path, files.name, fingerprint))
            stage.source = {
                "repo": files.repo,
                "revision": files.revision,
                "fingerprint": files.header.self_fingerprint,
            }
            stage.saved_name, stage.saved_dtype = files.name, files.header.dtype
            stage.prompt = files.config.get("prompt")
            if fetch(files.repo, "generation_config.json", files.access, files.revision) is not None:
                stage.generation_config = GenerationConfig.from_pretrained(files.folder)
                _check_token_ids(stage.generation_config, files.repo)
        stages.append(stage)
    return stages
