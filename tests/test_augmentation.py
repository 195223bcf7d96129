"""Each augmentation alone, and all in order. The result depends only on the row, the seed and the epoch."""

import random
import re
from collections import Counter
from dataclasses import replace
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from augmentation_rows import BOOK, DEMO, POEM, TIDE, arguments, demo_rows, misfit, row, rows, text, tool
from poe.calls.conversation import Conversation
from poe.calls.tools import as_tool
from poe.data.augment import (
    ToolPool,
    add_distractors,
    augment,
    change_case,
    make_contrast_pair,
    make_irrelevant,
    paraphrase,
)
from poe.data.augment.abstentions import describe_action, make_abstention
from poe.data.augment.fitting import fits, get_traits
from poe.data.augment.rows import argument_strings, called_tools, iter_calls, row_digest, row_rng, user_texts
from poe.errors import RecipeError
from poe.stages import Augmentation

any_row = rows() | demo_rows
seeds = st.integers(0, 99)
slow = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
POOL = ToolPool.from_conversations(DEMO)
NO_POOL = ToolPool()
ALL = Augmentation(
    mask=0.33, irrelevance=0.2, contrast=0.2, distractors=0.5, max_distractors=3, shuffle=0.5, case=0.4, paraphrase=0.5
)
DINNER = row("Book a table in Oslo for 3", ("book_table", {"city": "Oslo", "guests": 3}))


def names(conversation: Conversation) -> list[str]:
    return [one["function"]["name"] for one in conversation.tools]


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        (("getWeather", "Weather now"), ("get_weather", "Rain or shine"), True),
        (("search_movies", "Films"), ("fetch_movie_details", "About one film"), True),
        (("sum_up", "Add all the numbers of a list"), ("total", "Add the numbers in some list"), True),
        (("tell_rain", "Rain at a place"), ("rain_chance", "How likely it rains"), True),  # equal parameters, a word
        (("book_table", "Reserve a seat"), ("cancel_table", "Call it off"), False),
        (("get_report", "A report"), ("get_password", "A password"), False),
    ],
)
def test_which_tools_fit_each_other(one: tuple[str, str], other: tuple[str, str], alike: bool) -> None:
    first, second = (get_traits(tool(*t, **({"place": text("p")} if "rain" in t[0] else {}))) for t in (one, other))
    assert fits(first, second) == fits(second, first) == alike


@slow
@given(any_row, seeds)
def test_an_irrelevant_row_has_no_fitting_tool_and_no_call(conversation: Conversation, seed: int) -> None:
    made = make_irrelevant(conversation, Random(seed), POOL)
    first_answer = next(m for m in conversation.messages if m["role"] == "assistant")
    assert (made is None) == (not first_answer.get("tool_calls"))
    if made is not None:
        called = [get_traits(one) for one in called_tools(conversation)]
        assert called
        assert not [one for one in made.tools if any(fits(get_traits(one), other) for other in called)]
        assert [m["role"] for m in made.messages if m["role"] != "system"] == ["user", "assistant"]
        assert made.query == conversation.query
        assert not list(iter_calls(made))
        assert made.messages[-1]["content"]


def test_a_row_without_its_only_tool_gets_others_except_one_in_eight() -> None:
    conversation = replace(DINNER, tools=[BOOK])
    made = [make_irrelevant(conversation, Random(seed), POOL) for seed in range(400)]
    empty = [one for one in made if one and not one.tools]
    assert 30 < len(empty) < 70
    assert {len(one.tools) for one in made if one} == {0, 1, 2, 3}
    assert not [
        one for one in empty if re.search("(?i)my tools|the tools (?!here)|tools I have", one.messages[-1]["content"])
    ]
    without = make_irrelevant(conversation, Random(0), NO_POOL)
    assert without is not None
    assert without.tools == []


def test_a_row_with_a_system_text_that_names_the_tool_stays_unchanged() -> None:
    system = {"role": "system", "content": "Call book_table when asked."}
    assert make_irrelevant(replace(DINNER, messages=[system, *DINNER.messages]), Random(0), POOL) is None


def test_abstentions_vary() -> None:
    abstentions = Counter(make_abstention(Random(seed), [BOOK], [TIDE, POEM]) for seed in range(2000))
    assert len(abstentions) > 800
    assert abstentions.most_common(1)[0][1] < 20
    all_text = " ".join(abstentions)
    assert "reserve a table in a restaurant" in all_text  # the impossible action
    assert "compose some verses" not in all_text  # an unclear description is not used
    assert all(one[0].isupper() and one[-1] in ".?" and "  " not in one and "{" not in one for one in abstentions)
    with_one_tool = " ".join(make_abstention(Random(seed), [BOOK], [TIDE]) for seed in range(200))
    assert "tideTimes" in with_one_tool
    assert "POEM" not in with_one_tool


