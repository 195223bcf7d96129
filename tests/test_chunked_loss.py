"""The chunked cross-entropy compared with plain cross-entropy in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import tiny_base, token_ids
from poe.modeling.families import Logits, logits_of
from poe.training import loss as loss_module
from poe.training.loss import chunk_rows, cross_entropy_sum, per_label_losses

SHAPES = {
    "rows": st.integers(1, 40),
    "vocabulary": st.integers(2, 30),
    "softcap": st.sampled_from([None, 3.0]),
    "scale": st.sampled_from([1.0, 0.3, 2.0]),
    "biased": st.booleans(),
    "z_loss": st.sampled_from([0.0, 1e-4, 0.3]),
    "weighted": st.booleans(),
    "chunk": st.integers(1, 50),
    "seed": st.integers(0, 99),
}


def reference(hidden, weight, labels, family, bias=None, z_loss=0.0, weights=None):
    """Return the loss by its definition, in float64, with all logits in memory."""
    logits = family.scale * F.linear(hidden.double(), weight.double(), None if bias is None else bias.double())
    if family.softcap is not None:
        logits = family.softcap * torch.tanh(logits / family.softcap)
    logits, labels = logits.flatten(0, -2), labels.flatten()
    losses = F.cross_entropy(logits, labels, ignore_index=-100, reduction="none")
    losses = losses + (labels != -100) * z_loss * logits.logsumexp(-1) ** 2
    return (losses if weights is None else losses * weights.double().flatten()).sum()


def draw(rows, vocabulary, softcap, scale, biased, weighted, seed, dtype):
    """Return random hidden states and a random head, both with gradients, and the other arguments."""
    torch.manual_seed(seed)
    hidden = torch.randn(rows, 8).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, 8).to(dtype).requires_grad_()
    labels = torch.randint(0, vocabulary, (rows,)).masked_fill(torch.rand(rows) < 0.3, -100)
    bias = torch.randn(vocabulary).to(dtype) if biased else None
    return hidden, weight, labels, Logits(scale, softcap), bias, torch.rand(rows) * 2 if weighted else None


def relative_error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return ((ours.double() - exact).norm() / exact.norm().clamp_min(1e-12)).item()


@settings(deadline=None)
@given(**SHAPES)
def test_loss_and_gradients_equal_plain_cross_entropy(
    rows, vocabulary, softcap, scale, biased, z_loss, weighted, chunk, seed
) -> None:
    hidden, weight, labels, family, bias, weights = draw(
        rows, vocabulary, softcap, scale, biased, weighted, seed, torch.float32
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_module, "chunk_rows", lambda weight: chunk)
        total = cross_entropy_sum(hidden, weight, labels, family, bias, z_loss=z_loss, weights=weights)
    (total / 3).backward()
    h, w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    expected = reference(h, w, labels, family, bias, z_loss, weights)
    if (labels != -100).any():
        (expected / 3).backward()
        assert torch.allclose(hidden.grad.double(), h.grad, atol=2e-5, rtol=1e-5)
        assert torch.allclose(weight.grad.double(), w.grad, atol=2e-5, rtol=1e-5)
        assert torch.allclose(total.double(), expected, rtol=1e-5, atol=1e-4)
    else:
        assert total == 0
        assert not hidden.grad.any()


@settings(deadline=None)
@given(**SHAPES | {"rows": st.integers(8, 60), "vocabulary": st.integers(8, 60), "chunk": st.integers(4, 60)})
def test_bf16_errors_are_bf16_rounding(rows, vocabulary, softcap, scale, biased, z_loss, weighted, chunk, seed) -> None:
    """Logits of size 3 rounded to 8 bits have errors up to 1e-2, so losses may have them too, and gradients 2 %."""
    hidden, weight, labels, family, bias, weights = draw(
        rows, vocabulary, softcap, scale, biased, weighted, seed, torch.bfloat16
    )
    labels[0] = 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_module, "chunk_rows", lambda weight: chunk)
        total = cross_entropy_sum(hidden, weight, labels, family, bias, z_loss=z_loss, weights=weights)
    (total / 3).backward()
    assert (hidden.grad.dtype, weight.grad.dtype, total.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    h, w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    expected = reference(h, w, labels, family, bias, z_loss, weights)
    (expected / 3).backward()
    assert torch.allclose(total.double(), expected, rtol=1e-2, atol=1e-1)
    assert relative_error(hidden.grad, h.grad) < 0.02
    assert relative_error(weight.grad, w.grad) < 0.02


def test_head_gradient_keeps_late_chunks_in_bf16() -> None:
    """With a thousand chunks of one row, a sum of gradients in bf16 would stop growing at the 256th."""
    torch.manual_seed(0)
    hidden = torch.ones(1000, 8, dtype=torch.bfloat16)
    weight = torch.zeros(4, 8, dtype=torch.bfloat16, requires_grad=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_module, "chunk_rows", lambda weight: 1)
        cross_entropy_sum(hidden, weight, torch.zeros(1000, dtype=torch.long)).backward()
    assert torch.equal(weight.grad[1], torch.full((8,), 250.0, dtype=torch.bfloat16))


def test_chunk_rows_have_a_lower_bound() -> None:
    for vocabulary, width in [(600, 32), (1536, 192), (16384, 384), (49152, 576), (151936, 1024)]:
        rows = chunk_rows(torch.empty(vocabulary, width))
        assert width <= rows <= max(1 << 22, vocabulary * width) // vocabulary


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that an operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [t.numel() for t in (result if isinstance(result, (tuple, list)) else (result,)) if torch.is_tensor(t)]
        self.elements = max(self.elements, *made, 0)
        return result


def test_no_tensor_is_larger_than_a_chunk_of_logits() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(4000, 16, requires_grad=True), torch.randn(5000, 16, requires_grad=True)
    labels = torch.randint(0, 5000, (4000,))
    with Largest() as seen:
        cross_entropy_sum(hidden, weight, labels).backward()
        per_label_losses(hidden, weight, labels)
    assert seen.elements == chunk_rows(weight) * 5000 <= 1 << 22  # of 20 million logits


def test_losses_per_label_sum_to_the_loss_in_order() -> None:
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
    assert per_label_losses(hidden, weight, torch.full_like(labels, -100)).shape == (0,)


def test_frozen_head_gets_no_gradient() -> None:
    hidden = torch.randn(4, 8, requires_grad=True)
    weight = torch.randn(6, 8)
    cross_entropy_sum(hidden, weight, torch.tensor([1, 2, 3, 4])).backward()
    assert weight.grad is None
    assert hidden.grad.abs().sum() > 0


def test_loss_can_be_differentiated_once() -> None:
    hidden = torch.randn(4, 8, requires_grad=True)
    total = cross_entropy_sum(hidden, torch.randn(6, 8), torch.tensor([1, 2, 3, 4]))
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        total.backward()


@pytest.mark.parametrize("name", ["gemma2", "granite", "nanochat", "cohere-tied"])
def test_loss_equals_that_of_the_model(name: str) -> None:
    """The loss is that of the model's own logits, over all rows of its head.

    Rows beyond the tokenizer's vocabulary, which padded heads have, take part: `generate` and every other reader of the
    logits normalize over them, and only a loss that sees them keeps a stage from raising them.
    """
    model, ids = tiny_base(name), token_ids(2, 9)
    labels = ids.roll(-1, 1)
    hidden = getattr(model, model.base_model_prefix)(input_ids=ids, use_cache=False).last_hidden_state
    head = model.get_output_embeddings()
    with torch.no_grad():
        ours = cross_entropy_sum(hidden, head.weight, labels, logits_of(model.config), head.bias)
        plain = F.cross_entropy(model(ids).logits.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(ours, plain)
