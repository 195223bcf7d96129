"""Rows of the demo world: requests, parallel requests, follow-ups with results, and wishes that no tool grants."""

import json
from random import Random
from typing import Any, Literal

from poe.data.conversation import Conversation, Message
from poe.data.demo import words as w
from poe.data.demo.world import (
    HELD_OUT_TOOLS,
    TRAIN_TOOLS,
    DemoTool,
    Request,
    invented_tool,
    make_request,
)

Split = Literal["train", "unseen_values", "unseen_tools"]

FRAMES = (
    "Please {c}.",
    "Can you {c}?",
    "Could you {c}, please?",
    "I want to {c}.",
    "I need you to {c}.",
    "{C}.",
    "{C}, thanks.",
    "Hi, {c}.",
    "Would you {c}?",
)
PAIR_FRAMES = ("Please {c} and also {d}.", "{C}. Then {d}.", "Can you {c}, and {d}?", "I want to {c} and to {d}.")
ABSTENTIONS = (
    "None of my tools can do that.",
    "I have no tool for that, sorry.",
    "Sorry, that is not something my tools cover.",
    "I cannot do that with the tools I have.",
    "That needs a tool I do not have.",
    "There is no tool here that fits this.",
)
CONFIRMATIONS = ("Done: {r}.", "It worked: {r}.", "All set, {r}.", "Here is what came back: {r}.")
SMALL_TALK = (
    ("Hello!", "Hello! What can I do for you?"),
    ("Thanks a lot.", "You are welcome."),
    ("Who are you?", "I am a small assistant that calls tools."),
    ("Good morning.", "Good morning! How can I help?"),
)


def capitalize(clause: str) -> str:
    return clause[0].upper() + clause[1:]


def frame(rng: Random, first: str, second: str | None = None) -> str:
    """Put one clause, or two, into a sentence."""
    text = rng.choice(FRAMES if second is None else PAIR_FRAMES)
    return text.format(c=first, C=capitalize(first), d=second)


def call_message(requests: list[Request], first_id: int = 1) -> Message:
    """The assistant message that grants the requests."""
    calls = [
        {
            "id": f"call_{first_id + i}",
            "type": "function",
            "function": {"name": r.tool.name, "arguments": r.arguments},
        }
        for i, r in enumerate(requests)
    ]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def _result(request: Request, rng: Random, held_out: bool) -> dict[str, Any]:
    code = rng.randint(100, 9999)
    return rng.choice(({"status": "ok", "id": code}, {"status": "ok", "result": w.invented_name(rng)}, {"id": code}))


def pick_tools(rng: Random, split: Split, wanted: int, near: float = 0.4, odd: float = 0.0) -> list[DemoTool]:
    """The tools that a row offers, distinct by name: `wanted` to call first, then near and far distractors.

    `near` is the share of distractors with the same verb or the same noun as the first tool, `odd` that of odd names
    among the invented tools (two in five of all, in training rows).
    """
    pool = HELD_OUT_TOOLS if split == "unseen_tools" else TRAIN_TOOLS

    def one() -> DemoTool:
        return invented_tool(rng, odd) if split == "train" and rng.random() < 0.4 else rng.choice(pool)

    tools: dict[str, DemoTool] = {}
    while len(tools) < wanted:
        tool = one()
        tools[tool.name] = tool
    target = next(iter(tools.values()))
    for _ in range(rng.randint(0 if wanted > 1 else 1, 2)):
        alike = [t for t in pool if (t.noun == target.noun) != (t.verb == target.verb)]
        tool = rng.choice(alike) if alike and rng.random() < near else one()
        tools.setdefault(tool.name, tool)
    return list(tools.values())


def make_conversation(index: int, split: Split = "train", seed: int = 0, kind: str | None = None) -> Conversation:
    """Row number `index` of a split, the same for ever.

    `kind`: "call", "parallel", "follow_up", "abstain" or "talk"; by default a mixture of them. Only "train" rows use
    values outside `words.is_held_out`; only "unseen_tools" rows use held-out nouns.
    """
    rng = Random(f"{seed}/{split}/{index}")
    held_out = split != "train"
    kind = kind or rng.choices(("call", "parallel", "follow_up", "abstain", "talk"), (42, 22, 8, 26, 2))[0]
    near, odd = (0.6, 0.5) if split == "train" else (0.4, 0.0)
    tools = pick_tools(rng, split, 2 if kind in ("parallel", "abstain") else 1, near, odd)
    messages: list[Message]
    if kind == "talk":
        hello, answer = rng.choice(SMALL_TALK)
        messages = [{"role": "user", "content": hello}, {"role": "assistant", "content": answer}]
    elif kind == "abstain":
        absent = tools.pop(0)  # asked for, but not offered
        messages = [
            {"role": "user", "content": frame(rng, make_request(absent, rng, held_out).clause)},
            {"role": "assistant", "content": rng.choice(ABSTENTIONS)},
        ]
    elif kind == "parallel":
        requests = [make_request(tool, rng, held_out) for tool in tools[:2]]
        messages = [
            {"role": "user", "content": frame(rng, requests[0].clause, requests[1].clause)},
            call_message(requests),
        ]
    else:
        request = make_request(tools[0], rng, held_out)
        messages = [{"role": "user", "content": frame(rng, request.clause)}, call_message([request])]
        if kind == "follow_up":
            result = _result(request, rng, held_out)
            told = ", ".join(f"{key} {value}" for key, value in result.items())
            messages += [
                {
                    "role": "tool",
                    "tool_call_id": "call_1",
                    "name": request.tool.name,
                    "content": json.dumps(result),
                },
                {"role": "assistant", "content": rng.choice(CONFIRMATIONS).format(r=told)},
            ]
            if rng.random() < 0.5:  # a second wish in the same conversation
                again = make_request(rng.choice(tools), rng, held_out)
                messages += [{"role": "user", "content": frame(rng, again.clause)}, call_message([again], 2)]
    rng.shuffle(tools)
    return Conversation(
        messages=messages,
        tools=[tool.schema() for tool in tools],
        source="demo",
        licence="Apache-2.0",
        id=f"{split}-{seed}-{index}-{kind}",
    )
