"""One folded weight: summed in chain order, always current, with gradients only to the stage's own delta."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from conftest import scramble
from poe.errors import FamilyError
from poe.modeling.heads import FoldedHead, build_head
from poe.modeling.stage_config import StageConfig

KINDS = st.sampled_from(["dense", "low_rank", "none"])


def head(
    kinds: list[str], dtype: torch.dtype = torch.float32, seed: int = 0, size: tuple[int, int] = (11, 6)
) -> FoldedHead:
    """Return a folded head (vocabulary 11, width 6) with scrambled deltas of these kinds."""
    torch.manual_seed(seed)
    base = nn.Linear(size[1], size[0], bias=False).to(dtype).requires_grad_(False)
    deltas = [build_head(StageConfig("t", head=kind, head_rank=3), *size) for kind in kinds]
    folded = FoldedHead(base, deltas)
    for index, delta in enumerate(deltas):
        scramble(delta, seed + index)
    return folded


@settings(max_examples=40, deadline=None)
@given(kinds=st.lists(KINDS, max_size=5), bf16=st.booleans(), seed=st.integers(0, 1000))
def test_the_fold_is_the_sum_in_chain_order(kinds: list[str], bf16: bool, seed: int) -> None:
    folded = head(kinds, torch.bfloat16 if bf16 else torch.float32, seed)
    expected = folded.base.weight.float()
    for kind, delta in zip(kinds, folded.deltas, strict=True):
        if kind != "none":
            expected = expected + (delta.weight if kind == "dense" else delta.b @ delta.a)
    expected = expected.to(folded.base.weight.dtype)
    assert torch.equal(folded.weight, expected)
    with torch.no_grad():
        assert torch.equal(folded.weight, expected)
    hidden = torch.randn(2, 3, 6).to(expected.dtype)
    assert torch.equal(folded(hidden), nn.functional.linear(hidden, expected))
    assert list(folded.state_dict()) == ["weight"]
    assert torch.equal(folded.state_dict(prefix="h.")["h.weight"], expected)


@settings(max_examples=25, deadline=None)
@given(kinds=st.lists(KINDS, min_size=1, max_size=4), seed=st.integers(0, 1000))
def test_gradients_reach_only_the_own_delta(kinds: list[str], seed: int) -> None:
    folded = head(kinds, seed=seed)
    own = list(folded.deltas[-1].parameters())
    weight = folded.weight
    assert weight.requires_grad == bool(own)
    if own:
        weight.square().sum().backward()
        assert all(p.grad is not None for p in own)
    assert folded.base.weight.grad is None
    assert all(p.grad is None for delta in folded.deltas[:-1] for p in delta.parameters())


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
}


@pytest.mark.parametrize("kind", ["dense", "low_rank"])
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_an_optimizer_step_updates_the_folded_weight(name: str, kind: str) -> None:
    folded = head([kind, kind])
    optimizer = OPTIMIZERS[name](list(folded.deltas[-1].parameters()))
    with torch.inference_mode():
        first = folded.weight
        assert folded.weight is first
    for _ in range(2):
        folded.weight.square().sum().backward()
        with torch.no_grad():
            before = folded.weight
        optimizer.step()
        with torch.no_grad():
            assert not torch.equal(folded.weight, before)
            assert torch.equal(folded.weight, folded._fold())
        optimizer.zero_grad()
        with torch.no_grad():
            assert torch.equal(folded.weight, folded._fold())
            assert folded.weight is folded.weight


@pytest.mark.parametrize("which", [0, 1])
def test_every_other_change_updates_the_folded_weight(which: int) -> None:
    folded = head(["dense", "low_rank"])
    with torch.no_grad():
        for change in (
            lambda: folded.deltas[which].load_state_dict(
                {k: v + 1 for k, v in folded.deltas[which].state_dict().items()}
            ),
            lambda: folded.base.weight.mul_(2),
            lambda: setattr(next(folded.deltas[which].parameters()), "data", torch.ones(11 if which == 0 else 3, 6)),
            lambda: folded.to(torch.bfloat16),
            lambda: folded.to(torch.float32),
        ):
            before = folded.weight
            change()
            assert folded.weight.dtype == folded.base.weight.dtype
            assert torch.equal(folded.weight, folded._fold())
            assert before is not folded.weight


def test_a_weight_cached_in_inference_mode_can_train_layers_below() -> None:
    folded = head(["dense"])
    folded.requires_grad_(False)
    with torch.inference_mode():
        folded(torch.randn(2, 6))
    hidden = torch.randn(2, 6, requires_grad=True)
    folded(hidden).sum().backward()
    assert hidden.grad is not None


def test_without_deltas_the_weight_is_the_bases_own() -> None:
    folded = head(["none"])
    assert folded.weight is folded.base.weight
    assert folded.state_dict()["weight"].data_ptr() != folded.base.weight.data_ptr()
    assert (folded.in_features, folded.out_features, folded.bias) == (6, 11, None)


def test_a_bias_of_the_base_is_kept() -> None:
    base = nn.Linear(6, 11)
    folded = FoldedHead(base, [])
    hidden = torch.randn(2, 6)
    assert torch.equal(folded(hidden), base(hidden))
    assert list(folded.state_dict()) == ["weight", "bias"]


def test_heads_that_cannot_be_folded_are_refused() -> None:
    with pytest.raises(FamilyError, match="offloaded"):
        FoldedHead(nn.Linear(6, 11, device="meta"), [])
    quantized = nn.Linear(6, 11)
    quantized.weight = nn.Parameter(torch.ones(11, 6, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(FamilyError, match="floating point"):
        FoldedHead(quantized, [])
