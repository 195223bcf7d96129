"""Which rows are repetitions, and which are held out: both decided by what a row says, never by where it stands."""

import json
import re

from poe.calls.conversation import Conversation
from poe.data.digest import digest


def _question(conversation: Conversation) -> str:
    """Everything the user says and the tools on offer (in any order), without the answers."""
    said = [
        re.sub(r"\s+", " ", m["content"] or "").strip().lower() for m in conversation.messages if m["role"] == "user"
    ]
    tools = sorted(json.dumps(tool, sort_keys=True, ensure_ascii=False) for tool in conversation.tools)
    return json.dumps([said, tools], ensure_ascii=False)


def repetition(conversation: Conversation, seen: set[bytes]) -> str | None:
    """Why a row repeats one whose marks are in `seen`, or None; a row that repeats none leaves its marks there.

    "duplicate row": messages and tools are equal. "same questions and tools": every user turn (white space and case
    aside) and the tools are, so the two rows could only contradict or repeat each other.
    """
    row, question = digest("r" + conversation.key(), 16), digest("q" + _question(conversation), 16)
    if row in seen:
        return "duplicate row"
    if question in seen:
        return "same questions and tools"
    seen.update((row, question))
    return None


def is_held_out(conversation: Conversation, held_out: float = 0.02, seed: int = 0) -> bool:
    """Whether a row belongs to the held-out side: a function of its `query`, the share and the seed alone.

    A query is on one side only, whatever the other rows are; rows added later move nothing, and a larger share holds
    out all that a smaller one does. `held_out` is the expected share of *queries*, so small sets deviate from it.
    """
    if not 0 <= held_out <= 1:
        raise ValueError(f"held_out is a share from 0 to 1, got {held_out!r}")
    text = conversation.query or conversation.key()
    number = int.from_bytes(digest(f"{seed}\n{text}", 16)[:8], "big")
    return number < held_out * 2**64
