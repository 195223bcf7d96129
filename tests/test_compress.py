"""Smaller stages: automatic head ranks, heads compressed by SVD, int8 matrices."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from conftest import EXEMPLARS, every_value, scramble, tiny_base, token_ids
from poe import Cascade, StageConfig
from poe.commands.poe import app
from poe.errors import DeltaError, StageError
from poe.loaders.describe import describe
from poe.modeling.delta_file import as_stored, from_stored, read_delta, read_delta_header, storage_error, write_delta
from poe.modeling.fingerprint import fingerprint_files, fingerprint_tensors
from poe.modeling.heads import automatic_rank
from poe.modeling.int8 import dequantize, quantize
from poe.modeling.tensor_file import read_header, write_tensors
from poe.stages import Recipe, load_recipe

INT8 = torch.int8


def make_stage(saved_base, head: str = "dense", base: str = "qwen3", dtype: torch.dtype = torch.float32) -> Cascade:
    """Return a cascade with a stage `t` of one layer and random weights on a saved base."""
    cascade = Cascade.from_pretrained(saved_base(base, dtype)).add_stage(StageConfig("t", 1, head, 4))
    scramble(cascade.stages["t"], seed=1)
    return cascade


# Automatic ranks


@settings(max_examples=200, deadline=None)
@given(vocabulary=st.integers(8, 300_000), width=st.integers(8, 8192), layers=st.integers(0, 2**32))
def test_a_head_of_automatic_rank_is_no_larger_than_the_layers(vocabulary: int, width: int, layers: int) -> None:
    rank = automatic_rank(vocabulary, width, layers)
    assert rank.bit_count() == 1
    assert 8 <= rank <= min(vocabulary, width)
    assert rank == 8 or rank * (vocabulary + width) <= layers
    assert 2 * rank > min(vocabulary, width) or 2 * rank * (vocabulary + width) > layers


def test_automatic_ranks_of_known_bases() -> None:
    # Qwen3-0.6B (15.7 M parameters per layer), the embedded base, the 1.3B base with a vocabulary of 32,768
    assert automatic_rank(151_936, 1024, 4 * 15_730_000) == 256
    assert automatic_rank(151_936, 1024, 1 * 15_730_000) == 64
    assert automatic_rank(32_768, 1536, 4 * 28_300_000) == 1024


def test_auto_is_accepted_in_python_recipes_and_options(saved_base, tmp_path: Path) -> None:
    cascade = Cascade.from_pretrained(saved_base()).add_stage("tool", num_layers=1, head="low_rank", head_rank="auto")
    stage = cascade.stages["tool"]
    layers = sum(p.numel() for p in stage.layers.parameters())
    assert stage.config.head_rank == automatic_rank(61, 32, layers) == len(stage.head.a)
    folder = cascade.save_stage("tool", tmp_path / "tool")
    assert Cascade.from_pretrained(folder).stages["tool"].config == stage.config.__class__(
        "tool", 1, "low_rank", stage.config.head_rank, attach_at=2
    )
    recipe = load_recipe("tool", head="low_rank", head_rank="auto")
    recipe_file = tmp_path / "mine.yaml"
    recipe_file.write_text(recipe.to_yaml())
    assert load_recipe(recipe_file).stage_config().head_rank == "auto"
    with pytest.raises(StageError, match="head_rank must be a whole number of at least 1 or 'auto', got 'big'"):
        StageConfig("t", head_rank="big")
    assert Recipe(name="t").head_rank == 64


# Heads compressed by SVD


@settings(max_examples=25, deadline=None)
@given(rank=st.integers(1, 20), seed=st.integers(0, 100))
def test_compression_gives_the_nearest_head_of_its_rank(rank: int, seed: int) -> None:
    """The error is the norm of the dropped singular values (Eckart and Young)."""
    cascade = Cascade(tiny_base()).add_stage(StageConfig("t", 1))
    scramble(cascade.stages["t"].head, seed)
    before = cascade.stages["t"].head.delta().detach().clone()
    values = torch.linalg.svdvals(before.double())
    report = cascade.compress_head("t", rank)
    stage = cascade.stages["t"]
    tail = float((values[rank:].square().sum() / values.square().sum()).sqrt())
    assert report.relative_error == pytest.approx(tail, rel=1e-3, abs=1e-6)
    assert report.energy == pytest.approx(1 - tail**2, abs=1e-5)
    assert report.parameters_before == 61 * 32
    assert report.parameters_after == sum(p.numel() for p in stage.head.parameters()) == rank * (61 + 32)
    assert (stage.config.head, stage.config.head_rank) == ("low_rank", rank)
    change = float((stage.head.delta().detach() - before).norm() / before.norm())
    assert change == pytest.approx(report.relative_error, rel=1e-3)
    assert report.max_logit_error is None


def test_a_head_of_low_rank_is_compressed_without_loss(saved_base, tmp_path: Path) -> None:
    cascade = make_stage(saved_base)
    with torch.no_grad():
        factors = torch.randn(61, 3), torch.randn(3, 32)
        cascade.stages["t"].head.weight.copy_(factors[0] @ factors[1])
    model, ids = cascade.model("t"), token_ids()
    expected = model(ids).logits
    report = cascade.compress_head("t", 3, ids)
    assert report.relative_error < 1e-5
    assert report.energy == pytest.approx(1)
    got = cascade(ids).logits
    assert 0 < report.mean_logit_error <= report.max_logit_error == float((got - expected).abs().max()) < 1e-3
    assert not torch.equal(got, expected)
    folder = cascade.save_stage("t", tmp_path / "t", dtype=torch.float32)
    assert torch.equal(Cascade.from_pretrained(folder)(ids).logits, got)
    cascade.model("t").train()(ids, labels=ids, use_cache=False).loss.backward()  # training can continue
    assert all(p.grad.any() for p in cascade.stages["t"].head.parameters())
    assert cascade.compress_head("t", 2).parameters_before == 3 * (61 + 32)


def test_a_refused_compression_changes_nothing(saved_base) -> None:
    cascade = make_stage(saved_base)
    before = cascade(token_ids()).logits
    for rank in (0, -1, 21, 61, True, 2.0, None):
        with pytest.raises(StageError, match=r"rank should be a whole number from 1 to 20, .* 1,952 parameters, got"):
            cascade.compress_head("t", rank)
    cascade.add_stage(StageConfig("child", 1, "none", parent="t"))
    with pytest.raises(StageError, match="'t' cannot be changed while child stand"):
        cascade.compress_head("t", 4)
    with pytest.raises(StageError, match="no head delta"):
        cascade.compress_head("child", 4)
    assert torch.equal(cascade(token_ids(), stage="t").logits, before)
    fresh = Cascade(tiny_base()).add_stage(StageConfig("t", 1))
    report = fresh.compress_head("t", 4)
    assert (report.relative_error, report.energy) == (0.0, 1.0)


# int8

matrices = st.builds(
    lambda rows, columns, seed, scale, zero: (
        torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).mul(2.0**scale)
        * (torch.arange(rows) != zero)[:, None]
    ),
    st.integers(1, 6),
    st.integers(1, 40),
    st.integers(0, 2**31),
    st.integers(-126, 100),
    st.integers(0, 8),
)


@settings(max_examples=300, deadline=None)
@given(matrix=matrices, read_as=st.sampled_from([torch.float32, torch.bfloat16]))
def test_int8_values_survive_a_second_round_trip(matrix: torch.Tensor, read_as: torch.dtype) -> None:
    numbers, scale = quantize(matrix)
    again, scale_again = quantize(dequantize(numbers, scale).to(read_as))
    assert torch.equal(numbers, again)
    assert torch.equal(scale, scale_again)
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()
    assert numbers.min() >= -127


@pytest.mark.parametrize("read_as", [torch.float32, torch.bfloat16])
def test_every_int8_number_under_every_scale_survives_a_round_trip(read_as: torch.dtype) -> None:
    """Try all 128 mantissas of a row's largest magnitude with all 255 numbers."""
    largest = (1 + torch.arange(128) / 128).float()
    numbers = torch.arange(-127, 128, dtype=INT8).expand(128, -1)
    again, scale = quantize(dequantize(numbers, largest / 127).to(read_as))
    assert torch.equal(again, numbers)
    assert torch.equal(scale, largest / 127)