@pytest.mark.parametrize(
    ("description", "words"),
    [
        ("Reserve a table. Any restaurant.", "reserve a table"),
        ("Fetches the current weather", "fetch the current weather"),
        ("Search results of a query", None),  # a noun
        ("Get the price (in EUR)", None),
        ("Weather now", None),
        ("Get one two three four five six seven eight nine", None),
    ],
)
def test_a_tools_action_in_words(description: str, words: str | None) -> None:
    assert describe_action(tool("t_t", description)) == words


@slow
@given(any_row, seeds, st.integers(1, 5))
def test_distractors_are_new_and_fit_no_called_tool(conversation: Conversation, seed: int, most: int) -> None:
    twins = [as_tool(f"{name}_again", "Does it once more", {}) for name in names(conversation)]
    pool = ToolPool([*twins, *POOL.tools[:30]])
    (made,) = add_distractors([conversation], Random(seed), pool, most)
    added = [one for one in made.tools if one not in conversation.tools]
    assert 1 <= len(added) <= most
    assert len(set(names(made))) == len(made.tools) == len(conversation.tools) + len(added)
    assert made.messages == conversation.messages
    called = [get_traits(one) for one in called_tools(conversation)]
    assert not [one for one in added if any(fits(get_traits(one), other) for other in called)]


def test_no_distractor_serves_a_question_answered_without_a_call() -> None:
    conversation = row("Could you reserve me a table?", tools=(TIDE,))
    (made,) = add_distractors([conversation], Random(0), ToolPool([BOOK]), 1)
    assert made.tools == [TIDE]
    (made,) = add_distractors([conversation], Random(0), ToolPool([BOOK, POEM]), 1)
    assert sorted(names(made)) == ["tideTimes", "write_poem"]


def test_a_pool_does_not_depend_on_order_or_on_workers() -> None:
    tools = [one for conversation in DEMO for one in conversation.tools]
    mixed = random.Random(5).sample(tools, len(tools))
    small = ToolPool(tools, 50)
    assert len(small) == 50
    assert ToolPool(mixed, 50).tools == small.tools
    parts = [*ToolPool(mixed[:300], 50).tools, *ToolPool(mixed[300:], 50).tools]
    assert ToolPool(parts, 50).tools == small.tools
    assert len(ToolPool(tools)) == len({repr(one) for one in tools})
    assert len(ToolPool([tool("long_one", "x" * 5000)])) == len(ToolPool(tools, 0)) == 0


def test_a_contrastive_pair_differs_in_the_called_tool() -> None:
    pair = make_contrast_pair(replace(DINNER, tools=[BOOK]), Random(1), POOL)
    assert pair is not None
    with_tool, without = pair
    assert with_tool.query == without.query
    assert arguments(with_tool) == arguments(DINNER)
    assert without.tools
    assert [one for one in with_tool.tools if one not in without.tools] == [BOOK]
    assert [one for one in without.tools if one not in with_tool.tools] == []
    assert make_contrast_pair(row("Hello"), Random(0), POOL) is None


@slow
@given(any_row, seeds)
def test_a_change_of_case_changes_copied_values_alike(conversation: Conversation, seed: int) -> None:
    made = change_case(conversation, Random(seed))
    assert misfit(made) == []
    assert [t.lower() for t in user_texts(made)] == [t.lower() for t in user_texts(conversation)]
    before, after = argument_strings(conversation), argument_strings(made)
    for old, new in zip(before, after, strict=False):
        copied = any(re.search(rf"(?<!\w){re.escape(old)}(?!\w)", text_) for text_ in user_texts(conversation))
        if len(before) == len(after) and copied and old != new:
            assert any(new in text_ for text_ in user_texts(made))


@pytest.mark.parametrize(
    ("question", "value", "values"),
    [
        ("Tides at Bar Harbor", "Bar Harbor", {"bar harbor", "BAR HARBOR"}),
        ("Tides at Kiel, Kiel", "Kiel", {"kiel", "KIEL"}),
        ("Tides at Kiel", "kiel", {"kiel"}),  # not copied exactly: it does not change
        ("Tides at Kiel", "Kiel, Germany", set()),  # uses a word of the text
        ("Tides at Kielport", "Kiel", set()),  # inside a word
        ("Tides at https://Kiel.de", "Kiel", set()),
        ("Write Kiel in capitals", "Kiel", set()),
        ("Use tideTimes for Kiel", "Kiel", set()),
    ],
)
def test_changes_of_case(question: str, value: str, values: set[str]) -> None:
    conversation = row(question, ("tideTimes", {"harbour": value}))
    made = [change_case(conversation, Random(seed)) for seed in range(40)]
    assert {arguments(one)[0]["harbour"] for one in made} == (values or {value})
    variants = {user_texts(one)[0] for one in made}
    assert variants == ({question.lower(), question.upper(), question.capitalize()} if values else {question})


