"""The sharded optimizer: how parameters are divided, and two processes compared with a single one."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

import zero_optimizer_worker as problem
from poe.errors import TrainingError
from poe.training.checkpoints.optimizer_state import join_shards, optimizer_tensors, restore_optimizer
from poe.training.optim import MuonAdamW
from poe.training.parallel.zero import divide_parameters

Weights = dict[str, torch.Tensor]


@given(params=st.lists(st.tuples(st.integers(0, 60), st.booleans()), min_size=1, max_size=9), world=st.integers(1, 6))
def test_every_element_has_one_owner_and_the_load_is_even(params: list[tuple[int, bool]], world: int) -> None:
    sizes, whole = [n for n, _ in params], [keep for _, keep in params]
    ranks = divide_parameters(sizes, whole, world)
    owned = [(p.parameter, i) for pieces in ranks for p in pieces for i in range(p.start, p.stop)]
    assert sorted(owned) == [(index, i) for index, size in enumerate(sizes) for i in range(size)]
    for pieces in ranks:
        assert len({p.parameter for p in pieces}) == len(pieces)
        assert all(p.stop - p.start == sizes[p.parameter] for p in pieces if whole[p.parameter])
    for kind, slack in ((False, 1), (True, max([size for size, keep in params if keep], default=0))):
        loads = [sum(p.stop - p.start for p in pieces if whole[p.parameter] == kind) for pieces in ranks]
        assert max(loads) - min(loads) <= slack


@contextmanager
def member(rank: int, world: int, backend: str = "fake") -> Iterator[dist.ProcessGroup]:
    """Act as one of `world` processes. The fake backend sends nothing, but the optimizer is divided."""
    store = FakeStore() if backend == "fake" else dist.HashStore()
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    try:
        assert dist.group.WORLD is not None
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def shard(named: problem.Named, state: Weights, rank: int, world: int) -> tuple[Weights, dict[str, Any]]:
    """Return the state that process `rank` of `world` saves after loading a whole state, with JSON values decoded."""
    with member(rank, world) as group:
        optimizer = problem.make(named, group)
        restore_optimizer(optimizer, problem.names_of(optimizer), state, {})
        tensors, numbers = optimizer_tensors(optimizer, problem.names_of(optimizer))
        return tensors, json.loads(json.dumps(numbers))


def trained_optimizer(named: problem.Named, steps: int = 3) -> MuonAdamW:
    optimizer = problem.make(named)
    problem.train(optimizer, named, range(steps), [0, 1], None)
    return optimizer


def trained(named: problem.Named, steps: int = 3) -> Weights:
    optimizer = trained_optimizer(named, steps)
    return optimizer_tensors(optimizer, problem.names_of(optimizer))[0]


@given(
    shapes=st.lists(st.lists(st.integers(1, 7), max_size=2), min_size=1, max_size=6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    worlds=st.tuples(st.integers(1, 4), st.integers(1, 4)),
)
@settings(max_examples=25, deadline=None)
def test_joined_state_loads_with_any_number_of_processes(
    shapes: list[list[int]], dtype: torch.dtype, worlds: tuple[int, int]
) -> None:
    """From one process to some to others, by the content of files: every number is the same and held once."""
    named = problem.parameters({f"layers.{i}.w": tuple(s) for i, s in enumerate(shapes)}, dtype)
    whole = state = trained(named)
    for world in worlds:
        parts = [shard(named, state, rank, world) for rank in range(world)]
        state, numbers = join_shards(parts[::-1])
        assert numbers == {}
        assert state.keys() == whole.keys()
        assert all(torch.equal(state[k], whole[k]) and state[k].dtype == whole[k].dtype for k in whole)
        counts = sum(t.numel() for tensors, _ in parts for k, t in tensors.items() if not k.endswith("::step"))
        assert counts == sum(t.numel() for k, t in whole.items() if not k.endswith("::step"))


def test_shards_of_different_runs_are_refused() -> None:
    named = problem.parameters()
    state = trained(named)
    a, b = (shard(named, state, rank, 2) for rank in range(2))
    for parts in ([a], [a, a], [a, b, b], [a, shard(named, state, 1, 3)], [(state, {}), a], []):
        with pytest.raises(TrainingError, match="every shard of one run once"):
            join_shards(parts)
    moved = json.loads(json.dumps(b[1]).replace('"head.weight": [', '"head.weight": [1'))
    with pytest.raises(TrainingError, match="do not cover it exactly"):
        join_shards([a, (b[0], moved)])
    optimizer = problem.make(named)
    with pytest.raises(TrainingError, match="shard 0 of 2, expected 0 of 1"):
        restore_optimizer(optimizer, problem.names_of(optimizer), *a)
    with member(1, 2) as group:
        optimizer = problem.make(named, group)
        with pytest.raises(TrainingError, match="shard 0 of 2, expected 1 of 2"):
            restore_optimizer(optimizer, problem.names_of(optimizer), *a)
        with pytest.raises(TrainingError, match="belongs to another shard"):
            optimizer.load_state_dict(trained_optimizer(named).state_dict())


def test_sharded_optimizer_refuses_new_groups_and_strided_parameters() -> None:
    with member(0, 2) as group:
        optimizer = problem.make(problem.parameters(), group)
        with pytest.raises(ValueError, match="pass every parameter group"):
            optimizer.add_param_group({"kind": "adamw", "lr": 0.1, "params": [torch.nn.Parameter(torch.zeros(2))]})
        strided = torch.nn.Parameter(torch.zeros(4, 3).T)
        with pytest.raises(ValueError, match="contiguous"):
            MuonAdamW([{"kind": "adamw", "lr": 0.1, "params": [strided]}], process_group=group)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_process_group_of_one_changes_no_bit(dtype: torch.dtype) -> None:
    alone, grouped = problem.parameters(dtype=dtype), problem.parameters(dtype=dtype)
    expected = problem.train(problem.make(alone), alone, range(4), [0, 1], None)
    with member(0, 1, "gloo") as group:
        got = problem.train(problem.make(grouped, group), grouped, range(4), [0, 1], None)
    assert got == pytest.approx(expected, rel=1e-6)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(alone, grouped, strict=True))


def test_zero_grad_clears_summed_gradients() -> None:
    param = torch.nn.Parameter(torch.zeros(3))
    with member(0, 1, "gloo") as group:
        optimizer = problem.make([("norm.weight", param)], group)
        for size in (2.0, 3.0):
            optimizer.zero_grad()
            param.grad = torch.tensor([size, 0.0, 0.0])
            assert [optimizer.clip_grad_norm_().item() for _ in range(2)] == [size, size]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that two processes wrote, each with its own gradients."""
    folder = tmp_path_factory.mktemp("two")
    named = problem.parameters()
    state = trained(named, problem.HALF)
    save_file(state | {f"weights.{name}": p.detach() for name, p in named}, folder / "whole.safetensors")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, problem.__file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([*command, str(rank), port, str(folder)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    return folder


def outcome_record(folder: Path, scenario: str) -> tuple[Weights, dict[str, Any], list[tuple[Weights, dict[str, Any]]]]:
    """Return the weights, which are bit-identical in both ranks, the record of rank 0, and the state of both."""
    ours, theirs = (load_file(folder / f"{scenario}-{rank}.weights") for rank in range(2))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    records = [json.loads((folder / f"{scenario}-{rank}.json").read_text()) for rank in range(2)]
    assert records[0]["norms"] == records[1]["norms"]
    states = [load_file(folder / f"{scenario}-{rank}.state") for rank in range(2)]
    return ours, records[0], [(state, record["numbers"]) for state, record in zip(states, records, strict=True)]


def furthest(weights: Weights, named: problem.Named) -> float:
    return max((weights[name].float() - p.detach().float()).abs().max().item() for name, p in named)


@pytest.mark.parametrize(("scenario", "max_norm"), [("plain", None), ("clipped", 0.5)])
def test_two_processes_equal_one(two: Path, scenario: str, max_norm: float | None) -> None:
    named = problem.parameters()
    start = {name: p.detach().clone() for name, p in named}
    norms = problem.train(problem.make(named), named, range(problem.STEPS), [0, 1], max_norm)
    weights, record, _ = outcome_record(two, scenario)
    assert record["norms"] == pytest.approx(norms, rel=1e-6)
    assert furthest(weights, named) <= 1e-5
    still = {name for name, p in named if torch.equal(p, start[name])}
    assert still == {"layers.3.never.weight"} == {name for name in weights if torch.equal(weights[name], start[name])}


def test_half_precision_masters_are_sharded(two: Path) -> None:
    named = problem.parameters(dtype=torch.bfloat16)
    optimizer = problem.make(named)
    problem.train(optimizer, named, range(problem.STEPS), [0, 1], None)
    expected, _ = optimizer_tensors(optimizer, problem.names_of(optimizer))
    weights, _, parts = outcome_record(two, "bf16")
    state, _ = join_shards(parts)
    assert state.keys() == expected.keys()
    for key in (k for k in state if k.endswith("::master")):
        torch.testing.assert_close(state[key], expected[key], rtol=0, atol=1e-5)
        assert torch.equal(state[key].bfloat16(), weights[key.removesuffix("::master")])


@pytest.mark.parametrize(("scenario", "shapes"), [("plain", problem.SHAPES), ("head_only", problem.HEAD_ONLY)])
def test_each_process_holds_half_of_the_state(two: Path, scenario: str, shapes: dict) -> None:
    named = problem.parameters(shapes)
    optimizer = problem.make(named)
    problem.train(optimizer, named, range(1), [0, 1], None)
    records = [json.loads((two / f"{scenario}-{rank}.json").read_text()) for rank in range(2)]
    assert all(r["state_bytes"] <= 0.55 * problem.state_bytes(optimizer) for r in records)


@pytest.mark.slow
def test_bucket_size_changes_no_bit(two: Path) -> None:
    usual, small = outcome_record(two, "plain"), outcome_record(two, "buckets")
    assert all(torch.equal(usual[0][name], small[0][name]) for name in usual[0])


def test_resume_with_the_same_number_of_processes_changes_no_bit(two: Path) -> None:
    (straight, record, states), (resumed, later, again) = outcome_record(two, "plain"), outcome_record(two, "resumed")
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert record["norms"][problem.HALF :] == later["norms"]
    for (a, _), (b, _) in zip(states, again, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_resume_with_fewer_or_more_processes(two: Path) -> None:
    expected = problem.parameters()
    problem.train(problem.make(expected), expected, range(problem.STEPS), [0, 1], None)
    assert furthest(outcome_record(two, "from_one")[0], expected) <= 1e-5

    weights, _, parts = outcome_record(two, "half")
    named = problem.parameters()
    with torch.no_grad():
        for name, param in named:
            param.copy_(weights[name])
    optimizer = problem.make(named)
    restore_optimizer(optimizer, problem.names_of(optimizer), *join_shards(parts))
    problem.train(optimizer, named, range(problem.HALF, problem.STEPS), [0, 1], None)
    assert furthest({name: p.detach() for name, p in expected}, named) <= 1e-5


def test_losses_follow_those_of_one_process(two: Path) -> None:
    shares = [json.loads((two / f"losses-{rank}.json").read_text()) for rank in range(2)]
    together = [a + b for a, b in zip(*shares, strict=True)]
    alone = problem.learn(slice(0, 8))
    assert alone[-1] < alone[0]
    assert together == pytest.approx(alone, abs=1e-5)


def test_infinite_norm_in_one_process_is_infinite_in_all(two: Path) -> None:
    assert all(json.loads((two / f"infinite-{rank}.json").read_text()) for rank in range(2))
