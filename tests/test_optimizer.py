"""MuonAdamW compared with plain float64 loops, its saved state, and the groups of parameters."""

import copy
import io
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from poe.errors import TrainingError
from poe.training import optim
from poe.training.optim import MuonAdamW, build_optimizer, orthogonalize, width_scale
from poe.training.precision import choose_dtype

F64 = torch.float64


def polar_reference(g):
    """Orthogonalize one matrix in float64, term by term as in the paper."""
    x = g / (g.norm() * 1.02)
    for a, b, c in optim.POLAR_EXPRESS:
        x = a * x + b * (x @ x.T) @ x + c * (x @ x.T) @ (x @ x.T) @ x
    return x


class MuonReference:
    """Update one matrix by the definition of the rule, in plain loops."""

    def __init__(self, weight, *, lr, momentum, beta2, weight_decay, cautious):
        self.w = weight.clone().to(F64)
        self.m = torch.zeros_like(self.w)
        rows, cols = self.w.shape
        self.v = [0.0] * (rows if rows >= cols else cols)
        self.lr, self.mu, self.beta2, self.wd, self.cautious = lr, momentum, beta2, weight_decay, cautious

    def step(self, grad):
        grad = grad.to(F64)
        rows, cols = self.w.shape
        self.m = self.mu * self.m + (1 - self.mu) * grad
        update = polar_reference(self.mu * self.m + (1 - self.mu) * grad)
        norm = update.norm()
        lines = update if rows >= cols else update.T  # a view with one line for each variance
        for i in range(len(self.v)):
            self.v[i] = self.beta2 * self.v[i] + (1 - self.beta2) * float((lines[i] ** 2).mean())
            lines[i] /= math.sqrt(max(self.v[i], 1e-10))
        update *= norm / update.norm()
        lr = self.lr * max(1, rows / cols) ** 0.5
        for i in range(rows):
            for j in range(cols):
                w, u = float(self.w[i, j]), float(update[i, j])
                decayed = w if (not self.cautious or u * w >= 0) else 0.0
                self.w[i, j] = w - lr * u - lr * self.wd * decayed


