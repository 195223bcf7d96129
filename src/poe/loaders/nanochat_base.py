"""Import a nanochat checkpoint as a PoE base.

nanochat's network has changed over time. Its checkpoints record sizes but not the constants of their version, so the
version is recognized by the tensors that it added; `_LAYOUTS` lists them. The rest is the same since the first release:
RoPE before QK-norm, norms without parameters, logits capped at 15.
"""

import functools
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from poe.errors import SourceError
from poe.loaders.base import save_base_folder
from poe.loaders.nanochat import read_tensors, translate
from poe.loaders.nanochat_tokenizer import find_tokenizer, read_tokenizer
from poe.modeling.modeling_poe import PoEConfig, PoEForCausalLM

_SIZES = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
_TABLES = ("embed_tokens.weight", "lm_head.weight", "value_embed.weight")  # one row per token, with padding
_SOFTCAP = 15.0
# Without an epsilon, F.rms_norm uses that of fp32.
_EPSILON = float(torch.finfo(torch.float32).eps)


@dataclass(frozen=True)
class Layout:
    """The constants of one range of nanochat's versions, which checkpoints do not record.

    `sharpness` multiplies queries and keys after their norm, `gate_scale` the gate of a value embedding. `short_window`
    maps the sequence length to the number of earlier tokens that an "S" layer sees. `doubt` is a note for the user on
    what the tensors cannot show.
    """

    since: str
    rope_theta: float
    sharpness: float
    gate_scale: float
    short_window: Callable[[int], int]
    doubt: str | None = None


