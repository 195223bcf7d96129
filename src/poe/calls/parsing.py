"""Calls in a model's reply: read from its text, and checked against the tools before anybody acts on them."""

from poe.calls.conversation import Tool
from poe.calls.forms.calls import Call, Reply, call_form
from poe.calls.schema import check_call

__all__ = ["Call", "Reply", "parse_reply", "problems"]


def parse_reply(text: str, form: str = "hermes") -> Reply:
    """Read the calls that a reply makes in a form of `poe.calls.forms.calls`, and the prose around them.

    The text is data: nothing in it is run. What looks like a call but cannot be read is kept in `malformed`, never
    guessed at.
    """
    return call_form(form).read(text)


def problems(calls: list[Call], tools: list[Tool]) -> list[str]:
    """What is wrong with the calls, one sentence each: an undeclared tool, arguments that do not fit its schema."""
    found = []
    for call in calls:
        reason = check_call(tools, call.name, call.arguments)
        if reason is not None:
            found.append(f"{call.name}: {reason}")
    return found
