"""Find repeated rows and choose held-out rows, both by hashes of a row's content, independent of its position."""

import hashlib
import json
import re
from math import ceil

import numpy as np

from poe.calls.conversation import Conversation


def text_hash(text: str, size: int = 8) -> bytes:
    """Return the BLAKE2b hash of a text in UTF-8, `size` bytes. Lone surrogates are hashed as they are."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=size).digest()


def short_hash(text: str) -> int:
    """Return the hash of a text as an integer from 0 to 2**64 - 1."""
    return int.from_bytes(text_hash(text), "little")


def find_repetition(conversation: Conversation, seen: set[bytes]) -> str | None:
    """Return why a row repeats a row in `seen`, or add it to `seen` and return None.

    "duplicate row": messages and tools are equal. "same questions and tools": the tools are equal, and so are all user
    messages except for white space and case. Two such rows could only repeat or contradict each other.
    """
    row = text_hash("r" + conversation.key(), 16)
    question = text_hash("q" + _question(conversation), 16)
    if row in seen:
        return "duplicate row"
    if question in seen:
        return "same questions and tools"
    seen.update((row, question))
    return None


def _question(conversation: Conversation) -> str:
    """Return all user messages and the tools, independent of their order, without the answers."""
    texts = [
        re.sub(r"\s+", " ", m["content"] or "").strip().lower() for m in conversation.messages if m["role"] == "user"
    ]
    tools = sorted(json.dumps(tool, sort_keys=True, ensure_ascii=False) for tool in conversation.tools)
    return json.dumps([texts, tools], ensure_ascii=False)


def split_number(conversation: Conversation, seed: int = 0) -> int:
    """Return the number, from 0 to 2**64 - 1, that decides the side of a row: a hash of its `query` and of the seed.

    The rows with the lowest numbers are held out. So all rows with one query are on the same side, rows that are added
    later do not move other rows, and a larger share holds out every row that a smaller share does.
    """
    text = conversation.query or conversation.key()
    return int.from_bytes(text_hash(f"{seed}\n{text}", 16)[:8], "big")


def find_held_out(numbers: np.ndarray, ratio: float) -> np.ndarray:
    """Return which of the rows with these split numbers, uint64 (N,), are held out, bool (N,).

    `ratio` is the expected share of *queries*, so the actual share of a small set can differ. Above 0 it is at least
    one query.
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio is a share from 0 to 1, got {ratio!r}")
    if not ratio or not len(numbers):
        return np.zeros(len(numbers), dtype=bool)
    largest = np.uint64(ceil(ratio * 2**64) - 1)
    return numbers <= max(largest, numbers.min())
