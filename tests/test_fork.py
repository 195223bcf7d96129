"""Forked layers: the base's own layers with a trained change, on all tokens or on the answer alone."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from conftest import BASES, EXEMPLARS, RECURRENT, mostly_slow, scramble, tiny_base, tiny_model, token_ids
from poe import Cascade, StageConfig
from poe.decoding import SelfSpeculation
from poe.errors import DecodingError, DeltaError, FamilyError, PoEError, StageError
from poe.modeling.answer_boundary import AnswerBoundary
from poe.modeling.boundary import Boundary
from poe.modeling.families import logits_of
from poe.modeling.fork import ForkedLinear
from poe.modeling.recognition import recognize_family
from poe.stages.copying import copying_scores

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
RANKS = pytest.mark.parametrize("rank", [4, None], ids=["low-rank", "full"])
ACTIVE = pytest.mark.parametrize("active", ["all", "answer"])
FAMILIES = [name for name in BASES if name not in RECURRENT]
FLAT = mostly_slow(FAMILIES, EXEMPLARS)


@pytest.fixture(params=FLAT)
def flat_base(request: pytest.FixtureRequest) -> str:
    return request.param


def forked(
    name: str = "qwen3",
    dtype: torch.dtype = torch.float32,
    *,
    rank: int | None = 4,
    active: str = "all",
    **fields: object,
) -> Cascade:
    """Return a cascade with one scrambled fork `f` of the base's second layer."""
    cascade = Cascade(tiny_base(name, dtype))
    fields = {"head": "none", "attach_at": 1, **fields}
    cascade.add_stage(StageConfig("f", layers="fork", rank=rank, active=active, **fields))
    scramble(cascade.stages["f"], seed=1)
    return cascade


@DTYPES
@RANKS
@ACTIVE
def test_a_new_fork_is_the_base_and_switched_off_it_stays_the_base(
    flat_base: str, dtype: torch.dtype, rank: int | None, active: str
) -> None:
    base = tiny_base(flat_base, dtype)
    ids = token_ids()
    before = base(ids).logits
    cascade = Cascade(base)
    cascade.add_stage(StageConfig("f", layers="fork", attach_at=1, rank=rank, active=active, head_rank=4))
    assert torch.equal(cascade(ids).logits, before)
    assert type(cascade.model("f")) is type(base)
    assert cascade.model("f").config.num_hidden_layers == base.config.num_hidden_layers
    scramble(cascade.stages["f"], seed=1)
    assert not torch.equal(cascade(ids).logits[:, -1], before[:, -1])
    assert torch.equal(cascade(ids, stage=None).logits, before)


@RANKS
def test_a_fork_holds_its_changes_and_shares_all_else(flat_base: str, rank: int | None) -> None:
    cascade = forked(flat_base, rank=rank)
    stage, base = cascade.stages["f"], {p.data_ptr() for p in cascade.base.parameters()}
    assert all(name.endswith((".a", ".b") if rank else ".delta") for name in stage.delta_state_dict())
    foreign = {p.data_ptr() for p in cascade.model("f").parameters()} - base
    assert foreign == {p.data_ptr() for p in stage.parameters()}


def test_a_fork_changes_the_linear_layers_that_its_family_declares() -> None:
    for name in FAMILIES:
        base = tiny_base(name)
        cascade, family = Cascade(base), recognize_family(base)
        cascade.add_stage(StageConfig("f", layers="fork", attach_at=1, rank=4, head="none"))
        layer, fork = family.layers_of(base)[1], cascade.stages["f"].layers[0]
        linear = {path for path, module in layer.named_modules() if isinstance(module, nn.Linear)}
        changed = {path for path, module in fork.named_modules() if isinstance(module, ForkedLinear)}
        assert changed == linear - set(family.unforked), name
        others = {path: module for path, module in layer.named_modules() if module._parameters and path not in linear}
        assert all(fork.get_submodule(path) is module for path, module in others.items() if path), name


