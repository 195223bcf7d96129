"""The keywords of `from_pretrained`: those of transformers are taken, or refused by name with what to do instead."""

import os
from collections.abc import Mapping
from typing import Any

import torch

from poe.errors import SourceError, suggest
from poe.modeling.placement import missing_device

TAKEN = (
    *("attn_implementation", "experts_implementation", "quantization_config", "max_memory", "offload_folder"),
    *("offload_buffers", "offload_state_dict", "low_cpu_mem_usage", "disable_mmap", "code_revision", "proxies"),
    *("generation_config", "use_kernels", "allow_all_kernels", "kernel_config", "tp_plan", "tp_size", "device_mesh"),
    *("distributed_config", "use_safetensors", "torch_dtype", "subfolder", "force_download"),
)
_OWN = (
    "dtype",
    "device_map",
    "revision",
    "base",
    "verify",
    "token",
    "cache_dir",
    "local_files_only",
    "trust_remote_code",
)
_FILES = "a stage stands on the base that its files hold. Save the model you mean as a folder, and open that"
REFUSED = {
    "config": _FILES,
    "state_dict": _FILES,
    "key_mapping": _FILES,
    "gguf_file": "weights are read from safetensors: convert the file with transformers first",
    "from_tf": "weights are read from safetensors: convert the files with transformers first",
    "from_flax": "weights are read from safetensors: convert the files with transformers first",
    "weights_only": "weights are read from safetensors and never unpickled: leave it out",
    "variant": "a fingerprint belongs to model.safetensors: open the repository without it, in the dtype=... you want",
    "ignore_mismatched_sizes": "weights that do not fit would be random: leave it out",
    "adapter_kwargs": "adapters become stages: poe import peft",
    "adapter_name": "adapters become stages: poe import peft",
    "output_loading_info": "from_pretrained raises for weights that are missing: leave it out",
    "use_auth_token": "expected token=...",
    "use_fast": "the tokenizer is always a fast one: leave it out",
    "padding_side": "expected cascade.tokenizer.padding_side = ...",
    "fusion_config": "the base's layers must be those of its class: leave it out",
}


def _check_device_map(device_map: Any) -> None:
    places = device_map.values() if isinstance(device_map, Mapping) else [device_map]
    for place in places:
        if isinstance(place, str) and place.partition(":")[0] in ("cuda", "mps"):
            place = torch.device(place)
        if isinstance(place, torch.device) and (problem := missing_device(place)):
            raise SourceError(f"{problem} Leave device_map out, or give 'cpu'.")


def read_options(
    repo: str, dtype: Any, options: Mapping[str, Any], device_map: Any = None
) -> tuple[str, dict[str, Any]]:
    """Return the location with its subfolder, and the keywords for the base's `from_pretrained`, `dtype` among them.

    Raises `SourceError` for a keyword that is refused or unknown, such as a field of the config: it would change what
    the base computes, under the fingerprint of its files. Raises it for a device that this machine does not have, too.
    """
    _check_device_map(device_map)
    for name in options:
        if name in REFUSED:
            raise SourceError(f"from_pretrained does not take {name}: {REFUSED[name]}.")
        if name not in TAKEN:
            raise SourceError(
                f"from_pretrained has no keyword {name!r}.{suggest(name, (*TAKEN, *_OWN))} A field of the base's "
                "config cannot be changed: save a base with the changed config, and open that."
            )
    taken = dict(options)
    if (alias := taken.pop("torch_dtype", None)) is not None and dtype == "auto":
        dtype = alias
    if isinstance(dtype, str) and dtype != "auto":
        found = getattr(torch, dtype.removeprefix("torch."), None)
        if not isinstance(found, torch.dtype):
            raise SourceError(f"dtype should be 'auto', or a dtype of torch such as 'bfloat16', got {dtype!r}.")
        dtype = found
    if taken.pop("use_safetensors", True) is False:
        raise SourceError("from_pretrained does not take use_safetensors=False: weights are never unpickled.")
    if subfolder := taken.pop("subfolder", None):
        if not os.path.isdir(repo):
            raise SourceError(
                f"from_pretrained takes a subfolder of a local folder only, and {repo} is a repository: fetch it with "
                f"`hf download {repo} --include '{subfolder}/*' --local-dir FOLDER`, then open FOLDER/{subfolder}."
            )
        repo = os.path.join(repo, subfolder)
    return repo, {"dtype": dtype, **taken}
