"""Cached hidden states: training a stage on them gives the same result as training above the base."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import BASES, EXEMPLARS, RECURRENT, VOCABULARY, mostly_slow, scramble, tiny_base, tiny_model
from poe import Cascade
from poe.data.cache import cache_root
from poe.data.packing import Batch, PackedRows, pack
from poe.errors import OutputError, TrainingError
from poe.files.lock import hold
from poe.modeling.boundary import Boundary
from poe.stages import load_recipe
from poe.training.engine import Engine
from poe.training.hidden_states import disk_cache as hidden_cache
from poe.training.hidden_states.disk_cache import DiskCache, boundary_facts
from poe.training.hidden_states.sources import AboveBoundary, MemoryCache, WholeModel, stage_sources
from poe.training.reporting.progress import Progress
from poe.training.reporting.tracking import Trackers
from poe.training.run import RunContext, RunRows, RunSettings, TrainedModel

QUIET = Progress("test", quiet=True)
T = 16
EVERYTHING = {  # all features of a PoE base that a stage reads: the first hidden state, tokens, a lower layer
    "num_hidden_layers": 4,
    "layer_scalars": True,
    "value_embedding_layers": [1, 3],
    "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
    "sliding_window": 4,
    "smear_channels": 4,
    "backout_layer": 1,
}
STEPS = 6  # of four rows each: more than one epoch
KINDS = ("top", "low", "child")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POE_CACHE", str(tmp_path / "cache"))
    return cache_root() / "hidden"


def rows(count: int = 12, seed: int = 0) -> PackedRows:
    """Return packed rows of several short documents each."""
    rng = np.random.default_rng(seed)
    documents = [rng.integers(3, VOCABULARY, rng.integers(3, 8)) for _ in range(count * 3)]
    return pack([(ids, np.ones(len(ids), dtype=bool)) for ids in documents], T, seed=seed)


def grown(base, kind: str = "top") -> Cascade:
    """Return a cascade with a noisy stage `s` on top, at a lower layer, or on another noisy stage."""
    cascade = Cascade(base)
    if kind == "child":
        cascade.add_stage(name="p", num_layers=1)
        scramble(cascade.stages["p"], 1)
    place = {"top": {}, "low": {"attach_at": 1}, "child": {"parent": "p"}}[kind]
    cascade.add_stage(name="s", num_layers=2, **place)
    scramble(cascade.stages["s"], 2)
    cascade.stages["s"].requires_grad_(True)
    return cascade


def cache_of(cascade: Cascade, data: PackedRows, dtype: torch.dtype = torch.bfloat16, at_once: int = 2) -> DiskCache:
    boundary = Boundary(cascade.base, cascade.stages["s"])
    return DiskCache(boundary, boundary_facts(cascade, "s", boundary), dtype, data, data.num_rows, at_once)


def files(folder: Path) -> dict[str, bytes]:
    """Return the finished shards; a killed writer leaves others in scratch folders."""
    return {path.name: path.read_bytes() for path in folder.rglob("*.safetensors") if ".poe-" not in str(path)}


CASES = [(name, kind) for name in BASES for kind in KINDS if not (kind == "low" and name in RECURRENT)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("name", "kind"),
    mostly_slow(
        [*CASES, *(("poe with everything", kind) for kind in KINDS)],
        [("poe with everything", "low"), *zip(EXEMPLARS, ("low", "top", "child") * 2 + ("top",), strict=True)],
    ),
)
def test_layers_above_the_boundary_give_the_output_of_the_model(name: str, kind: str, dtype: torch.dtype) -> None:
    """Hidden states and gradients are bit-identical in every family, and depend on the states at the boundary."""
    base = tiny_base(name, dtype) if name in BASES else tiny_model("poe", EVERYTHING, dtype)
    base.config.prefix_lm = False  # the states of a PrefixLM base also depend on the labels
    cascade = grown(base, kind)
    stage, boundary = cascade.stages["s"], Boundary(base, cascade.stages["s"])
    batch = rows().batch(0, 3)
    states = boundary.below(batch.input_ids, batch.position_ids)
    assert not states.requires_grad
    gradients = []
    for hidden in (WholeModel(cascade.model("s"))(batch), boundary.above(states, batch.input_ids, batch.position_ids)):
        stage.zero_grad()
        hidden.float().square().sum().backward()
        gradients.append([hidden, *(p.grad.clone() for p in stage.layers.parameters() if p.grad is not None)])
    assert len(gradients[0]) == len(gradients[1]) > 5
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    other = boundary.above(states * 1.5, batch.input_ids, batch.position_ids)
    assert not torch.equal(other, gradients[0][0])


@pytest.mark.parametrize("name", ["poe", "qwen3-sliding", "gemma3", "hrm"])
def test_cached_states_equal_those_of_the_base(name: str) -> None:
    """In bf16 they are exact for any rows in any order; in fp32 they are rounded to bf16."""
    for dtype in (torch.bfloat16, torch.float32):
        cascade, data = grown(tiny_base(name, dtype)), rows()
        cache = cache_of(cascade, data)
        cache.fill("training", QUIET)
        boundary = Boundary(cascade.base, cascade.stages["s"])
        for step in range(2 * data.num_rows // 2):  # two epochs, the second in another order
            batch = data.batch(step, 2)
            direct = boundary.below(batch.input_ids, batch.position_ids)
            assert torch.allclose(cache(batch).float(), direct.float(), rtol=2**-7, atol=1e-5)
            if dtype == torch.bfloat16:
                assert torch.equal(cache(batch), direct)


def train(cascade: Cascade, data: PackedRows, tmp_path: Path, cache_hidden: bool, name: str) -> list[float]:
    fields = {
        "seq_len": T,
        "tokens_per_step": 4 * T,
        "max_tokens_per_batch": 2 * T,
        "validation_every": 3,
        "num_layers": 2,
    }
    plan = load_recipe("demo", **fields, cache_hidden=cache_hidden, max_steps=STEPS).replace(name="s")
    (tmp_path / name).mkdir()
    sources = stage_sources(cascade, plan, data, rows(2, seed=1), STEPS, QUIET)
    stage, model = cascade.stages["s"], cascade.model("s")
    byte_counts = torch.ones(VOCABULARY, dtype=torch.long)
    trained = TrainedModel(model, list(stage.named_parameters()), sources, byte_counts)
    settings = RunSettings(tmp_path / name, STEPS)
    engine = Engine(plan, trained, RunRows(data, rows(2, seed=1)), settings, RunContext(QUIET, Trackers({}, print)))
    history = engine.run()
    return [record["loss"] for record in history.steps] + [record["val_loss"] for record in history.evals]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("poe", "top"), ("llama", "top"), ("qwen3-sliding", "low"), ("gemma3", "child"), ("smollm3", "top")],
)
def test_losses_with_and_without_the_cache_are_equal(name: str, kind: str, tmp_path: Path) -> None:
    """Over several epochs, with two batches per step: bit-identical if the base computes in bf16."""
    plain, cached = (
        train(grown(tiny_base(name, torch.bfloat16), kind), rows(), tmp_path, cached, str(cached))
        for cached in (False, True)
    )
    assert len(plain) == STEPS + 3
    assert plain[0] != plain[STEPS - 1]
    assert plain == cached


def test_cache_in_bf16_changes_fp32_losses_by_rounding_only(tmp_path: Path) -> None:
    """The first loss and the first validation are measured before the weights differ."""
    plain, cached = (
        train(grown(tiny_base("llama")), rows(), tmp_path, cached, str(cached)) for cached in (False, True)
    )
    assert plain[0] != cached[0]
    assert plain[0] == pytest.approx(cached[0], rel=1e-3)
    assert plain[STEPS] == cached[STEPS]  # validation states are stored in fp32
    assert plain == pytest.approx(cached, rel=2e-2)


def test_memory_cache_keeps_states_up_to_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    cascade, data = grown(tiny_base("qwen3")), rows()
    boundary = Boundary(cascade.base, cascade.stages["s"])
    size = boundary.below(*inputs(data.batch(0, 2))).nbytes
    whole = WholeModel(cascade.model("s"))
    calls = []
    below = boundary.below
    monkeypatch.setattr(boundary, "below", lambda *batch: calls.append(1) or below(*batch))
    for num_cached in (0, 2, 5):
        source = AboveBoundary(cascade.model("s"), boundary, MemoryCache(boundary, num_cached * size))
        calls.clear()
        for _ in range(3):
            assert all(torch.equal(source(data.batch(i, 2)), whole(data.batch(i, 2))) for i in range(4))
        assert len(calls) == 12 - 2 * min(num_cached, 4)  # cached batches are computed once, the others every time


def inputs(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    return batch.input_ids, batch.position_ids


def test_cache_serves_every_stage_at_the_same_boundary(own_cache: Path) -> None:
    base, data = tiny_base("qwen3"), rows()
    cache_of(grown(base), data).fill("training", QUIET)
    written = files(own_cache)
    other = Cascade(base).add_stage(name="s", num_layers=1, head="none", seed=5)  # another depth, head, seed
    cache = cache_of(other, data)
    cache._write_shard = fail_to_write
    cache.fill("training", QUIET)
    assert files(own_cache) == written


def fail_to_write(shard: str) -> None:
    raise AssertionError(f"{shard} is computed again")


def test_cache_folder_depends_on_everything_that_changes_the_states(own_cache: Path) -> None:
    def place(cascade: Cascade, data: PackedRows, dtype: torch.dtype = torch.bfloat16) -> tuple[Path, str]:
        cache = cache_of(cascade, data, dtype)
        return cache.folder, cache.shards[0]

    base, data = tiny_base("qwen3"), rows()
    scaled = tiny_base("qwen3")
    scaled.config.rope_parameters = {**scaled.config.rope_parameters, "rope_theta": 123.0}
    child = grown(base, "child")
    other_parent = grown(base, "child")
    scramble(other_parent.stages["p"].layers, 9)
    places = [
        place(grown(base), data),
        place(grown(tiny_base("qwen3", seed=1)), data),  # weights
        place(grown(scaled), data),  # the same weights, another config
        place(grown(tiny_base("qwen3", torch.bfloat16)), data),  # computed in another dtype
        place(grown(base), data, torch.float32),  # stored in another dtype
        place(grown(base, "low"), data),
        place(child, data),
        place(other_parent, data),
        place(grown(base), rows(seed=1)),
    ]
    assert len(set(places)) == len(places)
    assert place(grown(base), data) == places[0]


def test_row_hash_includes_positions() -> None:
    """Tokens attend to other tokens when the documents of a row are not isolated."""
    data = rows()
    joined = PackedRows(data._tokens, data._trained, data._starts, data.stats, isolated=False)
    digests = [hidden_cache.row_digests(r.batch(0, 8)) for r in (data, joined)]
    assert len(set(digests[0])) == 8
    assert not set(digests[0]) & set(digests[1])


def small_shards(monkeypatch: pytest.MonkeyPatch, per_shard: int = 2) -> None:
    monkeypatch.setattr(hidden_cache, "SHARD_BYTES", per_shard * T * 32 * 2)


def test_runs_with_shared_rows_share_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    small_shards(monkeypatch)
    cascade, data = grown(tiny_base("qwen3")), rows()
    cache = cache_of(cascade, data)
    boundary = Boundary(cascade.base, cascade.stages["s"])
    facts = boundary_facts(cascade, "s", boundary)
    shorter = DiskCache(boundary, facts, torch.bfloat16, data, 6, 2)
    assert len(shorter.shards) == 3
    assert shorter.shards == cache.shards[:3]


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def exchange(path: Path) -> None:
    """Replace a shard by another valid one of the same shape."""
    from safetensors.torch import load_file, save_file

    save_file({"states": load_file(path)["states"] + 1}, path)


@pytest.mark.parametrize("damage", [shorten, lengthen, flip, empty, exchange, Path.unlink])
def test_damaged_shard_is_found_and_computed_again(own_cache: Path, monkeypatch, damage) -> None:
    small_shards(monkeypatch)
    cascade, data = grown(tiny_base("qwen3")), rows()
    cache_of(cascade, data).fill("training", QUIET)
    written = files(own_cache)
    damage(next(own_cache.rglob("*.safetensors")))
    assert files(own_cache) != written
    again = cache_of(cascade, data)
    make, made = again._write_shard, []
    monkeypatch.setattr(again, "_write_shard", lambda shard: made.append(shard) or make(shard))
    again.fill("training", QUIET)
    assert len(made) == 1
    assert files(own_cache) == written


def test_cache_deleted_during_a_run_is_computed_again(own_cache: Path) -> None:
    cascade, data = grown(tiny_base("qwen3")), rows()
    cache = cache_of(cascade, data)
    cache.fill("training", QUIET)
    before = cache(data.batch(0, 4))
    shutil.rmtree(own_cache)
    assert torch.equal(cache(data.batch(0, 4)), before)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(after=st.integers(0, 6), torn=st.booleans())
def test_killed_writer_leaves_no_shard_that_looks_complete(tmp_path_factory, after: int, torn: bool) -> None:
    """After a kill at any moment complete shards are kept, the others are computed, and the bytes are the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POE_CACHE", str(tmp_path_factory.mktemp("cache")))
        small_shards(patch)
        cascade, data = grown(tiny_base("qwen3")), rows()
        cache = cache_of(cascade, data)
        count = len(cache.shards)
        real, calls = hidden_cache.save_file, []

        def dies(tensors, path, **options) -> None:
            if len(calls) == after:
                if torn:
                    Path(path).write_bytes(b"half a shard")
                raise KeyboardInterrupt
            calls.append(path)
            real(tensors, path, **options)

        with patch.context() as inner:
            inner.setattr(hidden_cache, "save_file", dies)
            if after < count:
                with pytest.raises(KeyboardInterrupt):
                    cache.fill("training", QUIET)
            else:
                cache.fill("training", QUIET)
        kept = files(cache.folder)
        assert len(kept) == min(after, count)
        again = cache_of(cascade, data)
        again.fill("training", QUIET)
        assert len(files(cache.folder)) == count
        assert kept.items() <= files(cache.folder).items()
        boundary = Boundary(cascade.base, cascade.stages["s"])
        direct = boundary.below(*inputs(data.batch(0, 2))).bfloat16()
        assert torch.equal(again(data.batch(0, 2)), direct)


