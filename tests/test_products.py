"""Products: the combined prediction of several stages is the arithmetic on their separate predictions."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from branched_cascade import STAGES, branched_cascade
from conftest import VOCABULARY, mostly_slow, scramble, tiny_model, token_ids
from decoding_models import MODELS, positions, prompts
from poe import Cascade
from poe.decoding.products import combine
from poe.errors import DataError, DecodingError, FamilyError

ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 0.05}


def alone(cascade: Cascade, stage: str | None, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits (B, T, V), fp32, of the whole model that ends in one stage."""
    with torch.no_grad():
        where = positions(inputs["attention_mask"])
        return cascade.model(stage)(**inputs, position_ids=where, use_cache=False).logits.float()


def naive(cascade: Cascade, weights: dict[str | None, float], mode: str, inputs: dict) -> torch.Tensor:
    """The product of models that are run one after the other, by the formula."""
    if mode == "log_op":
        total = sum(w * alone(cascade, s, inputs).log_softmax(-1) for s, w in weights.items())
    else:
        base = alone(cascade, None, inputs)
        total = base + sum(w * (alone(cascade, s, inputs) - base) for s, w in weights.items())
    assert isinstance(total, torch.Tensor)
    return total.log_softmax(-1)


MIXTURES: list[tuple[str, dict[str | None, float]]] = [
    ("log_op", {"tool": 0.7, "math": 0.3}),
    ("log_op", {None: 0.2, "low": 0.3, "tool": 0.1, "grandchild": 0.4}),
    ("log_op", {"low": 1.0}),
    ("delta", {"math": 0.8, "low": 0.5, "child": -0.4}),
]


@pytest.mark.parametrize(
    ("dtype", "rows"), mostly_slow(itertools.product(ROUNDING, (1, 4)), [(torch.float32, 4), (torch.bfloat16, 1)])
)
@pytest.mark.parametrize("name", MODELS)
def test_a_product_equals_the_formula_on_whole_models(name: str, dtype: torch.dtype, rows: int) -> None:
    cascade, inputs = branched_cascade(name, dtype), prompts(rows)
    real = inputs["attention_mask"].bool()
    for mode, weights in MIXTURES:
        logits = cascade.compose(weights, mode).logits(**inputs)
        expected = naive(cascade, weights, mode, inputs)
        torch.testing.assert_close(logits[real], expected[real], atol=ROUNDING[dtype], rtol=ROUNDING[dtype])
        assert logits.dtype == torch.float32
        assert logits.logsumexp(-1)[real].abs().max() < 1e-5


