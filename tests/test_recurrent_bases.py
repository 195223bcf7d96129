"""Recurrent bases: the stage runs once, in the last cycle, with its own cache slots; prefix prompts reach it."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.masking_utils import create_causal_mask

from conftest import HRM, RECURRENT, VOCABULARY, demo_tokenizer, scramble, tiny_base, tiny_model, token_ids
from poe import Cascade, StageConfig, train_stage
from poe.chat import generate_replies
from poe.data.packing import IGNORED, Batch
from poe.errors import FamilyError, StageError, TrainingError
from poe.loaders.base import save_base_folder
from poe.training.forward import prompt_positions
from poe.training.hidden_states.sources import WholeModel
from poe.training.reporting.progress import Progress

RECURRENT_BASE = pytest.mark.parametrize("name", RECURRENT)
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


def grown(name: str = "hrm", head: str = "low_rank") -> Cascade:
    """Return a cascade with a scrambled chain: `t` of two layers, `child` of one."""
    cascade = Cascade(tiny_base(name)).add_stage(StageConfig("t", 2, head, 4))
    cascade.add_stage(StageConfig("child", 1, head, 4, parent="t"))
    for seed, stage in enumerate(cascade.stages.values(), 1):
        scramble(stage, seed)
    return cascade


def prefix_types(ids: torch.Tensor, length: int) -> torch.Tensor:
    """Return token types in which the first `length` tokens of every row attend both ways."""
    return (torch.arange(ids.shape[1]) < length).long().expand_as(ids)


class Slots(DynamicCache):
    """A cache that notes which slots are written."""

    def __init__(self, config) -> None:
        super().__init__(config=config)
        self.allocated, self.written = len(self.layers), []

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        self.written.append(layer_idx)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


@RECURRENT_BASE
def test_every_run_of_a_layer_writes_a_slot_of_its_own(name: str) -> None:
    cascade = grown(name)
    depth = cascade.config.num_hidden_layers
    for stage, total in ((None, depth), ("t", depth + 2), ("child", depth + 3)):
        model = cascade.model(stage)
        cache = Slots(model.config)
        model(token_ids(), past_key_values=cache, use_cache=True)
        assert cache.written == list(range(total))
        assert cache.allocated == len(cache.layers) == total


@RECURRENT_BASE
@pytest.mark.parametrize("prefix", [0, 5])
def test_the_stage_runs_once_between_the_last_cycle_and_its_norm(name: str, prefix: int) -> None:
    """The logits are those of: base without its last norm, the chain's layers once, the norm, the folded head."""
    cascade, ids = grown(name), token_ids()
    base, types = cascade.base, prefix_types(ids, prefix)
    runs = []
    hook = base.model.H_module.layers[-1].register_forward_hook(lambda *call: runs.append(call[-1]))
    base(ids, token_type_ids=types)
    hook.remove()
    assert len(runs) == base.config.H_cycles
    positions = torch.arange(ids.shape[1])[None]
    groups = torch.where(types == 1, 0, -1) if base.config.prefix_lm else None
    hidden = runs[-1]
    rotations = base.model.rotary_emb(hidden, positions)
    mask = create_causal_mask(base.config, hidden, None, None, positions, block_sequence_ids=groups)
    for stage in cascade.stages.values():
        for layer in stage.layers:
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotations, cycle_offset=0)
    head = cascade.model("child").lm_head.weight
    expected = F.linear(base.model.H_module.final_norm(hidden), head)
    torch.testing.assert_close(cascade(ids, token_type_ids=types).logits, expected)


@settings(max_examples=25, deadline=None)
@given(
    cycles=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    layers=st.integers(1, 3),
    counts=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    prefix=st.integers(0, 6),
)
@pytest.mark.slow
def test_any_number_of_cycles_and_layers(cycles: tuple[int, int], layers: int, counts: list[int], prefix: int) -> None:
    fields = {**HRM, "H_cycles": cycles[0], "L_cycles": cycles[1], "num_hidden_layers": layers}
    cascade, ids = Cascade(tiny_model("hrm_text", fields)), token_ids()
    assert cascade.config.num_hidden_layers == layers * cycles[0] * (cycles[1] + 1)
    types, parent = prefix_types(ids, prefix), None
    for index, count in enumerate(counts):
        before = cascade(ids, token_type_ids=types).logits
        cascade.add_stage(StageConfig(f"s{index}", count, "low_rank", 4, parent=parent))
        assert torch.equal(cascade(ids, token_type_ids=types).logits, before)
        parent = f"s{index}"
        scramble(cascade.stages[parent], index)
        assert not torch.equal(cascade(ids, token_type_ids=types).logits, before)
    whole = cascade(ids, token_type_ids=types, use_cache=False).logits
    first = cascade(ids[:, :6], token_type_ids=types[:, :6], use_cache=True)
    rest = cascade(ids[:, 6:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], dim=1), whole, rtol=1e-3, atol=1e-4)


