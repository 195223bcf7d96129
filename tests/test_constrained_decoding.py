"""Replies stay inside a grammar: calls that parse, fit their schema and end, from models with random weights."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from tool_sets import make_tools

from chat_families import family
from conftest import demo_tokenizer, mostly_slow, scramble, tiny_model, tiny_tokenizer
from poe import Cascade, StageConfig
from poe.calls.conversation import Call, Conversation
from poe.calls.forms.call_forms import CALL_FORMS, parse_reply
from poe.calls.grammar import MARKS, ToolChoice, read_tool_choice, write_call_grammar, write_json_grammar
from poe.calls.tools import check_calls, read_tools
from poe.chat import Answer, generate_replies, plan_reply, read_call_threshold
from poe.data.render import Renderer
from poe.decoding import SelfSpeculation
from poe.decoding.constraints import Constraint, ConstraintProcessor, Vocabulary, read_vocabulary
from poe.errors import DataError, DecodingError, DeltaError
from poe.evaluation.calls import choose_threshold, evaluate_calls, fit_call_threshold, score_openings

QUESTION = [{"role": "user", "content": "What is the weather in Lisbon?"}]
ANSWER = {"role": "assistant", "content": "I cannot."}
KINDS = ("qwen3", "llama-2", "chatml, unigram", "demo")  # byte-level, space marks and bytes, Unigram, one digit a token


def get_weather(city: str, days: int = 1) -> str:
    """Get the weather.

    Args:
        city: The city.
        days: Number of days.
    """
    return city * days


def get_time(zone: str) -> str:
    """Get the time.

    Args:
        zone: The zone.
    """
    return zone


TOOLS = read_tools([get_weather, get_time])


def tokenizer_of(kind: str) -> Any:
    return demo_tokenizer() if kind == "demo" else family(kind)


def vocabulary_of(kind: str) -> tuple[Any, Vocabulary]:
    tokenizer = tokenizer_of(kind)
    return tokenizer, read_vocabulary(tokenizer, len(tokenizer) + 8, [tokenizer.eos_token_id], MARKS)


def write_reply(constraint: Constraint, size: int, seed: int, max_new_tokens: int) -> list[int]:
    """Return the tokens that a model of random logits writes under a constraint."""
    generator, tokens = torch.Generator().manual_seed(seed), list[int]()
    while len(tokens) < max_new_tokens and not constraint.is_finished:
        logits = torch.randn(size, generator=generator) * 3
        constraint.mask(logits)
        tokens.append(int(logits.argmax()))
        assert constraint.accept(tokens[-1])
    assert constraint.is_finished
    return tokens[:-1]


def make_constraint(vocabulary: Vocabulary, tools: Any, form: str, mode: Any, max_new_tokens: int) -> Constraint:
    grammar = write_call_grammar(form, read_tool_choice(mode, tools), vocabulary.special)
    limits = {"longest": grammar.longest, "shortest": grammar.shortest, "max_new_tokens": max_new_tokens}
    return Constraint(grammar.lark, vocabulary, **limits)


@pytest.mark.parametrize("kind", KINDS)
def test_a_random_model_writes_calls_that_fit_and_end(kind: str) -> None:
    tokenizer, vocabulary = vocabulary_of(kind)
    for seed in range(4):
        tools = make_tools(seed)
        constraint = make_constraint(vocabulary, tools, "hermes", "required", 160)
        tokens = write_reply(constraint, len(tokenizer) + 8, seed, 160)
        reply = parse_reply(tokenizer.decode(tokens))
        assert reply.calls
        assert not reply.malformed
        assert not check_calls(reply.calls, tools)


@pytest.mark.parametrize("kind", KINDS)
def test_addresses_and_times_that_would_not_end_are_closed(kind: str) -> None:
    texts = {"pattern": "^[a-z]+@[a-z]+\\.com$"}, {"format": "email"}, {"format": "date-time"}, {"format": "uri"}
    properties = {f"field{i}": {"type": "string", **limits} for i, limits in enumerate(texts)}
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    tools = read_tools([{"type": "function", "function": {"name": "send", "parameters": schema}}])
    tokenizer, vocabulary = vocabulary_of(kind)
    constraint = make_constraint(vocabulary, tools, "hermes", "required", 260)
    letter = tokenizer.convert_tokens_to_ids("a")
    tokens: list[int] = []
    while not constraint.is_finished:  # a model that writes the same letter wherever it may
        assert len(tokens) < 260
        logits = torch.zeros(len(tokenizer) + 8)
        logits[letter] = 1
        constraint.mask(logits)
        tokens.append(int(logits.argmax()))
        assert constraint.accept(tokens[-1])
    assert constraint.is_cut
    reply = parse_reply(tokenizer.decode(tokens[:-1]))
    assert not reply.malformed
    assert not check_calls(reply.calls, tools)


@pytest.mark.parametrize(
    ("form", "kind"), mostly_slow([(f, k) for f in CALL_FORMS for k in KINDS], [(f, "demo") for f in CALL_FORMS])
)
def test_every_call_form_can_be_constrained(form: str, kind: str) -> None:
    tokenizer, vocabulary = vocabulary_of(kind)
    for seed in range(2):
        constraint = make_constraint(vocabulary, TOOLS, form, "required", 220)
        reply = parse_reply(tokenizer.decode(write_reply(constraint, len(tokenizer) + 8, seed, 220)), form)
        assert reply.calls
        assert not reply.malformed
        assert not check_calls(reply.calls, TOOLS)


def accepts(constraint: Constraint, tokenizer: Any, text: str) -> bool:
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    return all(map(constraint.accept, tokens)) and constraint.accept(tokenizer.eos_token_id)


@pytest.mark.parametrize("form", CALL_FORMS)
def test_a_grammar_has_what_the_call_form_writes(form: str) -> None:
    tokenizer, vocabulary = vocabulary_of("demo")
    calls = [Call("get_weather", {"city": 'Saint "X" \\ \n Øre', "days": -3}), Call("get_time", {"zone": "it's"})]
    written = CALL_FORMS[form].write(calls)
    texts = ["", "I {can} not [do](that): 3 < 4.\nSorry."]
    for mode in ("auto", "required", "none"):
        constraint = make_constraint(vocabulary, TOOLS, form, mode, 400)
        assert accepts(constraint.copy(), tokenizer, written) == (mode != "none")
        for text in texts:
            assert accepts(constraint.copy(), tokenizer, text) == (mode != "required")
    one = make_constraint(vocabulary, TOOLS, form, {"type": "function", "function": {"name": "get_time"}}, 400)
    assert accepts(one.copy(), tokenizer, CALL_FORMS[form].write(calls[1:]))
    assert not accepts(one.copy(), tokenizer, CALL_FORMS[form].write(calls[:1]))
    single = write_call_grammar(form, ToolChoice("required", tuple(TOOLS), is_parallel=False), vocabulary.special)
    assert not accepts(Constraint(single.lark, vocabulary), tokenizer, written)


@pytest.mark.parametrize("kind", ["demo", "chatml, unigram"])
def test_white_space_beside_the_marks_is_that_of_the_template(kind: str) -> None:
    tokenizer, vocabulary = vocabulary_of(kind)
    calls = [Call("get_weather", {"city": "Lisbon"}), Call("get_time", {"zone": "UTC"})]
    text = CALL_FORMS["hermes"].write(calls)
    for written in (text, text.replace("\n", "")):
        assert accepts(make_constraint(vocabulary, TOOLS, "hermes", "auto", 400), tokenizer, written)
    message = {"role": "assistant", "tool_calls": [call.as_openai() for call in calls]}
    rendered = tokenizer.apply_chat_template([*QUESTION, message], tools=TOOLS, tokenize=False)
    start, end = rendered.rindex("<tool_call>", 0, rendered.rindex("<tool_call>")), rendered.rindex("</tool_call>")
    assert accepts(
        make_constraint(vocabulary, TOOLS, "hermes", "auto", 400),
        tokenizer,
        rendered[start : end + len("</tool_call>")],
    )


def test_thinking_may_stand_before_text_and_calls() -> None:
    tokenizer, vocabulary = vocabulary_of("qwen3")
    call = CALL_FORMS["hermes"].write([Call("get_time", {"zone": "UTC"})])
    grammar = plan_reply(tokenizer, len(tokenizer), [tokenizer.eos_token_id], TOOLS).grammar
    assert grammar is not None
    constraint = Constraint(grammar.lark, vocabulary)
    for text in (f"<think>\nHm.\n</think>\n\n{call}", "<think>Hm.</think>No.", "No."):
        assert accepts(constraint.copy(), tokenizer, text)
    assert not accepts(constraint.copy(), tokenizer, "<think>Hm.</think><tool_call>No.")


def test_undeclared_arguments_other_types_and_other_orders_are_impossible() -> None:
    tokenizer, vocabulary = vocabulary_of("demo")
    for arguments in (
        {"city": "Lisbon", "unit": "C"},
        {"days": 1},
        {"city": 1},
        {"city": "Lisbon", "days": 1.5},
        {"days": 1, "city": "Lisbon"},
    ):
        text = CALL_FORMS["hermes"].write([Call("get_weather", arguments)])
        assert not accepts(make_constraint(vocabulary, TOOLS, "hermes", "auto", 400), tokenizer, text), arguments


def test_a_reply_that_goes_back_is_followed() -> None:
    tokenizer, vocabulary = vocabulary_of("demo")
    size = len(tokenizer) + 8
    text = CALL_FORMS["hermes"].write([Call("get_time", {"zone": "UTC"})])
    tokens = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    constraint = make_constraint(vocabulary, TOOLS, "hermes", "auto", 400)
    masks = []
    for length in range(len(tokens)):
        logits = torch.zeros(size)
        constraint.follow(tokens[:length])
        constraint.mask(logits)
        masks.append(logits)
    constraint.follow(tokens)
    assert constraint.is_finished
    assert not constraint.is_cut
    for length in (len(tokens) - 1, 3, 9, 0, 5):
        constraint.follow(tokens[:length])
        constraint.mask(logits := torch.zeros(size))
        assert torch.equal(logits, masks[length])
    constraint.follow([5, 6, 7])  # text
    constraint.follow(tokens)
    assert constraint.is_finished


def test_a_token_outside_the_grammar_ends_the_reply() -> None:
    tokenizer, vocabulary = vocabulary_of("demo")
    constraint = make_constraint(vocabulary, TOOLS, "hermes", "required", 400)
    wrong = tokenizer("x", add_special_tokens=False).input_ids[0]
    assert not constraint.accept(wrong)
    constraint.mask(logits := torch.zeros(len(tokenizer)))
    assert np.flatnonzero(logits.isfinite().numpy()).tolist() == [tokenizer.eos_token_id]


def test_forced_tokens_are_those_of_the_tokenizer() -> None:
    tokenizer, vocabulary = vocabulary_of("demo")
    constraint = make_constraint(vocabulary, TOOLS[:1], "hermes", "required", 400)
    assert constraint.accept(tokenizer.convert_tokens_to_ids("<tool_call>"))
    assert constraint.accept(tokenizer('{"', add_special_tokens=False).input_ids[0])
    forced = constraint.forced()
    assert tokenizer.decode(forced).startswith('name": "get_weather", "arguments": {"city')
    for token in forced:  # no other way to write that text is allowed
        constraint.mask(logits := torch.zeros(len(tokenizer)))
        assert np.flatnonzero(logits.isfinite().numpy()).tolist() == [token] == [constraint.forced_token()]
        assert constraint.accept(token)


@pytest.fixture(scope="module")
def cascade() -> Cascade:
    """A random base of two layers with the demo's tokenizer and a scrambled stage."""
    base = tiny_model("llama", {"vocab_size": 600, "max_position_embeddings": 1024, "eos_token_id": 1})
    cascade = Cascade(base, demo_tokenizer()).add_stage(StageConfig("s", 1, "none"))
    scramble(cascade.stages["s"])
    return cascade