@pytest.mark.parametrize("mode", ["log_op", "delta"])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["poe with everything", "qwen3 sliding"])
def test_one_stage_at_weight_one_is_that_stage(name: str, stage: str, mode: str) -> None:
    cascade, inputs = branched_cascade(name), prompts(4)
    real = inputs["attention_mask"].bool()
    product = cascade.compose({stage: 1.0}, mode)
    expected = alone(cascade, stage, inputs).log_softmax(-1)
    assert torch.equal(product.logits(**inputs)[real], expected[real])
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(product.generate(**inputs, **options), cascade.generate(**inputs, **options, stage=stage))
    options["do_sample"] = True
    torch.manual_seed(0)
    sampled = product.generate(**inputs, **options, temperature=0.8, top_k=20)
    torch.manual_seed(0)
    assert torch.equal(sampled, cascade.generate(**inputs, **options, temperature=0.8, top_k=20, stage=stage))


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("name", MODELS)
def test_generation_with_a_cache_equals_the_formula_without(name: str, rows: int) -> None:
    """Every step's scores, past the windows, are those of whole models that read everything again."""
    cascade, inputs = branched_cascade(name), prompts(rows)
    for mode, weights in MIXTURES:
        product = cascade.compose(weights, mode)
        output = product.generate(
            **inputs, max_new_tokens=7, do_sample=False, eos_token_id=None,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        ids = output.sequences
        assert torch.equal(torch.stack(output.logits, 1).argmax(-1), ids[:, inputs["input_ids"].shape[1] :])
        mask = torch.cat([inputs["attention_mask"], torch.ones(rows, 7, dtype=torch.long)], 1)
        expected = naive(cascade, weights, mode, {"input_ids": ids, "attention_mask": mask})[:, -8:-1]
        torch.testing.assert_close(torch.stack(output.logits, 1), expected, atol=5e-5, rtol=5e-5)


def test_the_trunk_runs_and_is_cached_once() -> None:
    cascade, inputs = branched_cascade("llama"), prompts(2)
    calls = [0] * 4
    for index, layer in enumerate(cascade.base.model.layers):
        layer.register_forward_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    tool = [0]
    cascade.stages["tool"].layers[0].register_forward_hook(lambda *_: tool.__setitem__(0, tool[0] + 1))
    product = cascade.compose({None: 0.1, "tool": 0.3, "math": 0.2, "child": 0.2, "low": 0.2})
    output = product(**inputs, use_cache=True)
    assert calls == [1, 1, 1, 1]
    assert tool == [1]  # of the chain too
    assert len(output.past_key_values.layers) == 4 + 2 + 1 + 1 + 2
    low = cascade.compose(["low"])
    low(**inputs)
    assert calls == [2, 2, 2, 1]


@pytest.mark.parametrize("name", ["poe with everything", "llama", "qwen3 sliding"])
def test_beams_streamers_processors_and_stopping_are_those_of_generate(name: str) -> None:
    cascade, inputs = branched_cascade(name), prompts(3)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    product = cascade.compose({"tool": 1.0})
    for more in (
        {"num_beams": 3, "eos_token_id": None},
        {"num_return_sequences": 2, "num_beams": 2, "eos_token_id": 5},
        {"bad_words_ids": [[t] for t in range(3, 40)], "eos_token_id": list(range(50, 55))},
    ):
        expected = cascade.generate(**inputs, **options, **more, stage="tool")
        assert torch.equal(product.generate(**inputs, **options, **more), expected)
    mixed = cascade.compose({"tool": 0.5, "low": 0.5})
    said: list[int] = []

    class Streamer:
        def put(self, value: torch.Tensor) -> None:
            said.extend(value.flatten().tolist())

        def end(self) -> None:
            said.append(-1)

    row = {"input_ids": token_ids(1, 5)}
    tokens = mixed.generate(**row, **options, eos_token_id=None, streamer=Streamer())
    assert said == [*tokens[0].tolist(), -1]


@pytest.mark.parametrize("name", ["poe", "qwen3"])
def test_fitting_changes_no_weights_of_the_models(name: str) -> None:
    cascade = branched_cascade(name)
    before = {key: value.clone() for key, value in cascade.base.state_dict().items()}
    stages = {s: {k: v.clone() for k, v in cascade.stages[s].state_dict().items()} for s in STAGES}
    grads = {n: p.requires_grad for s in STAGES for n, p in cascade.stages[s].named_parameters(prefix=s)}
    for mode in ("log_op", "delta"):
        fitted = cascade.compose(["tool", "low"], mode).fit([{"input_ids": row} for row in token_ids(6, 12)])
        assert fitted.after <= fitted.before
        assert fitted.tokens == 6 * 11
    assert all(torch.equal(value, before[key]) for key, value in cascade.base.state_dict().items())
    for s in STAGES:
        assert all(torch.equal(v, stages[s][k]) for k, v in cascade.stages[s].state_dict().items())
        assert all(p.grad is None for p in cascade.stages[s].parameters())
    assert grads == {n: p.requires_grad for s in STAGES for n, p in cascade.stages[s].named_parameters(prefix=s)}


@pytest.mark.parametrize(
    ("mode", "truth"),
    [("log_op", {"tool": 0.15, "math": 0.6, "low": 0.25}), ("delta", {"tool": 0.9, "math": -0.5, "low": 0.4})],
)
def test_fit_recovers_the_weights_that_generated_the_data(mode: str, truth: dict) -> None:
    """Text that a known product has said is said best by that product."""
    cascade = branched_cascade("llama")
    teacher = cascade.compose(truth, mode)
    torch.manual_seed(0)
    prompt = token_ids(256, 2)
    text = teacher.generate(prompt, max_new_tokens=30, do_sample=True, eos_token_id=None, top_k=0, top_p=1.0)
    labels = text.clone()
    labels[:, :2] = -100
    batches = [{"input_ids": x, "labels": y} for x, y in zip(text.split(64), labels.split(64), strict=True)]
    student = cascade.compose(list(truth), mode)
    fitted = student.fit(batches)
    assert fitted.weights == student.weights
    assert fitted.after < fitted.before
    assert fitted.tokens == 256 * 30
    for name, weight in truth.items():
        assert abs(fitted.weights[name] - weight) < 0.06, fitted
    with torch.no_grad():
        own, best = (float(m(input_ids=text, labels=labels).loss) for m in (student, teacher))
    assert fitted.after == pytest.approx(own, abs=1e-4)
    assert own <= best + 1e-4


def test_fit_reads_padding_and_labels_as_a_loss_does() -> None:
    cascade, inputs = branched_cascade("qwen3"), prompts(4)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    product = cascade.compose({"tool": 0.4, None: 0.6})
    with torch.no_grad():
        where = positions(inputs["attention_mask"])
        first = (inputs["attention_mask"].cumsum(-1) == 1) & (inputs["attention_mask"] == 1)
        # A row's first token is predicted by padding: `fit` does not count it.
        loss = product(**inputs, position_ids=where, labels=labels.masked_fill(first, -100)).loss
    fitted = product.fit([inputs])
    assert fitted.before == pytest.approx(float(loss), abs=1e-5)
    for rows, message in (
        ([], "No token"),
        ([{"input_ids": [3], "labels": [3]}], "No token"),
        ([{"input_ids": [3, 4, 5], "labels": [-100] * 3}], "No token"),
        ([[3, 4, 5]], "mapping"),
        ([{"input_ids": [3, 4, 5], "labels": [3, 4]}], "as many"),
    ):
        with pytest.raises(DataError, match=message):
            product.fit(rows)  # type: ignore[arg-type]


def test_fit_lets_stages_for_the_answer_act_on_labels_alone() -> None:
    cascade = Cascade(tiny_model("llama"))
    for seed, name in enumerate(("tool", "math")):
        cascade.add_stage(name=name, layers="fork", attach_at=1, active="answer", head="none")
        scramble(cascade.stages[name], seed)
    row = {"input_ids": token_ids(1), "labels": token_ids(1).index_fill(1, torch.arange(5), -100)}
    product = cascade.compose(["tool", "math"])
    before = product(**row).loss.item()
    assert product.fit([row]).before == pytest.approx(before, rel=1e-4)


@settings(max_examples=50, deadline=None)
@given(data=st.data(), count=st.integers(1, 4), seed=st.integers(0, 10_000))
def test_the_pool_ignores_constants_and_keeps_agreement(data: st.DataObject, count: int, seed: int) -> None:
    """Adding a number to a model's logits changes nothing; models that agree are not changed by being pooled."""
    torch.manual_seed(seed)
    logits = [torch.randn(2, 7) * 4 for _ in range(count)]
    raw = data.draw(st.lists(st.floats(0.01, 1), min_size=count, max_size=count))
    weights = [w / sum(raw) for w in raw]
    pooled = combine(logits, weights)
    shifted = combine([x + torch.randn(2, 1) * 10 for x in logits], weights)
    torch.testing.assert_close(pooled, shifted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(pooled.logsumexp(-1), torch.zeros(2), atol=1e-5, rtol=0)
    same = combine([logits[0]] * count, weights)
    torch.testing.assert_close(same, logits[0].log_softmax(-1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("stages", "mode", "message"),
    [
        ({"tool": 0.7, "math": 0.7}, "log_op", "sum 1.4"),
        ({"tool": 1.5, "math": -0.5}, "log_op", "not be negative"),
        ({"tool": float("nan")}, "log_op", "finite"),
        ({"tool": float("inf")}, "delta", "finite"),
        ({None: 0.5, "tool": 0.5}, "delta", "once"),
        ({}, "log_op", "one or more"),
        (["tool", "tool"], "log_op", "one or more"),
        ({"tool": 1.0}, "mean", "'log_op', 'delta'"),
    ],
)
def test_invalid_products_are_refused(stages: Any, mode: str, message: str) -> None:
    with pytest.raises(DecodingError, match=message):
        branched_cascade("llama").compose(stages, mode)


def test_a_product_cannot_be_saved_as_a_checkpoint(tmp_path: Any) -> None:
    with pytest.raises(FamilyError, match="save_stage"):
        branched_cascade("llama").compose(["tool"]).save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("combiner", ["last", "log_op"])
def test_products_on_a_base_with_stage_heads(combiner: str) -> None:
    """Each tip is read by the head that belongs to its depth; a base that votes has no single state to stand for it."""
    fields = {"num_hidden_layers": 4, "stage_layers": [2, 1, 1], "stage_heads": True, "combiner": combiner}
    cascade = Cascade(tiny_model("poe", fields))
    for seed, (name, attach_at) in enumerate({"top": None, "middle": 3, "early": 2}.items()):
        cascade.add_stage(name=name, num_layers=1, attach_at=attach_at)
        scramble(cascade.stages[name], seed)
    inputs = prompts(3)
    real = inputs["attention_mask"].bool()
    stages: dict[str | None, float] = {"top": 0.5, "early": 0.2, "middle": 0.3}
    if combiner == "last":
        stages |= {"top": 0.1, None: 0.4}
    else:
        rows: list[str | None] = ["top", None, "top"]
        for refused in (lambda: cascade.compose([None, "top"]), lambda: cascade.generate(**inputs, stage=rows)):
            with pytest.raises(FamilyError, match="combines the predictions"):
                refused()
    expected = naive(cascade, stages, "log_op", inputs)
    torch.testing.assert_close(cascade.compose(stages).logits(**inputs)[real], expected[real], atol=2e-5, rtol=2e-5)


def test_products_on_a_recurrent_base() -> None:
    cascade = Cascade(tiny_model("hrm_text", {"head_dim": 8, "num_key_value_heads": 4, "L_cycles": 2}))
    for seed, name in enumerate("ab"):
        cascade.add_stage(name=name, num_layers=1)
        scramble(cascade.stages[name], seed)
    inputs = prompts(2)
    product = cascade.compose({"a": 0.5, None: 0.2, "b": 0.3})
    real = inputs["attention_mask"].bool()
    expected = naive(cascade, product.weights, "log_op", inputs)
    torch.testing.assert_close(product.logits(**inputs)[real], expected[real], atol=2e-5, rtol=2e-5)
    types = {"token_type_ids": torch.ones_like(inputs["input_ids"]), "max_new_tokens": 5, "do_sample": False}
    one = cascade.compose({"a": 1.0})
    assert torch.equal(one.generate(**inputs, **types), cascade.generate(**inputs, **types, stage="a"))
    assert product.generate(**inputs, **types).max() < VOCABULARY
