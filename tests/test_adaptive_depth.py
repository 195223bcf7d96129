"""Adaptive depth: each token gets the prediction of the first exit that is confident enough."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import every_value, token_ids
from decoding_models import MODELS, decoding_cascade, model_of, prompts
from poe import Cascade
from poe.decoding import Exit
from poe.decoding.adaptive import CONFIDENCES, ConfidenceMeter, with_adaptive_depth
from poe.decoding.depth import AdaptiveDepth, ExitPredictions, find_thresholds, measure_exits
from poe.decoding.segments import list_exits, segment_model
from poe.errors import DecodingError

LENGTH = 10
QUIET = {"max_new_tokens": LENGTH, "do_sample": False}


def early(cascade: Cascade, cuts: list[int], thresholds: list[float], confidence: str = "margin"):
    expert = cascade.expert(cascade.active)
    return with_adaptive_depth(expert.model, segment_model(expert, cuts), thresholds, confidence)


def median_margin(cascade: Cascade, exit: int) -> float:
    """A threshold that about half of the tokens pass."""
    logits = cascade(token_ids(4, 12), stage=None, strategy=Exit(exit)).logits
    return float(ConfidenceMeter("margin")(logits).median())


@pytest.mark.parametrize(("name", "stage", "rows"), every_value(MODELS, [None, "top", "low"], [4, 1]))
def test_without_early_tokens_generation_is_plain(name: str, stage: str | None, rows: int) -> None:
    cascade, inputs = decoding_cascade(name, stage), prompts(rows)
    plain = cascade.generate(**inputs, **QUIET)
    assert torch.equal(early(cascade, [1, 2], [math.inf, math.inf]).generate(**inputs, **QUIET), plain)


@pytest.mark.parametrize(("name", "rows"), every_value(MODELS, [1, 4]))
def test_if_all_tokens_leave_at_one_exit_the_model_is_that_exit(name: str, rows: int) -> None:
    cascade, inputs = decoding_cascade(name), prompts(rows)
    plain = cascade.generate(**inputs, **QUIET, strategy=Exit(2))
    assert torch.equal(early(cascade, [2], [-1.0]).generate(**inputs, **QUIET), plain)


@pytest.mark.parametrize(("name", "rows"), every_value(MODELS, [4, 1]))
def test_both_extremes_are_exact_in_bf16(name: str, rows: int) -> None:
    """As long as all tokens go the same way, every pass has the plain path's shape: equal to the last bit."""
    cascade, inputs = decoding_cascade(name, dtype=torch.bfloat16), prompts(rows)
    for threshold, exit in ((math.inf, None), (-1.0, 2)):
        plain = cascade.generate(**inputs, **QUIET, strategy=exit and Exit(exit))
        assert torch.equal(early(cascade, [2], [threshold]).generate(**inputs, **QUIET), plain)


@pytest.mark.parametrize(("name", "stage", "rows"), every_value(MODELS, ["top", "low", None], [4, 1]))
@torch.no_grad()
def test_each_token_has_the_logits_of_its_own_exit_in_the_plain_model(name: str, stage: str | None, rows: int) -> None:
    """Some rows leave early and some do not. The logits of every token are those of the whole models."""
    cascade, inputs = decoding_cascade(name, stage), prompts(rows)
    thresholds = [median_margin(cascade, 1), median_margin(cascade, 2)]
    out = early(cascade, [1, 2], thresholds).generate(
        **inputs, **QUIET, return_dict_in_generate=True, output_logits=True, eos_token_id=None
    )
    ids = out.sequences
    mask = torch.cat([inputs["attention_mask"], torch.ones(rows, LENGTH, dtype=torch.long)], 1)[:, : ids.shape[1]]
    where = (mask.cumsum(-1) - 1).clamp(min=0)
    exits = [cascade.model(None, Exit(exit)) for exit in (1, 2)] + [model_of(cascade)]
    said = [model(ids, attention_mask=mask, position_ids=where).logits[:, -LENGTH - 1 : -1] for model in exits]
    sure = [ConfidenceMeter("margin")(logits) >= threshold for logits, threshold in zip(said, thresholds, strict=False)]
    expected = torch.where(sure[0][..., None], said[0], torch.where(sure[1][..., None], said[1], said[2]))
    got = torch.stack(out.logits, 1)
    assert (got - expected).abs().max() < 1e-4
    assert 0 < sure[0].float().mean() < 1  # or this test would say nothing
    teacher = early(cascade, [1, 2], thresholds)(ids, attention_mask=mask, position_ids=where).logits
    assert (teacher[:, -LENGTH - 1 : -1] - expected).abs().max() < 1e-4


def test_sampling_and_beams_go_through_native_generate() -> None:
    cascade, inputs = decoding_cascade("qwen3 sliding"), prompts(3)
    options = {"max_new_tokens": 8, "top_k": 20, "eos_token_id": None}
    model = early(cascade, [1, 2], [math.inf, math.inf])
    for way in ({"do_sample": True, "temperature": 0.8}, {"num_beams": 3, "do_sample": False}):
        torch.manual_seed(1)
        plain = cascade.generate(**inputs, **options, **way)
        torch.manual_seed(1)
        assert torch.equal(model.generate(**inputs, **options, **way), plain)
    half = early(cascade, [2], [median_margin(cascade, 2)])
    beams = half.generate(**inputs, **options, num_beams=3, do_sample=False)
    alone = [
        half.generate(
            inputs["input_ids"][[row]], attention_mask=inputs["attention_mask"][[row]], **options, num_beams=3
        )
        for row in range(3)
    ]
    assert torch.equal(beams, torch.cat(alone))