_NEW_SOFTCAP = (
    "Versions of 2 to 9 March 2026 capped logits at 20 instead of 15 and did not record it in their checkpoints. If "
    "this is one of them, set final_logit_softcapping to 20 in config.json."
)
# The tensors that came last, and the layouts: (whether these tensors exist, the number of channels that gates of value
# embeddings read) -> layout. Dates are those of nanochat's history.
_LAST = {"model.smear.gate.weight", "model.smear.scale", "model.backout_scale"}
_LAYOUTS = {
    (False, None): Layout("13 October 2025", 10_000.0, 1.0, 2.0, lambda length: length // 2),
    (False, 32): Layout("18 January 2026", 10_000.0, 1.0, 2.0, lambda length: length // 2, doubt=_NEW_SOFTCAP),
    (False, 12): Layout("9 March 2026", 100_000.0, 1.15, 3.0, lambda length: 128 * math.ceil(length / 3 / 128)),
    (True, 12): Layout("14 March 2026", 100_000.0, 1.2, 3.0, lambda length: 128 * math.ceil(length / 4 / 128)),
}


@dataclass(frozen=True)
class Imported:
    """An imported base: its folder, the checkpoint's step, the recognized layout, and the number of parameters."""

    folder: Path
    step: int
    layout: Layout
    parameters: int


def import_nanochat(checkpoint: Path | str, output: Path | str) -> Imported:
    """Write a nanochat checkpoint atomically as a PoE base folder.

    `checkpoint` is a folder with `model_<step>.pt` and `meta_<step>.json` (base, chat or RL; the last of several
    steps), and with the tokenizer where `find_tokenizer` looks. The padding rows of nanochat's tables are left out.
    Weights are written in the widest dtype of the checkpoint, usually fp32. Raises `SourceError` for missing, damaged
    or unknown files, `OutputError` if the folder cannot be written.
    """
    folder = Path(checkpoint).expanduser()
    step, weights, meta = find_last_checkpoint(folder)
    sizes = read_sizes(meta)
    tokenizer = read_tokenizer(find_tokenizer(folder), sizes["sequence_len"])
    if len(tokenizer) != sizes["vocab_size"]:
        raise SourceError(
            f"{meta} has {sizes['vocab_size']} tokens, but the tokenizer has {len(tokenizer)}: expected the one that "
            "the model was trained with."
        )
    tensors = translate(read_tensors(weights), sizes["n_embd"] // sizes["n_head"], weights)
    layout = recognize_layout(tensors, weights)
    check_sizes(sizes, tensors, meta)
    model = build_model(build_config(sizes, layout, tensors, tokenizer), tensors, weights)
    target = save_base_folder(model, output, tokenizer)
    return Imported(target, step, layout, sum(p.numel() for p in model.parameters()))


def find_last_checkpoint(folder: Path) -> tuple[int, Path, Path]:
    """Return the last step in a folder and its two files, like nanochat. Raises `SourceError`."""
    names = [re.fullmatch(r"model_(\d+)\.pt", path.name) for path in folder.glob("model_*.pt")]
    if not (steps := {int(name[1]): name[1] for name in names if name}):
        raise SourceError(f"{folder}: expected a nanochat checkpoint, model_<step>.pt and meta_<step>.json.")
    last = max(steps)
    weights, meta = folder / f"model_{steps[last]}.pt", folder / f"meta_{steps[last]}.json"
    if not meta.is_file():
        raise SourceError(f"{meta} is missing, which has the sizes of {weights.name}: copy it from the same run.")
    return last, weights, meta


def read_sizes(meta: Path) -> dict[str, Any]:
    """Return the checked `model_config` of a nanochat meta file; `window_pattern` is "L" by default."""
    try:
        content = json.loads(meta.read_text(encoding="utf-8"))
        sizes = dict(content["model_config"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SourceError(f"{meta}: expected JSON with a `model_config`, got {error!r}.") from error
    pattern = sizes.pop("window_pattern", "L")
    if sorted(sizes) != sorted(_SIZES):
        raise SourceError(
            f"{meta}: expected a model_config of {', '.join(_SIZES)} and window_pattern, got {', '.join(sizes)}. "
            "The effect of another field is unknown, so nothing was imported."
        )
    if not all(type(value) is int and value > 0 for value in sizes.values()):
        raise SourceError(f"{meta}: expected sizes above 0, got {sizes}.")
    if not isinstance(pattern, str) or not re.fullmatch("[SL]+", pattern.upper()):
        raise SourceError(f"{meta}: expected a window_pattern of S and L, got {pattern!r}.")
    heads, key_value_heads, width = sizes["n_head"], sizes["n_kv_head"], sizes["n_embd"]
    if width % (2 * heads) or heads % key_value_heads:
        raise SourceError(f"{meta}: {heads} heads, {key_value_heads} for keys, do not divide a width of {width}.")
    return {**sizes, "window_pattern": pattern.upper()}


def recognize_layout(tensors: Mapping[str, Tensor], path: Path) -> Layout:
    """Return the layout of a checkpoint from its tensors (with the names of a PoE base). Raises `SourceError`."""
    channels = {tensor.shape[1] for name, tensor in tensors.items() if name.endswith("value_gate.weight")}
    last = _LAST & tensors.keys()
    is_consistent = len(channels) <= 1 and last in (set(), _LAST)
    layout = _LAYOUTS.get((bool(last), next(iter(channels), None))) if is_consistent else None
    if layout is None:
        raise SourceError(
            f"{path} is not of a known version of nanochat: expected gates of value embeddings that read 32 channels, "
            "or 12 with or without smear and backout, or no value embeddings at all."
        )
    return layout


def check_sizes(sizes: Mapping[str, Any], tensors: Mapping[str, Tensor], meta: Path) -> None:
    """Raise `SourceError` if a meta file is of another checkpoint, before a network of its sizes is built."""
    layers = {name.split(".")[2] for name in tensors if name.startswith("model.layers.")}
    embedding = tensors.get("model.embed_tokens.weight", torch.empty(0, 0))
    if layers != {str(index) for index in range(min(sizes["n_layer"], len(tensors)))}:
        raise SourceError(f"{meta} has {sizes['n_layer']} layers, but the checkpoint has {len(layers)}.")
    if embedding.shape[1] != sizes["n_embd"]:
        raise SourceError(f"{meta} has a width of {sizes['n_embd']}, but the embedding has {embedding.shape[1]}.")


def build_config(
    sizes: Mapping[str, Any],
    layout: Layout,
    tensors: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerFast,
) -> PoEConfig:
    """Return the config of a PoE base that computes what nanochat does, up to the trained sequence length."""
    depth, pattern = sizes["n_layer"], sizes["window_pattern"]
    kinds = [pattern[index % len(pattern)] for index in range(depth - 1)] + ["L"]
    gates = {int(name.split(".")[2]): t.shape[1] for name, t in tensors.items() if name.endswith("value_gate.weight")}
    smear_gate = tensors.get("model.smear.gate.weight")
    names = {"S": "sliding_attention", "L": "full_attention"}
    return PoEConfig(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["n_embd"],
        num_hidden_layers=depth,
        num_attention_heads=sizes["n_head"],
        num_key_value_heads=sizes["n_kv_head"],
        max_position_embeddings=sizes["sequence_len"],
        rope_theta=layout.rope_theta,
        rms_norm_eps=_EPSILON,
        attention_logit_scale=layout.sharpness**2,
        final_logit_softcapping=_SOFTCAP,
        layer_scalars="model.layers.0.resid_scale" in tensors,
        value_embedding_layers=sorted(gates) or None,
        value_gate_channels=next(iter(gates.values()), PoEConfig.value_gate_channels),
        value_gate_scale=layout.gate_scale,
        layer_types=[names[kind] for kind in kinds] if "S" in kinds else None,
        # nanochat counts only the earlier tokens, transformers also the current one
        sliding_window=layout.short_window(sizes["sequence_len"]) + 1 if "S" in kinds else None,
        smear_channels=None if smear_gate is None else smear_gate.shape[1],
        backout_layer=depth // 2 if "model.backout_scale" in tensors else None,
        bos_token_id=tokenizer.bos_token_id,
        # an answer ends at <|assistant_end|>, a plain text at the start of the next one
        eos_token_id=[tokenizer.eos_token_id, tokenizer.bos_token_id],
        pad_token_id=tokenizer.pad_token_id,
    )


def build_model(config: PoEConfig, tensors: dict[str, Tensor], path: Path) -> PoEForCausalLM:
    """Return the model with these tensors, cropped to the vocabulary. Empties `tensors` to save memory.

    Raises `SourceError` with all tensors that are missing, surplus or of another shape.
    """
    with torch.device("meta"):
        model = PoEForCausalLM(config)
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values()))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    weights = {}
    for name in list(tensors):
        tensor = tensors.pop(name)
        weights[name] = (tensor[: config.vocab_size] if name.endswith(_TABLES) else tensor).to(dtype, copy=True)
    problems = [f"{name} is missing" for name in expected.keys() - weights.keys()]
    problems += [f"{name} is surplus" for name in weights.keys() - expected.keys()]
    problems += [
        f"{name} is {tuple(weights[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if name in weights and tuple(weights[name].shape) != shape
    ]
    problems += [f"{name} is not finite" for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if problems or not dtype.is_floating_point:
        raise SourceError(f"{path} does not fit its meta file: {'; '.join(sorted(problems)) or dtype}.")
    model.load_state_dict(weights, assign=True)
    return model
