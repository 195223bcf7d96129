"""What makes a stage cheap to train: nothing below it is kept for a backward pass. Asserted, not hoped for."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from poe.errors import TrainingError
from poe.modeling.placement import device_of
from poe.modeling.stage import Stage

PROBE_TOKENS = 8


def assert_frozen_below(model: PreTrainedModel, stage: Stage) -> None:
    """Run a few tokens through `model`, as training will, and see that what lies below `stage` leaves no graph.

    That is: only the stage's own weights ask for a gradient, the hidden state that reaches its first layer requires
    none, and autograd has saved no tensor up to there. It costs one forward pass of 8 tokens, once per run. Raises
    `TrainingError` with what woke the base.
    """
    own = {id(parameter) for parameter in stage.parameters()}
    awake = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in own]
    if awake:
        raise TrainingError(
            f"Only stage {stage.name!r} should learn, but {len(awake)} weight(s) below it require a gradient, such as "
            f"{awake[0]}: freeze them with requires_grad_(False)."
        )
    below, saved, needs_gradient = True, 0, False

    def enter(layer: torch.nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal below, needs_gradient
        below, needs_gradient = False, bool(args[0].requires_grad)

    def count(tensor: Tensor) -> Tensor:
        nonlocal saved
        saved += below
        return tensor

    embedding = model.get_input_embeddings()
    ids = torch.arange(PROBE_TOKENS, device=device_of(embedding))[None] % model.config.vocab_size
    was_training = model.training
    handle = stage.layers[0].register_forward_pre_hook(enter, prepend=True)  # before the stage cuts the graph itself
    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            getattr(model.train(), model.base_model_prefix)(input_ids=ids, use_cache=False)
    finally:
        handle.remove()
        model.train(was_training)
    if needs_gradient or saved:
        raise TrainingError(
            f"The base below stage {stage.name!r} should run without a graph, but the hidden state that it hands up "
            f"{'requires' if needs_gradient else 'does not require'} a gradient, and autograd kept {saved} of its "
            "tensors: a hook makes an activation of the base require one. enable_input_require_grads() does, and "
            "gradient checkpointing and PEFT call it: undo it with disable_input_require_grads() on the base, and let "
            "checkpoint_activations recompute the stage's own layers instead."
        )