def test_too_small_disk_is_reported_before_anything_is_computed(own_cache: Path, monkeypatch) -> None:
    cascade, data = grown(tiny_base("qwen3")), rows()
    cache = cache_of(cascade, data)
    needed = data.num_rows * T * 32 * 2

    class Usage:
        free = needed

    monkeypatch.setattr(cache, "_write_shard", fail_to_write)
    monkeypatch.setattr(hidden_cache.shutil, "disk_usage", lambda _: Usage)
    with pytest.raises(OutputError, match="Not enough disk for hidden states"):
        cache.fill("training", QUIET)
    assert not files(own_cache)


def test_full_disk_is_one_message_and_leaves_no_partial_file(own_cache: Path, monkeypatch) -> None:
    def full(tensors, path, **options) -> None:
        Path(path).write_bytes(b"half a shard")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hidden_cache, "save_file", full)
    cascade, data = grown(tiny_base("qwen3")), rows()
    with pytest.raises(OutputError, match=r"No space left on device.*POE_CACHE"):
        cache_of(cascade, data).fill("training", QUIET)
    assert [p.name for p in own_cache.rglob("*") if p.is_file()] == ["about.json"]


def test_size_of_the_cache_is_reported_before_it_is_computed(capsys: pytest.CaptureFixture[str]) -> None:
    cascade, data = grown(tiny_base("qwen3")), rows()
    cache = cache_of(cascade, data)
    cache.fill("training", Progress("run"))
    output = capsys.readouterr().err
    size = sum(map(len, files(cache.folder).values()))
    stated = data.num_rows * T * 32 * 2
    assert stated < size < stated + 1000  # the difference are the headers
    assert f"{data.num_rows} x 16 x 32 numbers x 2 bytes = {stated / 2**20:,.1f} MiB" in output