def is_valid(answer: Answer) -> bool:
    return bool(answer.calls) and not answer.problems and not check_calls(answer.calls, TOOLS)


def test_the_tool_choice_is_kept_by_a_random_model(cascade: Cascade) -> None:
    required = cascade.chat(QUESTION, TOOLS, tool_choice="required", max_new_tokens=64)
    assert is_valid(required)
    named = {"type": "function", "function": {"name": "get_time"}}
    options = {"parallel_tool_calls": False, "do_sample": True, "max_new_tokens": 64}
    answer = cascade.chat(QUESTION, [get_weather, get_time], tool_choice=named, **options)
    assert is_valid(answer)
    assert [call.name for call in answer.calls] == ["get_time"]
    assert not cascade.chat(QUESTION, TOOLS, tool_choice="none", max_new_tokens=24).calls
    free = cascade.chat(QUESTION, TOOLS, tool_choice="required", constrain=False, max_new_tokens=8)
    assert free.problems == ["no call, and tool_choice asks for one"]


def test_a_reply_that_would_not_end_is_closed_and_counts_as_cut(cascade: Cascade) -> None:
    answer = cascade.chat(QUESTION, TOOLS, tool_choice="required", max_new_tokens=32)
    assert is_valid(answer)
    assert answer.finish_reason == "length"
    with pytest.raises(DecodingError, match=r"takes about \d+ tokens.*got 8\."):
        cascade.chat(QUESTION, TOOLS, tool_choice="required", max_new_tokens=8)


