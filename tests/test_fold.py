"""Folding a chain of stages: the layers are copied, the head deltas are summed, the logits stay the same."""

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

from conftest import EXEMPLARS, RECURRENT, mostly_slow, scramble, tiny_base, token_ids
from poe import Cascade, StageConfig
from poe.commands.poe import app
from poe.errors import StageError
from poe.modeling.heads import FoldedHead, build_head
from poe.stages.fold import fold_heads

KINDS = st.sampled_from(["dense", "low_rank", "none"])
SIZE = (23, 12)


def add_chain(cascade: Cascade, heads: list[str], attach_at: int | None = None) -> Cascade:
    """Add stages `s0`, `s1`, ... with random weights and these heads, each on top of the previous one."""
    for index, head in enumerate(heads):
        parent = f"s{index - 1}" if index else None
        cascade.add_stage(StageConfig(f"s{index}", 1 + index % 2, head, 3, parent, None if index else attach_at))
        scramble(cascade.stages[f"s{index}"], seed=index)
    return cascade


def random_heads(kinds: list[str], dtype: torch.dtype, seed: int) -> list:
    heads = [build_head(StageConfig("t", head=kind, head_rank=3), *SIZE).to(dtype) for kind in kinds]
    for index, head in enumerate(heads):
        scramble(head, seed + index)
    return heads


def folded_head(heads: list, dtype: torch.dtype) -> nn.Module:
    """Return the head module of the folded deltas, in the dtype of a stage."""
    kind, rank, tensors = fold_heads(heads)
    head = build_head(StageConfig("t", head=kind, head_rank=rank), *SIZE).to(dtype)
    head.load_state_dict({name.removeprefix("head."): tensor for name, tensor in tensors.items()})
    return head


@settings(max_examples=100, deadline=None)
@given(
    kinds=st.lists(KINDS, min_size=1, max_size=5),
    bf16_stage=st.booleans(),
    bf16_base=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_the_folded_head_equals_that_of_the_chain_within_the_stated_bound(kinds, bf16_stage, bf16_base, seed) -> None:
    """The bound is that of `fold_heads`. A single delta is equal bit for bit."""
    stage_dtype = torch.bfloat16 if bf16_stage else torch.float32
    torch.manual_seed(seed)
    base = nn.Linear(SIZE[1], SIZE[0], bias=False).to(torch.bfloat16 if bf16_base else torch.float32)
    heads = random_heads(kinds, stage_dtype, seed)
    folded = folded_head(heads, stage_dtype)
    with torch.no_grad():
        expected, got = FoldedHead(base, heads).weight, FoldedHead(base, [folded]).weight
    if sum(kind != "none" for kind in kinds) <= 1:
        assert torch.equal(got, expected)
        return
    sizes = [
        h.b.abs().float() @ h.a.abs().float() if kind == "low_rank" else h.weight.abs().float()
        for kind, h in zip(kinds, heads, strict=True)
        if kind != "none"
    ]
    total = base.weight.abs().float() + sum(sizes)
    sums = len(kinds) + 3 * kinds.count("low_rank")
    bound = 2 * sums * 2.0**-24 * total
    if hasattr(folded, "weight") and bf16_stage:
        bound = bound + 2.0**-8 * sum(sizes)
    if bf16_base:
        bound = bound + 2 * 2.0**-8 * total
    assert ((got.double() - expected.double()).abs() <= bound).all()


@settings(max_examples=50, deadline=None)
@given(kinds=st.lists(KINDS, max_size=6), seed=st.integers(0, 1000))
def test_the_folded_head_has_the_smallest_kind(kinds: list[str], seed: int) -> None:
    heads = random_heads(kinds, torch.float32, seed)
    kind, rank, tensors = fold_heads(heads)
    low, dense = kinds.count("low_rank"), kinds.count("dense")
    if not low and not dense:
        assert (kind, tensors) == ("none", {})
    elif dense or 3 * low * sum(SIZE) >= SIZE[0] * SIZE[1]:
        assert kind == "dense"
        assert tensors["head.weight"].shape == SIZE
    else:
        assert (kind, rank) == ("low_rank", 3 * low)
        assert torch.equal(tensors["head.a"], torch.cat([h.a for h in heads if hasattr(h, "a")]))
        assert {name: tuple(t.shape) for name, t in tensors.items()} == {
            "head.a": (rank, SIZE[1]),
            "head.b": (SIZE[0], rank),
        }
    assert sum(t.numel() for t in tensors.values()) <= sum(p.numel() for h in heads for p in h.parameters())


def test_a_low_rank_head_alone_keeps_its_rank() -> None:
    head = build_head(StageConfig("t", head="low_rank", head_rank=11), *SIZE)  # has more numbers than a dense one
    kind, rank, _ = fold_heads([head, build_head(StageConfig("n", head="none"), *SIZE)])
    assert (kind, rank) == ("low_rank", 11)


EXACT = [["none", "none"], ["none", "dense", "none"], ["low_rank", "none"], ["dense"]]
MIXED = [["dense", "low_rank", "none"], ["none", "low_rank", "dense"], ["low_rank", "low_rank"], ["dense", "dense"]]


@pytest.mark.parametrize(
    ("base_name", "dtype"),
    mostly_slow(
        itertools.product(EXEMPLARS, (torch.float32, torch.bfloat16)),
        [*((name, torch.float32) for name in EXEMPLARS), ("poe", torch.bfloat16), ("qwen3-tied", torch.bfloat16)],
    ),
)
@pytest.mark.parametrize("heads", [*EXACT, *MIXED], ids="+".join)
def test_a_folded_chain_has_the_logits_of_the_chain(heads, dtype, base_name, saved_base, tmp_path: Path) -> None:
    attach_at = 1 if "none" in heads and base_name not in RECURRENT else None
    cascade = add_chain(Cascade.from_pretrained(saved_base(base_name, dtype)), heads, attach_at)
    last = cascade.active
    with torch.no_grad():
        expected = cascade(token_ids()).logits
        hidden = cascade.model(last).model(token_ids()).last_hidden_state
        folded = cascade.fold(last)(token_ids()).logits
        assert cascade.active == f"{last}-folded"
        assert torch.equal(cascade.model(cascade.active).model(token_ids()).last_hidden_state, hidden)
        if heads in EXACT:
            assert torch.equal(folded, expected)
        else:
            tolerance = 1e-4 if dtype == torch.float32 else 0.05
            torch.testing.assert_close(folded, expected, rtol=tolerance, atol=tolerance)
        assert torch.equal(cascade(token_ids(), stage=last).logits, expected)
    stage = cascade.stages[cascade.active]
    assert stage.parent is None
    assert stage.below == cascade.stages["s0"].below
    assert len(stage.layers) == sum(len(cascade.stages[f"s{i}"].layers) for i in range(len(heads)))
    folder = cascade.save_stage(stage.name, tmp_path / "folded", dtype=dtype)
    again = Cascade.from_pretrained(folder)
    assert list(again.stages) == [stage.name]
    with torch.no_grad():
        assert torch.equal(again(token_ids()).logits, folded)


def test_a_folded_stage_shares_no_tensor_with_the_chain(saved_base) -> None:
    cascade = add_chain(Cascade.from_pretrained(saved_base()), ["dense", "low_rank"])
    cascade.stages["s1"].prompt = {"name": "p", "version": "1", "stop": ["w7"]}
    before = cascade(token_ids()).logits
    cascade.fold("s1", "one")
    stage = cascade.stages["one"]
    shared = {p.data_ptr() for p in cascade.base.parameters()}
    shared |= {p.data_ptr() for name in ("s0", "s1") for p in cascade.stages[name].parameters()}
    assert not shared & {p.data_ptr() for p in stage.parameters()}
    cascade.model("one").train()(token_ids(), labels=token_ids(), use_cache=False).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in stage.parameters())
    scramble(stage, seed=9)
    assert torch.equal(cascade(token_ids(), stage="s1").logits, before)
    assert stage.prompt == cascade.stages["s1"].prompt
    with pytest.raises(StageError, match="There is a stage 'one' already"):
        cascade.fold("s1", "one")
    with pytest.raises(StageError, match="Did you mean 's1'"):
        cascade.fold("s2")


