"""Chat templates of ours: for tokenizers without one, and for tools where the base's own knows none; forms of calls.

Many instruct models come with a template that ignores `tools` and fails on an assistant turn with calls alone. What
stands here goes before such a template, in Jinja: it tells tools, calls and results in text (as `PromptForm()` does)
and hands the messages on. The base's own markers, defaults and generation prompt stay, and a conversation without tools
renders as before. Because it is part of the template, everything that reads templates knows the format.
"""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from poe.calls.conversation import Message, PromptForm
from poe.calls.forms.call_forms import CALL_FORMS, call_form
from poe.calls.forms.prompt_forms import tools_heading

__all__ = ["complete_template", "extend_with_tools", "knows_tools", "reply_form", "template_call_form"]

_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_weather",
        "description": "Look at the probed sky",
        "parameters": {"type": "object", "properties": {"probed_city": {"type": "string", "description": "which"}}},
    },
}
_ARGUMENTS = {"probed_city": "Probeville"}
_ASK: list[Message] = [{"role": "user", "content": "How is it there?"}]
_CALL: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        # nine letters and digits: what Mistral's templates insist on
        {"id": "probe0001", "type": "function", "function": {"name": "probe_weather", "arguments": _ARGUMENTS}}
    ],
}
_RESULT: list[Message] = [
    {"role": "tool", "tool_call_id": "probe0001", "name": "probe_weather", "content": "probably sunny"},
    {"role": "assistant", "content": "Sunny."},
]

_ASSETS = Path(__file__).parents[1] / "assets"


def complete_template(tokenizer: Any) -> str:
    """Give a tokenizer what its chat template lacks; returns what was done, in words, nothing if nothing was.

    Without a template: that of HRM-Text if its marks end a turn (the condition is "direct"), ChatML where its marks are
    tokens, else roles in words with the end of text after every answer. Then `extend_with_tools`. A tokenizer without a
    template and without an end of text stays as it is.
    """
    done = []
    if not tokenizer.chat_template and (name := _own_template(tokenizer)):
        tokenizer.chat_template = (_ASSETS / f"chat_{name}.jinja").read_text(encoding="utf-8")
        done.append(f"the base has no chat template: ours is taken ({name})")
    if extend_with_tools(tokenizer) and not done:
        done.append("the base's chat template ignores tools: extended by ours")
    return f"{done[0]}, and saved so with the stage" if done else ""


def _own_template(tokenizer: Any) -> str | None:
    known = set(tokenizer.get_vocab())
    if {"<|im_start|>", "<|im_end|>"} <= known:
        is_conditioned = "<|object_ref_start|>" in known and tokenizer.eos_token == "<|box_end|>"
        return "conditioned" if is_conditioned else "chatml"
    return "plain" if tokenizer.eos_token else None


def knows_tools(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template shows tools, calls with their arguments, and results."""
    text = _rendered(tokenizer, [*_ASK, _CALL, *_RESULT], [_TOOL])
    shown = ("Look at the probed sky", "probed_city", "Probeville", "probably sunny")
    return all(part in text for part in shown) and text.count("probe_weather") >= 2  # the tool, and its call


def extend_with_tools(tokenizer: Any) -> bool:
    """Put our handling of tools before a chat template that has none; returns whether it was needed.

    The tokenizer itself is changed, so that it is saved, and served, with what a stage was trained on. Nothing is done
    to a tokenizer without a chat template, or with one whose every rendering fails.
    """
    if not tokenizer.chat_template or knows_tools(tokenizer):
        return False
    system = [{"role": "system", "content": "The probe's rule."}, *_ASK]
    place = "system" if "The probe's rule." in _rendered(tokenizer, system, None) else "user"
    told = PromptForm(place=place)
    values = {"PLACE": place, "HEADING": tools_heading(told), "REQUEST": call_form(told.calls).request[0]}
    extension = (_ASSETS / "tools.jinja").read_text(encoding="utf-8")
    for name, value in values.items():
        extension = extension.replace(name, json.dumps(value))
    before = tokenizer.chat_template
    if isinstance(before, dict):  # several templates by name: the one for tools is missing or of no use
        tokenizer.chat_template = {**before, "tool_use": extension + before["default"]}
    else:
        tokenizer.chat_template = extension + before
    if knows_tools(tokenizer):
        return True
    tokenizer.chat_template = before
    return False


def template_call_form(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The name of the call form that the chat template writes, None if it is none of ours."""
    before, whole = (_rendered(tokenizer, turns, [_TOOL]) for turns in (_ASK, [*_ASK, _CALL]))
    said = whole.removeprefix(before)
    for name, form in CALL_FORMS.items():
        reply = form.read(said)
        if [(call.name, call.arguments) for call in reply.calls] == [("probe_weather", _ARGUMENTS)]:
            return name
    return None


def reply_form(tokenizer: PreTrainedTokenizerBase) -> str:
    """The call form in which to read a model's replies: its template's, else hermes."""
    return template_call_form(tokenizer) or PromptForm().calls


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: Any) -> str:
    """What the template makes of a conversation; nothing where it fails: a template is a program."""
    try:
        return str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False))
    except Exception:
        return ""
