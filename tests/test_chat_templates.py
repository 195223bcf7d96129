"""Chat templates without tools are extended, and tokenizers without a template get one."""

import copy

import pytest
from hypothesis import given, settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from augmentation_rows import demo_rows
from conftest import render_one
from poe.calls.conversation import Conversation, PromptForm
from poe.data.render import Renderer
from poe.data.templates import complete_template, extend_with_tools, reply_form, shows_tools, template_call_form
from poe.demo.conversations import make_conversation
from poe.errors import TemplateError
from poe.evaluation.calls import score_replies, split_question
from test_loss_mask import TOKENIZERS, assistant, trained, user
from test_prompt_forms import ROW

# Like SmolLM2: a default system text, and only the content of every message.
PLAIN = """\
{%- for m in messages %}
{%- if loop.first and m.role != 'system' %}{{- '<|im_start|>system\\nHelp.<|im_end|>\\n' }}{%- endif %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
# Like Gemma 2: no system role; user and assistant alternate.
STRICT = """\
{%- for m in messages %}
{%- if m.role == 'system' %}{{- raise_exception('System role not supported') }}{%- endif %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('Roles must alternate') }}{%- endif %}
{{- '<|im_start|>' + m.role + '\\n' + m.content | trim + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
PLACES = {"plain": (PLAIN, "system"), "strict": (STRICT, "user")}


def tokenizer_with(template):
    tokenizer = copy.deepcopy(TOKENIZERS["chatml"])
    tokenizer.chat_template = template
    return tokenizer


BEFORE = {name: Renderer(tokenizer_with(template)) for name, (template, _) in PLACES.items()}
EXTENDED = {name: tokenizer_with(template) for name, (template, _) in PLACES.items()}
for one in EXTENDED.values():
    assert extend_with_tools(one)
AFTER = {name: Renderer(tokenizer) for name, tokenizer in EXTENDED.items()}


@given(demo_rows)
@settings(max_examples=40, deadline=None)
def test_the_extended_template_writes_the_default_form(row) -> None:
    for name, (_, place) in PLACES.items():
        expected = render_one(BEFORE[name], Conversation(row.messages, row.tools, form=PromptForm(place=place)))
        assert render_one(AFTER[name], row).text == expected.text
        assert render_one(AFTER[name], row).loss_mask == expected.loss_mask


@pytest.mark.parametrize("name", PLACES)
def test_conversations_without_tools_render_as_before(name) -> None:
    messages = [user("hello"), assistant("Hello!"), user("bye"), assistant("Bye.")]
    assert render_one(AFTER[name], Conversation(messages)) == render_one(BEFORE[name], Conversation(messages))
    assert AFTER[name].prompt(messages[:3]) == BEFORE[name].prompt(messages[:3])
    assert AFTER[name].stop_token_ids == BEFORE[name].stop_token_ids


def test_only_the_assistants_text_is_trained() -> None:
    answers = trained(AFTER["plain"], render_one(AFTER["plain"], ROW))
    assert answers[0].startswith('<tool_call>\n{"name": "find_news"')
    assert answers[0].endswith("</tool_call><|im_end|>")
    assert answers[1].startswith('I shall.\n<tool_call>\n{"name": "send_mail"')
    assert answers[2] == "It is sent.<|im_end|>"


def test_a_system_message_keeps_its_place_and_its_words() -> None:
    text = render_one(AFTER["plain"], ROW).text
    assert text.startswith("<|im_start|>system\nBe brief.\n\nYou have access to these functions:\n{")
    assert text.count("<|im_start|>system") == 1
    assert "Help." not in text


@pytest.mark.parametrize("name", ["chatml", "marked"])
def test_a_template_that_shows_tools_stays_unchanged(name) -> None:
    tokenizer = copy.deepcopy(TOKENIZERS[name])
    assert shows_tools(tokenizer)
    assert not extend_with_tools(tokenizer)
    assert tokenizer.chat_template == TOKENIZERS[name].chat_template


def test_a_template_that_always_fails_stays_unchanged() -> None:
    for broken in ("{{ raise_exception('no') }}", "{% if %}", "always the same", None):
        tokenizer = tokenizer_with(broken)
        assert not extend_with_tools(tokenizer)
        assert tokenizer.chat_template == broken


def test_extending_twice_is_extending_once() -> None:
    tokenizer = copy.deepcopy(EXTENDED["plain"])
    assert not extend_with_tools(tokenizer)
    assert tokenizer.chat_template == EXTENDED["plain"].chat_template


def test_one_of_several_templates_is_made_for_tools() -> None:
    tokenizer = tokenizer_with({"default": PLAIN, "short": "x"})
    assert extend_with_tools(tokenizer)
    assert render_one(Renderer(tokenizer), ROW) == render_one(AFTER["plain"], ROW)
    assert tokenizer.chat_template["default"] == PLAIN


def test_an_extended_template_survives_saving(tmp_path) -> None:
    from transformers import AutoTokenizer

    EXTENDED["plain"].save_pretrained(tmp_path)
    assert render_one(Renderer(AutoTokenizer.from_pretrained(tmp_path)), ROW) == render_one(AFTER["plain"], ROW)


@pytest.mark.parametrize(
    ("name", "form"), [("chatml", "hermes"), ("marked", "hermes"), ("llama3", "llama"), ("rewriting", None)]
)
def test_the_call_form_of_a_template_is_found(name, form) -> None:
    assert template_call_form(TOKENIZERS[name]) == form
    assert reply_form(TOKENIZERS[name]) == (form or "hermes")
    assert template_call_form(EXTENDED["strict"]) == "hermes"


def test_replies_are_read_in_the_form_of_the_template() -> None:
    row = make_conversation(3, kind="call")
    renderer = Renderer(TOKENIZERS["llama3"])
    text = render_one(renderer, row).text
    answers = text[len(renderer.prompt(split_question(row)[0], row.tools)) :].removesuffix("<|eot_id|>")
    assert score_replies([row], [answers], "llama").exact == 1.0
    assert score_replies([row], [answers]).exact == 0.0


def marked_tokenizer(*marks: str, eos: str | None):
    """Return a byte-level tokenizer with these special tokens and without a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(marks), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the quick brown fox"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos)


HRM = ("<|im_start|>", "<|object_ref_start|>", "<|im_end|>", "<|box_end|>")
WITHOUT = {  # special tokens; a conversation in our template
    "conditioned": (
        marked_tokenizer(*HRM, eos="<|box_end|>"),
        "<|im_start|><|object_ref_start|>Be brief.\n\nhello<|im_end|>Hello!<|box_end|>"
        "<|im_start|><|object_ref_start|>bye<|im_end|>Bye.<|box_end|>",
        "<|im_start|><|object_ref_start|>Be brief.\n\nhello<|im_end|>",
    ),
    "chatml": (
        marked_tokenizer("<|endoftext|>", "<|im_start|>", "<|im_end|>", eos="<|endoftext|>"),
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n"
        "<|im_start|>assistant\nHello!<|im_end|>\n"
        "<|im_start|>user\nbye<|im_end|>\n<|im_start|>assistant\nBye.<|im_end|>\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n",
    ),
    "plain": (
        marked_tokenizer("</s>", eos="</s>"),
        "Be brief.\n\nUser: hello\n\nAssistant: Hello!</s>\n\nUser: bye\n\nAssistant: Bye.</s>\n\n",
        "Be brief.\n\nUser: hello\n\nAssistant:",
    ),
}
TALK = [{"role": "system", "content": "Be brief."}, user("hello"), assistant("Hello!"), user("bye"), assistant("Bye.")]


@pytest.mark.parametrize("name", WITHOUT)
def test_a_tokenizer_without_a_template_gets_a_template(name) -> None:
    tokenizer, expected_text, prompt = copy.deepcopy(WITHOUT[name][0]), *WITHOUT[name][1:]
    assert f"the template {name!r} is used" in complete_template(tokenizer)
    assert complete_template(tokenizer) == ""
    renderer = Renderer(tokenizer)
    talk = render_one(renderer, Conversation(TALK))
    assert talk.text == expected_text
    assert renderer.prompt(TALK[:2]) == prompt
    stop = tokenizer.convert_ids_to_tokens(renderer.stop_token_ids)[-1]
    assert [answer.lstrip() for answer in trained(renderer, talk)] == [f"Hello!{stop}", f"Bye.{stop}"]
    assert shows_tools(tokenizer)
    assert reply_form(tokenizer) == "hermes"


@given(demo_rows)
@settings(max_examples=20, deadline=None)
def test_our_templates_render_rows_with_tools(row) -> None:
    for name, (tokenizer, *_) in WITHOUT.items():
        tokenizer = copy.deepcopy(tokenizer)
        complete_template(tokenizer)
        renderer = Renderer(tokenizer)
        rendered = render_one(renderer, row)
        assert rendered.text.startswith(renderer.prompt(split_question(row)[0], row.tools)), name
        assert all(tool["function"]["description"] in rendered.text for tool in row.tools)
        answers = trained(renderer, rendered)
        assert len(answers) == sum(message["role"] == "assistant" for message in row.messages)
        assert sum(turn.count("<tool_call>") for turn in answers) == sum(
            len(message.get("tool_calls") or ()) for message in row.messages
        )


def test_a_tokenizer_without_an_end_of_turn_is_rejected() -> None:
    tokenizer = marked_tokenizer("<a>", eos=None)
    assert complete_template(tokenizer) == ""
    with pytest.raises(TemplateError, match="without one"):
        Renderer(tokenizer)
