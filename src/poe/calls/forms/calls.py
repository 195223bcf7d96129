"""The call forms by name.

| form | a call | text beside calls |
|---|---|---|
| hermes | `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` | before, between, after |
| glaive | `<functioncall> {"name": ..., "arguments": '{...}'}` | before, between, after |
| mistral | `[TOOL_CALLS] [{"name": ..., "arguments": {...}}]` | before, after |
| xlam | `[{"name": ..., "arguments": {...}}]` | not foreseen; on lines of its own |
| llama | `{"name": ..., "parameters": {...}}; {...}` | not foreseen; on lines of its own |
| openai | `{"tool_calls": [{"id", "type", "function": {"name", "arguments": "{...}"}}]}` | in `content` |
| python | `[name(a=1, b='x')]` | not foreseen; on lines of its own |

Text is always written before the calls, and comes back without the white space around it.
"""

from poe.calls.forms.bare import Llama, OpenAI, Python, Xlam
from poe.calls.forms.marked import Glaive, Hermes, Mistral
from poe.calls.forms.reply import Call, CallForm, Reply
from poe.errors import DataError, suggest

__all__ = ["CALL_FORMS", "Call", "CallForm", "Reply", "call_form"]

CALL_FORMS: dict[str, CallForm] = {
    form.name: form for form in (Hermes(), Glaive(), Xlam(), Llama(), Mistral(), OpenAI(), Python())
}


def call_form(name: str) -> CallForm:
    """The call form of that name; an unknown one is a DataError with a suggestion."""
    if name not in CALL_FORMS:
        raise DataError(f"Unknown call form {name!r}.{suggest(name, CALL_FORMS)}")
    return CALL_FORMS[name]
