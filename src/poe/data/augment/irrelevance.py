"""Irrelevance and contrast: remove the tools that a question needs, and replace the answer by an abstention.

* A row qualifies if its first question is answered by a call. The new row ends with that question and the abstention.
* All tools that any message of the row calls are removed, and all tools that fit one of them (`fitting`). The others
  stay, because the question must not be answered with them.
* If no tool is left, one to three harmless tools from the pool are offered, except in one row of eight, or if the pool
  has none: a caller must also know what to answer without any tool.
* A row with a system message that names a removed tool does not qualify, because it would contradict itself.

`make_contrast_pair` returns the row with its call as well. A tool from the pool is then offered in both rows, so that
the two lists differ only in the tools that serve the question, and in those that fit them.
"""

from dataclasses import replace
from random import Random

from poe.calls.conversation import Conversation
from poe.data.augment.abstentions import make_abstention
from poe.data.augment.distractors import ToolPool, add_tools
from poe.data.augment.fitting import distractor_filter, without_fitting
from poe.data.augment.rows import called_tools

MAX_POOL_TOOLS = 3
NO_TOOLS_SHARE = 1 / 8


def make_irrelevant(conversation: Conversation, rng: Random, pool: ToolPool) -> Conversation | None:
    """Return the row with an abstention and without the tools that serve its first question, or None."""
    roles = [message["role"] for message in conversation.messages]
    answer = roles.index("assistant") if "assistant" in roles else 0
    if answer == 0 or roles[answer - 1] != "user" or not conversation.messages[answer].get("tool_calls"):
        return None
    called = called_tools(conversation)
    question = conversation.messages[:answer]
    tools = without_fitting(conversation.tools, called)
    removed = [tool["function"]["name"] for tool in conversation.tools if tool not in tools]
    if any(m["role"] == "system" and any(name in (m["content"] or "") for name in removed) for m in question):
        return None
    row = replace(conversation, messages=[*question, {"role": "assistant", "content": ""}], tools=tools)
    if not tools and rng.random() >= NO_TOOLS_SHARE:
        tools = pool.draw(rng, rng.randint(1, MAX_POOL_TOOLS), distractor_filter(conversation, row))
    abstention = {"role": "assistant", "content": make_abstention(rng, called, tools)}
    return replace(row, messages=[*question, abstention], tools=tools)


def make_contrast_pair(
    conversation: Conversation, rng: Random, pool: ToolPool
) -> tuple[Conversation, Conversation] | None:
    """Return the row with its call and the row with an abstention; None if the row does not qualify."""
    irrelevant = make_irrelevant(conversation, rng, pool)
    if irrelevant is None:
        return None
    added = [tool for tool in irrelevant.tools if tool not in conversation.tools]
    return add_tools(conversation, added, rng), irrelevant