def test_the_model_is_not_changed() -> None:
    cascade, inputs = decoding_cascade("llama"), prompts(2)
    plain = cascade.generate(**inputs, **QUIET)
    early(cascade, [1], [0.0]).generate(**inputs, **QUIET)
    assert torch.equal(cascade.generate(**inputs, **QUIET), plain)
    assert "forward" not in vars(cascade.base)


@pytest.mark.parametrize("confidence", CONFIDENCES)
def test_calibration_reaches_its_target_and_can_be_saved(confidence: str, tmp_path) -> None:
    cascade = nearly_constant()
    rows = token_ids(24, 30).tolist()
    exact, most = (cascade.calibrate_depth(rows, agreement=a, confidence=confidence) for a in (1.0, 0.9))
    assert most.depths  # leaving pays here
    assert exact.agreement > 0.97
    assert most.agreement > 0.85
    assert sum(most.shares) == pytest.approx(1)
    assert most.shares[-1] < 1
    most.save(tmp_path / "depth.json")
    json.loads((tmp_path / "depth.json").read_text(), parse_constant=refuse)
    again = AdaptiveDepth.load(tmp_path / "depth.json")
    assert again == most
    inputs = prompts(2)
    assert torch.equal(
        cascade.generate(**inputs, **QUIET, strategy=again), cascade.generate(**inputs, **QUIET, strategy=most)
    )


def refuse(constant: str) -> None:
    raise AssertionError(constant)


def nearly_constant() -> Cascade:
    """A base whose upper layers rarely change what is likeliest."""
    cascade = decoding_cascade("poe")
    with torch.no_grad():
        for layer in cascade.base.model.layers[1:]:
            layer.self_attn.o_proj.weight.mul_(0.05)
            layer.mlp.down_proj.weight.mul_(0.05)
    return cascade


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4), st.sampled_from([0.5, 0.8, 0.9, 0.99, 1.0]), st.booleans())
def test_thresholds_reach_the_target_on_the_tokens_they_were_found_on(
    seed: int, exits: int, agreement: float, in_a_row: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    count = 60
    top = torch.randint(0, 5, (1, count), generator=generator)
    noise = torch.rand(exits, count, generator=generator)
    likeliest = torch.where(noise < 0.7, top, torch.randint(0, 5, (exits, count), generator=generator))
    sure = (torch.rand(exits, count, generator=generator) * 20).round() / 20  # with ties
    said = ExitPredictions(torch.cat([likeliest, top]), None if in_a_row else sure)
    found = find_thresholds(said, range(exits), agreement)
    share, shares = measure_exits(said, range(exits), found)
    assert share >= agreement
    assert sum(shares) == pytest.approx(1)


def test_an_exit_that_does_not_pay_is_not_used() -> None:
    """Random upper layers say something else, so only the top is left: the model itself."""
    cascade = decoding_cascade("llama")
    depth = cascade.calibrate_depth(token_ids(20, 30).tolist(), agreement=1.0)
    assert depth.depths == ()
    assert depth.agreement == 1.0
    assert depth.shares == (1.0,)
    assert depth.build_model(cascade.expert(None)) is cascade.base


def test_a_stage_is_calibrated_against_itself() -> None:
    """The base's exits below a specialist speak for the base; where they mislead, the specialist is asked."""
    cascade = nearly_constant()
    cascade.add_stage(name="s", num_layers=1)
    rows = token_ids(24, 30).tolist()
    assert list_exits(cascade.expert("s")) == [1, 2, 3, 4]
    silent = cascade.calibrate_depth(rows, agreement=0.9)
    assert silent.stage == "s"
    assert silent.shares[-1] < 0.5  # a new stage says what the base says
    with torch.no_grad():
        cascade.stages["s"].head.weight.normal_()
    loud = cascade.calibrate_depth(rows, agreement=0.9)
    assert loud.shares[-1] > 0.9
    with pytest.raises(DecodingError, match="for s on "):
        cascade.generate(**prompts(1), strategy=loud, stage=None)


def test_invalid_calibrations_files_and_caches_are_refused(tmp_path) -> None:
    cascade = nearly_constant()
    rows = token_ids(8, 12).tolist()
    with pytest.raises(DecodingError, match="confidence must be one of margin"):
        cascade.calibrate_depth(rows, confidence="certainty")
    with pytest.raises(DecodingError, match="at least two rows"):
        cascade.calibrate_depth(rows[:1])
    with pytest.raises(DecodingError, match="above 0 and at most 1"):
        cascade.calibrate_depth(rows, agreement=99)
    depth = cascade.calibrate_depth(rows, agreement=0.5)
    with pytest.raises(DecodingError, match="strategy should be an Exit"):
        cascade.generate(**prompts(1), strategy=(depth, Exit(1)))
    with pytest.raises(DecodingError, match="decodes with one stage"):
        cascade.generate(**prompts(1), strategy=depth, stage=[None])
    with pytest.raises(DecodingError, match="calibrate_depth"):
        decoding_cascade("llama").generate(**prompts(1), strategy=depth)
    (tmp_path / "not.json").write_text('{"depths": [1]}')
    with pytest.raises(DecodingError, match="not a saved adaptive depth"):
        AdaptiveDepth.load(tmp_path / "not.json")
    cache = cascade.base(token_ids(1, 3)).past_key_values
    with pytest.raises(DecodingError, match="cache of its own, got a DynamicCache"):
        early(cascade, [1], [0.5])(token_ids(1, 3), past_key_values=cache)
    with pytest.raises(DecodingError, match="got a StaticCache"):
        early(decoding_cascade("qwen3"), [1], [0.5]).generate(**prompts(1), **QUIET, cache_implementation="static")
