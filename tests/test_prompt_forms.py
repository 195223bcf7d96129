"""A row written as text keeps its content in every form, and only the assistant's text is trained."""

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import demo_tokenizer, render_one
from poe.calls.conversation import Call, Conversation, PromptForm
from poe.calls.forms.base import Reply
from poe.calls.forms.call_forms import CALL_FORMS, call_form
from poe.calls.forms.prompt_forms import PHRASINGS, PLACES, random_form, write_as_text
from poe.calls.forms.tool_forms import TOOL_FORMS, write_tools
from poe.calls.tools import as_tool
from poe.data.render import Renderer
from poe.errors import DataError, RowError
from poe.evaluation.calls import score_replies, split_question

NEWS = as_tool("find_news", "Find news", {"type": "object", "properties": {"about": {"type": "string"}}})
MAIL = {"to": {"type": "string"}, "copies": {"type": "integer"}}
SEND = as_tool("send_mail", "Send a mail", {"type": "object", "properties": MAIL})
forms = st.builds(
    PromptForm, st.sampled_from(list(TOOL_FORMS)), st.sampled_from(list(CALL_FORMS)), st.sampled_from(PLACES),
    st.integers(0, 2 * PHRASINGS),
)  # fmt: skip


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(demo_tokenizer())


def user(text):
    return {"role": "user", "content": text}


