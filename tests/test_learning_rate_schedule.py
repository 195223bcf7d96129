"""The learning-rate trapezoid and the momentum's ramp: their bounds, ends and continuity."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from poe.training.optim import MuonAdamW
from poe.training.schedule import apply_lr, apply_momentum, lr_factor, muon_momentum

share = st.floats(0, 1)
ramp = st.floats(0.01, 1)


def named(start, warmup, warmdown, final):
    """Return the options of `lr_factor` by name."""
    return {
        "initial_lr_factor": start,
        "warmup_ratio": warmup,
        "warmdown_ratio": warmdown,
        "final_lr_factor": final,
    }


@given(step=st.integers(0, 500), num_steps=st.integers(1, 400), start=share, warmup=share, warmdown=share, final=share)
def test_factor_lies_between_the_smallest_ramp_end_and_one(step, num_steps, start, warmup, warmdown, final):
    factor = lr_factor(step, num_steps, **named(start, warmup, warmdown, final))
    assert min(start, final) - 1e-12 <= factor <= 1


@given(num_steps=st.integers(1, 400), start=share, warmup=ramp, warmdown=ramp, final=share)
def test_factor_starts_and_ends_at_the_given_values(num_steps, start, warmup, warmdown, final):
    options = named(start, warmup, warmdown, final)
    assert lr_factor(0, num_steps, **options) == pytest.approx(start)
    assert lr_factor(num_steps, num_steps, **options) == pytest.approx(final)
    assert lr_factor(num_steps + 7, num_steps, **options) == pytest.approx(final)


@given(num_steps=st.integers(100, 400), start=share, warmup=ramp, warmdown=ramp, final=share)
def test_factor_is_continuous_and_rises_only_during_warmup(num_steps, start, warmup, warmdown, final):
    options = named(start, warmup, warmdown, final)
    factors = [lr_factor(i, num_steps, **options) for i in range(num_steps + 1)]
    steepest = max((1 - start) / warmup, (1 - final) / warmdown) / num_steps
    differences = [b - a for a, b in itertools.pairwise(factors)]
    assert all(abs(d) <= steepest + 1e-9 for d in differences)
    peak = factors.index(max(factors))
    assert all(d >= -1e-9 for d in differences[:peak])
    assert all(d <= 1e-9 for d in differences[peak:])


def test_default_schedule_of_a_stage():
    factors = [lr_factor(step, 100) for step in range(101)]
    assert factors[0] == 0.2
    assert factors[5] == 1.0
    assert factors[10] == pytest.approx(1.0)
    assert factors[55] == pytest.approx(0.5)
    assert factors[99] == pytest.approx(1 / 90)
    assert factors[100] == 0.0


def test_ratio_zero_turns_a_ramp_off():
    assert all(lr_factor(step, 10, warmup_ratio=0, warmdown_ratio=0) == 1 for step in range(11))


@pytest.mark.parametrize(
    "wrong",
    [{"initial_lr_factor": -0.1}, {"warmup_ratio": 1.1}, {"warmdown_ratio": 2}, {"final_lr_factor": float("nan")}],
)
def test_ratios_outside_zero_to_one_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        lr_factor(0, 10, **wrong)


@pytest.mark.parametrize(("step", "num_steps"), [(-1, 10), (0, 0)])
def test_wrong_step_numbers_are_refused(step, num_steps):
    with pytest.raises(ValueError, match="num_steps"):
        lr_factor(step, num_steps)


def test_apply_lr_multiplies_the_initial_learning_rates():
    a, b = torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.zeros(2))
    optimizer = MuonAdamW([{"kind": "muon", "lr": 0.5, "params": [a]}, {"kind": "adamw", "lr": 0.1, "params": [b]}])
    for factor in (0.2, 1.0, 0.0, 0.5):
        apply_lr(optimizer, factor)
        assert [g["lr"] for g in optimizer.param_groups] == [0.5 * factor, 0.1 * factor]
    with pytest.raises(KeyError):
        apply_lr(torch.optim.SGD([b], lr=1.0), 0.5)


@given(st.integers(1, 400), share, st.floats(0, 0.99), st.floats(0, 0.99))
def test_momentum_rises_during_warmup_and_then_stays(num_steps, warmup, start, momentum):
    options = {"initial_momentum": start, "momentum": momentum, "warmup_ratio": warmup}
    values = [muon_momentum(s, num_steps, **options) for s in range(num_steps + 1)]
    assert all(min(start, momentum) - 1e-12 <= v <= max(start, momentum) + 1e-12 for v in values)
    assert sorted(values, reverse=start > momentum) == pytest.approx(values, abs=1e-12)
    assert values[0] == (start if warmup else momentum)
    after = [v for s, v in enumerate(values) if s / num_steps >= warmup]
    assert after == pytest.approx([momentum] * len(after), abs=1e-12)


def test_momentum_has_defaults_and_refuses_wrong_values():
    assert [muon_momentum(s, 100) for s in (0, 5, 99)] == pytest.approx([0.85, 0.95, 0.95])
    for wrong in ({"initial_momentum": 1.0}, {"momentum": -0.1}, {"warmup_ratio": 2}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            muon_momentum(0, 10, **wrong)


def test_apply_momentum_changes_muon_groups_only():
    a, b = torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.zeros(2))
    optimizer = MuonAdamW([{"kind": "muon", "lr": 0.5, "params": [a]}, {"kind": "adamw", "lr": 0.1, "params": [b]}])
    apply_momentum(optimizer, 0.7)
    assert optimizer.param_groups[0]["momentum"] == 0.7
    assert "momentum" not in optimizer.param_groups[1]