def test_case_leaves_a_row_with_an_ambiguous_value() -> None:
    conversation = row("Kiel tides at Kiel", ("tideTimes", {"harbour": "Kiel"}))
    variants = {user_texts(change_case(conversation, Random(seed)))[0] for seed in range(40)}
    assert variants == {"kiel tides at kiel", "KIEL TIDES AT KIEL", "Kiel tides at Kiel"}  # never "Kiel tides at kiel"


def test_case_keeps_listed_values_and_the_schema() -> None:
    conversation = row("Tides at Kiel in m", ("tideTimes", {"harbour": "Kiel", "unit": "m"}))
    upper = next(
        one for seed in range(40) if (one := change_case(conversation, Random(seed))).messages[0]["content"].isupper()
    )
    assert arguments(upper) == [{"harbour": "KIEL", "unit": "m"}]
    strict = tool("tideTimes", "When the sea is high", harbour=text("the harbour", pattern="^[A-Z][a-z]+$"))
    conversation = row("Tides at Kiel", ("tideTimes", {"harbour": "Kiel"}), tools=(strict,))
    assert {change_case(conversation, Random(seed)) is conversation for seed in range(40)} == {True}


@slow
@given(any_row, seeds)
def test_a_paraphrase_keeps_every_copied_value_and_quotation(conversation: Conversation, seed: int) -> None:
    made = paraphrase(conversation, Random(seed))
    assert replace(made, messages=[]) == replace(conversation, messages=[])
    for before, after in zip(conversation.messages, made.messages, strict=True):
        if before["role"] != "user":
            assert before == after
            continue
        for value in [*argument_strings(conversation), *re.findall(r'"[^"]*"', before["content"])]:
            assert after["content"].count(value) >= before["content"].count(value)


@pytest.mark.parametrize(
    ("question", "given", "expected"),
    [
        ("Book a table in Oslo.", "Oslo", "Could you book a table in Oslo?"),
        ("Could you book a table in Oslo?", "Oslo", "Book a table in Oslo."),
        ("What is the tide?", "", "What's the tide?"),
        ("Book the table.", "", "Book the table, please."),
        ("Hi, is there a table?", "", "Hey, is there a table?"),
    ],
)
def test_paraphrases(question: str, given: str, expected: str) -> None:
    conversation = row(question, ("book_table", {"city": given}))
    assert expected in {user_texts(paraphrase(conversation, Random(seed)))[0] for seed in range(400)}


def test_a_value_at_an_end_keeps_the_end() -> None:
    ends = row("Write verses about Monday rain", ("write_poem", {"topic": "monday rain"}), tools=(POEM,))
    variants = {user_texts(paraphrase(ends, Random(seed)))[0] for seed in range(200)}
    assert len(variants) > 5
    assert {one[-11:] for one in variants} == {"Monday rain"}
    whole = row("What is love", ("write_poem", {"topic": "What is love"}), tools=(POEM,))
    assert {user_texts(paraphrase(whole, Random(seed)))[0] for seed in range(200)} == {"What is love"}
    for question, value in (("What is love to you?", "is love"), ("Compute the sum of a, b, etc.", "etc.")):
        inside = row(question, ("write_poem", {"topic": value}), tools=(POEM,))
        variants = {user_texts(paraphrase(inside, Random(seed)))[0] for seed in range(200)}
        assert len(variants) > 5
        assert all(value in one for one in variants)
    loose = row("Write of the rain in spring.", ("write_poem", {"topic": "The Spring Rain Falls"}), tools=(POEM,))
    assert {paraphrase(loose, Random(seed)) is loose for seed in range(50)} == {True}


def test_formats_sets_a_form() -> None:
    options = Augmentation(formats=1, tool_formats=("indent2",), call_formats=("glaive", "llama"))
    forms = set()
    for epoch in range(40):
        (made,) = augment(DINNER, options, epoch=epoch, seed=0, pool=NO_POOL)
        assert made.form is not None
        assert replace(made, form=None) == DINNER
        forms.add((made.form.tools, made.form.calls, made.form.place))
    assert forms == {("indent2", calls, place) for calls in ("glaive", "llama") for place in ("system", "user")}


def test_a_row_that_a_form_cannot_hold_gets_another_form_or_none() -> None:
    odd = as_tool("no name-for Python", "", {"type": "object", "properties": {}})
    unwritable = row("Do it", ("no name-for Python", {}), tools=(odd,))
    python = Augmentation(formats=1, call_formats=("python",))
    assert [r.form for r in augment(unwritable, python, epoch=0, seed=0, pool=NO_POOL)] == [None]
    either = Augmentation(formats=1, call_formats=("python", "hermes"))
    found = [augment(unwritable, either, epoch=e, seed=0, pool=NO_POOL)[0].form for e in range(40)]
    assert {form.calls for form in found if form} == {"hermes"}