def assistant(text, *calls):
    made = [
        {"id": f"call_{i}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for i, name, arguments in calls
    ]
    return {"role": "assistant", "content": text, **({"tool_calls": made} if made else {})}


def result(i, name, text):
    return {"role": "tool", "tool_call_id": f"call_{i}", "name": name, "content": text}


ROW = Conversation(
    [
        {"role": "system", "content": "Be brief."},
        user("What is new of Köln and Bonn?"),
        assistant(None, (1, "find_news", {"about": 'Köln, "the city"\n'}), (2, "find_news", {"about": "Bonn"})),
        result(2, "find_news", "rain"),
        result(1, "find_news", "it's sunny"),
        user("Thank you. Mail it to Ada."),
        assistant("I shall.", (3, "send_mail", {"to": "Ada", "copies": 10**30})),
        result(3, "send_mail", "sent"),
        assistant("It is sent."),
    ],
    [NEWS, SEND],
    source="tests",
    id="1",
)
ANSWERS = (2, 6, 8)


def reply_of(message):
    calls = [Call(c["function"]["name"], c["function"]["arguments"]) for c in message.get("tool_calls", [])]
    return Reply(message["content"] or "", calls)


@given(forms)
@settings(max_examples=80, deadline=None)
def test_a_row_written_as_text_has_the_same_content(form) -> None:
    flattened = write_as_text(ROW, form)
    roles = [message["role"] for message in flattened.messages]
    assert roles == ["system", "user", "assistant", "user", "assistant", "user", "assistant"]
    assert (flattened.tools, flattened.form, flattened.source, flattened.id) == ([], None, "tests", "1")
    assert all(message.keys() == {"role", "content"} for message in flattened.messages)
    answers = [m["content"] for m in flattened.messages if m["role"] == "assistant"]
    assert [call_form(form.calls).read(text) for text in answers] == [reply_of(ROW.messages[i]) for i in ANSWERS]
    system, question, later = (flattened.messages[i]["content"] for i in (0, 1, 3))
    holder, other = (system, question) if form.place == "system" else (question, system)
    assert write_tools(ROW.tools, form.tools) in holder
    assert any(sentence in holder for sentence in call_form(form.calls).request)
    assert other == ("What is new of Köln and Bonn?" if form.place == "system" else "Be brief.")
    assert holder.startswith(("Be brief.", "What")) or holder.endswith(("Be brief.", "Bonn?"))
    assert later.index("it's sunny") < later.index("rain") < later.index("Thank you.")  # in the order of the calls
    assert later.endswith("\n\nThank you. Mail it to Ada.")
    assert ROW.messages[5] == user("Thank you. Mail it to Ada.")


@given(forms)
@settings(max_examples=40, deadline=None)
def test_a_prompt_is_a_prefix_of_the_row_and_the_loss_covers_the_assistants_text(renderer, form) -> None:
    row = replace(ROW, form=form)
    rendered = render_one(renderer, row)
    flattened = write_as_text(ROW, form).messages
    runs, previous = [], False
    for token, on in zip(rendered.input_ids, rendered.loss_mask, strict=True):
        if on:
            runs = [*runs[:-1], [*runs[-1], token]] if previous else [*runs, [token]]
        previous = on
    expected = [m["content"] + "<|assistant_end|>" for m in flattened if m["role"] == "assistant"]
    assert [renderer.tokenizer.decode(run) for run in runs] == expected
    for i in ANSWERS:
        prompt = renderer.prompt_ids(row.messages[:i], row.tools, row.form)
        assert rendered.input_ids[: len(prompt)] == prompt
        assert rendered.loss_mask[len(prompt)]
    assert "<|output_start|>" not in rendered.text
    assert rendered.text == render_one(renderer, write_as_text(ROW, form)).text


def test_without_a_form_the_template_writes_the_tools(renderer) -> None:
    text = render_one(renderer, ROW).text
    assert "<|output_start|>rain<|output_end|>" in text
    assert renderer.prompt(ROW.messages[:2], ROW.tools) == text[: text.index("<tool_call>")]


@given(forms)
def test_a_row_without_tools_stays_unchanged(form) -> None:
    row = Conversation([user("hello"), assistant("[TOOL_CALLS] is a mark, <tool_call> too")])
    assert write_as_text(row, form) is row


@given(forms)
def test_tools_are_listed_in_a_row_without_a_system_message(form) -> None:
    flattened = write_as_text(Conversation([user("Sing!"), assistant("I cannot.")], [NEWS]), form).messages
    assert [m["role"] for m in flattened] == ["system"] * (form.place == "system") + ["user", "assistant"]
    assert write_tools([NEWS], form.tools) in flattened[0]["content"]
    assert flattened[-1]["content"] == "I cannot."
    if form.place == "system":
        assert flattened[1] == user("Sing!")


def test_phrasings_differ_and_repeat_after_the_last() -> None:
    texts = [write_as_text(ROW, PromptForm(phrasing=n)).messages[0]["content"] for n in range(PHRASINGS)]
    assert len(set(texts)) == PHRASINGS
    assert write_as_text(ROW, PromptForm(phrasing=PHRASINGS)).messages[0]["content"] == texts[0]


def test_rows_that_a_form_cannot_hold_are_rejected_with_a_reason(renderer) -> None:
    row = Conversation([user("how?"), assistant("Write <functioncall> and the call.")], [NEWS], source="tests")
    with pytest.raises(RowError, match="text that looks like a call in the form glaive"):
        write_as_text(row, PromptForm(calls="glaive"))
    with pytest.raises(RowError, match="text that looks like a call in the form glaive"):
        renderer.render(replace(row, form=PromptForm(calls="glaive")))
    assert len(renderer.render(replace(row, form=PromptForm(calls="llama")))) == 1
    with pytest.raises(RowError, match="no user turn"):
        write_as_text(replace(ROW, messages=[assistant("x")]), PromptForm(place="user"))


def test_the_key_of_a_row_does_not_depend_on_its_form() -> None:
    assert replace(ROW, form=PromptForm()).key() == ROW.key()


def test_random_forms_are_drawn_from_the_named_forms() -> None:
    rng = random.Random(1)
    drawn = [random_form(rng, calls=["xlam", "python"]) for _ in range(300)]
    assert {form.calls for form in drawn} == {"xlam", "python"}
    assert {form.tools for form in drawn} == set(TOOL_FORMS)
    assert {form.place for form in drawn} == set(PLACES)
    assert len({form.phrasing for form in drawn}) > PHRASINGS // 2
    assert random_form(random.Random(1), calls=["xlam", "python"]) == drawn[0]


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        ({"tools": "jsonl"}, "tool form 'jsonl'"),
        ({"calls": "lama"}, "'llama'"),  # codespell:ignore lama
        ({"place": "end"}, "Known: system, user"),
    ],
)
def test_unknown_names_in_a_form_raise_an_error(wrong, hint) -> None:
    with pytest.raises(DataError, match=hint):
        write_as_text(ROW, PromptForm(**wrong))


def test_replies_are_scored_in_the_form_of_the_prompt() -> None:
    row = Conversation([user("news of Rome?"), assistant(None, (1, "find_news", {"about": "Rome"}))], [NEWS])
    written = {name: form.write([Call("find_news", {"about": "Rome"})]) for name, form in CALL_FORMS.items()}
    for name in CALL_FORMS:
        row_with_form = replace(row, form=PromptForm(calls=name))
        assert split_question(row_with_form)[1] == [("find_news", {"about": "Rome"})]
        right = {n for n, text in written.items() if score_replies([row_with_form], [text]).exact == 1.0}
        assert right == (
            {"xlam", "mistral"} if name == "xlam" else {name}
        )  # after its mark, mistral writes a list like xlam
    assert score_replies([row], [written["hermes"]]).exact == 1.0