@settings(max_examples=200, deadline=None)
@given(matrix=matrices)
def test_the_int8_error_is_at_most_half_a_step(matrix: torch.Tensor) -> None:
    numbers, scale = quantize(matrix)
    error = (dequantize(numbers, scale).double() - matrix.double()).abs()
    assert (error <= (0.5 + 2.0**-14) * scale.double()[:, None]).all()
    steps = matrix.abs().amax(1) / scale
    assert ((steps - 127).abs() < 0.5).logical_or(scale == 1).all()


@pytest.mark.parametrize(
    ("base_name", "head", "dtype"),
    every_value(EXEMPLARS, ["dense", "low_rank", "none"], [torch.float32, torch.bfloat16]),
)
def test_an_int8_delta_has_the_same_bytes_every_time(saved_base, base_name, head, dtype, tmp_path: Path) -> None:
    cascade = make_stage(saved_base, head, base_name, dtype)
    first = cascade.save_stage("t", tmp_path / "first", dtype=INT8)
    opened = Cascade.from_pretrained(first)
    again = opened.save_stage("t", tmp_path / "again")
    for name in ("delta.safetensors", "config.json", "README.md"):
        assert (first / name).read_bytes() == (again / name).read_bytes(), name
    stored, own = load_file(first / "delta.safetensors"), cascade.stages["t"].delta_state_dict()
    for name, tensor in own.items():
        assert stored[name].dtype == (INT8 if tensor.dim() == 2 else torch.bfloat16), name
        assert stored[name].shape == tensor.shape
        if tensor.dim() == 2:
            assert stored[f"{name}.scale"].dtype == torch.float32
            assert stored[f"{name}.scale"].shape == tensor.shape[:1]
    assert len(stored) == len(own) + sum(tensor.dim() == 2 for tensor in own.values())
    header = read_delta_header(first / "delta.safetensors")
    assert header.self_fingerprint == fingerprint_tensors(stored) == fingerprint_files([first / "delta.safetensors"])
    assert header.dtype == opened.stages["t"].saved_dtype == INT8
    assert header.num_parameters == cascade.stages["t"].num_parameters()
    assert json.loads((first / "config.json").read_text())["stage"]["dtype"] == "int8"
    assert f"{header.num_parameters:,} parameters" in dict(describe(str(first)))["  is"]
    assert opened.stages["t"].layers[0].mlp.up_proj.weight.dtype == dtype


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**31), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, INT8]))
def test_the_storage_error_equals_that_of_the_values(seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = {"a": torch.randn(7, 5, generator=generator), "b": torch.randn(3, generator=generator)}
    got = from_stored(as_stored(tensors, dtype))
    squares = sum((got[n].double() - t.double()).square().sum() for n, t in tensors.items())
    expected = math.sqrt(squares / sum(t.double().square().sum() for t in tensors.values()))
    assert storage_error(tensors, dtype) == pytest.approx(expected)
    assert storage_error(tensors, dtype) <= {torch.float32: 0, INT8: 0.02}.get(dtype, 2.0**-8)
    assert storage_error(got, dtype) == 0
    assert storage_error({"a": torch.zeros(2, 2)}, dtype) == 0


def test_int8_logits_are_close_to_the_original(saved_base, tmp_path: Path) -> None:
    cascade = make_stage(saved_base)
    error = cascade.stages["t"].storage_error(INT8)
    assert 0.001 < error < 0.02
    folder = cascade.save_stage("t", tmp_path / "t", dtype=INT8)
    with torch.no_grad():
        got, expected = Cascade.from_pretrained(folder)(token_ids()).logits, cascade(token_ids()).logits
    assert 0 < float((got - expected).norm() / expected.norm()) < 0.05
    sizes = {
        d: (cascade.save_stage("t", tmp_path / str(d), dtype=d) / "delta.safetensors").stat().st_size
        for d in (INT8, torch.bfloat16)
    }
    assert sizes[INT8] < 0.7 * sizes[torch.bfloat16]


def test_a_child_stands_on_an_int8_parent(saved_base, tmp_path: Path) -> None:
    cascade = make_stage(saved_base, dtype=torch.bfloat16)
    cascade.save_stage("t", tmp_path / "t", dtype=INT8)
    opened = Cascade.from_pretrained(tmp_path / "t").add_stage(StageConfig("child", 1, "low_rank", 4, parent="t"))
    scramble(opened.stages["child"])
    opened.save_stage("child", tmp_path / "child", dtype=INT8)
    again = Cascade.from_pretrained(tmp_path / "child")
    assert [s.saved_dtype for s in again.stages.values()] == [INT8, INT8]
    scramble(opened.stages["t"])
    with pytest.raises(StageError, match="has changed since it was saved"):
        opened.save_stage("child", tmp_path / "other")


HASH_LOGITS = """
import hashlib, json, os, sys
sys.modules["poe"] = None
import torch, transformers
from transformers import AutoModelForCausalLM
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(1)
ids, folders = json.load(sys.stdin)
for folder in folders:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        print(hashlib.sha256(model(torch.tensor(ids)).logits.float().numpy().tobytes()).hexdigest())
"""


@pytest.mark.slow
def test_package_remote_code_and_export_give_the_same_logits(saved_base, tmp_path: Path) -> None:
    """Remote code and the native export run in a process that cannot import `poe`."""
    import hashlib

    expected, folders = [], []
    for base in ("poe", "qwen3-tied"):
        for dtype in (torch.float32, torch.bfloat16):
            name = f"{base}-{str(dtype)[6:]}"
            make_stage(saved_base, "low_rank", base, dtype).save_stage("t", tmp_path / name, dtype=INT8)
            cascade = Cascade.from_pretrained(tmp_path / name)
            with torch.no_grad():
                logits = cascade(token_ids()).logits.float().numpy().tobytes()
            expected += 2 * [hashlib.sha256(logits).hexdigest()]
            folders += [str(tmp_path / name), str(cascade.export_native("t", tmp_path / f"{name}-native"))]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", HASH_LOGITS],
        input=json.dumps([token_ids().tolist(), folders]),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.stdout.split() == expected, done.stderr[-3000:]


def rewrite_delta(path: Path, change) -> None:
    """Apply `change(tensors)` to a delta file, and give it the correct fingerprint."""
    tensors, metadata = load_file(path), read_header(path)[1]
    change(tensors)
    write_tensors(path, tensors, {**metadata, "self_fingerprint": fingerprint_tensors(tensors)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("a.scale"),
            r"a is of type I8 and shape \[4, 3\]; expected a matrix with a.scale, .* got none",
        ),
        (lambda t: t.update({"a.scale": torch.ones(3)}), r"got F32 \[3\]"),
        (lambda t: t.update({"a.scale": torch.ones(4, 1)}), r"got F32 \[4, 1\]"),
        (lambda t: t.update({"a.scale": torch.ones(4, dtype=torch.bfloat16)}), r"got BF16 \[4\]"),
        (
            lambda t: t.update({"a.scale": torch.tensor([1, 1, math.nan, 1])}),
            "a.scale holds values that are not finite",
        ),
        (
            lambda t: t.update({"a.scale": torch.tensor([1, 1, math.inf, 1])}),
            "a.scale holds values that are not finite",
        ),
        (lambda t: t.update({"a.scale": torch.tensor([1.0, 0, 1, 1])}), "a.scale should hold positive scales"),
        (lambda t: t.update({"a.scale": torch.tensor([1.0, -1, 1, 1])}), "a.scale should hold positive scales"),
        (lambda t: t.update({"a": torch.ones(4, 3)}), "a.scale belongs to no int8 matrix"),
        (lambda t: t.update({"b": torch.ones(3, dtype=INT8), "b.scale": torch.ones(3)}), r"b is of type I8 and shape"),
        (
            lambda t: t.update({"b": torch.ones(3, dtype=torch.int16)}),
            "b is of type I16; expected F32, BF16, F16 or I8",
        ),
    ],
)
def test_scales_of_a_wrong_shape_or_name_are_refused(change, message: str, tmp_path: Path) -> None:
    path = tmp_path / "delta.safetensors"
    tensors = {"a": torch.randn(4, 3), "b": torch.randn(3)}
    write_delta(path, tensors, stage="t", attach_at=2, base_fingerprint="", dtype=INT8)
    assert read_delta(path, "t").keys() == tensors.keys()
    rewrite_delta(path, change)
    with pytest.raises(DeltaError, match=message):
        read_delta_header(path) and read_delta(path, "t")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused_before_writing(value: float, tmp_path: Path) -> None:
    path = tmp_path / "delta.safetensors"
    with pytest.raises(DeltaError, match="'t': a holds values that are not finite"):
        write_delta(path, {"a": torch.full((2, 2), value)}, stage="t", attach_at=2, base_fingerprint="", dtype=INT8)
    assert not path.exists()


def test_the_compress_command_makes_a_stage_smaller(saved_base, tmp_path: Path) -> None:
    cascade = make_stage(saved_base)
    source = {"hub_id": None, "conversations": 5, "epochs": 1.0, "license": "mit-0"}
    cascade.save_stage("t", tmp_path / "t", {"data": {"sources": {"rows": source}}})
    arguments = ["compress", str(tmp_path / "t"), "--out", str(tmp_path / "small")]
    done = CliRunner().invoke(app, [*arguments, "--rank", "4", "--int8"])
    assert done.exit_code == 0, done.output
    assert "1,952 -> 372 parameters" in done.output
    assert "int8: relative error" in done.output
    small = Cascade.from_pretrained(tmp_path / "small")
    assert (small.stages["t"].config.head_rank, small.stages["t"].saved_dtype) == (4, INT8)
    assert "mit-0" in (tmp_path / "small" / "NOTICE").read_text()
    before, after = ((tmp_path / n / "delta.safetensors").stat().st_size for n in ("t", "small"))
    assert after < 0.6 * before
    assert CliRunner().invoke(app, arguments).exit_code == 2
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "small")(token_ids()).logits.shape == (2, 9, 61)
