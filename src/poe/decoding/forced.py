"""Skip the model for forced tokens: where a constraint leaves one token only, it is appended without a pass.

The next pass takes the chosen token and all forced tokens after it together. `Constraint.mask` allows only these tokens
as well, so the reply is that of the ordinary loop, up to the rounding of a pass over several tokens. It is for one row,
greedy or sampling.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from poe.decoding.constraints import Constraint
from poe.decoding.speculation import generate_with

_OPTIONS = {
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "logits_processor"),
    *("streamer", "stopping_criteria", "max_time"),
}


def supports_options(options: Iterable[str]) -> bool:
    """Return whether our loops support these options of `generate`. With others, such as beams, they are not used."""
    return _OPTIONS.issuperset(options)


def generate_skipping_forced(model: Any, constraint: Constraint, **options: Any) -> Tensor:
    """Call `model.generate` for one row, with the constraint that also stands in its `logits_processor`."""
    output: Tensor = generate_with(partial(_decode, constraint), model, **options)
    return output


def _decode(
    constraint: Constraint,
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Any = None,
    **kwargs: Any,
) -> Tensor:
    """Run the loop with the arguments that `generate` of transformers passes to its decoding loops."""
    ids, count = input_ids, input_ids.shape[1]  # the last `count` tokens go through the model next
    kwargs.pop("synced_gpus", None)
    ended = False
    while not ended:
        outputs, scores = run_pass(model, ids, logits_processor, kwargs, None if ids is input_ids else count)
        chosen = scores.softmax(-1).multinomial(1) if generation_config.do_sample else scores.argmax(-1)
        token: int | None = int(chosen)
        skips, count = has_plain_layers(outputs.get("past_key_values")), 0
        while token is not None and not ended:
            ids, count = torch.cat([ids, ids.new_tensor([[token]])], dim=1), count + 1
            constraint.accept(token)
            if streamer is not None:
                streamer.put(ids[0, -1:].cpu())
            ended = bool(stopping_criteria(ids, None).all())
            token = constraint.forced_token() if skips else None
        kwargs = model._update_model_kwargs_for_generation(outputs, kwargs, num_new_tokens=count)
    if streamer is not None:
        streamer.end()
    return ids


def run_pass(
    model: Any, ids: Tensor, logits_processor: Any, kwargs: dict[str, Any], count: int | None
) -> tuple[Any, Tensor]:
    """Run a model on the last `count` tokens of ids (B, T), as `generate` does; return its output and scores (B, V).

    Without a cache, and in the first pass (None), all tokens go through the model.
    """
    length = count if kwargs.get("use_cache") else None
    inputs = model.prepare_inputs_for_generation(
        ids, next_sequence_length=length, is_first_iteration=count is None, **kwargs
    )
    outputs = model(**inputs, return_dict=True)
    logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32, device=ids.device)
    return outputs, logits_processor(ids, logits)  # a constraint follows `ids` in the processor


def has_plain_layers(cache: Any) -> bool:
    """Return whether a cache has keys and values alone: a pass may append several tokens, and rows may be selected.

    Recurrent states take one token at a time.
    """
    kinds = (DynamicLayer, DynamicSlidingWindowLayer)
    return isinstance(cache, DynamicCache) and all(type(layer) in kinds for layer in cache.layers)
