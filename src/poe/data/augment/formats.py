"""Formats: the row is to be written in another prompt form (`poe.data.forms`), tools and calls as others write them."""

from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any

from poe.data.conversation import Conversation


def with_random_form(
    conversation: Conversation, rng: Random, tools: Sequence[str] = (), calls: Sequence[str] = ()
) -> Conversation:
    """The row with a random `form`; `tools` and `calls` name the forms to choose from, none means any."""
    from poe.data.forms import random_form

    form: dict[str, Any] = {"form": random_form(rng, tools=list(tools) or None, calls=list(calls) or None)}
    return replace(conversation, **form)