def test_a_chain_of_two_dtypes_folds_to_the_wider_dtype() -> None:
    cascade = Cascade(tiny_base(dtype=torch.bfloat16)).add_stage(StageConfig("a", 1))
    cascade.add_stage(StageConfig("b", 1, parent="a"), dtype=torch.float32)
    cascade.fold("b")
    assert {p.dtype for p in cascade.stages["b-folded"].parameters()} == {torch.float32}


def test_the_fold_command_keeps_the_records_of_the_data(saved_base, tmp_path: Path) -> None:
    cascade = add_chain(Cascade.from_pretrained(saved_base()), ["none", "low_rank"])
    for name in ("s0", "s1"):
        sources = {"rows": {"hub_id": None, "conversations": 5, "epochs": 1.0, "license": f"license-{name}"}}
        cascade.save_stage(name, tmp_path / name, {"data": {"sources": sources}}, dtype=torch.float32)
    expected = cascade(token_ids()).logits
    done = CliRunner().invoke(app, ["fold", str(tmp_path / "s1"), "--out", str(tmp_path / "one"), "--name", "one"])
    assert done.exit_code == 0, done.output
    assert "2 stages" in done.output
    again = Cascade.from_pretrained(tmp_path / "one")
    assert list(again.stages) == ["one"]
    assert torch.equal(again(token_ids()).logits, expected)
    assert {t.dtype for t in load_file(tmp_path / "one" / "delta.safetensors").values()} == {torch.float32}
    notice = (tmp_path / "one" / "NOTICE").read_text()
    assert "license-s0" in notice
    assert "license-s1" in notice


def test_a_stage_can_be_removed_if_no_stage_stands_on_it(saved_base) -> None:
    cascade = add_chain(Cascade.from_pretrained(saved_base()), ["dense", "none"])
    with pytest.raises(StageError, match="'s0' cannot be removed while s1 stand"):
        cascade.remove_stage("s0")
    expected = cascade(token_ids(), stage="s0").logits
    assert cascade.remove_stage("s1").active == "s0"
    assert torch.equal(cascade(token_ids()).logits, expected)
    with pytest.raises(StageError, match="no stage 's1'"):
        cascade.model("s1")
    assert cascade.remove_stage("s0").active is None
    assert not cascade.stages
    assert add_chain(cascade, ["none"]).active == "s0"


def test_a_stage_is_active_inside_a_block() -> None:
    cascade = add_chain(Cascade(tiny_base()), ["dense", "none"])
    with cascade.activated(None) as same:
        assert same is cascade
        assert cascade.active is None
        with cascade.activated("s0"):
            assert cascade.active == "s0"
        assert cascade.active is None
    assert cascade.active == "s1"
    with pytest.raises(KeyError), cascade.activated("s0"):
        raise KeyError
    assert cascade.active == "s1"
    with pytest.raises(StageError, match="no stage"), cascade.activated("unknown"):
        pass
    assert cascade.active == "s1"
    with cascade.activated(None):
        cascade.remove_stage("s1")
    assert cascade.active is None