def test_a_poe_base_with_value_gates_can_be_forked_at_the_default_rank() -> None:
    """The gate of a layer with value embeddings reads 12 channels, fewer than the rank of 16."""
    base = tiny_model("poe", {"value_embedding_layers": [1]})
    logits = base(token_ids()).logits
    cascade = Cascade(base).add_stage(name="f", layers="fork", attach_at=1, head="none")
    assert torch.equal(cascade(token_ids()).logits, logits)
    assert not any("value_gate" in name for name in cascade.stages["f"].delta_state_dict())


class _Packed(nn.Module):
    """A linear layer as GPTQ and AWQ have it: no nn.Linear, and its weight in a buffer of whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(4, 32, dtype=torch.int32))


class _Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(2, 96, 32))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (lambda: Conv1D(32, 48), "mlp.down_proj is a Conv1D with a weight of shape"),
        (lambda: nn.Conv1d(48, 32, 3), "is a Conv1d"),
        (_Packed, "is a _Packed with a qweight"),
        (_Experts, r"is a _Experts with a gate_up_proj of shape \(2, 96, 32\)"),
    ],
)
def test_a_fork_refuses_matrices_that_it_would_leave_as_they_are(
    kind: Callable[[], nn.Module], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("poe.cascade.check_plain_model", lambda base: None)  # a family can have such layers
    base = tiny_base("llama")
    base.model.layers[1].mlp.down_proj = kind()
    with pytest.raises(FamilyError, match=words):
        Cascade(base).add_stage(StageConfig("f", layers="fork", attach_at=1, rank=4, head="none"))


def test_a_low_rank_fork_of_quantized_weights_is_not_merged() -> None:
    base = tiny_base("llama")
    packed = base.model.layers[1].mlp.down_proj
    packed.weight = nn.Parameter(torch.zeros(packed.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)
    cascade = Cascade(base).add_stage(StageConfig("f", layers="fork", attach_at=1, rank=4, head="none"))
    with pytest.raises(FamilyError, match="are quantized: open the base without"):
        cascade.model("f").state_dict()
    with pytest.raises(FamilyError, match="are quantized: give a rank"):
        cascade.add_stage(StageConfig("g", layers="fork", attach_at=1, rank=None, head="none"))


@RANKS
@ACTIVE
def test_cache_and_left_padding_change_no_token(flat_base: str, rank: int | None, active: str) -> None:
    cascade = forked(flat_base, rank=rank, active=active)
    ids = token_ids()[:1]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = cascade.generate(input_ids=ids, use_cache=True, **options)
    assert torch.equal(cached, cascade.generate(input_ids=ids, use_cache=False, **options))
    padded = functional.pad(ids, (3, 0))
    mask = functional.pad(torch.ones_like(ids), (3, 0))
    assert torch.equal(cascade.generate(input_ids=padded, attention_mask=mask, **options)[:, 3:], cached)


@RANKS
def test_the_boundary_of_a_fork_gives_the_model_s_hidden_states(flat_base: str, rank: int | None) -> None:
    cascade = forked(flat_base, rank=rank)
    ids = token_ids()
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    boundary = Boundary(cascade.base, cascade.stages["f"])
    model = cascade.model("f")
    backbone = getattr(model, model.base_model_prefix)
    whole = backbone(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
    assert torch.equal(boundary.above(boundary.below(ids, positions), ids, positions), whole)


@RANKS
def test_a_chain_of_forks_and_new_layers_begins_as_what_it_stands_on(flat_base: str, rank: int | None) -> None:
    cascade = forked(flat_base, rank=rank, head="low_rank", head_rank=4)
    ids = token_ids()
    logits = cascade(ids).logits
    cascade.add_stage(StageConfig("new", 1, head="none", parent="f"))
    torch.testing.assert_close(cascade(ids).logits, logits, rtol=0, atol=0)
    scramble(cascade.stages["new"], seed=2)
    logits = cascade(ids).logits
    for attach_at in (1, 2):  # from the fork on, and the new layer alone
        cascade.add_stage(
            StageConfig(f"again{attach_at}", layers="fork", attach_at=attach_at, rank=rank, head="none", parent="new")
        )
        assert torch.equal(cascade(ids).logits, logits)
        assert cascade.model(f"again{attach_at}").config.num_hidden_layers == 3


def masked_logits(cascade: Cascade, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """Return the logits of the tokens that follow the first `prompt` tokens, from one plain forward pass."""
    labels = ids.clone()
    labels[:, :prompt] = -100
    return cascade(input_ids=ids, labels=labels).logits[:, prompt - 1 : -1]


@RANKS
def test_the_answer_over_the_base_s_own_cache_is_the_answer_alone(flat_base: str, rank: int | None) -> None:
    """The base reads the prompt once; every stage continues from a copy of its cache."""
    cascade = forked(flat_base, rank=rank, active="answer")
    cascade.add_stage(StageConfig("g", layers="fork", attach_at=1, rank=rank, active="answer", head="none"), seed=5)
    scramble(cascade.stages["g"], seed=6)
    ids = token_ids()
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    prefilled = DynamicCache(config=cascade.base.config)
    with torch.no_grad():
        cascade.base(input_ids=ids[:, :-1], past_key_values=prefilled, use_cache=True)
    answers = {}
    for name in ("f", "g"):
        answers[name] = cascade.generate(input_ids=ids, stage=name, **options)
        shared = cascade.generate(input_ids=ids, stage=name, past_key_values=copy.deepcopy(prefilled), **options)
        assert torch.equal(shared, answers[name])
        with cascade.activated(name):
            predicted = masked_logits(cascade, answers[name], ids.shape[1]).argmax(-1)
        assert torch.equal(predicted, answers[name][:, ids.shape[1] :])
    assert not torch.equal(cascade(ids, stage="f").logits[:, -1], cascade(ids, stage="g").logits[:, -1])


def dense_case(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[tuple[int, int, int]]]:
    """Return ids, positions, shifted labels (2, 26) of packed rows, and each turn as (document start, start, end)."""
    ids = torch.randint(3, 50, (2, 26), generator=torch.Generator().manual_seed(4))
    positions = torch.tensor([[*range(11), *range(15)]] * 2)
    turns = [(0, 6, 11), (11, 16, 20), (11, 22, 26)]
    labels = torch.full_like(ids, -100)
    for _, start, end in turns:
        labels[:, start - 1 : end - 1] = ids[:, start:end]
    labels[1, :10] = -100  # rows need not have equally many
    return ids, positions, labels, turns


@RANKS
@pytest.mark.parametrize("attach_at", [0, 1])
def test_dense_answers_have_the_loss_and_gradients_of_a_masked_forward_pass(
    flat_base: str, rank: int | None, attach_at: int
) -> None:
    cascade = forked(flat_base, torch.float64, rank=rank, active="answer", attach_at=attach_at)
    stage, model = cascade.stages["f"].requires_grad_(True), cascade.model("f")
    ids, positions, labels, turns = dense_case(model)
    boundary = AnswerBoundary(cascade.base, stage)
    hidden = boundary.above(boundary.below(ids, positions), ids, positions, labels != -100)
    logits = logits_of(model.config)(model.get_output_embeddings()(hidden))
    loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    loss.backward()
    dense = {name: p.grad.clone() for name, p in stage.named_parameters()}
    stage.zero_grad()
    expected = torch.zeros((), dtype=torch.float64)
    for row in range(2):
        for document, start, end in turns:
            if labels[row, start - 1] == -100:
                continue
            turn = ids[row : row + 1, document:end]
            logits = masked_logits(cascade, turn, start - document)
            expected = expected + functional.cross_entropy(logits[0], turn[0, start - document :], reduction="sum")
    expected.backward()
    rounding = {"rtol": 1e-4, "atol": 1e-5} if model.config._attn_implementation == "eager" else {}  # a softmax in fp32
    torch.testing.assert_close(loss, expected, **rounding)
    for name, parameter in stage.named_parameters():
        torch.testing.assert_close(dense[name], parameter.grad, **rounding)


def test_reading_the_prompt_keeps_no_graph() -> None:
    cascade = forked(active="answer")
    stage = cascade.stages["f"].requires_grad_(True)
    ids, positions, labels, _ = dense_case(cascade.base)
    boundary = AnswerBoundary(cascade.base, stage)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.numel()), t)[1], lambda t: t):
        read = boundary.below(ids, positions)
        assert not saved
        boundary.above(read, ids, positions, labels != -100)
    assert saved
    assert not any(t.requires_grad for t in (read.states, read.keys, read.values))


@pytest.mark.parametrize("name", mostly_slow(["llama", "poe", "gemma3", "granite", "smollm3", "stablelm"], ["llama"]))
def test_dense_answers_compile_to_whole_graphs_for_any_number_of_tokens(name: str) -> None:
    """At most three: the layers below, the fork at a first number of answer tokens, and the fork at any number."""
    graphs = []
    torch.compiler.reset()
    model_type, fields = BASES[name]
    fields = {"num_hidden_layers": 1, **fields} if name == "llama" else fields
    cascade = Cascade(tiny_model(model_type, fields, torch.float64))  # only what is not compiled attends by spans
    cascade.add_stage(name="f", layers="fork", attach_at=0, rank=2, active="answer", head="none")
    stage = cascade.stages["f"].requires_grad_(True)
    scramble(stage, seed=1)
    ids, positions, labels, _ = dense_case(cascade.base)
    eager, compiled = AnswerBoundary(cascade.base, stage), AnswerBoundary(cascade.base, stage)
    compiled.compile(fullgraph=True, backend=lambda graph, inputs: (graphs.append(graph), graph)[1])
    for prompt in (0, 18, 22):
        cascade.model("f").train()
        active = (labels != -100).index_fill(1, torch.arange(prompt), False)
        results = []
        for boundary in (eager, compiled):
            hidden = boundary.above(boundary.below(ids, positions), ids, positions, active)
            hidden.square().sum().backward()
            results.append([hidden.detach(), *(p.grad.clone() for p in stage.parameters())])
            stage.zero_grad()
        torch.testing.assert_close(results[1], results[0])
    assert len(graphs) <= 3


@pytest.mark.parametrize("kind", [Boundary, AnswerBoundary])
def test_dropout_of_the_layers_below_is_off_while_the_stage_learns(kind: type) -> None:
    cascade = Cascade(tiny_model("llama", {"attention_dropout": 0.5}))
    active = "answer" if kind is AnswerBoundary else "all"
    cascade.add_stage(name="f", layers="fork", attach_at=1, rank=4, active=active)
    boundary, ids = kind(cascade.base, cascade.stages["f"]), token_ids()
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    cascade.model("f").train()
    first, again = (boundary.below(ids, positions) for _ in range(2))
    if kind is AnswerBoundary:
        first, again = first.states, again.states
    assert torch.equal(first, again)


def test_what_cannot_be_a_fork_is_refused() -> None:
    cascade = Cascade(tiny_base("hrm"))
    with pytest.raises(PoEError, match="recurrent"):
        cascade.add_stage(StageConfig("f", layers="fork", attach_at=1))
    cascade = Cascade(tiny_base())
    for fields, match in (
        ({"layers": "fork"}, "needs attach_at"),
        ({"layers": "fork", "attach_at": 2}, "expected attach_at from 0 to 1"),
        ({"layers": "copy"}, "new, fork"),
        ({"active": "answer"}, "for a fork"),
        ({"layers": "fork", "attach_at": 1, "rank": 0}, "at least 1"),
        ({"layers": "fork", "attach_at": 1, "rank": 4000}, "rank 4000"),
    ):
        with pytest.raises(ValueError, match=match):
            cascade.add_stage(StageConfig("f", **fields))


def test_a_fork_comes_back_from_its_folder_with_the_same_bytes_and_logits(tmp_path: Path, saved_base: Callable) -> None:
    for rank, active in ((4, "all"), (4, "answer"), (None, "answer")):
        cascade = Cascade.from_pretrained(saved_base("qwen3"))
        cascade.add_stage(
            StageConfig("f", layers="fork", attach_at=1, rank=rank, active=active, head="low_rank", head_rank=4),
        )
        scramble(cascade.stages["f"], seed=1)
        folder = cascade.save_stage("f", tmp_path / f"{rank}-{active}", dtype=torch.float32)
        again = Cascade.from_pretrained(folder, dtype=torch.float32)
        assert again.stages["f"].config == cascade.stages["f"].config
        assert torch.equal(again(token_ids()).logits, cascade(token_ids()).logits)
        second = again.save_stage("f", tmp_path / f"{rank}-{active}-again")
        assert (second / "delta.safetensors").read_bytes() == (folder / "delta.safetensors").read_bytes()
        remote = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
        options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        assert torch.equal(remote(token_ids()).logits, cascade(token_ids()).logits)
        assert torch.equal(remote.generate(token_ids(), **options), cascade.generate(input_ids=token_ids(), **options))
        config = json.loads((folder / "config.json").read_text())
        assert (config["poe_format"], config["stage"]["layers"], config["stage"]["active"]) == ("2", "fork", active)
        config["stage"]["active"] = "all" if active == "answer" else "answer"
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(DeltaError, match="not from one save"):
            Cascade.from_pretrained(folder)


def test_a_fork_is_exported_with_merged_weights(tmp_path: Path, saved_base: Callable) -> None:
    cascade = Cascade.from_pretrained(saved_base("llama"))
    for name, active in (("f", "all"), ("g", "answer")):
        cascade.add_stage(StageConfig(name, layers="fork", attach_at=1, rank=4, active=active, head_rank=4))
        scramble(cascade.stages[name], seed=1)
    folder = cascade.export_native("f", tmp_path / "native")
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert plain.config.num_hidden_layers == cascade.config.num_hidden_layers
    torch.testing.assert_close(plain(token_ids()).logits, cascade(token_ids(), stage="f").logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(StageError, match="active on the answer"):
        cascade.export_native("g", tmp_path / "answer")
    with pytest.raises(FamilyError, match="active on the answer"):
        cascade.model("g").save_pretrained(tmp_path / "saved")
    on_all = cascade.export_native("g", tmp_path / "answer", all_tokens=True)
    logits = AutoModelForCausalLM.from_pretrained(on_all, dtype=torch.float32)(token_ids()).logits
    torch.testing.assert_close(logits, plain(token_ids()).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("active", ["all", "answer"])
@pytest.mark.parametrize("name", mostly_slow(FAMILIES, ["qwen3-sliding", "poe"]))
def test_rows_of_one_batch_go_to_several_forks(name: str, active: str) -> None:
    cascade = Cascade(tiny_base(name))
    cascade.add_stage(StageConfig("new", 1, head="none"))
    for seed, stage in enumerate(("f", "g")):
        cascade.add_stage(StageConfig(stage, layers="fork", attach_at=1, rank=4, active=active, head="none"))
        scramble(cascade.stages[stage], seed=seed + 1)
    scramble(cascade.stages["new"], seed=5)
    names, ids = ["f", None, "g", "new", "f"], token_ids(5)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mixed = cascade.generate(input_ids=ids, attention_mask=torch.ones_like(ids), stage=names, **options)
    for row, stage in enumerate(names):
        alone = cascade.generate(input_ids=ids[row : row + 1], stage=stage, **options)
        assert torch.equal(mixed[row], alone[0]), stage


def test_a_product_of_forks_at_weight_one_is_the_fork() -> None:
    cascade = forked(active="answer")
    cascade.add_stage(StageConfig("g", layers="fork", attach_at=1, rank=4, active="answer", head="none"))
    scramble(cascade.stages["g"], seed=9)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for name, weights in (("f", {"f": 1.0, "g": 0.0}), ("g", {"f": 0.0, "g": 1.0})):
        product = cascade.compose(weights).generate(input_ids=token_ids(), **options)
        assert torch.equal(product, cascade.generate(input_ids=token_ids(), stage=name, **options))


def test_a_fork_in_fp32_stands_on_a_base_in_bf16() -> None:
    base, ids = tiny_base("qwen3", torch.bfloat16), token_ids()
    cascade = Cascade(base)
    for rank in (4, None):
        stage = StageConfig(f"r{rank}", layers="fork", attach_at=1, rank=rank, head="none")
        cascade.add_stage(stage, dtype=torch.float32)
        assert torch.equal(cascade(ids).logits, cascade(ids, stage=None).logits)
        own = cascade.stages[f"r{rank}"].requires_grad_(True)
        cascade(input_ids=ids, labels=ids).loss.backward()
        assert all(p.grad is not None and p.dtype == torch.float32 for p in own.parameters())


def test_every_hidden_state_is_recorded_once(flat_base: str) -> None:
    cascade = Cascade(tiny_base(flat_base))
    assert len(cascade(token_ids(), stage=None, output_hidden_states=True).hidden_states) == 3
    cascade.add_stage(StageConfig("f", layers="fork", attach_at=1, rank=4, head="none"))
    cascade.add_stage(StageConfig("g", layers="fork", attach_at=0, rank=4, head="none", parent="f"))
    for name in ("f", "g"):
        assert len(cascade(token_ids(), stage=name, output_hidden_states=True).hidden_states) == 3


def test_gradients_reach_every_layer_of_a_fork_below_its_parent(flat_base: str) -> None:
    cascade = forked(flat_base)
    cascade.add_stage(StageConfig("g", layers="fork", attach_at=0, rank=None, head="none", parent="f"))
    stage = cascade.stages["g"].requires_grad_(True)
    cascade(input_ids=token_ids(), labels=token_ids()).loss.backward()
    assert all(p.grad is not None for p in stage.parameters())
    assert all(p.grad is None for p in [*cascade.base.parameters(), *cascade.stages["f"].parameters()])


def test_what_cuts_a_model_refuses_a_fork_that_is_active_on_the_answer() -> None:
    """These would run the fork on the prompt, too, and answer differently without a word."""
    cascade, ids, draft = forked(active="answer"), token_ids()[:1], SelfSpeculation(1)
    cascade.add_stage(StageConfig("above", 1, parent="f"))
    for name in ("f", "above"):
        for decode in (
            lambda name=name: cascade.generate(input_ids=ids, stage=name, strategy=draft, max_new_tokens=2),
            lambda name=name: cascade.calibrate_draft([ids[0].tolist()], stage=name),
            lambda name=name: cascade.calibrate_depth([ids[0].tolist()] * 4, stage=name),
        ):
            with pytest.raises(DecodingError, match="active on the answer"):
                decode()
    for choose in (
        lambda: cascade.route(ids),
        lambda: cascade.generate(input_ids=ids, stage="auto", max_new_tokens=2),
    ):
        with pytest.raises(DecodingError, match=r"f, above\. Name a stage for each row"):
            choose()


def test_a_fork_of_all_tokens_drafts_as_it_decodes(flat_base: str) -> None:
    cascade, ids = forked(flat_base), token_ids()[:1]
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    drafted = cascade.generate(input_ids=ids, strategy=SelfSpeculation(1), **options)
    assert torch.equal(drafted, cascade.generate(input_ids=ids, **options))


def test_auto_attaches_at_a_layer_that_copies() -> None:
    cascade = Cascade.from_pretrained("demo", dtype=torch.float32)
    scores = copying_scores(cascade.base)
    assert scores.index(max(scores)) == 5
    cascade.add_stage(name="f", layers="fork", attach_at="auto", head="none")
    assert cascade.stages["f"].below == 5
    assert cascade.base.config._attn_implementation == "sdpa"


def test_a_chain_of_forks_folds_into_one_fork(flat_base: str) -> None:
    for ranks, folded_rank in (((4, 2), 6), ((4, None), None), ((10, 10), 20)):
        cascade = forked(flat_base, rank=ranks[0], head="low_rank", head_rank=4)
        cascade.add_stage(
            StageConfig("g", layers="fork", attach_at=0, rank=ranks[1], head="low_rank", head_rank=2, parent="f")
        )
        scramble(cascade.stages["g"], seed=2, scale=0.1)
        expected = cascade(token_ids()).logits
        folded = cascade.fold("g").stages["g-folded"]
        linear = [module for module in folded.modules() if isinstance(module, ForkedLinear)]
        if folded_rank and folded_rank > min(min(module.in_features, module.out_features) for module in linear):
            folded_rank = None  # a change of low rank would be larger than the weight
        assert (folded.parent, folded.below, folded.config.rank) == (None, 0, folded_rank)
        torch.testing.assert_close(cascade(token_ids()).logits, expected, rtol=1e-3, atol=1e-4)


def test_a_chain_of_several_kinds_does_not_fold() -> None:
    cascade = forked()
    cascade.add_stage(StageConfig("new", 1, parent="f"))
    with pytest.raises(StageError, match="of several kinds"):
        cascade.fold("new")
