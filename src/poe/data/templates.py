"""Complete a tokenizer's chat template: add a missing template, or add tools to a template that ignores them.

Many instruct models have a template that ignores `tools` and fails on an assistant message that has only calls. The
extension is Jinja code in front of such a template. It writes tools, calls and results as text, in the form
`PromptForm()`, and passes the messages on. The base's own markers, defaults and generation prompt stay, and a
conversation without tools renders as before. Because the extension is part of the template, every program that applies
the template uses the same format.
"""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from poe.calls.conversation import Message, PromptForm, Tool
from poe.calls.forms.call_forms import CALL_FORMS, call_form
from poe.calls.forms.prompt_forms import tools_heading
from poe.data.template_needs import CALL, QUESTION, RESULT, TOOL, find_needs
from poe.errors import DataError

__all__ = [
    "complete_template",
    "extend_with_tools",
    "note_unread_calls",
    "reply_form",
    "shows_tools",
    "template_call_form",
]

_ASSETS = Path(__file__).parents[1] / "assets"


def complete_template(tokenizer: Any) -> str:
    """Add a chat template or tools to a tokenizer that lacks them. Return a description of the change, or "".

    A tokenizer without a template gets HRM-Text's if that model's marks end a turn (the condition is "direct"), ChatML
    if its marks are tokens, and otherwise one that writes the roles as words and the EOS token after every answer. It
    begins with the tokens that the tokenizer puts before every text, such as BOS. Then `extend_with_tools` is applied.
    A tokenizer without a template and without an EOS token stays unchanged.
    """
    changes = []
    if not tokenizer.chat_template and (name := _template_for(tokenizer)):
        text = (_ASSETS / f"chat_{name}.jinja").read_text(encoding="utf-8")
        tokenizer.chat_template = _write_prefix(tokenizer) + text
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


def _write_prefix(tokenizer: Any) -> str:
    """Return the part of a template that writes the tokens which the tokenizer puts before every text."""
    encoded = tokenizer("a", return_special_tokens_mask=True, verbose=False)
    num_tokens = [*encoded["special_tokens_mask"], 0].index(0)
    tokens = tokenizer.convert_ids_to_tokens(encoded["input_ids"][:num_tokens])
    if not tokens:
        return ""
    text = "bos_token" if tokens == [tokenizer.bos_token] else json.dumps("".join(tokens))
    return "{{- " + text + " -}}\n"


def shows_tools(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the chat template shows tools, calls with their arguments, and results."""
    text = _render_probe(tokenizer, [*QUESTION, CALL, *RESULT])
    expected = ("Look at the probed sky", "probed_city", "Probeville", "probably sunny")
    return all(part in text for part in expected) and text.count("probe_weather") >= 2  # the tool and its call


def extend_with_tools(tokenizer: Any) -> bool:
    """Add tools to a chat template that ignores them. Return whether the template was changed.

    The tokenizer itself is changed, so that it is saved and served with the template that the stage was trained on. A
    tokenizer without a chat template, or with a template that always fails, stays unchanged.
    """
    if not tokenizer.chat_template or shows_tools(tokenizer):
        return False
    place = "user" if find_needs(partial(_render, tokenizer)).no_system else "system"
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
    """Return the name of the call form that the chat template writes; None if it is not one of `CALL_FORMS`.

    A form with a mark comes first: the calls after the mark of another form can look like those of a form without one.
    """
    before, whole = (_render_probe(tokenizer, turns) for turns in (QUESTION, [*QUESTION, CALL]))
    call_text = whole.removeprefix(before)
    expected = [("probe_weather", CALL["tool_calls"][0]["function"]["arguments"])]
    marked = [name for name, form in CALL_FORMS.items() if form.mark and form.mark in call_text]
    for name in dict.fromkeys([*marked, *CALL_FORMS]):
        if [(call.name, call.arguments) for call in CALL_FORMS[name].read(call_text).calls] == expected:
            return name
    return None


def note_unread_calls(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a note if the chat template writes calls in a notation that no call form reads, otherwise ""."""
    if template_call_form(tokenizer) is not None:
        return ""
    return "the chat template writes calls in a notation of its own, which is not read: such calls count as text"


def reply_form(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the name of the call form of a model's replies: its template's, or hermes."""
    return template_call_form(tokenizer) or PromptForm().calls


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Sequence[Tool]) -> str:
    """Return the rendered conversation. Raises `DataError` for any exception of the template."""
    try:
        return str(tokenizer.apply_chat_template(list(messages), tools=list(tools) or None, tokenize=False))
    except Exception as error:
        raise DataError(str(error)) from error


def _render_probe(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    """Return a conversation with the probe's tool as the template requires it, or "" if the template fails."""
    render = partial(_render, tokenizer)
    try:
        return render(find_needs(render).adapt(messages), [TOOL])
    except DataError:
        return ""