def matrices(shapes, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def set_grads(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


shape = st.tuples(st.integers(1, 9), st.integers(1, 9))


@given(
    shapes=st.lists(shape, min_size=1, max_size=4),
    seed=st.integers(0, 10_000),
    weight_decay=st.sampled_from([0.0, 0.3]),
    cautious=st.booleans(),
    limit=st.sampled_from([1, 40, 1 << 20]),
)
@settings(max_examples=25, deadline=None)
def test_muon_equals_a_plain_loop(shapes, seed, weight_decay, cautious, limit):
    shapes = [*shapes, shapes[0], shapes[0]]  # stacked
    params = matrices(shapes, seed, F64)
    options = {"lr": 0.05, "momentum": 0.9, "beta2": 0.8, "weight_decay": weight_decay, "cautious": cautious}
    references = [MuonReference(p.detach(), **options) for p in params]
    optimizer = MuonAdamW([{"kind": "muon", "params": params, **options}], iteration_dtype=F64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optim, "MAX_STACKED_ELEMENTS", limit)
        for step in range(3):
            set_grads(params, seed + step)
            for p, reference in zip(params, references, strict=True):
                reference.step(p.grad)
            optimizer.step()
    for p, reference in zip(params, references, strict=True):
        torch.testing.assert_close(p.detach(), reference.w, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("size", [(24, 24), (48, 12), (12, 48)])
def test_iteration_dtypes_are_close_to_float64(size, dtype, tolerance):
    params = matrices([size, size], 3)
    reference = [MuonReference(p.detach(), lr=0.1, momentum=0.95, beta2=0.95, weight_decay=0.1, cautious=True)
                 for p in params]  # fmt: skip
    optimizer = MuonAdamW([{"kind": "muon", "lr": 0.1, "weight_decay": 0.1, "params": params}], iteration_dtype=dtype)
    before = [p.detach().clone() for p in params]
    for step in range(2):
        set_grads(params, step)
        for p, r in zip(params, reference, strict=True):
            r.step(p.grad)
        optimizer.step()
    for p, r, start in zip(params, reference, before, strict=True):
        moved, expected = p.detach() - start, r.w.float() - start
        assert (moved - expected).norm() / expected.norm() < tolerance


@given(shape=st.tuples(st.integers(2, 40), st.integers(2, 40)), seed=st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_orthogonalize_brings_singular_values_near_one(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    u, _, v = torch.linalg.svd(torch.randn(2, *shape, generator=generator), full_matrices=False)
    values = torch.logspace(-2, 0, min(shape))  # the smallest is still over 1e-3 of the norm
    stacked = u * values @ v
    for dtype, low, high in ((torch.float32, 0.85, 1.15), (torch.bfloat16, 0.8, 1.2)):
        out = orthogonalize(stacked * 1e-6, dtype)
        assert out.dtype == dtype
        got = torch.linalg.svdvals(out.float())
        assert got.min() > low
        assert got.max() < high


def test_orthogonalize_keeps_zero_and_ignores_the_scale():
    x = torch.stack([torch.zeros(5, 3), torch.full((5, 3), 1e-20), torch.randn(5, 3)])
    out = orthogonalize(x, torch.float32)
    assert torch.equal(out[0], torch.zeros(5, 3))
    assert out.isfinite().all()
    torch.testing.assert_close(out[2:], orthogonalize(x[2:] * 1e-12, torch.float32), rtol=1e-4, atol=1e-5)


def test_zero_gradients_change_nothing_without_weight_decay():
    params = matrices([(4, 6), (4, 6)], 0)
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    MuonAdamW([{"kind": "muon", "lr": 1.0, "params": params}]).step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_cautious_decay_changes_only_entries_that_the_update_shrinks():
    plain, decayed = matrices([(6, 6)], 1), matrices([(6, 6)], 1)
    start = plain[0].detach().clone()
    for params, weight_decay in ((plain, 0.0), (decayed, 0.5)):
        optimizer = MuonAdamW(
            [{"kind": "muon", "lr": 0.01, "weight_decay": weight_decay, "params": params}],
            iteration_dtype=torch.float32,
        )
        set_grads(params, 7)
        optimizer.step()
    update = start - plain[0].detach()
    extra = plain[0].detach() - decayed[0].detach()
    shrinking = update * start >= 0
    assert shrinking.any()
    assert not shrinking.all()
    torch.testing.assert_close(extra[shrinking], 0.01 * 0.5 * start[shrinking], rtol=1e-4, atol=1e-7)
    assert torch.equal(extra[~shrinking], torch.zeros_like(extra[~shrinking]))


@given(
    shapes=st.lists(st.lists(st.integers(1, 6), max_size=3), min_size=1, max_size=4),
    weight_decay=st.sampled_from([0.0, 0.2]),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=20, deadline=None)
def test_adamw_equals_torch(shapes, weight_decay, seed):
    ours, theirs = matrices(shapes, seed), matrices(shapes, seed)
    options = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": weight_decay}
    optimizer = MuonAdamW([{"kind": "adamw", "params": ours, **options}])
    reference = torch.optim.AdamW(theirs, **options)
    for step in range(4):
        set_grads(ours, step)
        set_grads(theirs, step)
        if step == 2:  # a parameter without a gradient keeps its step count
            ours[0].grad = theirs[0].grad = None
        optimizer.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def groups(dtype=torch.float32, seed=0):
    m = matrices([(8, 4), (8, 4), (4, 8), (6, 6)], seed, dtype)
    a = matrices([(10, 4), (5,), ()], seed + 1, dtype)
    return [
        {"kind": "muon", "lr": 0.02, "weight_decay": 0.1, "params": m},
        {"kind": "adamw", "lr": 0.01, "weight_decay": 0.1, "params": a},
    ]


def run(optimizer, steps):
    params = [p for g in optimizer.param_groups for p in g["params"]]
    for step in steps:
        set_grads(params, 100 + step)
        if step % 3 == 0:
            params[1].grad = params[-2].grad = None
        optimizer.param_groups[0]["lr"] = 0.02 / (1 + step)
        optimizer.step()
    return [p.detach().clone() for p in params]


def states(optimizer):
    return [optimizer.state[p] for g in optimizer.param_groups for p in g["params"]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("iteration_dtype", [torch.float32, torch.bfloat16])
def test_saved_and_restored_optimizer_continues_bit_identically(dtype, iteration_dtype):
    straight = MuonAdamW(groups(dtype), iteration_dtype=iteration_dtype)
    expected = run(straight, range(7))

    first = MuonAdamW(groups(dtype), iteration_dtype=iteration_dtype)
    stopped = run(first, range(4))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = MuonAdamW(groups(dtype, seed=50), iteration_dtype=iteration_dtype)
    with torch.no_grad():
        for p, value in zip((p for g in second.param_groups for p in g["params"]), stopped, strict=True):
            p.copy_(value)
    second.load_state_dict(torch.load(file, weights_only=True))
    got = run(second, range(4, 7))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    for a, b in zip(states(straight), states(second), strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def test_half_precision_parameters_have_fp32_masters():
    full, half = MuonAdamW(groups()), MuonAdamW(groups(torch.bfloat16))
    run(full, range(2))
    run(half, range(2))
    assert not any("master" in state for state in full.state.values())
    for p, state in half.state.items():
        assert all(value.dtype == torch.float32 for value in state.values())
        assert torch.equal(state["master"].bfloat16(), p)
    assert any(not torch.equal(state["master"], p.float()) for p, state in half.state.items())


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_steps_too_small_for_bf16_accumulate(kind):
    param = torch.nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    optimizer = MuonAdamW([{"kind": kind, "lr": 1e-4, "params": [param]}])
    for _ in range(100):  # each is smaller than the spacing of bf16 at 1.0
        param.grad = torch.ones_like(param)
        optimizer.step()
    assert (param < 1).all()


def test_load_state_dict_copies_tensors_and_keeps_hooks():
    first, second = MuonAdamW(groups()), MuonAdamW(groups())
    run(first, range(2))
    called = []
    second.register_load_state_dict_post_hook(lambda _: called.append(1))
    second.load_state_dict(first.state_dict())
    assert called
    for a, b in zip(states(first), states(second), strict=True):
        assert all(torch.equal(a[k], b[k]) and a[k].data_ptr() != b[k].data_ptr() for k in a)
    assert second.param_groups[0]["lr"] == first.param_groups[0]["lr"]
    assert second.param_groups[0]["initial_lr"] == 0.02


def test_state_of_another_model_is_refused():
    first = MuonAdamW(groups())
    run(first, range(1))
    fewer = groups()
    fewer[0]["params"] = fewer[0]["params"][:2]
    with pytest.raises(TrainingError, match="another model"):
        MuonAdamW(fewer).load_state_dict(first.state_dict())
    reshaped = groups()
    reshaped[0]["params"][0] = torch.nn.Parameter(torch.zeros(3, 3))
    other = MuonAdamW(reshaped)
    with pytest.raises(TrainingError, match=r"\(8, 4\).*\(3, 3\)"):
        other.load_state_dict(first.state_dict())


def test_updates_increment_the_versions_of_parameters():
    optimizer = MuonAdamW(groups())
    params = [p for g in optimizer.param_groups for p in g["params"]]
    before = [p._version for p in params]
    set_grads(params, 0)
    optimizer.step()
    assert all(p._version > b for p, b in zip(params, before, strict=True))


def test_missing_and_strided_gradients():
    params = matrices([(6, 4), (6, 4)], 0)
    twins = matrices([(6, 4), (6, 4)], 0)
    frozen = params[1].detach().clone()
    params[0].grad = torch.randn(4, 6).T
    twins[0].grad = params[0].grad.contiguous()
    for ps in (params, twins):
        optimizer = MuonAdamW([{"kind": "muon", "lr": 0.1, "params": ps}])
        optimizer.step()
        assert ps[1] not in optimizer.state
    assert torch.equal(params[1], frozen)
    assert torch.equal(params[0], twins[0])


def test_closure_copy_and_pickle():
    optimizer = MuonAdamW(groups(), iteration_dtype=torch.float32)
    params = optimizer.param_groups[1]["params"]

    def closure():
        optimizer.zero_grad()
        loss = sum((p**2).sum() for p in params)
        loss.backward()
        return loss.item()

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first
    again = copy.deepcopy(optimizer)
    assert again.iteration_dtype == torch.float32
    run(again, range(1))


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"lr": 0.1}, "kind"),
        ({"kind": "sgd", "lr": 0.1}, "sgd"),
        ({"kind": "muon"}, "lr"),
        ({"kind": "muon", "lr": 0.1, "params": [torch.nn.Parameter(torch.zeros(3))]}, r"\(3,\)"),
    ],
)
def test_wrong_parameter_groups_are_refused(group, message):
    with pytest.raises(ValueError, match=message):
        MuonAdamW([{"params": [torch.nn.Parameter(torch.zeros(2, 2))], **group}])


def test_wrong_dtype_and_sparse_gradients_are_refused():
    with pytest.raises(ValueError, match="iteration_dtype"):
        MuonAdamW(groups(), iteration_dtype=torch.float16)
    table = torch.nn.Embedding(4, 2, sparse=True)
    optimizer = MuonAdamW([{"kind": "adamw", "lr": 0.1, "params": list(table.parameters())}])
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse"):
        optimizer.step()


def test_dtype_auto_is_bf16_on_hardware_that_multiplies_bf16(monkeypatch):
    for amx, avx in ((True, False), (False, True), (False, False)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx=avx: avx)
        assert choose_dtype("auto", "cpu") == (torch.bfloat16 if amx or avx else torch.float32)
    for native in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        assert choose_dtype("auto", "cuda") == (torch.bfloat16 if native else torch.float32)
    assert choose_dtype("auto", "mps") == torch.float32


STAGE = {
    "layers.0.self_attn.q_proj.weight": ((8, 8), "matrices"),
    "layers.0.self_attn.q_proj.bias": ((8,), "scalars"),
    "layers.0.mlp.up_proj.weight": ((16, 8), "matrices"),
    "layers.0.input_layernorm.weight": ((8,), "scalars"),
    "layers.1.mlp.experts.weight": ((2, 8, 8), "other"),
    "layers.1.self_attn.q_proj.a": ((2, 8), "matrices"),
    "layers.1.self_attn.q_proj.b": ((8, 2), "matrices"),
    "layers.2.self_attn.q_proj.delta": ((8, 8), "matrices"),
    "norm.weight": ((8,), "scalars"),
    "head.weight": ((32, 8), "head"),
    "head.a": ((2, 8), "head"),
    "head.b": ((32, 2), "head"),
    "gate.weight": ((8, 8), "other"),
}
BASE = {
    "model.embed_tokens.weight": ((32, 8), "embeddings"),
    "model.value_embeds.1.weight": ((32, 8), "embeddings"),
    "model.layers.0.self_attn.k_proj.weight": ((8, 8), "matrices"),
    "model.norm.weight": ((8,), "scalars"),
    "model.x0_lambda": ((), "scalars"),
    "heads.1.weight": ((32, 8), "head"),
    "lm_head.deltas.0.weight": ((32, 8), "head"),
    "lm_head.weight": ((32, 8), "unembedding"),
}


@pytest.mark.parametrize("table", [STAGE, BASE])
def test_every_parameter_is_in_one_group(table):
    named = [(name, torch.nn.Parameter(torch.zeros(size))) for name, (size, _) in table.items()]
    frozen = torch.nn.Parameter(torch.zeros(3, 3), requires_grad=False)
    tied = ("tied." + named[0][0], named[0][1])
    optimizer = build_optimizer([*named, ("layers.9.frozen", frozen), tied], 192)
    got = {name: g["name"] for g in optimizer.param_groups for name in g["param_names"]}
    assert got == {name: role for name, (_, role) in table.items()}
    counted = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert sorted(counted) == sorted(id(p) for _, p in named)


def test_learning_rates_scale_with_width_and_decay_applies_to_its_groups():
    assert width_scale(768) == 1
    assert width_scale(1536) == pytest.approx(0.7071, abs=1e-4)
    named = [(n, torch.nn.Parameter(torch.zeros(s))) for n, (s, _) in {**STAGE, **BASE}.items()]
    by_name = {g["name"]: g for g in build_optimizer(named, 192, weight_decay=0.3).param_groups}
    assert (by_name["matrices"]["kind"], by_name["matrices"]["lr"]) == ("muon", 0.002)
    assert all(g["kind"] == "adamw" for n, g in by_name.items() if n != "matrices")
    assert by_name["head"]["lr"] == pytest.approx(2e-4)
    assert {n for n, g in by_name.items() if g["weight_decay"] == 0.3} == {"matrices", "head", "other"}
    assert all(g["initial_lr"] == g["lr"] for g in by_name.values())
    with pytest.raises(ValueError, match="Nothing to optimize"):
        build_optimizer([], 192)


def test_optimizer_reduces_a_loss():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 8))
    target = torch.nn.Linear(8, 8)
    named = [(f"layers.{name}", p) for name, p in model.named_parameters()]
    optimizer = build_optimizer(named, 32, matrix_lr=0.02)
    x = torch.randn(64, 8)
    y = target(x).detach()
    losses = []
    for _ in range(60):
        loss = torch.nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 10


def test_matrices_can_use_adamw():
    named = [(n, torch.nn.Parameter(torch.zeros(s))) for n, (s, _) in STAGE.items()]
    optimizer = build_optimizer(named, 192, matrix_lr=0.01, weight_decay=0.3, matrix_optimizer="adamw")
    matrices = next(g for g in optimizer.param_groups if g["name"] == "matrices")
    assert (matrices["kind"], matrices["lr"], matrices["weight_decay"]) == ("adamw", pytest.approx(0.02), 0.3)
    with pytest.raises(ValueError, match=r"matrix_optimizer.*'sgd'"):
        build_optimizer(named, 192, matrix_optimizer="sgd")


@given(
    shapes=st.lists(st.lists(st.integers(1, 5), max_size=2), min_size=1, max_size=4),
    max_norm=st.sampled_from([None, 0.1, 100.0]),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=20, deadline=None)
def test_clipping_equals_torch(shapes, max_norm, seed):
    ours, theirs = matrices(shapes, seed), matrices(shapes, seed)
    for params in (ours, theirs):
        set_grads(params, seed)
    ours.append(torch.nn.Parameter(torch.zeros(2)))  # without a gradient
    got = MuonAdamW([{"kind": "adamw", "lr": 0.1, "params": ours}]).clip_grad_norm_(max_norm)
    expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm if max_norm is not None else math.inf)
    torch.testing.assert_close(got, expected)
    for a, b in zip(ours, theirs, strict=False):
        torch.testing.assert_close(a.grad, b.grad)


def test_norm_that_is_not_finite_scales_nothing():
    params = matrices([(2, 3), (4,)], seed=0)
    set_grads(params, 0)
    params[0].grad[0, 0] = math.inf
    before = [p.grad.clone() for p in params]
    assert MuonAdamW([{"kind": "adamw", "lr": 0.1, "params": params}]).clip_grad_norm_(0.1).isinf()
    for p, gradient in zip(params, before, strict=True):
        assert torch.equal(p.grad, gradient)
