"""Next-token cross-entropy through a large head, in chunks that compute their gradient in the forward pass.

Only the positions with a label pass through the head, and no more than a chunk of logits exists at a time: memory is
O(chunk x vocabulary). The gradient costs nothing extra later because softmax minus one-hot is at hand when the loss is.
The logits are the family's own: `logits` says how they are scaled and capped, `bias` (V,) is the head's, if it has one.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from poe.modeling.families import Logits

PLAIN = Logits()
CHUNK_LOGITS = 1 << 24  # logits in memory at a time: 64 MiB in fp32


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, logits_of: Logits, bias: Tensor | None
    ) -> Tensor:
        """hidden (N, D), weight (V, D), labels (N,) -> the sum of losses in nats, a scalar in fp32."""
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if need_weight else None
        rows = max(1, CHUNK_LOGITS // weight.shape[0])
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            x, y = hidden[part], labels[part]
            logits = logits_of(F.linear(x, weight, bias).float())
            log_z = logits.logsumexp(dim=-1, keepdim=True)
            total += (log_z.squeeze(-1) - logits.gather(1, y[:, None]).squeeze(1)).sum()
            if not (need_hidden or need_weight):
                continue
            # d loss / d logits = softmax - one-hot, through the derivatives of the soft-cap and the scale
            grad = (logits - log_z).exp_()
            grad.scatter_add_(1, y[:, None], torch.full_like(grad[:, :1], -1.0))
            if logits_of.softcap is not None:
                grad.mul_(1 - (logits / logits_of.softcap).square())
            if logits_of.scale != 1.0:
                grad.mul_(logits_of.scale)
            grad = grad.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad @ weight
            if grad_weight is not None:
                grad_weight += grad.T @ x
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grads[0].to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grads[0]).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None


def cross_entropy_sum(
    hidden: Tensor, weight: Tensor, labels: Tensor, logits: Logits = PLAIN, bias: Tensor | None = None
) -> Tensor:
    """The summed cross-entropy, in nats, of the positions whose label is not -100; a scalar in fp32.

    `hidden` (..., D) are normalised states, `weight` (V, D) the folded head, `labels` (...,) already shifted: the
    label of a position is the token that follows it. The bias gets no gradient.
    """
    kept = labels != -100
    return _ChunkedCrossEntropy.apply(hidden[kept], weight, labels[kept], logits, bias)


@torch.no_grad()
def per_label_losses(
    hidden: Tensor, weight: Tensor, labels: Tensor, logits: Logits = PLAIN, bias: Tensor | None = None
) -> Tensor:
    """The loss in nats of every kept position, (N,) fp32, in the order of `labels[labels != -100]`."""
    kept = labels != -100
    x, y = hidden[kept], labels[kept]
    losses = []
    for part in torch.arange(x.shape[0], device=x.device).split(max(1, CHUNK_LOGITS // weight.shape[0])):
        chunk = logits(F.linear(x[part], weight, bias).float())
        losses.append(F.cross_entropy(chunk, y[part], reduction="none"))
    return torch.cat(losses) if losses else torch.zeros(0)