def test_what_killed_writers_left_is_removed_and_what_others_write_is_kept(own_cache: Path) -> None:
    cascade, data = grown(tiny_base("qwen3")), rows()
    cache = cache_of(cascade, data)
    abandoned, used = cache.folder / ".poe-a.part", cache.folder / ".poe-b.part"
    for path in (abandoned, used):
        path.mkdir(parents=True)
    with hold(used):
        cache.fill("training", QUIET)
    assert not abandoned.exists()
    assert used.exists()


def test_base_with_upper_layers_that_read_more_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = Boundary.above
    monkeypatch.setattr(Boundary, "above", lambda self, states, *batch: real(self, states * 2, *batch))
    with pytest.raises(TrainingError, match="cannot be cached"):
        train(grown(tiny_base("qwen3")), rows(), tmp_path, True, "cached")
    assert train(grown(tiny_base("qwen3")), rows(), tmp_path, False, "plain")


FILL = """
import os, sys, time
sys.path.insert(0, {tests!r})
import test_hidden_state_cache as t
os.environ["POE_CACHE"] = {cache!r}
from poe.training.hidden_states import disk_cache as hidden_cache
hidden_cache.SHARD_BYTES = 2 * t.T * 32 * 2
real = hidden_cache.save_file
def slowly(*args, **options):
    time.sleep(0.05)
    real(*args, **options)
    print("wrote", flush=True)
hidden_cache.save_file = slowly
cache = t.cache_of(t.grown(t.tiny_base("qwen3")), t.rows(40))
print("ready", flush=True)
sys.stdin.readline()
cache.fill("training", t.QUIET)
"""