def test_a_marked_prompt_attends_in_both_directions() -> None:
    cascade, ids = grown(), token_ids()
    types = prefix_types(ids, 5)
    other = ids.clone()
    other[:, 4] = (ids[:, 4] - 2) % (VOCABULARY - 3) + 3
    causal, both = ([cascade(x, token_type_ids=t).logits for x in (ids, other)] for t in (types * 0, types))
    assert torch.equal(causal[0][:, :4], causal[1][:, :4])
    assert torch.equal(causal[0], cascade(ids).logits)
    assert ((both[0] - both[1]).abs().amax(dim=-1) > 0)[:, :4].all()
    seen = []
    for layer in (cascade.base.model.L_module.layers[0], *cascade.stages["t"].layers, *cascade.stages["child"].layers):
        layer.register_forward_pre_hook(lambda _, args, given: seen.append(given["attention_mask"]), with_kwargs=True)
    cascade(ids, token_type_ids=types)
    assert all(mask is seen[0] is not None for mask in seen)


@pytest.mark.parametrize("stage", [None, "t", "child", "new"])
def test_generate_with_prefix_types_does_not_depend_on_cache_or_padding(stage: str | None) -> None:
    cascade, ids = grown(), token_ids(1, 7)
    cascade.add_stage(StageConfig("new", 1))
    options = {**GREEDY, "return_dict_in_generate": True, "output_logits": True, "stage": stage}
    types = prefix_types(ids, 6)  # the last one is 0: what follows a prompt is causal, without a cache too
    out = cascade.generate(input_ids=ids, token_type_ids=types, **options)
    logits = torch.stack(out.logits)
    plain = torch.stack(cascade.generate(input_ids=ids, **options).logits)
    assert not torch.allclose(logits, plain)
    uncached = cascade.generate(input_ids=ids, token_type_ids=types, use_cache=False, **options)
    pads = torch.zeros(1, 3, dtype=ids.dtype)
    padded = cascade.generate(
        input_ids=torch.cat([pads, ids], dim=1),
        token_type_ids=torch.cat([pads, types], dim=1),
        attention_mask=(torch.arange(10) >= 3).long()[None],
        **options,
    )
    for other in (uncached, padded):
        torch.testing.assert_close(torch.stack(other.logits), logits, rtol=1e-3, atol=1e-4)
        assert torch.equal(other.sequences[:, -6:], out.sequences[:, -6:])
    if stage == "new":
        assert torch.equal(out.sequences, cascade.generate(input_ids=ids, token_type_ids=types, **GREEDY, stage=None))


@RECURRENT_BASE
def test_autograd_keeps_nothing_of_the_base(name: str) -> None:
    cascade = grown(name)
    model, stage = cascade.model("child").train(), cascade.stages["child"]
    model.enable_input_require_grads()
    outputs = []
    for module in (cascade.base.model.embed_tokens, *cascade.base.model.L_module.layers, *model.model.H_module.layers):
        module.register_forward_hook(lambda module, _, output: outputs.append((module, output.requires_grad)))
    model(token_ids(), labels=token_ids(), use_cache=False).loss.backward()
    assert {module for module, graph in outputs if graph} == {stage.layers[0]}
    assert all(p.grad is not None and p.grad.any() for p in stage.parameters())
    others = [p for p in model.parameters() if all(p is not own for own in stage.parameters())]
    assert all(p.grad is None for p in others)


def test_a_stage_attaches_on_top_only(tmp_path: Path) -> None:
    cascade = Cascade(tiny_base("hrm"))
    depth = cascade.config.num_hidden_layers
    for below in (1, 2, depth - 1):
        with pytest.raises(StageError, match=f"attach_at is {below}, but .* 'hrm_text' is recurrent.*attach_at None"):
            cascade.add_stage(StageConfig("t", 1, attach_at=below))
    with pytest.raises(StageError, match=f"the base has {depth} layers"):
        cascade.add_stage(StageConfig("t", 1, attach_at=depth + 1))
    assert not cascade.stages
    assert cascade.add_stage(StageConfig("t", 1, attach_at=depth)).stages["t"].below == depth


def test_saving_an_ordinary_checkpoint_is_refused(saved_base, tmp_path: Path) -> None:
    cascade = Cascade.from_pretrained(saved_base("hrm")).add_stage(StageConfig("t", 1, "none"))
    folder = cascade.save_stage("t", tmp_path / "t")
    door = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    out = tmp_path / "out"

    def refused(write, *args: object) -> None:
        with pytest.raises(Exception, match=r"recurrent.*would lose the stage's layers.*Save the stage") as raised:
            write(*args, out)
        assert type(raised.value).__name__ == FamilyError.__name__  # the door's is that of the files beside the stage
        assert not out.exists()

    refused(cascade.export_native, "t")
    refused(cascade.model("t").save_pretrained)
    refused(copy.deepcopy(cascade.model("t")).save_pretrained)
    refused(door.save_pretrained)
    cascade.base.save_pretrained(out)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(out)(token_ids()).logits, cascade.base(token_ids()).logits)


