"""Self-speculation changes only the time: greedy the same tokens, sampled the same distribution."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, LogitsProcessor, StoppingCriteria, TextStreamer

from conftest import every_value, tiny_model, token_ids
from decoding_models import MODELS, decoding_cascade, model_of, prompts
from poe import Cascade
from poe.decoding import drafts
from poe.decoding.speculation import (
    DraftLoop,
    SelfSpeculation,
    accept_or_resample,
    build_loop,
    generate_with,
    look_up_tokens,
)
from poe.errors import DecodingError
from poe.loaders.repository import EMBEDDED_BASE

LENGTH = 16
GREEDY = {"max_new_tokens": LENGTH, "do_sample": False}
ALWAYS = {"min_probability": 0.0}
STAGES = (None, "top", "low")
CASES = pytest.mark.parametrize(("name", "stage", "rows"), every_value(MODELS, STAGES, (4, 1)))


def weaken_upper_layers(cascade: Cascade, scale: float = 0.3) -> Cascade:
    """Make the upper layers weaker, so that some drafts are accepted and some are not."""
    with torch.no_grad():
        for layer in cascade.base.model.layers[2:]:
            layer.self_attn.o_proj.weight.mul_(scale)
            layer.mlp.down_proj.weight.mul_(scale)
    return cascade


def loop_of(cascade: Cascade, exit: int = 2, tokens: int = 4, least: float = 0.0, lookup: int = 0) -> DraftLoop:
    plan = SelfSpeculation(exit, tokens, least, lookup)
    return build_loop(cascade.expert(cascade.active), plan)


@CASES
def test_greedy_tokens_are_those_of_plain_decoding(name: str, stage: str | None, rows: int) -> None:
    """Past the windows, with rows padded on the left that end at different times."""
    cascade, inputs = weaken_upper_layers(decoding_cascade(name, stage)), prompts(rows)
    plain = cascade.generate(**inputs, **GREEDY)
    for tokens, least, lookup in ((1, 0.0, 0), (4, 0.0, 0), (6, 0.2, 0), (4, 0.1, 5)):
        loop = loop_of(cascade, 2, tokens, least, lookup)
        assert torch.equal(generate_with(loop, model_of(cascade), **inputs, **GREEDY), plain)
    assert torch.equal(cascade.generate(**inputs, **GREEDY, strategy=SelfSpeculation(1)), plain)


def test_drafts_are_accepted_and_rejected() -> None:
    """Or the test above would say little: between nothing and everything is accepted, in fewer passes than tokens."""
    cascade = weaken_upper_layers(decoding_cascade("poe"))
    loop = loop_of(cascade)
    generate_with(loop, cascade.base, **prompts(1), max_new_tokens=60, do_sample=False, eos_token_id=None)
    assert 0 < loop.accepted < loop.drafted
    assert loop.passes + loop.accepted == 60
    sure = loop_of(cascade, least=0.15)
    generate_with(sure, cascade.base, **prompts(1), max_new_tokens=60, do_sample=False, eos_token_id=None)
    assert sure.drafted < loop.drafted
    assert sure.accepted / sure.drafted > loop.accepted / loop.drafted


@CASES
def test_in_bf16_only_nearly_equal_logits_may_be_swapped(name: str, stage: str | None, rows: int) -> None:
    """A pass over several tokens rounds differently: of two tokens whose logits are as good as equal either may come.

    Claimed and tested: every token's logit is, in the plain model on what came before it, within rounding of the best.
    """
    cascade, inputs = weaken_upper_layers(decoding_cascade(name, stage, torch.bfloat16)), prompts(rows)
    options = {**GREEDY, "eos_token_id": None}
    ids = generate_with(loop_of(cascade), model_of(cascade), **inputs, **options)
    mask = torch.cat([inputs["attention_mask"], torch.ones(rows, LENGTH, dtype=torch.long)], 1)
    where = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model_of(cascade)(ids, attention_mask=mask, position_ids=where).logits.float()
    said = logits[:, -LENGTH - 1 : -1]
    chosen = said.gather(-1, ids[:, -LENGTH:, None]).squeeze(-1)
    assert (said.max(-1).values - chosen).max() < 0.05 * float(said.abs().max())


def test_logits_processors_get_the_same_inputs() -> None:
    """Native ones that look at all tokens so far, and one of ours that records what it was shown."""
    seen: list[int] = []

    class Watch(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            seen.append(input_ids.shape[1])
            return scores + (input_ids.shape[1] % 3 == 0) * torch.arange(scores.shape[1]) * 0.05

    cascade, inputs = weaken_upper_layers(decoding_cascade("qwen3")), prompts(3)
    options = {**GREEDY, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "min_new_tokens": 9}
    plain = cascade.generate(**inputs, **options, logits_processor=[Watch()])
    seen.clear()
    assert torch.equal(
        cascade.generate(**inputs, **options, logits_processor=[Watch()], strategy=SelfSpeculation(2)), plain
    )
    assert set(seen) == set(range(7, 7 + LENGTH))


def test_generation_ends_where_plain_generation_ends() -> None:
    """At an end token, a stop string, a criterion of one's own, a length; a streamer gets each token once, in order."""

    class AfterWord(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
            return input_ids[:, -1] % 5 == 0

    cascade, tokenizer = (
        weaken_upper_layers(decoding_cascade("poe with everything")),
        AutoTokenizer.from_pretrained(EMBEDDED_BASE),
    )
    free = cascade.generate(**prompts(1), **GREEDY, eos_token_id=None)[0, 7:].tolist()
    ways = [
        {"eos_token_id": free[5]},
        {"eos_token_id": [free[2], free[9]]},
        {"stop_strings": tokenizer.decode(free[7]), "tokenizer": tokenizer},
        {"stopping_criteria": [AfterWord()]},
        {"eos_token_id": None, "stopping_criteria": [AfterWord()]},
        {"max_new_tokens": 1},
        {"max_new_tokens": 2},
    ]
    for rows, way in itertools.product((1, 4), ways):
        inputs = prompts(rows)
        plain = cascade.generate(**inputs, **{**GREEDY, **way})
        assert torch.equal(cascade.generate(**inputs, **{**GREEDY, **way}, strategy=SelfSpeculation(2, 5, 0.0)), plain)

    class Record(TextStreamer):
        def __init__(self) -> None:
            self.got: list[torch.Tensor] = []

        def put(self, value: torch.Tensor) -> None:
            self.got.append(value)

        def end(self) -> None:
            self.got.append(torch.tensor([-1]))

    records = [Record(), Record()]
    cascade.generate(**prompts(1), **GREEDY, streamer=records[0])
    cascade.generate(**prompts(1), **GREEDY, streamer=records[1], strategy=SelfSpeculation(2))
    assert all(torch.equal(a, b) for a, b in zip(*(r.got for r in records), strict=True))


def test_scores_and_logits_are_returned() -> None:
    cascade, inputs = weaken_upper_layers(decoding_cascade("llama")), prompts(2)
    options = {**GREEDY, "return_dict_in_generate": True, "output_scores": True, "output_logits": True, "top_k": 9}
    plain = cascade.generate(**inputs, **options)
    ours = cascade.generate(**inputs, **options, strategy=SelfSpeculation(2))
    for name in ("scores", "logits"):
        a, b = (torch.stack(out[name]) for out in (plain, ours))
        assert a.shape == b.shape
        assert (a - b).abs().max() < 1e-4


def test_repeated_text_is_drafted_without_running_a_layer() -> None:
    """Without its layers a model says the same after the same token, so it goes round; no draft is sure of anything."""
    cascade, inputs = decoding_cascade("llama"), prompts(1)
    with torch.no_grad():
        for layer in cascade.base.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    options = {"max_new_tokens": 200, "do_sample": False, "eos_token_id": None}
    plain = cascade.generate(**inputs, **options)
    without, looking = loop_of(cascade, least=0.9), loop_of(cascade, least=0.9, lookup=8)
    for loop in (without, looking):
        assert torch.equal(generate_with(loop, cascade.base, **inputs, **options), plain)
    assert without.passes == 200
    assert looking.passes < 100
    assert looking.accepted > 0.9 * looking.drafted


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(0, 6))
def test_copied_tokens_followed_the_same_tokens_before(row: list[int], most: int) -> None:
    found = look_up_tokens(torch.tensor([row]), most)[0].tolist()
    before = {size: [i for i in range(size, len(row)) if row[i - size : i] == row[-size:]] for size in (3, 2)}
    places = (before[3] if len(row) > 3 else []) or (before[2] if len(row) > 2 else [])
    if not places or not most:
        assert found == []
    else:
        assert found in [row[i : i + most] for i in places]
        assert len(found) == max(len(row[i : i + most]) for i in places)


