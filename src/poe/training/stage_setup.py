"""What a stage's training run sets up around the stage: shards, gradient masks, facts about it, its prompt format."""

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from poe.cascade import Cascade
from poe.data.render import Renderer
from poe.errors import StageError
from poe.loaders.card import EXAMPLE, TOOL
from poe.modeling.delta_file import delta_size
from poe.modeling.stage import Stage
from poe.stages.copying import find_copying_layer
from poe.training.parallel.distributed import World
from poe.training.parallel.sharding import resident_bytes, shard_base
from poe.training.reporting.progress import Progress


def shard_and_report(cascade: Cascade, world: World, progress: Progress) -> None:
    """Shard the base over the processes of `world`, and report the memory it takes in each."""
    if world.size == 1:
        progress.note("shard_base: there is one process, so the base stays whole")
        return
    whole = resident_bytes(cascade.base)
    shard_base(cascade, world)
    resident = resident_bytes(cascade.base)
    progress.note(
        f"base sharded over {world.size} processes: {resident / 2**20:,.0f} of {whole / 2**20:,.0f} MiB in each"
    )


def report_copying_layers(cascade: Cascade, stage: Stage, is_auto: bool, progress: Progress) -> None:
    """Report where a fork begins, and warn if layers of the base that copy from the prompt lie below it.

    With `is_auto` the fork begins at the lowest of these layers, and nothing is measured again.
    """
    if stage.config.layers != "fork" or stage.parent is not None:
        return
    try:
        lowest = stage.below if is_auto else find_copying_layer(cascade.base)
    except StageError:  # a base that does not return its attention
        return
    depth = cascade.base.config.num_hidden_layers
    place = f"the fork begins at layer {stage.below} of {depth}, and the lowest layer that copies is {lowest}"
    if stage.below > lowest:
        place += ": a fork above it learns to copy badly, and attach_at: auto begins there"
    progress.note(place)


def mask_unseen_tokens(stage: Stage, target_ids: np.ndarray) -> Callable[[], None]:
    """Let the head delta learn only the rows of the tokens in `target_ids`; return a function that removes the mask.

    Every other token is wrong at every step, so its gradient is tiny but always has the same sign. Adam divides by the
    size of the gradient and would push the token down at the full rate: the stage could never use a word that no
    training row has. With its row at zero the token keeps the logit of the base.
    """
    rows = next((tensor for name, tensor in stage.head.named_parameters() if name in ("weight", "b")), None)
    if rows is None:
        return lambda: None
    mask = torch.zeros(rows.shape[0], 1, dtype=rows.dtype, device=rows.device)
    mask[torch.from_numpy(target_ids).long()] = 1
    return rows.register_hook(lambda gradient: gradient * mask).remove


def prompt_format(tokenizer: Any, renderer: Renderer) -> dict[str, Any]:
    """Return the name, the version (a hash of the chat template) and the stop strings of the prompt format."""
    template = tokenizer.chat_template
    text = template if isinstance(template, str) else str(sorted(template.items()))
    stops = [tokenizer.convert_ids_to_tokens(token) for token in renderer.stop_token_ids]
    return {"name": "chat_template", "version": hashlib.sha256(text.encode()).hexdigest()[:12], "stop": stops}


def answer_example(cascade: Cascade, name: str) -> dict[str, str]:
    """Return the stage's greedy reply to the example question of the model card, as `{"reply": text}`."""
    return {"reply": cascade.chat(EXAMPLE, [TOOL], stage=name, max_new_tokens=100).raw}


def base_facts(cascade: Cascade, stage: Stage) -> dict[str, str]:
    """Return the fingerprints of the base and the parent: a run on others would end with another result."""
    facts = {"base": cascade.base_source.fingerprint[:12]}
    if stage.parent is not None:
        facts["parent"] = str((stage.parent.source or {}).get("fingerprint") or stage.parent.name)
    return facts


def delta_bytes(stage: Stage) -> int:
    """Return the size of the delta.safetensors that the stage will be saved as."""
    return delta_size(
        stage.delta_state_dict(),
        stage=stage.name,
        attach_at=stage.below,
        has_parent=stage.parent is not None,
        active=stage.config.active,
        dtype=stage.saved_dtype or torch.bfloat16,
    )
