"""The chunked cross-entropy against the plain one in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from poe.modeling.families import Logits
from poe.training import loss as loss_module
from poe.training.loss import cross_entropy_sum, per_label_losses


def reference(hidden, weight, labels, family, bias=None):
    logits = family.scale * F.linear(hidden.double(), weight.double(), None if bias is None else bias.double())
    if family.softcap is not None:
        logits = family.softcap * torch.tanh(logits / family.softcap)
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=-100, reduction="sum")


@settings(deadline=None)
@given(
    rows=st.integers(1, 40),
    vocabulary=st.integers(2, 30),
    softcap=st.sampled_from([None, 3.0]),
    scale=st.sampled_from([1.0, 0.3, 2.0]),
    biased=st.booleans(),
    chunk=st.integers(1, 200),
    seed=st.integers(0, 99),
)
def test_value_and_gradients_equal_the_plain_ones(rows, vocabulary, softcap, scale, biased, chunk, seed) -> None:
    torch.manual_seed(seed)
    logits, bias = Logits(scale, softcap), torch.randn(vocabulary) if biased else None
    hidden = torch.randn(rows, 8, requires_grad=True)
    weight = torch.randn(vocabulary, 8, requires_grad=True)
    labels = torch.randint(0, vocabulary, (rows,)).masked_fill(torch.rand(rows) < 0.3, -100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_module, "CHUNK_LOGITS", chunk)
        total = cross_entropy_sum(hidden, weight, labels, logits, bias)
    (total / 3).backward()
    h, w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    expected = reference(h, w, labels, logits, bias)
    if (labels != -100).any():
        (expected / 3).backward()
        assert torch.allclose(hidden.grad.double(), h.grad, atol=1e-5)
        assert torch.allclose(weight.grad.double(), w.grad, atol=1e-5)
        assert torch.allclose(total.double(), expected, rtol=1e-5, atol=1e-4)
    else:
        assert total == 0
        assert not hidden.grad.any()


def test_losses_per_label_add_up_and_keep_their_order() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 5, 8), torch.randn(11, 8)
    labels = torch.tensor([[1, -100, 3, 4, -100], [5, 6, -100, 8, 9]])
    family, bias = Logits(0.5, 5.0), torch.randn(11)
    losses = per_label_losses(hidden, weight, labels, family, bias)
    assert losses.shape == (7,)
    assert torch.allclose(losses.sum().double(), reference(hidden, weight, labels, family, bias), atol=1e-4)
    assert torch.allclose(
        losses[2].double(), reference(hidden[0, 3:4], weight, labels[0, 3:4], family, bias), atol=1e-5
    )


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden = torch.randn(4, 8, requires_grad=True)
    weight = torch.randn(6, 8)
    cross_entropy_sum(hidden, weight, torch.tensor([1, 2, 3, 4])).backward()
    assert weight.grad is None
    assert hidden.grad.abs().sum() > 0