probabilities = st.lists(st.floats(0.0, 1.0), min_size=5, max_size=5).filter(lambda p: sum(p) > 0.1)


@settings(max_examples=50, deadline=None)
@given(probabilities, probabilities, st.integers(0, 1000))
def test_accepted_or_resampled_tokens_have_the_targets_distribution(p: list[float], q: list[float], seed: int) -> None:
    """Drafted from q and accepted or drawn again, tokens are distributed as p; the share that p and q share is kept."""
    torch.manual_seed(seed)
    count = 20_000
    target, draft = (torch.tensor(x) / sum(x) for x in (p, q))
    rows = [x.expand(count, -1) for x in (target, draft)]
    tokens, kept = accept_or_resample(*rows, rows[1].multinomial(1))
    counts = torch.bincount(tokens.squeeze(1), minlength=5).double()
    assert chi_square(counts, target.double()) < 40  # of 4 degrees: by chance once in twenty million
    overlap = float(torch.minimum(target, draft).sum())
    assert abs(float(kept.float().mean()) - overlap) < 5 * (0.25 / count) ** 0.5


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    expected = probabilities * counts.sum()
    assert counts[expected < 1e-6].sum() == 0  # what cannot come has not come
    rare = expected < 5
    folded = [torch.cat([x[~rare], x[rare].sum()[None]]) for x in (counts, expected)]
    usable = folded[1] > 1
    return float(((folded[0] - folded[1])[usable] ** 2 / folded[1][usable]).sum())


