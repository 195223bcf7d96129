"""Segments of a model, one after the other or apart in time, compute what the whole model computes."""

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from conftest import every_value, tiny_base
from decoding_models import MODELS, decoding_cascade, model_of, positions, prompts
from poe import Cascade
from poe.decoding.segments import Segment, SegmentedCache, SegmentedModel
from poe.errors import DecodingError, FamilyError

ROUNDING = 2e-5  # the same sums over a batch of another shape; logits are of size 5
STAGES = (None, "top", "low")
CASES = pytest.mark.parametrize(("name", "stage", "rows"), every_value(MODELS, STAGES, (4, 1)))


def segmented(cascade: Cascade, cuts: list[int]) -> SegmentedModel:
    return SegmentedModel(cascade.expert(cascade.active), cuts)


def run(
    path: SegmentedModel, ids: Tensor, mask: Tensor | None, where: Tensor, cache: SegmentedCache
) -> tuple[Tensor, list[Tensor]]:
    """Logits and the states between parts for one call of every part."""
    states, between = (), []
    for part, own in zip(path.segments, cache.of, strict=True):
        states, hidden = part(states, ids, where, mask, own)
        between.append(states[-1])
    return path.logits(len(path.segments) - 1, hidden), between


class Inputs:
    """A padded prompt and the tokens that follow it, cut where a test wants them."""

    def __init__(self, rows: int, total: int = 13, padded: bool = True) -> None:
        given = prompts(rows, total)
        self.ids = given["input_ids"]
        self.mask = given["attention_mask"] if padded else torch.ones_like(self.ids)
        self.where = positions(self.mask)

    def __call__(self, start: int, end: int) -> tuple[Tensor, Tensor | None, Tensor]:
        mask = None if bool(self.mask.all()) else self.mask[:, :end]
        return self.ids[:, start:end], mask, self.where[:, start:end]


def whole(model, inputs: Inputs, cuts: list[int]):
    """The native model's logits and states after `cuts`, fed the same pieces."""
    cache = DynamicCache(config=model.config)

    def call(start: int, end: int) -> tuple[Tensor, list[Tensor]]:
        ids, mask, where = inputs(start, end)
        out = model(
            ids, attention_mask=mask, position_ids=where, past_key_values=cache, use_cache=True,
            output_hidden_states=True,
        )  # fmt: skip
        return out.logits, [out.hidden_states[cut] for cut in cuts]

    return call, cache


@CASES
@torch.no_grad()
def test_segments_equal_the_whole_model_bit_for_bit(name: str, stage: str | None, rows: int) -> None:
    """A prompt, then token by token past the window, with rows padded on the left."""
    cascade, inputs = decoding_cascade(name, stage), Inputs(rows)
    cuts = [1, 2, 4] if stage else [1, 2]
    native, _ = whole(model_of(cascade), inputs, cuts)
    path = segmented(cascade, cuts)
    cache = path.new_cache()
    for start, end in [(0, 7), *((t, t + 1) for t in range(7, 13))]:
        logits, states = native(start, end)
        own_logits, own_states = run(path, *inputs(start, end), cache)
        real = inputs.mask[:, start:end].bool()
        assert torch.equal(own_logits[real], logits[real])
        for ours, theirs in zip(own_states, states, strict=False):
            assert torch.equal(ours[real], theirs[real])
    assert cache.get_seq_length() == 13


@pytest.mark.parametrize(("name", "stage"), every_value(MODELS, STAGES))
@torch.no_grad()
def test_a_lower_segment_can_be_ahead_of_an_upper_one(name: str, stage: str | None) -> None:
    """The lower part takes tokens one at a time, the upper ones all of them together, later: nothing else changes."""
    cascade, inputs = decoding_cascade(name, stage), Inputs(4)
    native, _ = whole(model_of(cascade), inputs, [])
    path = segmented(cascade, [1, 3])
    cache = path.new_cache()
    for start, steps in ((0, [4, 1, 1]), (6, [1, 1, 1, 1]), (10, [3])):
        kept, end = [], start
        for step in steps:
            ids, mask, where = inputs(end, end + step)
            kept.append(path.segments[0]((), ids, where, mask, cache.of[0])[0])
            end += step
        states = tuple(torch.cat(tensors, dim=1) for tensors in zip(*kept, strict=True))
        ids, mask, where = inputs(start, end)
        for part, own in zip(path.segments[1:], cache.of[1:], strict=True):
            states, hidden = part(states, ids, where, mask, own)
        real = inputs.mask[:, start:end].bool()
        logits = path.logits(2, hidden)
        assert (logits[real] - native(start, end)[0][real]).abs().max() < ROUNDING


