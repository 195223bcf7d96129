"""Next-token cross-entropy through a large head, in chunks that compute their gradient in the forward pass.

Only the positions with a label pass through the head, and no more than a chunk of logits exists at a time: memory is
O(chunk x vocabulary). The gradient costs nothing extra later because softmax minus one-hot is at hand when the loss is.
The logits are the family's own: `logits` says how they are scaled and capped, `bias` (V,) is the head's, if it has one.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from poe.data.packing import IGNORED
from poe.modeling.families import Logits

PLAIN = Logits()
BLOCK = 256  # positions; a chunk is a number of whole blocks
# Logits in memory at a time, where that leaves enough rows. On a CPU a chunk of 16 MiB is about as fast as any larger
# one; a GPU needs some thousand rows before its matmuls outweigh the traffic of the weight's gradient.
CHUNK_LOGITS = {"cpu": 1 << 22, "cuda": 1 << 27}


def chunk_rows(weight: Tensor) -> int:
    """Return how many positions pass through a head's `weight` (V, D) at a time.

    As many as `CHUNK_LOGITS` says, but no fewer than D: every chunk also reads the weight and adds to its gradient,
    2 V D numbers, and with D rows the chunk's logits take no more memory than that gradient does anyway.
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
        """hidden (N, D), weight (V, D), labels (N,), weights (N,) fp32 -> the sum of losses in nats, fp32."""
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        kept = _kept(labels)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        # Summed over the chunks in fp32: in bf16 a late chunk would be lost in the sum of the earlier ones.
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if need_weight else None
        # Whole blocks, filled up with positions that do not count: oneDNN keeps memory for every shape it has met.
        spare = (labels == IGNORED).nonzero().squeeze(1)[: -kept.shape[0] % BLOCK]
        for part in torch.cat([kept, spare]).split(chunk_rows(weight) // BLOCK * BLOCK or BLOCK):
            x, y = hidden[part], labels[part, None]
            share = (y != IGNORED).float()
            share = share if weights is None else share * weights[part, None]
            loss, grad = _chunk(x, weight, y.clamp_min(0), logits_of, bias, z_loss, share)
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
        # Scaled in place, a head's gradient being large, hence only once.
        if ctx.gradients is None:
            raise RuntimeError("The chunked cross-entropy can be differentiated once; compute the loss again.")
        (grad_hidden, grad_weight), ctx.gradients = ctx.gradients, None
        if grad_hidden is not None:
            grad_hidden.mul_(grads[0])
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(grads[0]).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, *[None] * 5


def _chunk(
    x: Tensor, weight: Tensor, y: Tensor, logits_of: Logits, bias: Tensor | None, z_loss: float, share: Tensor | None
) -> tuple[Tensor, Tensor]:
    """x (n, D), y and share (n, 1) -> the sum of the losses, and its gradient (n, V) by what the head returns."""
    logits = logits_of(F.linear(x, weight, bias).float())  # (n, V)
    log_p = logits.log_softmax(dim=-1)
    picked = log_p.gather(1, y)  # (n, 1)
    log_z = logits.gather(1, y) - picked
    if share is None:
        share = torch.ones_like(picked)
    loss = (share * (z_loss * log_z.square() - picked)).sum()
    # d loss / d logits = softmax (1 + 2 z_loss log Z) - one-hot, then through the soft-cap and the scale
    grad = log_p.exp_().mul_(share * (1 + 2 * z_loss * log_z)).scatter_add_(1, y, -share)
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
    """The summed cross-entropy, in nats, of the positions whose label is not -100; a scalar in fp32.

    `hidden` (..., D) are normalized states, `weight` (V, D) the folded head, `labels` (...,) already shifted: the
    label of a position is the token that follows it. `z_loss` times the square of log Z, the logarithm of the softmax's
    denominator, is added at every position, which keeps the logits from drifting (PaLM, arXiv 2204.02311). `weights`
    (...,) multiply the losses of their positions. The bias gets no gradient, nor do the weights.
    """
    if weights is not None:
        weights = weights.flatten().to(weight.device, torch.float32)
    return _ChunkedCrossEntropy.apply(
        hidden.flatten(0, -2).to(weight), weight, labels.flatten().to(weight.device), logits, bias, z_loss, weights
    )


@torch.no_grad()
def per_label_losses(
    hidden: Tensor, weight: Tensor, labels: Tensor, logits: Logits = PLAIN, bias: Tensor | None = None
) -> Tensor:
    """The cross-entropy in nats of every kept position, (N,) fp32, in the order of `labels[labels != -100]`."""
    hidden, labels = hidden.flatten(0, -2).to(weight), labels.flatten().to(weight.device)
    losses = [
        F.cross_entropy(logits(F.linear(hidden[part], weight, bias).float()), labels[part], reduction="none")
        for part in _kept(labels).split(chunk_rows(weight))
    ]
    return torch.cat(losses)


def _kept(labels: Tensor) -> Tensor:
    """The indices (M,) of the positions of `labels` (N,) that count."""
    return (labels != IGNORED).nonzero().squeeze(1)
