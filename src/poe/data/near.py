"""Near-duplicates by MinHash: rows that say almost the same with almost the same calls.

A row is a set: the runs of three words of its user turns and calls, and the names of its tools. The share of equal
MinHash values estimates the Jaccard similarity of two sets (Broder 1997); rows are compared only where a band of values
agrees (locality-sensitive hashing). Of a value only eight bits are kept (b-bit MinHash, Li and König 2010), so a row
costs 256 bytes.
"""

import json
import re
from collections.abc import Iterator

import numpy as np

from poe.calls.conversation import Conversation
from poe.data.split import short_hash

BANDS, PER_BAND = 16, 8  # two rows of similarity 0.85 meet in a band with probability 0.99, of 0.5 with 0.06
_HASHES = BANDS * PER_BAND
_RNG = np.random.default_rng(20_240_601)
_FACTORS = _RNG.integers(0, 2**63, _HASHES, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_SHIFTS = _RNG.integers(0, 2**63, _HASHES, dtype=np.uint64)
_MIX = _RNG.integers(0, 2**63, PER_BAND, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_WORD = re.compile(r"\w+")
_CHUNK = 4096


def shingles(conversation: Conversation) -> set[str]:
    """What a row is compared by."""
    found = {f"tool {tool['function']['name']}" for tool in conversation.tools}
    for message in conversation.messages:
        parts = [message["content"] or ""] if message["role"] == "user" else []
        for call in message.get("tool_calls", ()):
            parts.append(f"{call['function']['name']} {json.dumps(call['function']['arguments'], ensure_ascii=False)}")
        for part in parts:
            words = _WORD.findall(part.lower())
            found.update(" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2)))
    return found


class NearDuplicates:
    """Collects rows in order; `find` then says which repeat an earlier one, and which one that is."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []
        self._done: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, conversation: Conversation) -> None:
        """Take the next row."""
        hashes = [short_hash(text) for text in shingles(conversation)] or [0]
        # multiply-shift hashing: the upper half of a * x + b modulo 2**64
        mixed = np.array(hashes, dtype=np.uint64)[:, None] * _FACTORS + _SHIFTS  # (S, 128)
        least = (mixed >> np.uint64(32)).min(axis=0)
        bands = (least.reshape(BANDS, PER_BAND) * _MIX).sum(axis=1, dtype=np.uint64)
        self._waiting.append((bands, (least & np.uint64(255)).astype(np.uint8)))
        if len(self._waiting) == _CHUNK:
            self._gather()

    def find(self) -> Iterator[tuple[int, int]]:
        """Yield (later, earlier) for every row that is near an earlier one which itself is kept."""
        self._gather()
        if not self._done:
            return
        bands = np.concatenate([b for b, _ in self._done])  # (N, BANDS)
        values = np.concatenate([v for _, v in self._done])  # (N, 128)
        self._done = [(bands, values)]
        pairs = _candidates(bands)
        dropped = np.zeros(len(bands), dtype=bool)
        # eight bits agree by chance once in 256
        needed = self.threshold + (1 - self.threshold) / 256
        for start in range(0, len(pairs), _CHUNK):
            part = pairs[start : start + _CHUNK]
            similar = (values[part[:, 0]] == values[part[:, 1]]).mean(axis=1)
            for later, earlier in part[similar >= needed].tolist():
                if not dropped[earlier] and not dropped[later]:
                    dropped[later] = True
                    yield later, earlier

    def _gather(self) -> None:
        if self._waiting:
            self._done.append((np.stack([b for b, _ in self._waiting]), np.stack([v for _, v in self._waiting])))
            self._waiting = []


def _candidates(bands: np.ndarray) -> np.ndarray:
    """Pairs (later, earlier) that agree in a band, sorted by the later: each row with the first and the one before."""
    found = []
    for band in bands.T:
        order = np.argsort(band, kind="stable")
        same = band[order[1:]] == band[order[:-1]]
        starts = np.where(np.concatenate(([True], ~same)), np.arange(len(order)), 0)
        first = order[np.maximum.accumulate(starts)]
        later = order[1:][same]
        found += [np.stack([later, order[:-1][same]], axis=1), np.stack([later, first[1:][same]], axis=1)]
    return np.unique(np.concatenate(found), axis=0)