def test_a_deep_copy_is_independent() -> None:
    cascade, ids = grown(), token_ids()
    model = cascade.model("child")
    twin, before = copy.deepcopy(model), model(ids).logits
    assert torch.equal(twin(ids).logits, before)
    scramble(twin, seed=3)
    assert not torch.equal(twin(ids).logits, before)
    assert torch.equal(model(ids).logits, before)


def trainable_base(folder: Path) -> Path:
    """Write a random recurrent base with the demo's tokenizer and template."""
    tokenizer = demo_tokenizer()
    base: PreTrainedModel = tiny_model("hrm_text", {**HRM, "vocab_size": 600, "max_position_embeddings": 512})
    return save_base_folder(base, folder, tokenizer)


def test_a_stage_is_trained_saved_and_opened(tmp_path: Path) -> None:
    cascade, ids = Cascade.from_pretrained(trainable_base(tmp_path / "base")), torch.arange(40)[None]
    before = cascade.base(ids).logits
    fields = {
        "seq_len": 256,
        "tokens_per_step": 512,
        "eval_rows": 2,
        "num_layers": 1,
        "validation_ratio": 0.1,
        "max_steps": 12,
    }
    run = train_stage(cascade, "demo", "demo=80", tmp_path / "t", progress=Progress("test", quiet=True), **fields)
    trajectory = [point["val_bpb"] for point in run.record["trajectory"]]
    assert trajectory[-1] < trajectory[0]
    assert torch.equal(cascade(ids, stage=None).logits, before)
    assert not torch.equal(cascade(ids).logits, before)
    opened = Cascade.from_pretrained(run.folder)
    assert torch.equal(opened(ids, stage=None).logits, before)
    door = AutoModelForCausalLM.from_pretrained(run.folder, trust_remote_code=True)
    types = prefix_types(ids, 30)
    assert torch.equal(door(ids, token_type_ids=types).logits, opened(ids, token_type_ids=types).logits)


def test_packed_documents_attend_in_both_directions_within_their_prompts() -> None:
    """What training computes of a row of documents is what the model says of each alone, its prompt being of type 1."""
    model = grown().model("child")
    lengths, prompts = [6, 9, 5], [3, 4, 5]  # of the last document nothing is learned
    ids = token_ids(2, sum(lengths))
    labels = torch.full_like(ids, IGNORED)
    start = 0
    for length, prompt in zip(lengths, prompts, strict=True):
        learned = slice(start + prompt - 1, start + length - 1 if prompt < length else start + prompt - 1)
        labels[:, learned] = ids[:, learned.start + 1 : learned.stop + 1]
        start += length
    positions = torch.cat([torch.arange(length) for length in lengths]).expand_as(ids)
    batch = Batch(ids, labels, positions)
    expected = [k < p for n, p in zip(lengths, prompts, strict=True) for k in range(n)]
    assert prompt_positions(batch)[0].tolist() == expected
    packed = WholeModel(model)(batch)
    start = 0
    for length, prompt in zip(lengths, prompts, strict=True):
        own = ids[:, start : start + length]
        alone = model.model(own, token_type_ids=prefix_types(own, prompt), use_cache=False).last_hidden_state
        torch.testing.assert_close(packed[:, start : start + length], alone)
        start += length
    causal = model.model(ids, position_ids=positions, use_cache=False).last_hidden_state
    assert not torch.allclose(packed, causal)


def test_evaluation_marks_prompts_of_a_prefix_base(tmp_path: Path) -> None:
    """Questions after training come with types; the cache of hidden states, which does not know prompts, is refused."""
    cascade = Cascade.from_pretrained(trainable_base(tmp_path / "base"))
    seen = []
    generate = cascade.base.generate
    cascade.base.generate = lambda **given: seen.append(given) or generate(**given)  # type: ignore[method-assign]
    generate_replies(cascade.base, cascade.tokenizer, [[5, 6, 7], [5, 6, 7, 8, 9]], [1], max_new_tokens=2)
    assert torch.equal(seen[0]["token_type_ids"], seen[0]["attention_mask"])
    fields = {"seq_len": 256, "tokens_per_step": 512, "num_layers": 1, "validation_ratio": 0.1, "max_steps": 1}
    with pytest.raises(TrainingError, match=r"cache_hidden: .* both directions"):
        train_stage(cascade, "demo", "demo=80", tmp_path / "t", cache_hidden=True, **fields)


def test_a_base_in_memory_has_the_fingerprint_of_its_files(saved_base, tmp_path: Path) -> None:
    """Its files join projections into one tensor: the fingerprint is theirs, wherever the base came from."""
    cascade = Cascade(tiny_base("hrm")).add_stage(StageConfig("t", 1, "none"))
    scramble(cascade.stages["t"])
    folder = cascade.save_stage("t", tmp_path / "t", dtype=torch.float32)
    opened = Cascade.from_pretrained(folder, base=saved_base("hrm"))
    assert torch.equal(opened(token_ids()).logits, cascade(token_ids()).logits)
    again = Cascade(AutoModelForCausalLM.from_pretrained(saved_base("hrm"))).load_stage(folder)
    assert torch.equal(again(token_ids()).logits, cascade(token_ids()).logits)