def filling(cache: Path) -> subprocess.Popen[str]:
    code = FILL.format(tests=str(Path(__file__).parent), cache=str(cache))
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.slow
def test_two_processes_fill_one_cache_after_a_killed_one(own_cache: Path, monkeypatch) -> None:
    small_shards(monkeypatch)
    killed = filling(own_cache.parent)
    killed.stdin.write("\n")
    killed.stdin.flush()
    for _ in range(3):
        assert killed.stdout.readline() == "wrote\n"
    killed.kill()
    killed.wait()
    cascade, data = grown(tiny_base("qwen3")), rows(40)
    cache = cache_of(cascade, data)
    kept = files(own_cache)
    assert 2 <= len(kept) < len(cache.shards)  # the third may not have been renamed yet
    both = [filling(own_cache.parent) for _ in range(2)]
    for process in both:
        process.stdin.write("\n")
        process.stdin.flush()
    wrote = [process.communicate(timeout=120)[0].count("wrote") for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum(wrote) >= len(cache.shards) - len(kept)
    assert len(files(own_cache)) == len(cache.shards)
    assert kept.items() <= files(own_cache).items()
    cache._write_shard = fail_to_write
    cache.fill("training", QUIET)
    facts = json.loads((cache.folder / "about.json").read_text())
    assert facts["base"] == cascade.base_source.fingerprint
