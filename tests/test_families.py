"""Properties of every family: identity when new, no effect when off, one head, caches, padding, files, the loss."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, Qwen2Config

from conftest import BASES, RECURRENT, scramble, tiny_base, token_ids
from poe import Cascade, StageConfig
from poe.modeling.families import FAMILIES, Family, family_of, grown_config, logits_of
from poe.training.loss import cross_entropy_sum, per_label_losses

HEADS = ("dense", "low_rank", "none")
FAMILY = pytest.mark.parametrize("name", list(BASES))
# Quick: every family with one kind of head, one family of every kind in bf16. Slow: all heads with all families.
QUICK = [(name, HEADS[index % 3], torch.float32) for index, name in enumerate(BASES)]
QUICK += [(name, "low_rank", torch.bfloat16) for name in ("poe", "qwen3-tied", "gemma3-tied", "granite", "phi")]
ALL = [(name, head, dtype) for name in BASES for head in HEADS for dtype in (torch.float32, torch.bfloat16)]
CASE = pytest.mark.parametrize(
    ("name", "head", "dtype"),
    [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in ALL],
    ids=[f"{name}-{head}-{str(dtype).removeprefix('torch.')}" for name, head, dtype in ALL],
)


def grown(name: str, head: str = "low_rank", dtype: torch.dtype = torch.float32) -> Cascade:
    """Return a cascade with one scrambled stage `t` of two layers."""
    cascade = Cascade(tiny_base(name, dtype)).add_stage(StageConfig("t", 2, head, 4))
    scramble(cascade.stages["t"], seed=1)
    return cascade


@CASE
def test_a_new_stage_is_the_identity_and_has_no_effect_when_off(name: str, head: str, dtype: torch.dtype) -> None:
    base, ids = tiny_base(name, dtype), token_ids()
    before = base(ids).logits
    cascade = Cascade(base).add_stage(StageConfig("t", 2, head, 4))
    assert torch.equal(cascade(ids).logits, before)
    for layer in range(2):  # each alone, so that none of them could be missing
        fresh = Cascade(base).add_stage(StageConfig("u", 2, "none"))
        scramble(fresh.stages["u"].layers[layer])
        assert not torch.equal(fresh(ids).logits, before)
    scramble(cascade.stages["t"], seed=1)
    changed = cascade(ids).logits
    assert torch.equal(cascade.activate(None)(ids).logits, before)
    cascade.add_stage(StageConfig("child", 1, head, 4, parent="t"))
    assert torch.equal(cascade(ids).logits, changed)
    scramble(cascade.stages["child"], seed=2)
    assert not torch.equal(cascade(ids).logits, changed)
    assert torch.equal(cascade(ids, stage="t").logits, changed)
    assert type(cascade.model("child")) is type(base)
    assert torch.equal(tiny_base(name, dtype)(ids).logits, base(ids).logits)


@CASE
def test_the_logits_are_one_matmul_of_the_folded_head(name: str, head: str, dtype: torch.dtype) -> None:
    cascade, ids = grown(name, head, dtype), token_ids()
    model, family = cascade.model("t"), family_of(cascade.base)
    states = []
    hook = family.backbone_of(model).get_submodule(family.norm).register_forward_hook(lambda *call: states.append(call))
    logits = model(ids).logits
    hook.remove()
    hidden = states[-1][-1]  # nanochat runs the same norm below the layers too
    base_head = family.head_of(cascade.base)
    weight = base_head.weight.float()
    change = cascade.stages["t"].head.delta()
    weight = (weight if change is None else weight + change).to(dtype)
    expected = logits_of(model.config)(F.linear(hidden, weight, base_head.bias))
    torch.testing.assert_close(logits, expected)
    if logits_of(model.config).scale == 1.0:
        assert torch.equal(logits, expected)


def greedy(cascade: Cascade, ids: torch.Tensor, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what greedy decoding gives: tokens (rows, T), and the logits of every new one (rows, new, vocabulary)."""
    options |= {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    out = cascade.generate(input_ids=ids, return_dict_in_generate=True, output_logits=True, **options)
    return out.sequences, torch.stack(out.logits, dim=1)


@CASE
def test_greedy_decoding_does_not_depend_on_cache_or_padding(name: str, head: str, dtype: torch.dtype) -> None:
    cascade, short, long = grown(name, head, dtype), token_ids(1, 7), token_ids(1, 10, seed=1)
    tokens, logits = greedy(cascade, short)
    assert tokens.shape == (1, 15)
    assert not torch.equal(logits, greedy(cascade, short, stage=None)[1])
    if dtype != torch.float32:
        return  # another order of sums may break a tie the other way
    pads = torch.zeros(1, 3, dtype=short.dtype)
    both = torch.cat([torch.cat([pads, short], dim=1), long])
    mask = torch.ones_like(both)
    mask[0, :3] = 0
    together, together_logits = greedy(cascade, both, attention_mask=mask)
    other, other_logits = greedy(cascade, long)
    assert torch.equal(together[0, 3:], tokens[0])
    assert torch.equal(together[1], other[0])
    torch.testing.assert_close(together_logits, torch.cat([logits, other_logits]), rtol=1e-4, atol=1e-4)
    uncached, uncached_logits = greedy(cascade, short, use_cache=False)
    assert torch.equal(uncached, tokens)
    torch.testing.assert_close(uncached_logits, logits, rtol=1e-4, atol=1e-4)


@FAMILY
def test_a_stage_and_its_child_are_the_same_after_loading(name: str, saved_base, tmp_path: Path) -> None:
    cascade = Cascade.from_pretrained(saved_base(name))
    for stage, parent in (("parent", None), ("child", "parent")):
        cascade.add_stage(StageConfig(stage, 1, "low_rank" if parent else "dense", 4, parent=parent))
        scramble(cascade.stages[stage], seed=len(stage))
        cascade.save_stage(stage, tmp_path / stage, dtype=torch.float32)
    again = Cascade.from_pretrained(tmp_path / "child")
    assert list(again.stages) == ["parent", "child"]
    assert torch.equal(again(token_ids()).logits, cascade(token_ids()).logits)
    for stage in again.stages:
        first = (tmp_path / stage / "delta.safetensors").read_bytes()
        assert (again.save_stage(stage, tmp_path / "again" / stage) / "delta.safetensors").read_bytes() == first


@pytest.mark.parametrize("name", [name for name in BASES if name not in RECURRENT])
def test_the_grown_model_is_an_ordinary_checkpoint(name: str, tmp_path: Path) -> None:
    model = grown(name).model("t")
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(again(token_ids()).logits, model(token_ids()).logits)
    assert len(family_of(again).layers_of(again) if again.config.model_type in FAMILIES else again.model.layers) == 4


@FAMILY
def test_the_training_loss_equals_the_loss_of_the_models_logits(name: str) -> None:
    """Training never makes all logits: it must scale and cap its own as the family does."""
    cascade, ids = grown(name), token_ids()
    model, stage = cascade.model("t").train(), cascade.stages["t"]
    labels = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], dim=1)
    expected = F.cross_entropy(model(ids).logits.flatten(0, 1), labels.flatten(), reduction="sum")
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in stage.named_parameters()}
    stage.zero_grad()
    hidden = getattr(model, model.base_model_prefix)(ids, use_cache=False).last_hidden_state
    head, logits = model.get_output_embeddings(), logits_of(model.config)
    loss = cross_entropy_sum(hidden, head.weight, labels, logits, head.bias)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(per_label_losses(hidden, head.weight, labels, logits, head.bias).sum(), expected)
    loss.backward()
    for name, parameter in stage.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-4)
    assert stage.layers[-1].mlp.training