@pytest.mark.parametrize(
    ("name", "rows", "lookup"),
    [
        ("qwen3 sliding", 1, 0),
        ("poe with everything", 4, 3),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("qwen3 sliding", 1, 3), ("qwen3 sliding", 4, 0), ("qwen3 sliding", 4, 3))
        ),
        pytest.param("poe with everything", 4, 0, marks=pytest.mark.slow),
    ],
)
def test_generated_samples_have_the_distribution_of_full_depth(name: str, rows: int, lookup: int) -> None:
    """Three tokens over a vocabulary cut to three: all 27 continuations against their exact probabilities.

    Equal rows are sampled in groups of `rows`, which advance together. To be looked up, every pair is in the prompt.
    """
    cascade = weaken_upper_layers(decoding_cascade(name))
    few = [5, 11, 23]
    pairs = torch.tensor([[5, 5, 11, 11, 23, 23, 5, 23, 11, 5]])
    prompt = pairs if lookup else prompts(1)["input_ids"]
    length = prompt.shape[1]

    class Few(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            kept = torch.full_like(scores, -torch.inf)
            kept[:, few] = scores[:, few] * 0.4
            return kept

    sequences = torch.tensor(list(itertools.product(few, repeat=3)))
    with torch.no_grad():
        logits = cascade.base(torch.cat([prompt.expand(27, -1), sequences], 1)).logits[:, length - 1 : length + 2]
        shares = Few()(torch.empty(0), logits.flatten(0, 1)).view(27, 3, -1).double().log_softmax(-1)
    expected = shares.gather(-1, sequences[..., None]).squeeze(-1).sum(-1).exp()
    assert float(expected.sum()) == pytest.approx(1)
    torch.manual_seed(0)
    loop = loop_of(cascade, exit=1, tokens=3, lookup=lookup)
    drawn = 400 if rows == 1 else 300
    options = {"max_new_tokens": 3, "do_sample": True, "top_k": 0, "logits_processor": [Few()], "eos_token_id": None}
    out = [generate_with(loop, cascade.base, prompt.expand(rows, -1), **options)[:, length:] for _ in range(drawn)]
    index = {tuple(s): i for i, s in enumerate(sequences.tolist())}
    counts = torch.bincount(torch.tensor([index[tuple(row)] for row in torch.cat(out).tolist()]), minlength=27)
    assert 0 < loop.accepted < loop.drafted
    assert chi_square(counts.double(), expected) < 75  # of 26 degrees: by chance once in a million


def test_drafts_of_a_model_with_idle_upper_layers_are_always_accepted() -> None:
    """With upper layers that add nothing the draft says what full depth says, and sampling keeps every token too."""
    cascade = weaken_upper_layers(decoding_cascade("qwen3"), 0.0)
    for sampling in (False, True):
        loop = loop_of(cascade, exit=2, tokens=5)
        generate_with(loop, cascade.base, token_ids(1, 5), max_new_tokens=61, do_sample=sampling, eos_token_id=None)
        assert loop.accepted == loop.drafted
        assert loop.passes == 11  # one for the prompt, then six tokens each


def test_unsupported_options_are_refused() -> None:
    cascade = decoding_cascade("llama", "low")
    inputs = prompts(1)
    with pytest.raises(DecodingError, match="after 1, 2, 3 \\(layers\\)"):
        cascade.generate(**inputs, strategy=SelfSpeculation(4))
    with pytest.raises(DecodingError, match="num_beams"):
        cascade.generate(**inputs, **GREEDY, strategy=SelfSpeculation(1), num_beams=2)
    with pytest.raises(DecodingError, match="output_hidden_states"):
        cascade.generate(
            **inputs, **GREEDY, strategy=SelfSpeculation(1), output_hidden_states=True, return_dict_in_generate=True
        )
    with pytest.raises(DecodingError, match="cache_implementation"):
        cascade.generate(**inputs, **GREEDY, strategy=SelfSpeculation(1), cache_implementation="static")
    with pytest.raises(DecodingError, match="tokenizer"):
        cascade.generate(**inputs, **GREEDY, strategy=SelfSpeculation(1), stop_strings="x")
    for wrong in ({"num_tokens": 0}, {"prompt_lookup_num_tokens": -1}, {"min_probability": 1.0}):
        with pytest.raises(DecodingError, match="at least one token"):
            SelfSpeculation(1, **wrong)


def test_a_poe_base_drafts_at_its_boundaries_only() -> None:
    cascade = Cascade(tiny_model("poe", {"num_hidden_layers": 4, "stage_layers": [1, 3]}))
    with pytest.raises(DecodingError, match=r"after 2 layers, but .* after 1 \(layers\)"):
        cascade.generate(**prompts(1), strategy=SelfSpeculation(2))
    voting = Cascade(tiny_model("poe", {"num_hidden_layers": 4, "stage_layers": [1, 3], "combiner": "log_op"}))
    with pytest.raises(DecodingError, match="combines the predictions of all its stages"):
        voting.generate(**prompts(1), strategy=SelfSpeculation(1))


def count_layers(cascade: Cascade, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a clock tell one second per layer and pass, however many tokens the pass is over, and as much for a head."""
    ran = [0]

    def tick(*args) -> None:
        ran[0] += 1

    for module in (*cascade.base.model.layers, cascade.base.lm_head):
        module.register_forward_pre_hook(tick)
    monkeypatch.setattr(drafts, "perf_counter", lambda: float(ran[0]))


def test_calibration_finds_the_fastest_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where layers above the second add nothing, that is where to draft: a passing token costs least there."""
    cascade = weaken_upper_layers(decoding_cascade("llama"), 0.0)
    with torch.no_grad():
        cascade.base.lm_head.weight.mul_(20)  # a model that is sure of itself
    count_layers(cascade, monkeypatch)
    prompts = token_ids(1, 6).tolist()
    found = cascade.calibrate_draft(prompts, max_new_tokens=20)
    assert found.depth == 2
    assert found.acceptance == 1.0
    assert found.speedup is not None
    assert found.speedup > 1.03
    assert found.num_tokens == 8
    ids = torch.tensor(prompts)
    assert torch.equal(cascade.generate(ids, **GREEDY, strategy=found), cascade.generate(ids, **GREEDY))


def test_a_draft_that_does_not_pay_is_refused_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    cascade = decoding_cascade("llama")  # no exit knows what the top will say
    count_layers(cascade, monkeypatch)
    with pytest.raises(
        DecodingError, match=r"takes 5e\+03 ms a token, the best draft .* ms \(after \d of 4 layers, .*%"
    ):
        cascade.calibrate_draft(token_ids(1, 6).tolist(), max_new_tokens=10)
    with pytest.raises(DecodingError, match="at least one row"):
        cascade.calibrate_draft([])
