"""Irrelevance: the tools that a question needs are taken away, and the answer becomes an abstention.

* A row qualifies when its first question is answered by a call. The new row ends with that question and the abstention.
* Gone are all tools that any turn of the row calls, and all that fit one of them (`fitting`); the others stay: they are
  what the question must not be answered with.
* Where nothing is left, one to three harmless tools of the pool are offered, except in one row of eight (and wherever
  the pool has none): a caller must also know what to say without any tool.
* A system text that names a tool which is gone would contradict the row: such a row does not qualify.
"""

from dataclasses import replace
from random import Random

from poe.calls.conversation import Conversation
from poe.data.augment.abstentions import abstention
from poe.data.augment.distractors import ToolPool
from poe.data.augment.fitting import harmless_to, without_fitting
from poe.data.augment.rows import called_tools

MOST_INSTEAD = 3
STAYS_EMPTY = 1 / 8


def make_irrelevant(conversation: Conversation, rng: Random, pool: ToolPool) -> Conversation | None:
    """The row with no tool that serves its first question, and an abstention; None where it does not qualify."""
    roles = [message["role"] for message in conversation.messages]
    at = roles.index("assistant") if "assistant" in roles else 0
    if at == 0 or roles[at - 1] != "user" or not conversation.messages[at].get("tool_calls"):
        return None
    called = called_tools(conversation)
    asked = conversation.messages[:at]
    left = without_fitting(conversation.tools, called)
    gone = [tool["function"]["name"] for tool in conversation.tools if tool not in left]
    if any(m["role"] == "system" and any(name in (m["content"] or "") for name in gone) for m in asked):
        return None
    row = replace(conversation, messages=[*asked, {"role": "assistant", "content": ""}], tools=left)
    if not left and rng.random() >= STAYS_EMPTY:
        left = pool.draw(rng, rng.randint(1, MOST_INSTEAD), harmless_to(conversation, row))
    answer = {"role": "assistant", "content": abstention(rng, called, left)}
    return replace(row, messages=[*asked, answer], tools=left)
