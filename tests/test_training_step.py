"""One optimizer step: its saved tensors, its gradients, its dtypes, and the errors that stop it."""

import copy
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.graph import saved_tensors_hooks

from conftest import VOCABULARY, scramble, tiny_base, tiny_model, token_ids
from poe import Cascade, StageConfig
from poe.data.packing import PackedRows, pack
from poe.errors import TrainingError
from poe.modeling.families import logits_of
from poe.stages import Recipe
from poe.training.checkpoints.files import list_checkpoints
from poe.training.checks import check_frozen_below
from poe.training.engine import Engine
from poe.training.forward import recompute_activations
from poe.training.hidden_states.sources import whole_model_sources
from poe.training.loss import cross_entropy_sum
from poe.training.precision import check_not_fp16, stage_dtype
from poe.training.reporting.progress import Progress
from poe.training.reporting.tracking import Trackers
from poe.training.run import RunContext, RunRows, RunSettings, TrainedModel

FAMILIES = ("poe", "llama", "qwen3", "gemma3", "hrm")
SEQ_LEN = 16


def grown(base, **fields) -> tuple[Cascade, object, object]:
    """Return a cascade with one noisy trainable stage, its model and the stage."""
    cascade = Cascade(base).add_stage(StageConfig("s", **{"num_layers": 2, **fields}))
    stage = cascade.stages["s"].requires_grad_(True)
    scramble(stage, 1)
    return cascade, cascade.model("s").train(), stage


def loss_of(model, ids: torch.Tensor, **options) -> torch.Tensor:
    """Return the summed loss of random rows, computed as in training."""
    hidden = getattr(model, model.base_model_prefix)(input_ids=ids, use_cache=False).last_hidden_state
    head = model.get_output_embeddings()
    return cross_entropy_sum(hidden, head.weight, ids.roll(-1, 1), logits_of(model.config), head.bias, **options)


def gradients(stage) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in stage.named_parameters()}


def rows_of(count: int, seed: int = 0) -> PackedRows:
    """Return `count` packed rows of documents of unequal lengths, with some tokens without labels."""
    ids = token_ids(count * 4, SEQ_LEN, seed).tolist()
    documents = [(row[: 3 + i % 13], [j % 3 > 0 for j in range(3 + i % 13)]) for i, row in enumerate(ids)]
    return pack(documents, SEQ_LEN, seed=seed)


def trained_labels(engine, rows):
    return int((engine.rows.train.batch(0, rows).labels != -100).sum())


def engine_for(model, stage, folder: Path, rows: int = 8, **fields) -> Engine:
    plan = Recipe(**{"name": "s", "seq_len": SEQ_LEN, "tokens_per_step": SEQ_LEN * rows, "dtype": "float32", **fields})
    data = rows_of(rows)
    folder.mkdir(exist_ok=True)
    token_bytes = torch.ones(VOCABULARY, dtype=torch.long)
    sources = whole_model_sources(model, plan.compile)
    trained = TrainedModel(model, list(stage.named_parameters()), sources, token_bytes)
    context = RunContext(Progress("test", quiet=True), Trackers({}, print))
    return Engine(plan, trained, RunRows(data, data), RunSettings(folder, 2), context)


# --- the boundary


