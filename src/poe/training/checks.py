"""Checks of a run: the base below a stage keeps no graph, and every number is finite before it reaches a weight."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from poe.errors import TrainingError
from poe.modeling.placement import device_of, is_plain
from poe.modeling.stage import Stage

PROBE_TOKENS = 8
NamedParameters = Iterable[tuple[str, nn.Parameter]]


def check_frozen_below(model: PreTrainedModel, stage: Stage) -> None:
    """Run 8 tokens through `model` in training mode and check that nothing below `stage` builds a graph.

    Three things must hold: only the weights of the stage require a gradient, the hidden state at the input of its first
    layer requires none, and autograd has saved no tensor before that layer. Raises `TrainingError` with the cause.
    """
    trained = {id(parameter) for parameter in stage.parameters()}
    unfrozen = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in trained]
    if unfrozen:
        raise TrainingError(
            f"Expected that only stage {stage.name!r} requires gradients, but {len(unfrozen)} weight(s) below it do, "
            f"such as {unfrozen[0]}: freeze them with requires_grad_(False)."
        )
    below_stage, num_saved, needs_gradient = True, 0, False

    def enter_stage(layer: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal below_stage, needs_gradient
        below_stage, needs_gradient = False, bool(args[0].requires_grad)

    def count_saved(tensor: Tensor) -> Tensor:
        nonlocal num_saved
        num_saved += below_stage
        return tensor

    embedding = model.get_input_embeddings()
    ids = torch.arange(PROBE_TOKENS, device=device_of(embedding))[None] % model.config.vocab_size
    was_training = model.training
    # prepend: this hook must run before the stage's own hook, which detaches its input
    handle = stage.layers[0].register_forward_pre_hook(enter_stage, prepend=True)
    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count_saved, lambda tensor: tensor):
            getattr(model.train(), model.base_model_prefix)(input_ids=ids, use_cache=False)
    finally:
        handle.remove()
        model.train(was_training)
    if needs_gradient or num_saved:
        raise TrainingError(
            f"Expected that the base below stage {stage.name!r} runs without a graph, but its output "
            f"{'requires' if needs_gradient else 'does not require'} a gradient and autograd kept {num_saved} of its "
            "tensors: a hook makes an activation of the base require a gradient. enable_input_require_grads() does "
            "that, and gradient checkpointing and PEFT call it. Call disable_input_require_grads() on the base, and "
            "use checkpoint_activations to recompute the layers of the stage."
        )


def check_step_is_finite(
    step: int,
    loss: float,
    grad_norm: float,
    model: nn.Module,
    parameters: NamedParameters,
    replay_forward: Callable[[], object],
) -> None:
    """Raise `TrainingError` unless `loss` and `grad_norm` are finite. Call it before the optimizer's step.

    The message names the first tensor that is not finite, in the order in which a step computes them: a weight, the
    output of a module, the loss, a gradient. `replay_forward` repeats the forward passes of the step, which finds the
    module.
    """
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    parameters = list(parameters)
    culprit = (
        _find_bad_weight(parameters)
        or _find_bad_weight(model.named_parameters())
        or _find_bad_output(model, replay_forward)
    )
    if culprit is None and not math.isfinite(loss):
        culprit = f"the loss ({loss})"
    culprit = culprit or _find_bad_gradient(parameters) or f"the norm of all gradients ({grad_norm})"
    raise TrainingError(
        f"The loss of step {step} is {loss} and the norm of its gradients is {grad_norm}: expected finite numbers. The "
        f"first tensor that is not finite is {culprit}. The step was not taken, and the newest checkpoint, if any, was "
        "kept. Start again with lower learning rates (matrix_lr, head_lr) or with max_grad_norm. --resume continues "
        "from that checkpoint with the same options, which helps only if the hardware failed."
    )


def check_weights_are_finite(step: int, parameters: NamedParameters) -> None:
    """Raise `TrainingError` if a step left a weight that is not finite. Call it before a checkpoint is replaced."""
    if culprit := _find_bad_weight(parameters):
        raise TrainingError(
            f"After step {step} the first tensor that is not finite is {culprit}. The newest checkpoint, if any, was "
            "kept. Start again with lower learning rates (matrix_lr, head_lr) or with max_grad_norm."
        )


def check_validation_is_finite(step: int, bpb: float) -> None:
    """Raise `TrainingError` unless a validation gave a number, so that no step counts as the best by accident."""
    if not math.isfinite(bpb):
        cause = (
            "the base itself computes such numbers on these rows: open it in another dtype, or check its files"
            if step == 0
            else "the run diverged. The newest checkpoint, if any, was kept. Start again with lower learning rates "
            "(matrix_lr, head_lr) or with max_grad_norm"
        )
        raise TrainingError(f"The validation after step {step} gave {bpb} bits per byte: {cause}.")


def _count_bad_numbers(tensor: object) -> str | None:
    """Describe how many numbers of a tensor are not finite; None if all are finite or it holds no plain floats."""
    if not isinstance(tensor, Tensor) or tensor.is_meta or not is_plain(tensor):
        return None
    finite = torch.isfinite(tensor)
    if finite.all():
        return None
    nan = int(tensor.isnan().sum())
    return f"{nan:,} nan and {tensor.numel() - int(finite.sum()) - nan:,} infinite of {tensor.numel():,} numbers"


def _find_bad_weight(parameters: NamedParameters) -> str | None:
    counts = ((name, _count_bad_numbers(p.detach())) for name, p in parameters)
    return next((f"the weight {name} ({count})" for name, count in counts if count), None)


def _find_bad_gradient(parameters: NamedParameters) -> str | None:
    """Find the first bad gradient in the order of the backward pass, which starts at the head."""
    counts = ((name, _count_bad_numbers(p.grad)) for name, p in reversed(list(parameters)))
    return next((f"the gradient of {name} ({count})" for name, count in counts if count), None)


def _find_bad_output(model: nn.Module, replay_forward: Callable[[], object]) -> str | None:
    with _record_bad_outputs(model) as outputs, torch.no_grad():
        replay_forward()
    return outputs[0] if outputs else None


@contextmanager
def _record_bad_outputs(model: nn.Module) -> Iterator[list[str]]:
    """Record the first module that returns a number that is not finite; inner modules return before outer ones."""
    outputs: list[str] = []

    def check_output(name: str, module: nn.Module, args: Any, output: Any) -> None:
        for tensor in output if isinstance(output, (tuple, list)) else (output,):
            if not outputs and (count := _count_bad_numbers(tensor)):
                outputs.append(f"the hidden state that {name} returns ({count})")

    handles = [
        module.register_forward_hook(lambda m, a, out, name=name: check_output(name, m, a, out))
        for name, module in model.named_modules()
        if name
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
