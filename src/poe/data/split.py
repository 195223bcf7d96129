"""Which rows are repetitions, and which are held out: both decided by what a row says, never by where it stands."""

import hashlib
import json
import re
from collections.abc import Iterable

from poe.data.conversation import Conversation
from poe.data.drops import DropReport


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _question(conversation: Conversation) -> str:
    """Everything the user says and the tools on offer (in any order), without the answers."""
    said = [
        re.sub(r"\s+", " ", m["content"] or "").strip().lower() for m in conversation.messages if m["role"] == "user"
    ]
    tools = sorted(json.dumps(tool, sort_keys=True, ensure_ascii=False) for tool in conversation.tools)
    return json.dumps([said, tools], ensure_ascii=False)


def deduplicate(
    conversations: Iterable[Conversation], report: DropReport | None = None, seen: set[bytes] | None = None
) -> list[Conversation]:
    """The first of each group of repetitions, in order; the rest is dropped and counted under its source.

    "duplicate row": messages and tools are equal. "same questions and tools": every user turn (white space and case
    aside) and the tools are, so the two rows could only contradict or repeat each other. Rows of several sources are
    compared with each other when they share a call, or share `seen`.
    """
    report = DropReport() if report is None else report
    seen = set() if seen is None else seen
    kept = []
    for conversation in conversations:
        row, question = _digest("r" + conversation.key()), _digest("q" + _question(conversation))
        if row in seen or question in seen:
            reason = "duplicate row" if row in seen else "same questions and tools"
            report.drop(conversation.source, reason, {"messages": conversation.messages}, conversation.id)
            report.kept[conversation.source] -= 1
            continue
        seen.update((row, question))
        kept.append(conversation)
    return kept


def is_held_out(conversation: Conversation, held_out: float = 0.02, seed: int = 0) -> bool:
    """Whether a row belongs to the held-out side: a function of its `query`, the share and the seed alone."""
    text = conversation.query or conversation.key()
    number = int.from_bytes(_digest(f"{seed}\n{text}")[:8], "big")
    return number < held_out * 2**64


def split(
    conversations: Iterable[Conversation], held_out: float = 0.02, seed: int = 0
) -> tuple[list[Conversation], list[Conversation]]:
    """(training rows, held-out rows), each in the order given.

    A query is on one side only, whatever the other rows are; rows added later move nothing, and a larger share holds
    out all that a smaller one does. `held_out` is the expected share of *queries*, so small sets deviate from it.
    """
    if not 0 <= held_out <= 1:
        raise ValueError(f"held_out is a share from 0 to 1, got {held_out!r}")
    sides: tuple[list[Conversation], list[Conversation]] = ([], [])
    for conversation in conversations:
        sides[is_held_out(conversation, held_out, seed)].append(conversation)
    return sides