def saved_for_backward(model, stage, ids: torch.Tensor) -> dict[str, int]:
    """Return the bytes that autograd saves for one step, below the stage and in all, without weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[str, dict[int, int]] = {"below": {}, "all": {}}
    where = ["below"]
    handle = stage.layers[0].register_forward_pre_hook(lambda *_: where.clear(), prepend=True)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            for part in ["all", *where]:
                kept[part][storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(model, ids)
    handle.remove()
    loss.backward()
    return {part: sum(storages.values()) for part, storages in kept.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_only_the_stage_saves_tensors_for_the_backward_pass(name: str) -> None:
    _, model, stage = grown(tiny_base(name))
    kept = saved_for_backward(model, stage, token_ids(4, 32))
    assert kept["below"] == 0
    assert kept["all"] > 0
    learned = {id(p) for p in stage.parameters()}
    assert all((p.grad is not None) == (id(p) in learned) for p in model.parameters())


def test_saved_tensors_do_not_grow_with_the_depth_of_the_base() -> None:
    needed = []
    for depth in (1, 6):
        _, model, stage = grown(tiny_model("llama", {"num_hidden_layers": depth}))
        needed.append(saved_for_backward(model, stage, token_ids(4, 32))["all"])
    assert needed[0] == needed[1]


@pytest.mark.parametrize("name", FAMILIES)
def test_frozen_base_passes_the_check_unchanged(name: str) -> None:
    cascade, model, stage = grown(tiny_base(name))
    model.eval()
    check_frozen_below(model, stage)
    assert not model.training
    model.enable_input_require_grads()  # on the grown model this hook concerns the input of the stage
    check_frozen_below(model, stage)
    model.disable_input_require_grads()
    cascade.add_stage(StageConfig("child", parent="s"))
    child = cascade.stages["child"].requires_grad_(True)
    check_frozen_below(cascade.model("child"), child)


def test_base_that_keeps_a_graph_is_refused() -> None:
    cascade, model, stage = grown(tiny_base("qwen3"))
    cascade.base.enable_input_require_grads()
    with pytest.raises(TrainingError, match=r"requires a gradient.*enable_input_require_grads"):
        check_frozen_below(model, stage)
    cascade.base.disable_input_require_grads()
    check_frozen_below(model, stage)
    cascade.base.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    with pytest.raises(TrainingError, match=r"model.layers.0.mlp.up_proj.weight: freeze"):
        check_frozen_below(model, stage)


def test_graph_in_the_base_is_found_below_a_parent_stage() -> None:
    cascade, _, _ = grown(tiny_base("qwen3"))
    cascade.add_stage(StageConfig("child", parent="s"))
    child = cascade.stages["child"].requires_grad_(True)
    cascade.base.enable_input_require_grads()
    with pytest.raises(TrainingError, match="autograd kept"):
        check_frozen_below(cascade.model("child"), child)


# --- activation checkpointing


@pytest.mark.parametrize("name", [*FAMILIES, "cohere-tied"])
def test_recomputed_layers_save_less_and_give_the_same_gradients(name: str) -> None:
    _, model, stage = grown(tiny_base(name))
    ids, results = token_ids(3, 12), []
    for layers in ((), stage.layers):
        with recompute_activations(layers):
            kept = saved_for_backward(model, stage, ids)["all"]
            stage.zero_grad()
            loss = loss_of(model, ids)
            loss.backward()
        results.append((kept, loss, gradients(stage)))
    (plain, loss, expected), (less, again, recomputed_gradients) = results
    assert less < 0.6 * plain
    assert torch.equal(again, loss)
    assert all(torch.equal(recomputed_gradients[n], gradient) for n, gradient in expected.items())
    assert all("forward" not in vars(layer) for layer in stage.layers)


# --- accumulation


@pytest.fixture(scope="module")
def llama():
    return tiny_base("llama")


@settings(deadline=None, max_examples=20)
@given(rows=st.integers(1, 6), micro=st.integers(1, 6), z_loss=st.sampled_from([0.0, 1e-2]))
def test_micro_batches_give_the_gradients_of_one_batch(llama, tmp_path_factory, rows, micro, z_loss) -> None:
    """The mean is over the labels of the whole step, which are spread unevenly over its micro-batches."""
    results = []
    for size in (rows, min(micro, rows)):
        _, model, stage = grown(llama)
        folder = tmp_path_factory.mktemp("run")
        engine = engine_for(model, stage, folder, rows, max_tokens_per_batch=size * SEQ_LEN, z_loss=z_loss)
        loss = engine.training_step.accumulate_gradients(engine.rows.train.batch(0, rows), trained_labels(engine, rows))
        results.append((loss, gradients(stage)))
    (whole, expected), (split, summed) = results
    assert split == pytest.approx(whole, rel=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(summed[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


# --- clipping, and numbers that are not finite


def test_gradient_norm_is_recorded_before_clipping(llama, tmp_path: Path) -> None:
    norms = []
    for limit in (None, 0.01):
        _, model, stage = grown(llama)
        engine = engine_for(model, stage, tmp_path / str(limit), max_grad_norm=limit)
        history = engine.run()
        norms.append([record["grad_norm"] for record in history.steps])
        lines = [json.loads(line) for line in (engine.settings.folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["grad_norm"] for line in lines if "loss" in line] == norms[-1]
    assert norms[0][0] == pytest.approx(norms[1][0])  # before clipping
    assert norms[0][0] > 0.01


def poison_weight(model, stage, value):
    stage.layers[1].mlp.up_proj.weight.data[0, 0] = value


def poison_base(model, stage, value):
    model.model.layers[0].self_attn.q_proj.weight.data[0, 0] = value


def poison_hidden(model, stage, value):
    stage.layers[0].mlp.register_forward_hook(lambda module, args, output: output * value)


def poison_gradient(model, stage, value):
    stage.layers[0].mlp.down_proj.weight.register_hook(lambda gradient: gradient * value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("poison", "culprit"),
    [
        (poison_weight, r"the weight layers.1.mlp.up_proj.weight \(. nan and . infinite of 1,536 numbers\)"),
        (poison_base, r"the weight model.layers.0.self_attn.q_proj.weight \("),
        (poison_hidden, r"the hidden state that model.layers.2.mlp returns \("),
        (poison_gradient, r"the gradient of layers.0.mlp.down_proj.weight \("),
    ],
)
def test_first_tensor_that_is_not_finite_is_named_before_the_step(tmp_path, poison, culprit: str, value) -> None:
    _, model, stage = grown(copy.deepcopy(tiny_base("llama")))
    engine = engine_for(model, stage, tmp_path, max_grad_norm=1.0)
    engine._take_step(0)
    engine._save_checkpoint(1)
    checkpoint = {path.name: path.read_bytes() for path in (engine.settings.folder / "checkpoint-1").iterdir()}
    poison(model, stage, value)
    before = {name: p.detach().clone() for name, p in stage.named_parameters()}
    with pytest.raises(TrainingError, match=f"loss of step 2 is .*{culprit}"):
        engine._take_step(1)
    for name, p in stage.named_parameters():
        assert torch.equal(p.nan_to_num(7.0), before[name].nan_to_num(7.0)), name
    assert {path.name: path.read_bytes() for path in (engine.settings.folder / "checkpoint-1").iterdir()} == checkpoint


def test_infinite_loss_is_named_when_all_hidden_states_are_finite(tmp_path: Path, llama) -> None:
    _, model, stage = grown(llama)
    engine = engine_for(model, stage, tmp_path)
    stage.head.weight.data[5] = 3e38  # finite, but its logits are not
    with pytest.raises(TrainingError, match=r"first tensor that is not finite is the loss \("):
        engine._take_step(0)


def test_weights_that_are_not_finite_do_not_replace_a_checkpoint(tmp_path: Path, llama) -> None:
    _, model, stage = grown(llama)
    engine = engine_for(model, stage, tmp_path, matrix_lr=1e38, head_lr=1e38, checkpoint_every=0.0)
    with pytest.raises(TrainingError, match=r"After step 1 .* the weight head.weight \(0 nan and 1,952 inf"):
        engine.run()
    assert not list_checkpoints(engine.settings.folder)


# --- precision


@pytest.mark.parametrize("name", FAMILIES)
def test_fp32_stage_trains_on_a_bf16_base(name: str, tmp_path: Path) -> None:
    """Its weights and gradients are fp32, and close to those on the same base in fp32."""
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        base = tiny_base(name, torch.bfloat16).to(dtype)  # the same numbers
        cascade = Cascade(base).add_stage(StageConfig("s", num_layers=1), dtype=stage_dtype("float32", base))
        stage = cascade.stages["s"].requires_grad_(True)
        engine = engine_for(cascade.model("s"), stage, tmp_path / str(dtype))
        assert {p.dtype for p in stage.parameters()} == {torch.float32}
        loss = engine.training_step.accumulate_gradients(engine.rows.train.batch(0, 8), trained_labels(engine, 8))
        results[dtype] = loss, torch.cat([g.flatten() for g in gradients(stage).values()])
        engine.optimizer.zero_grad()
        first = {n: p.detach().clone() for n, p in stage.named_parameters()}
        engine.run()
        assert any(not torch.equal(p, first[n]) for n, p in stage.named_parameters())
        assert all("master" not in state for state in engine.optimizer.state.values())  # fp32 weights need no masters
    (loss, exact), (rounded_loss, rounded) = results.values()
    assert rounded_loss == pytest.approx(loss, rel=0.02)
    assert torch.cosine_similarity(rounded, exact, dim=0) > 0.99


def test_dtype_auto_is_the_dtype_of_the_base() -> None:
    base = tiny_base("llama", torch.bfloat16)
    assert stage_dtype("auto", base) == torch.bfloat16
    assert stage_dtype("float32", base) == torch.float32
    assert stage_dtype("bfloat16", tiny_base("llama")) == torch.bfloat16


def test_fp16_is_refused() -> None:
    half = tiny_base("llama", torch.float16)
    with pytest.raises(TrainingError, match=r"float16: .*bfloat16"):
        check_not_fp16(half)
    with pytest.raises(TrainingError, match="float16"):
        check_not_fp16(tiny_base("llama"), half.lm_head)
    check_not_fp16(tiny_base("llama", torch.bfloat16), tiny_base("llama"))


# --- torch.compile


@pytest.mark.slow
def test_compiled_training_equals_eager_training(tmp_path: Path, monkeypatch) -> None:
    """Losses and parameter names are the same, and the model still validates and generates."""
    # this backend captures the graph as inductor does, without the minutes of compilation
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    results = {}
    for fast in (False, True):
        _, model, stage = grown(tiny_model("qwen3", {"head_dim": 8, "num_hidden_layers": 1}), num_layers=1)
        names = list(model.state_dict())
        engine = engine_for(model, stage, tmp_path / str(fast), compile=fast, max_tokens_per_batch=4 * SEQ_LEN)
        with recompute_activations(stage.layers if fast else ()):
            history = engine.run()
        assert list(model.state_dict()) == names
        generated = model.eval().generate(token_ids(1, 5), max_new_tokens=4, do_sample=False, eos_token_id=None)
        results[fast] = [r["loss"] for r in history.steps], [r["val_loss"] for r in history.evals], generated
    torch.testing.assert_close(results[True][0], results[False][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(results[True][1], results[False][1], rtol=1e-4, atol=1e-4)
    assert torch.equal(results[True][2], results[False][2])


def test_compilation_failure_is_one_message(tmp_path: Path, llama, monkeypatch) -> None:
    from torch._dynamo.exc import TorchDynamoException

    def broken(module, **options):
        def call(**inputs):
            raise TorchDynamoException("no working C++ compiler found\nand a long trace")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    _, model, stage = grown(llama)
    engine = engine_for(model, stage, tmp_path, compile=True)
    with pytest.raises(TrainingError, match=r"cannot compile the LlamaModel: no working C\+\+ compiler found On a CPU"):
        engine._take_step(0)
