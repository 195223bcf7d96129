"""The arms of the benchmarks: each trains only its own parameters, and its FLOPs are those that torch counts."""

import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import arms

LENGTH, VOCABULARY = 16, 256
BATCH = arms.random_batch(VOCABULARY, 4, LENGTH)


def base():
    return arms.qwen3(layers=3, width=64, vocab=VOCABULARY)


def build(kind: str, **options) -> arms.Arm:
    settings = arms.Settings(adamw=True, lr=1e-3, head_rank=8, last_layers=1, stage_layers=1, **options)
    builders = {"full": arms.full, "last": arms.last_layers}
    if kind in builders:
        return builders[kind](base, LENGTH, settings)
    return arms.stage(base, LENGTH, settings, head=kind.split()[0], cached="cached" in kind)


@pytest.mark.parametrize("kind", ["full", "last", "dense", "none", "dense cached"])
def test_flops_of_an_arm_are_those_of_its_step(kind: str) -> None:
    arm = build(kind)
    arm.step(BATCH)  # fills a cache
    # the counter lacks in-place addmm
    in_place = {torch.ops.aten.addmm_: lambda own, a, b, **_: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        arm.step(BATCH)
    counted = counter.get_total_flops() / BATCH.labels.numel()
    assert counted == pytest.approx(arm.flops_per_token, rel=0.05)  # the tolerance covers the attention of a few tokens


@pytest.mark.parametrize("kind", ["full", "last", "dense", "low_rank", "none", "dense cached"])
def test_arm_learns_and_changes_only_its_own_parameters(kind: str) -> None:
    arm = build(kind)
    own = {id(p) for p in arm.parameters}
    others = [(p, p.detach().clone()) for p in arm.model.parameters() if id(p) not in own]
    losses = [float(arm.step(BATCH)) for _ in range(8)]
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, before) for p, before in others)


def test_step_in_several_passes_equals_one_pass() -> None:
    whole, parts = build("dense"), build("dense", rows_per_pass=1)
    for _ in range(2):
        assert float(whole.step(BATCH)) == pytest.approx(float(parts.step(BATCH)), rel=1e-5)
    for one, other in zip(whole.parameters, parts.parameters, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_replayed_states_are_rounded_states_of_the_base() -> None:
    plain, cached = build("dense"), build("dense cached")
    with torch.no_grad():
        first = cached.hidden(BATCH)
        again = cached.hidden(BATCH)
        torch.testing.assert_close(first, again, rtol=0, atol=0)
        torch.testing.assert_close(first, plain.hidden(BATCH), rtol=0.05, atol=0.05)
        other = BATCH._replace(input_ids=BATCH.input_ids.flip(1))
        torch.testing.assert_close(cached.hidden(other), plain.hidden(other), rtol=0.05, atol=0.05)