@slow
@given(any_row, seeds)
def test_all_zero_is_the_identity(conversation: Conversation, seed: int) -> None:
    made = augment(conversation, Augmentation(), epoch=seed, seed=seed, pool=POOL)
    assert len(made) == 1
    assert made[0] is conversation


@slow
@given(any_row, seeds)
def test_augmented_rows_are_valid(conversation: Conversation, seed: int) -> None:
    before = conversation.key()
    options = Augmentation(mask=1, contrast=1, distractors=1, shuffle=1, case=1, paraphrase=1)
    made = augment(conversation, options, epoch=0, seed=seed, pool=POOL)
    assert conversation.key() == before
    assert [misfit(one) for one in made] == [[]] * len(made)
    assert len(list(iter_calls(made[0]))) == len(list(iter_calls(conversation)))
    for one in made:
        assert len(set(names(one))) == len(one.tools)
        assert not set(names(one)) & set(names(conversation))  # masked
    if len(made) == 2:
        assert made[0].query == made[1].query
        assert not list(iter_calls(made[1]))


def all_of(conversations: list[Conversation], epoch: int = 0, seed: int = 0) -> dict[str, list[str]]:
    pool = ToolPool.from_conversations(conversations, 300)
    return {one.id: [m.key() for m in augment(one, ALL, epoch=epoch, seed=seed, pool=pool)] for one in conversations}


def test_augmentation_depends_on_seed_and_epoch_and_not_on_order() -> None:
    made = all_of(DEMO)
    assert all_of(random.Random(1).sample(DEMO, len(DEMO))) == made
    assert all_of(DEMO) == made
    for other in (all_of(DEMO, epoch=1), all_of(DEMO, seed=1)):
        assert sum(made[i] != other[i] for i in made) > 0.6 * len(made)
    first = row_rng(row_digest(DEMO[0]), seed=0, epoch=12, step="mask").random()
    assert first != row_rng(row_digest(DEMO[0]), seed=0, epoch=1, step="2mask").random()


def count(share: float, step: str, changed: Any) -> float:
    """Return the share of suitable demo rows that the augmentation changes."""

    def done(ratio: float) -> set[str]:
        options = Augmentation(**{step: ratio})
        return {c.id for c in DEMO if changed(c, augment(c, options, epoch=0, seed=0, pool=POOL))}

    some, every = done(share), done(1)
    assert some <= every
    assert len(every) > 150
    return len(some) / len(every)


@pytest.mark.parametrize("step", "mask irrelevance contrast distractors shuffle case paraphrase".split())
def test_shares_of_augmented_rows_match_the_options(step: str) -> None:
    def changed(before: Conversation, after: list[Conversation]) -> bool:
        return after != [before]

    # `case` and `shuffle` may draw the present state, so slightly fewer rows change.
    assert count(0.3, step, changed) == pytest.approx(0.3, abs=0.07)


def test_shares_are_independent() -> None:
    masks = Augmentation(mask=0.5)
    both = Augmentation(mask=0.5, shuffle=1.0)
    for conversation in DEMO[:100]:
        (one,) = augment(conversation, masks, epoch=0, seed=0, pool=POOL)
        (other,) = augment(conversation, both, epoch=0, seed=0, pool=POOL)
        assert (names(one) == names(conversation)) == (set(names(other)) == set(names(conversation)))


def test_options_come_from_a_recipe() -> None:
    options = Augmentation.from_dict({"mask": 0.33, "max_distractors": 2, "call_formats": ["xlam"], "case": 1})
    assert options == Augmentation(mask=0.33, max_distractors=2, call_formats=("xlam",), case=1.0)
    assert Augmentation.from_dict(None) == Augmentation.from_dict({}) == Augmentation()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"masks": 0.3}, "Did you mean 'mask'"),
        ({"mask": 1.5}, "augment.mask should be a number .0 to 1."),
        ({"mask": -0.1}, "augment.mask should be a number .0 to 1."),
        ({"mask": True}, "augment.mask should be a number .0 to 1."),
        ({"mask": "0.3"}, "augment.mask should be a number .0 to 1."),
        ({"mask": float("nan")}, "augment.mask should be a number .0 to 1."),
        ({"max_distractors": 0}, "whole number"),
        ({"max_distractors": 1.5}, "whole number"),
        ({"tool_formats": "json"}, "a list with text in each place"),
        ({"tool_formats": ["jsn"]}, "unknown form"),
        ({"irrelevance": 0.6, "contrast": 0.6}, "at most 1"),
        ([0.3], "mapping"),
        ({3: 0.3}, "There is no augmentation 3"),
    ],
)
def test_invalid_options_are_rejected(options: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Augmentation.from_dict(options)
