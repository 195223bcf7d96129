"""Conversations of the demo world: requests, parallel requests, results, and requests that no tool can fulfill."""

import json
from random import Random
from typing import Literal

from poe.calls.conversation import Conversation, Message
from poe.demo import words as w
from poe.demo.world import (
    HELD_OUT_TOOLS,
    TRAIN_TOOLS,
    DemoTool,
    Request,
    invent_tool,
    make_request,
)

Split = Literal["train", "unseen_values", "unseen_tools"]
TURNS = ("call", "parallel", "abstain", "talk")

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
    """Return the clause with a capital first letter."""
    return clause[0].upper() + clause[1:]


def frame_request(rng: Random, first: str, second: str | None = None) -> str:
    """Return a sentence with one clause or two."""
    text = rng.choice(FRAMES if second is None else PAIR_FRAMES)
    return text.format(c=first, C=capitalize(first), d=second)


def call_message(requests: list[Request], first_id: int = 1) -> Message:
    """Return the assistant message with the calls that fulfill the requests."""
    calls = [
        {
            "id": f"call_{first_id + i}",
            "type": "function",
            "function": {"name": r.tool.name, "arguments": r.arguments},
        }
        for i, r in enumerate(requests)
    ]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def _result_messages(requests: list[Request], first_id: int, rng: Random) -> list[Message]:
    """Return the results of the called tools, and the assistant message that reports them."""
    messages: list[Message] = []
    reported = []
    for number, request in enumerate(requests, first_id):
        code = rng.randint(100, 9999)
        result = rng.choice(({"status": "ok", "id": code}, {"result": w.invent_name(rng)}, {"id": code}))
        content = json.dumps(result)
        messages.append(
            {"role": "tool", "tool_call_id": f"call_{number}", "name": request.tool.name, "content": content}
        )
        reported += [f"{key} {value}" for key, value in result.items()]
    confirmation = rng.choice(CONFIRMATIONS).format(r=", ".join(reported))
    return [*messages, {"role": "assistant", "content": confirmation}]


def pick_tools(rng: Random, split: Split, num_called: int, near: float = 0.4, odd: float = 0.0) -> list[DemoTool]:
    """Return the tools that a row offers, with distinct names: first `num_called` tools to call, then distractors.

    `near` is the share of distractors with the verb or the noun of the first tool. `odd` is the share of odd names
    among invented tools, which are two in five of all tools in training rows.
    """
    pool = HELD_OUT_TOOLS if split == "unseen_tools" else TRAIN_TOOLS

    def draw_tool() -> DemoTool:
        return invent_tool(rng, odd) if split == "train" and rng.random() < 0.4 else rng.choice(pool)

    tools: dict[str, DemoTool] = {}
    while len(tools) < num_called:
        tool = draw_tool()
        tools[tool.name] = tool
    target = next(iter(tools.values()))
    for _ in range(rng.randint(0 if num_called > 1 else 1, 2)):
        similar = [t for t in pool if (t.noun == target.noun) != (t.verb == target.verb)]
        tool = rng.choice(similar) if similar and rng.random() < near else draw_tool()
        tools.setdefault(tool.name, tool)
    return list(tools.values())


def make_conversation(index: int, split: Split = "train", seed: int = 0, kind: str | None = None) -> Conversation:
    """Return row number `index` of a split. It is always the same.

    `kind` is "call", "parallel", "abstain" or "talk": one turn of that kind. By default, one to three turns of mixed
    kinds, with results after calls. "train" rows only use values that are not held out (`words.is_held_out`), the other
    splits only held-out ones. Only "unseen_tools" rows use held-out nouns.
    """
    rng = Random(f"{seed}/{split}/{index}")
    held_out = split != "train"
    turns = [kind] if kind else rng.choices(TURNS, (48, 22, 27, 3), k=rng.choices((1, 2, 3), (45, 35, 20))[0])
    near, odd = (0.6, 0.5) if split == "train" else (0.4, 0.0)
    tools = pick_tools(rng, split, ("parallel" in turns) + ("abstain" in turns) + 1, near, odd)
    absent = tools.pop(0) if "abstain" in turns else None  # requested but not offered
    messages: list[Message] = []
    calls = 0
    for number, turn in enumerate(turns, 1):
        if turn == "talk":
            hello, answer = rng.choice(SMALL_TALK)
            messages += [{"role": "user", "content": hello}, {"role": "assistant", "content": answer}]
        elif turn == "abstain":
            assert absent is not None
            text = frame_request(rng, make_request(absent, rng, held_out).clause)
            messages += [{"role": "user", "content": text}, {"role": "assistant", "content": rng.choice(ABSTENTIONS)}]
        else:
            count = 2 if turn == "parallel" else 1
            called = tools[:count] if number == 1 else rng.sample(tools, count)
            requests = [make_request(tool, rng, held_out) for tool in called]
            text = frame_request(rng, *(request.clause for request in requests))
            messages += [{"role": "user", "content": text}, call_message(requests, calls + 1)]
            if number < len(turns) or (kind is None and rng.random() < 0.1):
                messages += _result_messages(requests, calls + 1, rng)
            calls += len(requests)
    rng.shuffle(tools)
    return Conversation(
        messages=messages,
        tools=[tool.schema() for tool in tools],
        source="demo",
        license="Apache-2.0",
        id=f"{split}-{seed}-{index}-{turns[0]}",
    )