def test_text_fits_the_response_format(cascade: Cascade) -> None:
    schema = {"type": "object", "properties": {"mood": {"enum": ["good", "bad"]}, "n": {"type": "integer"}}}
    schema["required"] = ["mood"]
    format_ = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    answer = cascade.chat(QUESTION, response_format=format_, max_new_tokens=48)
    assert not answer.problems
    assert not answer.calls
    assert answer.text.startswith('{"mood": ')
    answer = cascade.chat(QUESTION, response_format={"type": "json_object"}, max_new_tokens=48)
    assert not answer.problems
    assert answer.text.startswith("{")
    for mode in ("auto", "none"):
        answer = cascade.chat(QUESTION, TOOLS, tool_choice=mode, response_format=format_, max_new_tokens=64)
        assert not answer.problems
        assert bool(answer.calls) or answer.text.startswith('{"mood"')
    free = cascade.chat(QUESTION, response_format=format_, constrain=False, max_new_tokens=4)
    assert free.problems[0].startswith("the text does not fit response_format")


def test_a_stream_is_constrained(cascade: Cascade) -> None:
    stream = cascade.chat(QUESTION, TOOLS, tool_choice="required", max_new_tokens=48, stream=True)
    text = "".join(stream)
    assert text == stream.answer.raw
    assert is_valid(stream.answer)
    assert stream.answer.calls == cascade.chat(QUESTION, TOOLS, tool_choice="required", max_new_tokens=48).calls


