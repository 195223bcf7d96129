"""The forward pass of training: attention of PrefixLM bases, `torch.compile`, and activation checkpointing."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask

from poe.data.packing import IGNORED, Batch
from poe.errors import TrainingError
from poe.modeling.answer_boundary import AnswerBoundary
from poe.modeling.boundary import Boundary
from poe.modeling.span_attention import attend_again


def prompt_positions(batch: Batch) -> Tensor:
    """Return (B, T) bool: the prompt tokens of each document, which end before the first token with a label."""
    has_label = (batch.labels != IGNORED).long()
    labels_before = has_label.cumsum(1) - has_label
    labels_before_document = torch.where(batch.position_ids == 0, labels_before, 0).cummax(1).values
    return labels_before == labels_before_document


def prefix_lm_mask(model: PreTrainedModel, batch: Batch) -> Any:
    """Return the attention mask of packed rows for a PrefixLM base, which reads a prompt in both directions.

    Attention is causal within a document, and every prompt token attends to the whole prompt. The `token_type_ids` of
    transformers would join the prompts of all documents in a row into one block.
    """
    prompt = prompt_positions(batch)
    document = (batch.position_ids == 0).cumsum(1)

    def both_in_prompt(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return prompt[row, query] & prompt[row, key]

    def same_document(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return document[row, query] == document[row, key]

    return create_causal_mask(
        config=model.config,
        inputs_embeds=torch.empty(*batch.input_ids.shape, 1, dtype=model.dtype, device=batch.input_ids.device),
        attention_mask=None,
        past_key_values=None,
        position_ids=None,  # the positions of a packed row would make transformers count from each document's start
        or_mask_function=both_in_prompt,
        and_mask_function=same_document,
    )


def compile_forward(backbone: nn.Module) -> Callable[..., Any]:
    """Return a compiled forward pass of `backbone`; the module, its parameter names and its hooks do not change.

    Compilation happens at the first call. Every row is full, so there is one shape to compile, or two if the last
    micro-batch of a step is smaller. The first call raises `TrainingError` if compilation fails. What was compiled
    before in this process is forgotten, because it counts against torch's limit of recompilations.
    """
    torch.compiler.reset()
    compiled = torch.compile(backbone, dynamic=False)

    def forward(**inputs: Any) -> Any:
        with explain_failed_compilation(backbone):
            return compiled(**inputs)

    return forward


def compile_boundary(boundary: Boundary | AnswerBoundary, *, below: bool) -> None:
    """Let a boundary compile its layers, with `below` also those under the stage, at their first use."""
    torch.compiler.reset()
    boundary.compile(below=below)


@contextmanager
def explain_failed_compilation(model: nn.Module) -> Iterator[None]:
    """Raise `TrainingError` instead of the errors of torch.compile."""
    try:
        yield
    except TorchDynamoException as error:
        reason = str(error).strip().splitlines()[0]
        raise TrainingError(
            f"torch.compile cannot compile the {type(model).__name__}: {reason} On a CPU it needs a C++ compiler. To "
            "train without it, at some cost in speed, set compile: false (--no-compile)."
        ) from error


@contextmanager
def recompute_activations(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Inside the `with` block, recompute the activations of each of `layers` during the backward pass.

    A layer keeps only its input, which costs about a third more compute in these layers. Checkpointing is
    non-reentrant (torch.utils.checkpoint), so the gradients are exactly the same. Only the `forward` method of a layer
    is wrapped, so its hooks run once.
    """
    wrapped = list(layers)
    for layer in wrapped:
        layer.forward = partial(_recompute, layer.forward, attend_again(layer))
    try:
        yield
    finally:
        for layer in wrapped:
            del layer.forward  # the method of the class is visible again


def _recompute(forward: Callable[..., Any], context_fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    options: dict[str, Any] = (
        {} if torch.compiler.is_compiling() else {"context_fn": context_fn}
    )  # what is compiled has no spans
    return checkpoint(forward, *args, use_reentrant=False, **options, **kwargs)
