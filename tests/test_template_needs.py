"""Templates that refuse our form of a conversation get one that they accept, and keep every row."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import processors

from chat_families import FAMILIES, MISTRAL3, byte_level, family
from command_line import run_program
from conftest import render_one
from poe.calls.conversation import Conversation
from poe.data.render import Renderer
from poe.data.template_needs import TemplateNeeds
from poe.data.templates import complete_template, note_unread_calls, template_call_form
from poe.demo.conversations import make_conversation
from poe.errors import DataError
from poe.loaders.base import save_base_folder
from test_control_tokens import conversation

CALLS = [make_conversation(i, kind="call") for i in range(6)]


def two_calls(ids=("call_1", "call_2"), results=("call_2", "call_1")):
    """Return a row with parallel calls. Its results come in another order."""
    row = conversation()
    call = row.messages[2]["tool_calls"][0]
    calls = [{**call, "id": one} if one else {k: v for k, v in call.items() if k != "id"} for one in ids]
    answers = [{"role": "tool", "name": "find", "content": f"result of {one}"} for one in results]
    answers = [{**a, "tool_call_id": one} if one else a for a, one in zip(answers, results, strict=True)]
    messages = [row.messages[1], {"role": "assistant", "content": None, "tool_calls": calls}, *answers, row.messages[4]]
    return Conversation(messages, row.tools)


def test_a_template_that_wants_ids_of_nine_characters_keeps_its_rows() -> None:
    renderer = Renderer(family("mistral-v3"))
    for row in CALLS:
        assert renderer.render(row)
        assert renderer.prompt_ids(row.messages[:2], row.tools)
    text = render_one(renderer, two_calls()).text
    assert text.index('"id": "call00001"') < text.index('"id": "call00002"')
    assert text.index('"result of call_2", "call_id": "call00002"') < text.index(
        '"result of call_1", "call_id": "call00001"'
    )
    good = two_calls(("abcdef123", "abcdef456"), ("abcdef456", "abcdef123"))
    assert '"id": "abcdef123"' in render_one(renderer, good).text  # ids that the template takes stay
    assert (
        '"result of None", "call_id": "call00001"' in render_one(renderer, two_calls((None, None), (None, None))).text
    )


@pytest.mark.parametrize(
    ("name", "form"),
    [("mistral-v3", "mistral"), ("qwen3", "hermes"), ("llama-3.1", "llama"), ("deepseek", None), ("hermes", None)],
)
def test_the_call_form_of_a_family_is_its_own(name: str, form: str | None) -> None:
    assert template_call_form(family(name)) == form
    assert bool(note_unread_calls(family(name))) == (form is None)


def test_the_newer_notation_of_mistral_is_not_taken_for_another() -> None:
    older = next(line for line in MISTRAL3.splitlines() if "tojson)[:-1]" in line)
    newer = MISTRAL3.replace("{{- '[TOOL_CALLS] [' }}", "").replace(
        older, "{{- '[TOOL_CALLS]' + call.function.name + '[ARGS]' + (call.function.arguments | tojson) + eos_token }}"
    )
    assert "[ARGS]" in newer
    assert template_call_form(byte_level(newer, (), bos="<s>", eos="</s>")) is None


def test_the_text_of_a_system_message_joins_the_first_question() -> None:
    renderer = Renderer(family("gemma"))
    row = conversation()
    assert "<start_of_turn>user\nsys\n\nusr\n\nYou have access" in render_one(renderer, row).text
    raw = Renderer(FAMILIES["gemma"]())  # the base's own template
    messages = [{"role": "system", "content": "sys"}, {"role": "user", "content": "usr"}]
    assert raw.prompt(messages) == "<bos><start_of_turn>user\nsys\n\nusr<end_of_turn>\n<start_of_turn>model\n"
    assert raw.prompt(messages[:1]) == "<bos><start_of_turn>user\nsys<end_of_turn>\n<start_of_turn>model\n"
    silent = FAMILIES["gemma"]()  # drops the text without an error
    silent.chat_template = silent.chat_template.replace(
        "{%- for m in messages %}", "{%- for m in messages if m.role != 'system' %}"
    ).replace("{{- raise_exception('System role not supported') }}", "")
    assert "sys\n\nusr" in Renderer(silent).prompt(messages)


def test_a_template_with_a_system_role_keeps_it() -> None:
    for name in ("qwen3", "mistral-v3", "llama-2", "deepseek"):
        assert not Renderer(family(name))._needs.no_system
    assert Renderer(family("qwen3"))._needs == TemplateNeeds()


def test_calls_with_text_arguments_and_an_empty_content_keep_their_rows() -> None:
    renderer = Renderer(family("deepseek"))
    for row in CALLS:
        arguments = next(m for m in row.messages if m.get("tool_calls"))["tool_calls"][0]["function"]["arguments"]
        assert json.dumps(arguments, ensure_ascii=False) in render_one(renderer, row).text


def test_a_row_that_the_template_refuses_in_every_form_is_an_error() -> None:
    with pytest.raises(DataError, match="one call at a time"):
        Renderer(family("llama-3.1")).render(two_calls())


PREFIXES = {"bos": ("<s>", ["<s>"]), "two tokens": (None, ["[gMASK]", "<sop>"]), "nothing": ("<s>", [])}


@pytest.mark.parametrize("marks", [(), ("<|im_start|>", "<|im_end|>")])
@pytest.mark.parametrize("what", PREFIXES)
def test_our_templates_begin_with_what_the_tokenizer_puts_before_every_text(what: str, marks: tuple[str, ...]) -> None:
    bos, prefix = PREFIXES[what]
    tokenizer = byte_level(None, (*prefix, *marks), eos="</s>")
    tokenizer.bos_token = bos
    pieces = [(token, tokenizer.convert_tokens_to_ids(token)) for token in prefix]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join([*prefix, "$A"]), special_tokens=pieces
    )
    assert complete_template(tokenizer)
    renderer = Renderer(tokenizer)
    ids = [number for _, number in pieces]
    for row in [*CALLS, conversation()]:
        rendered = render_one(renderer, row)
        assert rendered.input_ids[: len(ids)] == ids
        assert not any(rendered.loss_mask[: len(ids)])
        assert renderer.prompt_ids(row.messages[:2], row.tools)[: len(ids)] == ids
        assert not ids or rendered.input_ids.count(ids[0]) == 1
    assert tokenizer("hello").input_ids[: len(ids)] == ids  # plain texts begin in the same way


@pytest.mark.slow
def test_the_command_takes_a_system_text_for_every_template(tmp_path: Path) -> None:
    from poe.modeling.modeling_poe import PoEConfig, PoEForCausalLM

    torch.manual_seed(0)
    tokenizer = FAMILIES["gemma"]()
    config = PoEConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    save_base_folder(PoEForCausalLM(config), tmp_path / "base", tokenizer)
    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps([conversation().tools[0]]))
    done = run_program(
        *("poe", "call", str(tmp_path / "base"), "hi", "--tools", str(tools), "--system", "Be brief."),
        *("--max-new-tokens", "2"),
    )
    assert "role" not in done.stderr
    assert json.loads(done.stdout)["tool_calls"] == []
