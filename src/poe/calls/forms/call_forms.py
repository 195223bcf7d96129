"""The call forms by name.

| form | a call | text beside calls |
|---|---|---|
| hermes | `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` | before, between, after |
| glaive | `<functioncall> {"name": ..., "arguments": '{...}'}` | before, between, after |
| mistral | `[TOOL_CALLS] [{"name": ..., "arguments": {...}}]` | before, after |
| xlam | `[{"name": ..., "arguments": {...}}]` | not part of the form; on separate lines |
| llama | `{"name": ..., "parameters": {...}}; {...}` | not part of the form; on separate lines |
| openai | `{"tool_calls": [{"id", "type", "function": {"name", "arguments": "{...}"}}]}` | in `content` |
| python | `[name(a=1, b='x')]` | not part of the form; on separate lines |

Text is always written before the calls. Reading removes the white space around it.
"""

from poe.calls.forms.base import CallForm, Reply
from poe.calls.forms.marked import Glaive, Hermes, Mistral
from poe.calls.forms.unmarked import Llama, OpenAI, Python, Xlam
from poe.errors import DataError, suggest

CALL_FORMS: dict[str, CallForm] = {
    form.name: form for form in (Hermes(), Glaive(), Xlam(), Llama(), Mistral(), OpenAI(), Python())
}


def call_form(name: str) -> CallForm:
    """Return the call form of that name. Raises `DataError` with a suggestion for an unknown name."""
    if name not in CALL_FORMS:
        raise DataError(f"Unknown call form {name!r}.{suggest(name, CALL_FORMS)}")
    return CALL_FORMS[name]


def parse_reply(text: str, form: str = "hermes") -> Reply:
    """Parse a model's reply that is written in the named call form.

    The text is data: nothing in it is executed. A call that cannot be parsed becomes a fault with a
    name, and is never guessed at.
    """
    return call_form(form).read(text)