@pytest.mark.parametrize(("name", "stage", "removed"), every_value(MODELS, STAGES, [1, 2, 3]))
@torch.no_grad()
def test_cropped_tokens_leave_no_trace(name: str, stage: str | None, removed: int) -> None:
    """Other tokens stood where the true ones come: after a crop the caches are as if they had never been."""
    cascade, inputs = decoding_cascade(name, stage), Inputs(4)
    native, _ = whole(model_of(cascade), inputs, [])
    path = segmented(cascade, [2])
    cache = path.new_cache()
    real = inputs.mask.bool()
    native(0, 5)
    run(path, *inputs(0, 5), cache)
    cache.activate_past_recording()
    for start in (5, 8):
        ids, mask, where = inputs(start, start + 3)
        wrong = torch.cat([ids[:, : 3 - removed], (ids[:, 3 - removed :] + 7) % 50 + 3], dim=1)
        run(path, wrong, mask, where, cache)
        cache.crop(-removed)
        again = inputs(start + 3 - removed, start + 3)
        own = run(path, *again, cache)[0]
        cache.crop(0)
        theirs = native(start, start + 3)[0][:, 3 - removed :]
        kept = real[:, start + 3 - removed : start + 3]
        assert (own[kept] - theirs[kept]).abs().max() < ROUNDING


@torch.no_grad()
def test_siblings_share_the_lower_segments() -> None:
    """Two stages at two depths start from the trunk's states at their own, each with a cache of its own slots."""
    cascade = decoding_cascade("poe with everything", "low")
    cascade.add_stage(name="t", num_layers=1, seed=5)
    torch.nn.init.normal_(cascade.stages["t"].layers[0].mlp.down_proj.weight)
    inputs = Inputs(2)
    trunk = SegmentedModel(cascade.expert(None), [3])
    cache = trunk.new_cache()
    above = {
        "s": Segment(cascade.base, cascade.stages["s"], 3, 5),
        "t": Segment(cascade.base, cascade.stages["t"], 4, 5),
    }
    caches = {name: part.new_cache() for name, part in above.items()}
    natives = {name: whole(cascade.model(name), inputs, [])[0] for name in above}
    for start, end in ((0, 7), (7, 8), (8, 9)):
        ids, mask, where = inputs(start, end)
        low, _ = trunk.segments[0]((), ids, where, mask, cache.of[0])
        top, _ = trunk.segments[1](low, ids, where, mask, cache.of[1])
        real = inputs.mask[:, start:end].bool()
        for name, states in (("s", low), ("t", top)):
            _, hidden = above[name](states, ids, where, mask, caches[name])
            head = cascade.model(name).lm_head
            logits = 15.0 * torch.tanh(head(hidden) / 15.0)
            assert torch.equal(logits[real], natives[name](start, end)[0][real])


def test_the_base_is_not_changed() -> None:
    cascade = decoding_cascade("qwen3 sliding", "top")
    inputs = Inputs(1)
    with torch.no_grad():
        before = model_of(cascade)(inputs.ids).logits
        layers = [*cascade.base.model.layers]
        run(segmented(cascade, [1, 2]), *inputs(0, 13), segmented(cascade, [1, 2]).new_cache())
        assert all(a is b for a, b in zip(layers, cascade.base.model.layers, strict=True))
        assert torch.equal(model_of(cascade)(inputs.ids).logits, before)


def test_invalid_cuts_are_refused() -> None:
    cascade = decoding_cascade("qwen3")
    with pytest.raises(DecodingError, match="model of 4 layers cannot be cut after \\[5\\]"):
        segmented(cascade, [5])
    with pytest.raises(DecodingError, match="rising"):
        segmented(cascade, [2, 1])
    with pytest.raises(DecodingError, match="a range of the 4 layers, got layers 3 to 9"):
        Segment(cascade.base, None, 3, 9)
    with pytest.raises(FamilyError, match="recurrent"):
        Segment(tiny_base("hrm"), None, 0, 1)