def test_what_the_engine_does_not_support_is_checked_afterwards(cascade: Cascade) -> None:
    never = {"type": "object", "properties": {"a": {"type": "boolean", "not": {"const": True}}}, "required": ["a"]}
    answer = cascade.chat(QUESTION, [{"name": "f", "parameters": never}], tool_choice="required", max_new_tokens=48)
    assert any("not" in note for note in answer.notes)
    assert not answer.problems or any("sampled" in note for note in answer.notes)


def test_rows_of_a_batch_have_their_own_tools_or_none(cascade: Cascade) -> None:
    renderer = Renderer(cascade.tokenizer, vocab_size=600)
    questions = ["Hi", "What is the time in the far north of Norway?", "Weather?"]
    prompts = [renderer.prompt_ids([{"role": "user", "content": text}]) for text in questions]
    plans = [
        plan_reply(cascade.tokenizer, 600, renderer.stop_token_ids, tools, tool_choice="required" if tools else "auto")
        for tools in (TOOLS[:1], [], TOOLS[1:])
    ]
    constraints = [plan.make_constraint(32) for plan in plans]
    model = cascade.model("s")
    options = {"max_new_tokens": 32}
    together = generate_replies(model, cascade.tokenizer, prompts, [1], constraints=constraints, **options)
    assert [call.name for reply in together for call in parse_reply(reply.text).calls[:1]] == [
        "get_weather",
        "get_time",
    ]
    for prompt, plan, reply in zip(prompts, plans, together, strict=True):
        own = [plan.make_constraint(32)]
        (alone,) = generate_replies(model, cascade.tokenizer, [prompt], [1], constraints=own, **options)
        assert alone == reply


def test_strategies_products_and_routing_are_constrained(cascade: Cascade) -> None:
    options = {"tool_choice": "required", "max_new_tokens": 32}
    plain = cascade.chat(QUESTION, TOOLS, **options)
    for strategy in (
        SelfSpeculation(1, min_probability=0.0),
        SelfSpeculation(1, min_probability=0.0, prompt_lookup_num_tokens=4),
    ):
        assert cascade.chat(QUESTION, TOOLS, strategy=strategy, **options).raw == plain.raw
        assert is_valid(cascade.chat(QUESTION, TOOLS, strategy=strategy, do_sample=True, **options))
    renderer = Renderer(cascade.tokenizer, vocab_size=600)
    ids = torch.tensor([renderer.prompt_ids(QUESTION, TOOLS)] * 2)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 32, "do_sample": False}
    plan = plan_reply(cascade.tokenizer, 600, [1], TOOLS, tool_choice="required")

    def processors() -> LogitsProcessorList:
        rows = [plan.make_constraint(32), plan.make_constraint(32)]
        return LogitsProcessorList([ConstraintProcessor(rows, ids.shape[1])])

    routed = cascade.generate(**inputs, stage=["s", None], logits_processor=processors())
    product = cascade.compose({"s": 0.5, None: 0.5}).generate(**inputs, logits_processor=processors())
    for row in (*routed, *product):
        reply = parse_reply(cascade.tokenizer.decode(row[ids.shape[1] :]).split("<|assistant_end|>")[0])
        assert reply.calls
        assert not reply.malformed
        assert not check_calls(reply.calls, TOOLS)
    with pytest.raises(DecodingError, match="num_beams"):
        cascade.generate(**inputs, num_beams=2, logits_processor=processors())


