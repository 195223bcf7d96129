"""Routing: each row of a mixed batch gets the output of its own stage, and each prompt finds the stage for it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from branched_cascade import STAGES, branched_cascade
from conftest import every_value, scramble, tiny_model, token_ids
from decoding_models import MODELS, decoding_cascade, positions, prompts
from poe import Cascade
from poe.decoding import Exit, SelfSpeculation
from poe.decoding.branches import build_branched_model
from poe.decoding.prompt_center import fit_prompt_center, read_center
from poe.decoding.routing import RoutedModel
from poe.errors import DecodingError, DeltaError, StageError

ROWS: list[str | None] = ["tool", "math", None, "low", "child", "tool", "grandchild", None]
GREEDY: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False}


def row_of(inputs: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    """One row of a batch without its padding."""
    real = inputs["attention_mask"][row].bool()
    return {name: tensor[row : row + 1, real] for name, tensor in inputs.items()}


def routed(cascade: Cascade, stages: list[str | None]) -> tuple[Any, torch.Tensor]:
    """A model for these rows, and which tip each of them has."""
    names = list(dict.fromkeys(stages))
    experts = [cascade.expert(name) for name in names]
    return build_branched_model(cascade.base, experts, RoutedModel), torch.tensor(
        [names.index(name) for name in stages]
    )


@pytest.mark.parametrize(("name", "eos"), every_value(MODELS, [None, list(range(40, 50))]))
def test_each_row_generates_what_it_generates_alone(name: str, eos: Any) -> None:
    """Greedy, past the windows, with left padding; with a stop token rows end one after the other."""
    cascade, inputs = branched_cascade(name), prompts(len(ROWS), 8)
    output = cascade.generate(**inputs, **GREEDY, eos_token_id=eos, stage=ROWS)
    ends = set()
    for row, stage in enumerate(ROWS):
        expected = cascade.generate(**row_of(inputs, row), **GREEDY, eos_token_id=eos, stage=stage)[0]
        said, new = output[row, 8:], expected[inputs["attention_mask"][row].sum() :]
        assert torch.equal(said[: len(new)], new), (row, stage)
        assert (said[len(new) :] == 0).all()
        ends.add(len(new))
    assert eos is None or len(ends) > 1


@pytest.mark.parametrize(
    ("name", "dtype", "stages"),
    every_value(
        MODELS,
        [torch.float32, torch.bfloat16],
        [["math"], ["low", None, "low", "math"], ["grandchild", "child", "low", "tool"]],
    ),
)
@torch.no_grad()
def test_the_logits_of_a_mixed_batch_equal_those_of_whole_models(name: str, dtype: torch.dtype, stages: list) -> None:
    """A prompt, then tokens one by one into the cache."""
    cascade, inputs = branched_cascade(name, dtype), prompts(len(stages), 12)
    model, branch = routed(cascade, stages)
    where, mask = positions(inputs["attention_mask"]), inputs["attention_mask"]
    caches: dict[Any, Any] = {}
    tolerance = 2e-5 if dtype == torch.float32 else 0.08
    for start, end in [(0, 6), *((t, t + 1) for t in range(6, 12))]:
        call = {"attention_mask": mask[:, :end], "position_ids": where[:, start:end], "use_cache": True}
        ids, real = inputs["input_ids"][:, start:end], mask[:, start:end].bool()
        output = model(ids, branch=branch, past_key_values=caches.get("routed"), **call)
        caches["routed"] = output.past_key_values
        for stage in set(stages):
            whole = cascade.model(stage)(ids, past_key_values=caches.get(stage), **call)
            caches[stage] = whole.past_key_values
            own = torch.tensor([name == stage for name in stages])
            torch.testing.assert_close(
                output.logits[own][real[own]], whole.logits[own][real[own]], atol=tolerance, rtol=tolerance
            )


def test_the_trunk_runs_once_and_a_stage_on_its_rows_only() -> None:
    cascade, inputs = branched_cascade("llama"), prompts(8)
    seen: dict[str, list[int]] = {}

    def watch(name: str, layer: torch.nn.Module) -> None:
        layer.register_forward_hook(lambda _, args, __: seen.setdefault(name, []).append(len(args[0])))

    for index, layer in enumerate(cascade.base.model.layers):
        watch(f"base {index}", layer)
    for name in STAGES:
        watch(name, cascade.stages[name].layers[0])
    cascade.generate(**inputs, stage=ROWS, max_new_tokens=2, eos_token_id=None)
    rows = {"tool": 4, "math": 1, "low": 1, "child": 2, "grandchild": 1}  # two of tool's are those that stand on it
    assert seen == {**{f"base {i}": [8, 8] for i in range(4)}, **{name: [n, n] for name, n in rows.items()}}


@pytest.mark.parametrize("name", ["poe with everything", "llama", "qwen3 sliding"])
def test_beams_and_several_sequences_stay_with_their_row(name: str) -> None:
    cascade, inputs = branched_cascade(name), prompts(4)
    stages = ["tool", None, "low", "tool"]
    options = {**GREEDY, "num_beams": 3, "num_return_sequences": 2, "eos_token_id": [7, 8, 9]}
    output = cascade.generate(**inputs, **options, stage=stages)
    for row, stage in enumerate(stages):
        expected = cascade.generate(**row_of(inputs, row), **options, stage=stage)
        length, padding = expected.shape[1], int((inputs["attention_mask"][row] == 0).sum())
        assert torch.equal(output[2 * row : 2 * row + 2, padding : padding + length], expected)


def test_sampling_follows_each_rows_own_distribution() -> None:
    """Chi-square over a small vocabulary: the same two prompts, many times, each with its stage."""
    cascade = branched_cascade("llama")
    stages: list[str | None] = ["tool", "low"]
    ids, times = token_ids(2, 5), 4000
    torch.manual_seed(0)
    output = cascade.generate(
        ids, stage=stages, max_new_tokens=1, do_sample=True, num_return_sequences=times, top_k=0, eos_token_id=None
    )
    for row, stage in enumerate(stages):
        with torch.no_grad():
            expected = cascade.model(stage)(ids[row : row + 1]).logits[0, -1].softmax(-1) * times
        counts = torch.bincount(output[row * times : (row + 1) * times, -1], minlength=len(expected)).float()
        frequent = expected >= 5
        observed = torch.cat([counts[frequent], counts[~frequent].sum()[None]])
        wanted = torch.cat([expected[frequent], expected[~frequent].sum()[None]])
        statistic = ((observed - wanted) ** 2 / wanted).sum()
        degrees = len(wanted) - 1
        assert statistic < degrees + 4 * (2 * degrees) ** 0.5, (stage, float(statistic), degrees)


def test_rows_stop_at_the_stop_tokens_of_their_own_stage() -> None:
    cascade, inputs = branched_cascade("qwen3"), prompts(4)
    plain = cascade.generate(**inputs, **GREEDY, eos_token_id=None, stage=["tool", "tool", "math", None])[:, 7:]
    # Each stage ends at what it says third; the other's stop token means nothing to it.
    for name, row in (("tool", 0), ("math", 2)):
        cascade.stages[name].generation_config = GenerationConfig(eos_token_id=int(plain[row, 2]), pad_token_id=0)
    cascade._models.clear()
    stages = ["tool", "tool", "math", None]

    def check(**options: Any) -> None:
        output = cascade.generate(**inputs, **options, stage=stages)
        for row, stage in enumerate(stages):
            expected = cascade.generate(**row_of(inputs, row), **options, stage=stage)[0]
            expected = expected[inputs["attention_mask"][row].sum() :]
            assert torch.equal(output[row, 7 : 7 + len(expected)], expected)
            assert (output[row, 7 + len(expected) :] == 0).all()

    check(**GREEDY)
    check(**GREEDY, eos_token_id=[int(token) for token in plain[:, 4]])  # these are for all rows
    cascade.stages["math"].generation_config = GenerationConfig(do_sample=True, temperature=0.3)
    cascade._models.clear()
    with pytest.raises(DecodingError, match="different ways to generate"):
        cascade.generate(**inputs, stage=stages)
    check(generation_config=GenerationConfig(**GREEDY, pad_token_id=0))


def word_prompts(first: int, numbers: range) -> list[list[int]]:
    """Return prompts, one for each number, that use three tokens only."""
    return [(token_ids(1, 30, seed=number)[0] % 3 + first).tolist() for number in numbers]


@pytest.mark.parametrize("name", ["poe", "llama", "qwen3 sliding"])
def test_a_prompt_finds_the_stage_that_was_trained_on_its_like(name: str, tmp_path: Path) -> None:
    """Padding or not, also for a fork that does not read prompts; what is like no training prompt goes to the base."""
    cascade = decoding_cascade(name)
    cascade.add_stage(name="low", num_layers=1)
    cascade.activate(None).add_stage(name="high", layers="fork", attach_at=2, rank=2, active="answer", head="none")
    with pytest.raises(DecodingError, match="do not know theirs: low, high"):
        cascade.route(token_ids(1))
    for stage, first in (("low", 10), ("high", 40)):
        assert fit_prompt_center(cascade.base, cascade.stages[stage], word_prompts(first, range(7))) is None
        assert fit_prompt_center(cascade.base, cascade.stages[stage], word_prompts(first, range(24))) is not None
    others = [word_prompts(first, range(100, 110)) for first in (10, 40, 25)]
    rows = [torch.tensor(prompt[i % 5 :]) for prompts in others for i, prompt in enumerate(prompts)]
    width = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in rows])
    mask = torch.stack([torch.arange(width) >= width - len(row) for row in rows]).long()
    decision = cascade.route(ids, mask)
    chosen = [decision.stages[start : start + 10] for start in (0, 10, 20)]
    assert [set(stages) - {None} for stages in chosen] == [{"low"}, {"high"}, set()]
    assert min(chosen[0].count("low"), chosen[1].count("high")) >= 8  # the random base has odd ones
    for row, text in enumerate(rows):
        alone = cascade.route(text[None])
        assert alone.scores[0] == pytest.approx(decision.scores[row], abs=1e-3)
        assert alone.scores[0][None] == 0.0
    output = cascade.generate(input_ids=ids, attention_mask=mask, stage="auto", return_dict_in_generate=True, **GREEDY)
    assert output.stages == decision.stages
    assert output.routing == decision
    expected = cascade.generate(input_ids=ids, attention_mask=mask, stage=decision.stages, **GREEDY)
    assert torch.equal(output.sequences, expected)
    with pytest.warns(UserWarning, match="never trained"):
        cascade.save_stage("low", tmp_path / "low", dtype=torch.float32)
    saved = json.loads((tmp_path / "low" / "config.json").read_text())["prompt"]
    assert saved == cascade.stages["low"].prompt


@pytest.mark.parametrize(
    "content",
    [
        {"direction": "AAAA", "edge": 0.5},  # not whole numbers of two bytes
        {"direction": "AAA=", "edge": 0.5},  # zero
        {"direction": "/38=", "edge": 0.5},  # not finite
        {"direction": "ADw=", "edge": 1.5},
        {"direction": "ADw=", "edge": 10**400},
        {"direction": "ADw=", "edge": None},
        {"direction": "ADw=", "edge": float("nan")},
        {"direction": ["ADw="], "edge": 0.5},
        "near",
    ],
)
def test_a_damaged_center_is_refused(content: Any) -> None:
    with pytest.raises(DeltaError, match="center in the stage's prompt should have a direction"):
        read_center({"center": content})


def test_a_center_of_another_width_is_refused() -> None:
    cascade = decoding_cascade("llama").add_stage(name="tool", num_layers=1)
    cascade.stages["tool"].prompt = {"center": {"direction": "ADw=", "edge": 0.5}}
    with pytest.raises(DeltaError, match="has 1 numbers, but the base has 32"):
        cascade.route(token_ids(1))


def test_without_stages_the_base_answers() -> None:
    cascade = decoding_cascade("qwen3")
    assert cascade.route(token_ids(3)).scores == [{None: 0.0}] * 3
    output = cascade.generate(token_ids(2), stage="auto", return_dict_in_generate=True, **GREEDY)
    assert output.stages == [None] * 2


def test_a_stage_may_be_called_auto() -> None:
    cascade = decoding_cascade("llama").add_stage(name="auto", num_layers=1)
    scramble(cascade.stages["auto"])
    ids = token_ids(2)
    assert torch.equal(cascade.generate(ids, stage="auto", **GREEDY), cascade.model("auto").generate(ids, **GREEDY))


def test_routing_on_a_recurrent_base() -> None:
    cascade = Cascade(tiny_model("hrm_text", {"head_dim": 8, "num_key_value_heads": 4, "L_cycles": 2}))
    for seed, name in enumerate("ab"):
        cascade.add_stage(name=name, num_layers=1)
        scramble(cascade.stages[name], seed)
    inputs = prompts(3)
    output = cascade.generate(**inputs, **GREEDY, eos_token_id=None, stage=["b", None, "a"])
    for row, stage in enumerate(["b", None, "a"]):
        expected = cascade.generate(**row_of(inputs, row), **GREEDY, eos_token_id=None, stage=stage)
        assert torch.equal(output[row, 7:], expected[0, -9:])


def test_invalid_routing_is_refused() -> None:
    cascade = branched_cascade("llama")
    ids = token_ids(2)
    with pytest.raises(DecodingError, match="got 3 for 2 rows"):
        cascade.generate(ids, stage=["tool", None, "math"])
    with pytest.raises(DecodingError, match="token ids"):
        cascade.generate(inputs_embeds=torch.zeros(2, 3, 32), stage=["tool", None])
    for strategy in (Exit(2), SelfSpeculation(2)):
        with pytest.raises(DecodingError, match="one stage"):
            cascade.generate(ids, stage=["tool", None], strategy=strategy)
    with pytest.raises(StageError, match="no stage 'tol'"):
        cascade.generate(ids, stage=["tol", None])
    cascade.base.set_attn_implementation("flex_attention")
    with pytest.raises(DecodingError, match="Flex"):
        cascade.generate(ids, stage=["tool", None])
