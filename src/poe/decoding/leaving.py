"""Decode a batch in which each row ends for itself: rows that have ended leave, and the passes get smaller.

`generate` of transformers computes all rows until the longest has ended. Every step here is that of `generate`, on the
rows that are left, so each reply is the same up to the rounding of smaller matrix products.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from poe.decoding.constraints import ConstraintProcessor
from poe.decoding.forced import has_plain_layers, run_pass
from poe.decoding.speculation import generate_with


def generate_leaving(model: Any, generators: Sequence[torch.Generator] | None = None, **options: Any) -> Tensor:
    """Call `model.generate` for a batch; rows that have ended leave it, and are padded in the output.

    `generators` has the random numbers of each row, for sampling that depends on no other row.
    """
    output: Tensor = generate_with(partial(_decode, generators), model, **options)
    return output


def _decode(
    generators: Sequence[torch.Generator] | None,
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Any = None,
    **kwargs: Any,
) -> Tensor:
    """Run the loop with the arguments that `generate` of transformers passes to its decoding loops."""
    kwargs.pop("synced_gpus", None)
    pad, ids, rows = int(generation_config.pad_token_id), input_ids, list(range(len(input_ids)))
    constraints = [processor for processor in logits_processor if isinstance(processor, ConstraintProcessor)]
    ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    finished: dict[int, Tensor] = {}
    while rows:
        outputs, scores = run_pass(model, ids, logits_processor, kwargs, None if ids is input_ids else 1)
        chosen = _sample(scores, generators) if generation_config.do_sample else scores.argmax(-1)
        ids = torch.cat([ids, chosen.masked_fill(ended, pad)[:, None]], dim=1)
        kwargs = model._update_model_kwargs_for_generation(outputs, kwargs)
        ended = ended | stopping_criteria(ids, None)
        cache = kwargs.get("past_key_values")
        if not (ended.all() or (ended.any() and (cache is None or has_plain_layers(cache)))):
            continue
        finished |= {rows[i]: ids[i] for i in ended.nonzero()[:, 0].tolist()}
        left = (~ended).nonzero()[:, 0]
        kept = left.tolist()
        rows, ids, ended = [rows[i] for i in kept], ids[left], ended[left]
        if not rows:
            break
        if cache is not None:
            cache.batch_select_indices(left)
        kwargs = {name: _keep(value, left, len(chosen)) for name, value in kwargs.items()}
        generators = generators and [generators[i] for i in kept]
        for processor in constraints:
            processor.constraints = [processor.constraints[i] for i in kept]
    ordered = [finished[row] for row in range(len(input_ids))]
    return torch.nn.utils.rnn.pad_sequence(ordered, batch_first=True, padding_value=pad)


def _keep(value: Any, rows: Tensor, count: int) -> Any:
    """Return the rows of a tensor (B, T) that are left of `count`; masks, positions and token types have that shape."""
    return value[rows] if isinstance(value, Tensor) and value.dim() > 1 and len(value) == count else value


def _sample(scores: Tensor, generators: Sequence[torch.Generator] | None) -> Tensor:
    """Return a random token for each row of scores (B, V)."""
    if generators is None:
        return scores.softmax(-1).multinomial(1)[:, 0]
    shares = scores.cpu().double().softmax(-1)  # the same draws on every device
    drawn = [share.multinomial(1, generator=own) for share, own in zip(shares, generators, strict=True)]
    return torch.cat(drawn).to(scores.device)
