"""Complete a tokenizer's chat template: add a missing template, or add tools to a template that ignores them.

Many instruct models have a template that ignores `tools` and fails on an assistant message that has only calls. The
extension is Jinja code in front of such a template. It writes tools, calls and results as text, in the form
`PromptForm()`, and passes the messages on. The base's own markers, defaults and generation prompt stay, and a
conversation without tools renders as before. Because the extension is part of the template, every program that applies
the template uses the same format.
"""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from poe.calls.conversation import Message, PromptForm
from poe.calls.forms.call_forms import CALL_FORMS, call_form
from poe.calls.forms.prompt_forms import tools_heading

__all__ = ["complete_template", "extend_with_tools", "reply_form", "shows_tools", "template_call_form"]

_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_weather",
        "description": "Look at the probed sky",
        "parameters": {"type": "object", "properties": {"probed_city": {"type": "string", "description": "which"}}},
    },
}
_ARGUMENTS = {"probed_city": "Probeville"}
_QUESTION: list[Message] = [{"role": "user", "content": "How is it there?"}]
_CALL: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        # Mistral's templates require an id of nine letters and digits.
        {"id": "probe0001", "type": "function", "function": {"name": "probe_weather", "arguments": _ARGUMENTS}}
    ],
}
_RESULT: list[Message] = [
    {"role": "tool", "tool_call_id": "probe0001", "name": "probe_weather", "content": "probably sunny"},
    {"role": "assistant", "content": "Sunny."},
]

_ASSETS = Path(__file__).parents[1] / "assets"


def complete_template(tokenizer: Any) -> str:
    """Add a chat template or tools to a tokenizer that lacks them. Return a description of the change, or "".

    A tokenizer without a template gets HRM-Text's if that model's marks end a turn (the condition is "direct"), ChatML
    if its marks are tokens, and otherwise one that writes the roles as words and the EOS token after every answer. Then
    `extend_with_tools` is applied. A tokenizer without a template and without an EOS token stays unchanged.
    """
    changes = []
    if not tokenizer.chat_template and (name := _template_for(tokenizer)):
        tokenizer.chat_template = (_ASSETS / f"chat_{name}.jinja").read_text(encoding="utf-8")
        changes.append(f"the base has no chat template: the template {name!r} is used")
    if extend_with_tools(tokenizer) and not changes:
        changes.append("the base's chat template ignores tools: it is extended with tools")
    return f"{changes[0]} and saved with the stage" if changes else ""


def _template_for(tokenizer: Any) -> str | None:
    known = set(tokenizer.get_vocab())
    if {"<|im_start|>", "<|im_end|>"} <= known:
        is_conditioned = "<|object_ref_start|>" in known and tokenizer.eos_token == "<|box_end|>"
        return "conditioned" if is_conditioned else "chatml"
    return "plain" if tokenizer.eos_token else None


def shows_tools(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the chat template shows tools, calls with their arguments, and results."""
    text = _rendered(tokenizer, [*_QUESTION, _CALL, *_RESULT], [_TOOL])
    expected = ("Look at the probed sky", "probed_city", "Probeville", "probably sunny")
    return all(part in text for part in expected) and text.count("probe_weather") >= 2  # the tool and its call


def extend_with_tools(tokenizer: Any) -> bool:
    """Add tools to a chat template that ignores them. Return whether the template was changed.

    The tokenizer itself is changed, so that it is saved and served with the template that the stage was trained on. A
    tokenizer without a chat template, or with a template that always fails, stays unchanged.
    """
    if not tokenizer.chat_template or shows_tools(tokenizer):
        return False
    system = [{"role": "system", "content": "The probe's rule."}, *_QUESTION]
    place = "system" if "The probe's rule." in _rendered(tokenizer, system, None) else "user"
    form = PromptForm(place=place)
    values = {"PLACE": place, "HEADING": tools_heading(form), "REQUEST": call_form(form.calls).request[0]}
    extension = (_ASSETS / "tools.jinja").read_text(encoding="utf-8")
    for name, value in values.items():
        extension = extension.replace(name, json.dumps(value))
    original = tokenizer.chat_template
    if isinstance(original, dict):  # several templates by name, without a working one for tools
        tokenizer.chat_template = {**original, "tool_use": extension + original["default"]}
    else:
        tokenizer.chat_template = extension + original
    if shows_tools(tokenizer):
        return True
    tokenizer.chat_template = original
    return False


def template_call_form(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the name of the call form that the chat template writes; None if it is not one of `CALL_FORMS`."""
    before, whole = (_rendered(tokenizer, turns, [_TOOL]) for turns in (_QUESTION, [*_QUESTION, _CALL]))
    call_text = whole.removeprefix(before)
    for name, form in CALL_FORMS.items():
        reply = form.read(call_text)
        if [(call.name, call.arguments) for call in reply.calls] == [("probe_weather", _ARGUMENTS)]:
            return name
    return None


def reply_form(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the name of the call form of a model's replies: its template's, or hermes."""
    return template_call_form(tokenizer) or PromptForm().calls


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: Any) -> str:
    """Return the rendered conversation, or "" if the template fails, with any exception."""
    try:
        return str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False))
    except Exception:
        return ""
