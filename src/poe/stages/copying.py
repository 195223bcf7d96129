"""Find the layers of a base that copy, so that a fork can begin at the lowest of them.

An induction head attends, at a token, to what followed the same token earlier, and so copies it (Olsson et al., 2022,
arXiv 2209.11895). Names and values of calls are copied from the prompt by such heads. A stage above them cannot change
what they copy; a fork that begins at the lowest of them can.
"""

import torch
from transformers import PreTrainedModel

from poe.errors import StageError
from poe.modeling.placement import device_of

STRONG = 0.25  # attention of a strong induction head to the token that it copies; in other layers it is below a tenth


def find_copying_layer(base: PreTrainedModel) -> int:
    """Return the index of the lowest layer with a strong induction head, or of the best layer if none is strong."""
    scores = copying_scores(base)
    strong = [index for index, score in enumerate(scores) if score >= STRONG]
    return strong[0] if strong else max(range(len(scores)), key=scores.__getitem__)


@torch.no_grad()
def copying_scores(base: PreTrainedModel, *, rows: int = 8, length: int = 64) -> list[float]:
    """Return for every layer the best score of its heads, from 0 to 1. It takes one forward pass.

    Each of `rows` rows is `length` random tokens, twice. The score of a head is the mean attention that a token of the
    second half gives to the token after its first occurrence. Raises `StageError` for a base that does not return its
    attention.
    """
    generator = torch.Generator().manual_seed(0)
    half = torch.randint(base.config.vocab_size, (rows, length), generator=generator)
    ids = torch.cat([half, half], dim=1).to(device_of(base.get_input_embeddings()))
    attention, training = base.config._attn_implementation, base.training
    base.eval().set_attn_implementation("eager")  # other kernels do not return the attention
    try:
        attentions = base(input_ids=ids, output_attentions=True, use_cache=False).attentions
    finally:
        base.set_attn_implementation(attention)
        base.train(training)
    if not attentions or any(weights is None for weights in attentions):
        raise StageError(
            f"A base of model type {base.config.model_type!r} does not return its attention, so attach_at='auto' "
            "cannot find the layers that copy: expected attach_at as a number."
        )
    query = torch.arange(length, 2 * length - 1)
    return [float(w.float()[:, :, query, query - length + 1].mean(dim=(0, 2)).max()) for w in attentions]