@FAMILY
def test_the_first_step_changes_the_stage_a_little(name: str) -> None:
    """No norm may stand between a module at zero and the residual stream: it would undo the zero in one step."""
    cascade, ids = Cascade(tiny_base(name)).add_stage(StageConfig("t", 2, "none")), token_ids()
    stage, before = cascade.stages["t"], cascade(ids).logits
    optimizer = torch.optim.AdamW(stage.parameters(), lr=1e-4, weight_decay=0.0)
    cascade(ids, labels=ids).loss.backward()
    moved = {path for path, p in stage.layers.named_parameters() if p.grad is not None and p.grad.any()}
    assert {path.rpartition(".")[0] for path in moved} == {
        f"{index}.{output}" for index in range(2) for output in family_of(cascade.base).outputs
    }
    optimizer.step()
    step = (cascade(ids).logits - before).abs().max()
    assert 0 < step < 0.02
    cascade(ids, labels=ids).loss.backward()
    assert all(p.grad.any() for path, p in stage.layers.named_parameters() if "k_proj.bias" not in path)


@FAMILY
def test_documents_of_one_row_are_isolated(name: str) -> None:
    model = grown(name).model("t")
    ids = token_ids(1, 10)
    positions = torch.cat([torch.arange(4), torch.arange(6)])[None]
    packed = model(ids, position_ids=positions, use_cache=False).logits
    alone = torch.cat([model(ids[:, :4]).logits, model(ids[:, 4:]).logits], dim=1)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)


@settings(deadline=None)
@given(
    depth=st.integers(1, 6),
    below=st.integers(1, 9),
    count=st.integers(1, 4),
    full=st.sets(st.integers(0, 5)),
    window=st.integers(1, 12),
)
def test_a_config_grows_in_all_its_lists(depth: int, below: int, count: int, full: set, window: int) -> None:
    types = ["full_attention" if index in full else "sliding_attention" for index in range(depth)]
    config = Qwen2Config(num_hidden_layers=depth, layer_types=types, max_window_layers=window)
    config.rotations, config.eos_token_id, config.architectures = tuple(range(depth)), [7] * depth, ["A"] * depth
    before = config.to_dict()
    total, kept = below + count, min(below, depth)
    new = {"layer_types": "new", "rotations": -1}
    result = grown_config(config, Family("qwen2"), below, [new] * (count - 1) + [depth - 1])
    assert result.layer_types == types[:kept] + ["new"] * (total - kept - 1) + types[-1:] or count == 1
    assert result.rotations[:kept] == tuple(range(kept))
    assert result.rotations[-1] == depth - 1
    assert len(result.rotations) == len(result.layer_types) == total
    assert (result.eos_token_id, result.architectures) == (config.eos_token_id, config.architectures)
    assert (result.max_window_layers >= total) == (window >= depth or window >= total)
    assert (result.num_hidden_layers, result.tie_word_embeddings) == (total, False)
    assert config.to_dict() == before


def test_a_config_without_lists_grows_only_in_depth() -> None:
    config = LlamaConfig(num_hidden_layers=3)
    grown_fields = grown_config(config, FAMILIES["llama"], 3, [{}] * 2).to_dict()
    assert {key for key, value in config.to_dict().items() if grown_fields[key] != value} == {"num_hidden_layers"}
