"""Find near-duplicates with MinHash: rows with almost the same user messages and calls.

A row is represented as a set: the three-word sequences of its user messages and calls, and the names of its tools. The
share of equal MinHash values estimates the Jaccard similarity of two sets (Broder 1997). Two rows are compared only if
a band of values agrees (locality-sensitive hashing). Eight bits of each value are kept (b-bit MinHash, Li and König
2010), so a row takes 256 bytes.
"""

import json
import re
from collections.abc import Iterator

import numpy as np

from poe.calls.conversation import Conversation
from poe.data.split import short_hash

BANDS, PER_BAND = 16, 8  # rows of similarity 0.85 share a band with probability 0.99, rows of 0.5 with 0.06
_HASHES = BANDS * PER_BAND
_RNG = np.random.default_rng(20_240_601)
_FACTORS = _RNG.integers(0, 2**63, _HASHES, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_SHIFTS = _RNG.integers(0, 2**63, _HASHES, dtype=np.uint64)
_MIX = _RNG.integers(0, 2**63, PER_BAND, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_WORD = re.compile(r"\w+")
_CHUNK = 4096


def shingles(conversation: Conversation) -> set[str]:
    """Return the set that represents a row."""
    shingle_set = {f"tool {tool['function']['name']}" for tool in conversation.tools}
    for message in conversation.messages:
        parts = [message["content"] or ""] if message["role"] == "user" else []
        for call in message.get("tool_calls", ()):
            parts.append(f"{call['function']['name']} {json.dumps(call['function']['arguments'], ensure_ascii=False)}")
        for part in parts:
            words = _WORD.findall(part.lower())
            shingle_set.update(" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2)))
    return shingle_set


class NearDuplicates:
    """Collects rows in order. `find` then yields each row that almost repeats an earlier row."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._rows: list[tuple[np.ndarray, np.ndarray]] = []
        self._chunks: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, conversation: Conversation) -> None:
        """Add the next row."""
        hashes = [short_hash(text) for text in shingles(conversation)] or [0]
        # multiply-shift hashing: the upper half of a * x + b modulo 2**64
        minima = np.full(_HASHES, 2**64 - 1, dtype=np.uint64)
        for start in range(0, len(hashes), _CHUNK):  # in parts, so that a long row takes no gigabytes
            mixed = np.array(hashes[start : start + _CHUNK], dtype=np.uint64)[:, None] * _FACTORS + _SHIFTS  # (S, 128)
            np.minimum(minima, mixed.min(axis=0), out=minima)
        minima >>= np.uint64(32)
        bands = (minima.reshape(BANDS, PER_BAND) * _MIX).sum(axis=1, dtype=np.uint64)
        self._rows.append((bands, (minima & np.uint64(255)).astype(np.uint8)))
        if len(self._rows) == _CHUNK:
            self._flush()

    def find(self) -> Iterator[tuple[int, int]]:
        """Yield (later, earlier) for every row that is a near-duplicate of an earlier row that is kept."""
        self._flush()
        if not self._chunks:
            return
        bands = np.concatenate([b for b, _ in self._chunks])  # (N, BANDS)
        values = np.concatenate([v for _, v in self._chunks])  # (N, 128)
        self._chunks = [(bands, values)]
        pairs = _candidates(bands)
        dropped = np.zeros(len(bands), dtype=bool)
        # Eight bits agree by chance once in 256.
        needed = self.threshold + (1 - self.threshold) / 256
        for start in range(0, len(pairs), _CHUNK):
            part = pairs[start : start + _CHUNK]
            similar = (values[part[:, 0]] == values[part[:, 1]]).mean(axis=1)
            for later, earlier in part[similar >= needed].tolist():
                if not dropped[earlier] and not dropped[later]:
                    dropped[later] = True
                    yield later, earlier

    def _flush(self) -> None:
        if self._rows:
            self._chunks.append((np.stack([b for b, _ in self._rows]), np.stack([v for _, v in self._rows])))
            self._rows = []


def _candidates(bands: np.ndarray) -> np.ndarray:
    """Return pairs (later, earlier) that agree in a band, sorted by the later row.

    Each row is paired with the first row and the previous row of its band value.
    """
    pairs = []
    for band in bands.T:
        order = np.argsort(band, kind="stable")
        same = band[order[1:]] == band[order[:-1]]
        starts = np.where(np.concatenate(([True], ~same)), np.arange(len(order)), 0)
        first = order[np.maximum.accumulate(starts)]
        later = order[1:][same]
        pairs += [np.stack([later, order[:-1][same]], axis=1), np.stack([later, first[1:][same]], axis=1)]
    return np.unique(np.concatenate(pairs), axis=0)
