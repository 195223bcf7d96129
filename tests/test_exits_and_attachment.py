"""Exits of a base, and stages that attach below its top: at any layer of most bases, at a boundary of a PoE base."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import scramble, tiny_base, token_ids
from poe import Cascade, StageConfig
from poe.decoding import Exit
from poe.errors import FamilyError, StageError
from poe.modeling.exits import exits_of
from poe.modeling.families import family_of, logits_of
from test_stage_loading import GREEDY, prompts, stranger

NAMES = ("poe", "llama", "qwen3-tied", "qwen3-sliding", "gemma2", "gemma3-tied", "granite", "olmo2", "nanochat", "phi")


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_an_exit_is_the_final_norm_and_the_head_on_an_earlier_state(name: str) -> None:
    base = tiny_base(name)
    cascade, family = Cascade(base), family_of(base)
    states = base(token_ids(), output_hidden_states=True).hidden_states  # the embedding, then after every layer
    norm = family.backbone_of(base).get_submodule(family.norm)
    expected = logits_of(base.config)(family.head_of(base)(norm(states[1])))
    left = cascade(token_ids(), strategy=Exit(1))
    torch.testing.assert_close(left.logits, expected)
    assert torch.equal(cascade(token_ids(), strategy=Exit(2)).logits, base(token_ids()).logits)
    assert not torch.allclose(left.logits, base(token_ids()).logits)
    assert exits_of(base.config) == [1, 2]


@pytest.mark.parametrize("name", [*NAMES, "poe-stages"])
def test_generating_from_an_exit_is_generating_with_a_shallower_model(name: str) -> None:
    """It is a model of the base's class: cache, padding and everything else of `generate` are native."""
    cascade = Cascade(tiny_base(name))
    depth = exits_of(cascade.config)[0]
    ids, padded, mask = prompts()
    cached = cascade.generate(input_ids=ids, strategy=Exit(depth), **GREEDY)
    assert torch.equal(cached, cascade.generate(input_ids=ids, strategy=Exit(depth), use_cache=False, **GREEDY))
    fed = cascade.generate(input_ids=padded, attention_mask=mask, strategy=Exit(depth), **GREEDY)
    assert torch.equal(fed[:, 3:], cached)
    model = cascade.model(None, Exit(depth))
    assert type(model) is type(cascade.base)
    assert {p.data_ptr() for p in model.model.parameters()} < {p.data_ptr() for p in cascade.base.parameters()}
    assert not torch.equal(cached, cascade.generate(input_ids=ids, **GREEDY))


def test_depths_without_an_exit_are_refused() -> None:
    ids = token_ids()
    for name, exit, said in (
        ("qwen3", 0, r"exit is after 0 layers, but this base has exits after its layers: expected 1, 2"),
        ("qwen3", 3, r"exit is after 3 layers"),
        ("qwen3", True, r"exit is after True"),
        ("poe-stages", 3, r"after its stages: expected 1, 2"),
        ("hrm", 1, r"'hrm_text' is recurrent.*no exit"),
    ):
        with pytest.raises(FamilyError, match=said):
            Cascade(tiny_base(name))(ids, strategy=Exit(exit))
    cascade = Cascade(tiny_base()).add_stage(StageConfig("t", 1))
    with pytest.raises(StageError, match=r"Exit\(1\) leaves the base below stage 't'.*stage=None.*attach_at"):
        cascade.generate(ids, strategy=Exit(1))
    assert cascade(ids, stage=None, strategy=Exit(1)).logits.shape == (2, 9, cascade.config.vocab_size)


def low(cascade: Cascade, depth: int, head: str = "dense") -> Cascade:
    """A cascade with a trained-looking specialist on `depth` layers and a child on it."""
    cascade.add_stage(StageConfig("low", 1, head, 4, attach_at=depth))
    scramble(cascade.stages["low"])
    cascade.add_stage(StageConfig("child", 1, "low_rank", 4, parent="low"))
    scramble(cascade.stages["child"], 1)
    return cascade


@pytest.mark.parametrize("name", ["poe-stages", "qwen3-sliding", "gemma3-tied", "phi"])
@torch.no_grad()
def test_a_stage_below_the_top_skips_the_layers_above(name: str, monkeypatch) -> None:
    cascade = low(Cascade(tiny_base(name)), exits_of(tiny_base(name).config)[0])
    above = family_of(cascade.base).layers_of(cascade.base)[cascade.stages["low"].below]
    before = cascade.base(token_ids()).logits
    monkeypatch.setattr(above, "forward", None)  # calling it would fail
    for stage in ("low", "child"):
        assert cascade(token_ids(), stage=stage).logits.isfinite().all()
    monkeypatch.undo()
    assert torch.equal(cascade.base(token_ids()).logits, before)


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=["fp32", "bf16"]
)
@torch.no_grad()
def test_a_stage_below_the_top_is_the_same_however_it_is_loaded(saved_base, tmp_path, dtype) -> None:
    """Package, remote code without it, plain transformers after the export, and folded into one stage."""
    folders, expected = [], {}
    for name, head in (("poe-stages", "dense"), ("poe-stages", "none"), ("qwen3-sliding", "low_rank")):
        base = saved_base(name, dtype)
        cascade = low(Cascade.from_pretrained(base), exits_of(Cascade.from_pretrained(base).config)[0], head)
        for stage in ("low", "child"):
            folder = str(cascade.save_stage(stage, tmp_path / f"{name}-{head}" / stage, dtype=dtype))
            again = Cascade.from_pretrained(folder)
            assert again.stages["low"].below == cascade.stages["low"].below
            assert torch.equal(again(token_ids()).logits, cascade(token_ids(), stage=stage).logits)
            expected[folder] = again.generate(input_ids=token_ids(), **GREEDY).tolist()
            folders.append(folder)
        native = cascade.export_native("child", tmp_path / f"{name}-{head}" / "native")
        plain = AutoModelForCausalLM.from_pretrained(native, trust_remote_code=True)
        assert torch.equal(plain(token_ids()).logits, cascade(token_ids(), stage="child").logits)
        assert plain.config.num_hidden_layers == cascade.stages["child"].below + 1
        cascade.fold("child")
        torch.testing.assert_close(
            cascade(token_ids(), stage="child-folded").logits,
            cascade(token_ids(), stage="child").logits,
            atol=1e-4 if dtype == torch.float32 else 0.1,
            rtol=0,
        )
    seen = stranger(folders)
    assert {folder: seen[folder][2] for folder in folders} == expected


def test_a_copy_of_a_base_with_stage_heads_is_independent() -> None:
    """What is kept of summed heads belongs to the model that made it."""
    base = tiny_base("poe-stages")
    with torch.no_grad():
        before = base(token_ids()).logits
        other = copy.deepcopy(base)
        other.lm_head_stages[-1].weight.add_(1.0)
        assert not torch.allclose(other(token_ids()).logits, before)
        assert torch.equal(base(token_ids()).logits, before)
