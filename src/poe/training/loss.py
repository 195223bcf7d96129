"""Next-token cross-entropy through a large head, in chunks that compute their gradient in the forward pass.

Only the positions with a label pass through the head, and only one chunk of logits exists at a time, so the memory is
O(chunk x vocabulary). The gradient, softmax minus one-hot, is computed with the loss and costs nothing later. `logits`
scales and caps the logits as the model's family does; `bias` (V,) is the bias of the head, if it has one.
"""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from poe.data.packing import IGNORED
from poe.modeling.families import Logits

PLAIN = Logits()
BLOCK = 256  # positions; a chunk consists of whole blocks
# Logits of a chunk. On a CPU larger chunks than 16 MiB are no faster. A GPU needs some thousand rows before its matmuls
# take longer than the memory traffic of the weight's gradient.
CHUNK_LOGITS = {"cpu": 1 << 22, "cuda": 1 << 27}


def chunk_rows(weight: Tensor) -> int:
    """Return the number of positions in a chunk, for a head's `weight` (V, D).

    A chunk has `CHUNK_LOGITS` logits, but at least D rows. Every chunk also reads the weight and adds to its gradient,
    2 V D numbers, and the logits of D rows take no more memory than that gradient.
    """
    vocabulary, width = weight.shape
    return max(1, CHUNK_LOGITS.get(weight.device.type, 1 << 22) // vocabulary, width)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        logits_of: Logits,
        bias: Tensor | None,
        z_loss: float,
        weights: Tensor | None,
    ) -> Tensor:
        """Return the sum of losses in nats, fp32, for hidden (N, D), weight (V, D), labels (N,), weights (N,) fp32."""
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        labeled = _labeled_positions(labels)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        # fp32: in bf16 the gradient of a late chunk would be rounded away in the sum over the chunks.
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if need_weight else None
        # Positions without a label fill the last block: oneDNN keeps memory for every new shape.
        padding = (labels == IGNORED).nonzero().squeeze(1)[: -labeled.shape[0] % BLOCK]
        for part in torch.cat([labeled, padding]).split(chunk_rows(weight) // BLOCK * BLOCK or BLOCK):
            x, y = hidden[part], labels[part, None]
            loss_weights = (y != IGNORED).float()
            loss_weights = loss_weights if weights is None else loss_weights * weights[part, None]
            loss, grad = _chunk(x, weight, y.clamp_min(0), logits_of, bias, z_loss, loss_weights)
            total += loss
            if grad_hidden is not None:
                grad_hidden[part] = grad @ weight
            if grad_weight is not None and weight.dtype == torch.float32:
                grad_weight.addmm_(grad.T, x)
            elif grad_weight is not None:
                grad_weight += grad.T @ x
        ctx.gradients = grad_hidden, grad_weight
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # The large gradients are scaled in place, which is possible only once.
        if ctx.gradients is None:
            raise RuntimeError("The chunked cross-entropy can be differentiated once; compute the loss again.")
        (grad_hidden, grad_weight), ctx.gradients = ctx.gradients, None
        if grad_hidden is not None:
            grad_hidden.mul_(grads[0])
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(grads[0]).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, *[None] * 5


def _chunk(
    x: Tensor, weight: Tensor, y: Tensor, logits_of: Logits, bias: Tensor | None, z_loss: float, loss_weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the sum of the losses, and its gradient (n, V) by the head's output, for x (n, D), y (n, 1).

    `loss_weights` (n, 1) multiply the losses of the positions.
    """
    logits = logits_of(F.linear(x, weight, bias).float())  # (n, V)
    log_p = logits.log_softmax(dim=-1)
    picked = log_p.gather(1, y)  # (n, 1)
    log_z = logits.gather(1, y) - picked
    loss = (loss_weights * (z_loss * log_z.square() - picked)).sum()
    # d loss / d logits = softmax (1 + 2 z_loss log Z) - one-hot, then through the soft-cap and the scale
    grad = log_p.exp_().mul_(loss_weights * (1 + 2 * z_loss * log_z)).scatter_add_(1, y, -loss_weights)
    if logits_of.softcap is not None:
        grad.mul_(logits.div_(logits_of.softcap).square_().neg_().add_(1))
    if logits_of.scale != 1.0:
        grad.mul_(logits_of.scale)
    return loss, grad.to(weight.dtype)


def cross_entropy_sum(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    logits: Logits = PLAIN,
    bias: Tensor | None = None,
    *,
    z_loss: float = 0.0,
    weights: Tensor | None = None,
) -> Tensor:
    """Return the summed cross-entropy in nats of the positions with a label (not -100), a scalar in fp32.

    `hidden` (..., D) are normalized states and `weight` (V, D) is the folded head. `labels` (...,) are shifted: the
    label of a position is the next token. `z_loss` times the square of log Z, the logarithm of the softmax's
    denominator, is added at every position, which keeps the logits from drifting (PaLM, arXiv 2204.02311). `weights`
    (...,) multiply the losses of their positions. Neither the bias nor `weights` gets a gradient.
    """
    if weights is not None:
        weights = weights.flatten().to(weight.device, torch.float32)
    return _ChunkedCrossEntropy.apply(
        rearrange(hidden, "... d -> (...) d").to(weight),
        weight,
        labels.flatten().to(weight.device),
        logits,
        bias,
        z_loss,
        weights,
    )


@torch.no_grad()
def per_label_losses(
    hidden: Tensor, weight: Tensor, labels: Tensor, logits: Logits = PLAIN, bias: Tensor | None = None
) -> Tensor:
    """Return the cross-entropy in nats of every position with a label, (N,) fp32, in their order."""
    hidden, labels = rearrange(hidden, "... d -> (...) d").to(weight), labels.flatten().to(weight.device)
    losses = [
        F.cross_entropy(logits(F.linear(hidden[part], weight, bias).float()), labels[part], reduction="none")
        for part in _labeled_positions(labels).split(chunk_rows(weight))
    ]
    return torch.cat(losses)


@torch.no_grad()
def match_likeliest(
    hidden: Tensor, weight: Tensor, labels: Tensor, logits: Logits = PLAIN, bias: Tensor | None = None
) -> Tensor:
    """Return whether the label of every position with a label has the largest logit, (N,) bool, in their order."""
    hidden, labels = rearrange(hidden, "... d -> (...) d").to(weight), labels.flatten().to(weight.device)
    rows = max(1, CHUNK_LOGITS.get(weight.device.type, 1 << 22) // len(weight))
    matches = [
        logits(F.linear(hidden[part], weight, bias).float()).argmax(-1) == labels[part]
        for part in _labeled_positions(labels).split(rows)
    ]
    return torch.cat(matches)


def _labeled_positions(labels: Tensor) -> Tensor:
    """Return the indices (M,) of the positions of `labels` (N,) that have a label."""
    return (labels != IGNORED).nonzero().squeeze(1)