def test_wrong_choices_and_formats_are_one_sentence(cascade: Cascade) -> None:
    for choice in ("always", 3, {"type": "function"}, {"type": "function", "function": {"name": "get_tide"}}):
        with pytest.raises(DataError, match="tool_choice"):
            cascade.chat(QUESTION, TOOLS, tool_choice=choice)
    with pytest.raises(DataError, match="at least one"):
        cascade.chat(QUESTION, tool_choice="required")
    with pytest.raises(DataError, match="response_format"):
        cascade.chat(QUESTION, response_format={"type": "xml"})
    with pytest.raises(DataError, match="No value fits"):
        write_json_grammar(False)


def test_a_tokenizer_that_the_engine_cannot_read_is_named() -> None:
    tokenizer = tiny_tokenizer()
    notes = plan_reply(tokenizer, 61, [2], TOOLS, form="hermes").notes
    assert len(notes) == 1
    assert "constrain=False" in notes[0]
    with pytest.raises(DecodingError, match="constrain=False"):
        plan_reply(tokenizer, 61, [2], TOOLS, tool_choice="required")


def test_the_threshold_decides_whether_to_call(cascade: Cascade) -> None:
    threshold = score_openings(cascade, "s", [Conversation([*QUESTION, ANSWER], TOOLS)])[0]
    stage = cascade.stages["s"]
    for change, calls in ((-0.5, True), (0.5, False)):
        stage.prompt = {"call_threshold": threshold + change}
        answer = cascade.chat(QUESTION, TOOLS, max_new_tokens=40)
        assert bool(answer.calls) == calls
        assert not answer.problems
    stage.prompt = {"call_threshold": "high"}
    with pytest.raises(DeltaError, match="call_threshold"):
        cascade.chat(QUESTION, TOOLS)
    stage.prompt = None


def test_a_threshold_separates_both_kinds_of_rows_and_stays_with_the_stage(cascade: Cascade, tmp_path: Path) -> None:
    assert choose_threshold([1.0, 2.0, 9.0], [False, False, True]) == 5.5
    assert choose_threshold([-3.0, 0.0, 1.0, 5.0], [False, True, False, True]) in (-1.5, 3.0)
    assert choose_threshold([1.0], [True]) is None
    call = {"id": "call_1", "type": "function", "function": {"name": "get_time", "arguments": {"zone": "UTC"}}}
    rows = [
        Conversation([*QUESTION, ANSWER], TOOLS),
        Conversation([QUESTION[0], {"role": "assistant", "content": None, "tool_calls": [call]}], TOOLS[:1]),
    ]
    assert fit_call_threshold(cascade, "s", rows) is None  # two rows would decide by chance
    assert fit_call_threshold(cascade, "s", rows[:1] * 20) is None
    threshold = fit_call_threshold(cascade, "s", rows * 10)
    assert threshold is not None
    assert read_call_threshold(cascade.stages["s"].prompt) == threshold
    loaded = Cascade(cascade.base, cascade.tokenizer).load_stage(cascade.save_stage("s", tmp_path / "s"))
    assert read_call_threshold(loaded.stages["s"].prompt) == threshold
    cascade.stages["s"].prompt = None


def test_evaluation_is_free_unless_it_is_constrained(cascade: Cascade) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "get_time", "arguments": {"zone": "UTC"}}}
    rows = [Conversation([QUESTION[0], {"role": "assistant", "content": None, "tool_calls": [call]}], TOOLS)]
    assert evaluate_calls(cascade, "s", {"a": rows}, max_new_tokens=40)["a"].valid == 0
    options = {"constrain": True, "threshold": -1e6, "max_new_tokens": 40}  # every reply is a call
    assert evaluate_calls(cascade, "s", {"a": rows}, **options)["a"].valid == 1
