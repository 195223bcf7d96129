"""Find the tools that fit a question best, with BM25, when there are more than fit into a prompt."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from poe.calls.conversation import Tool
from poe.errors import MissingExtraError

TOOL_SHARE = 0.5
"""The part of a model's context that tools may take."""

TOOLS_OFFERED = 20
"""The most tools that a question is offered."""

_CUT_OFF = 0.5  # of the best score: tools with less are not offered
_WHOLE = 0.5  # what the whole question counts beside its best sentence
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|[^\W\d_A-Za-z]+")
_SENTENCE_END = re.compile(r"(?<=[.?!;])\s+")


class ToolIndex:
    """An index of tools by the words of their names, descriptions and parameters.

    Raises `MissingExtraError` without bm25s.
    """

    def __init__(self, tools: Sequence[Tool]) -> None:
        try:
            import bm25s
        except ImportError:
            raise MissingExtraError('Finding tools needs bm25s: pip install "poe-cascade[tools]"') from None
        self.tools = list(tools)
        self._retriever = bm25s.BM25()
        words = [list(_tool_words(tool)) for tool in tools]
        if any(words):
            self._retriever.index(words, show_progress=False)

    def search(self, question: str, k: int = TOOLS_OFFERED) -> list[Tool]:
        """Return at most `k` tools that fit a question, the best first.

        A question can need several tools, each named in a sentence of its own. Therefore the score of a tool is that of
        the sentence that it fits best, plus half of that of the whole question, each as a part of the best tool's.
        Tools with less than half of the best score are left out.
        """
        sentences = [sentence for sentence in _SENTENCE_END.split(question) if sentence.strip()] or [question]
        parts = np.stack([self._score(sentence) for sentence in sentences])
        scores = parts.max(axis=0) + _WHOLE * self._score(question)
        best = np.argsort(-scores, kind="stable")[:k]
        lowest = max(_CUT_OFF * scores.max(initial=0.0), 1e-9)
        return [self.tools[i] for i in best if scores[i] >= lowest]

    def _score(self, text: str) -> "np.ndarray[Any, np.dtype[np.float32]]":
        """Return the score of each tool, as a part of the best one's; zeros if no word is in a tool."""
        known = getattr(self._retriever, "vocab_dict", {})
        words = [word for word in _words(text) if word in known]
        if not words:
            return np.zeros(len(self.tools), np.float32)
        scores = self._retriever.get_scores(words)
        return scores / max(scores.max(initial=0.0), 1e-9)


def _tool_words(tool: Tool) -> Iterator[str]:
    function = tool["function"]
    yield from _words(function["name"])
    yield from _words(function["description"])
    yield from _schema_words(function["parameters"])


def _schema_words(schema: Any) -> Iterator[str]:
    properties = schema.get("properties") if isinstance(schema, dict) else None
    for name, sub in (properties or {}).items():
        yield from _words(name)
        if isinstance(sub, dict):
            yield from _words(sub.get("description") or "")
            yield from _schema_words(sub)


def _words(text: str) -> Iterator[str]:
    """Yield the words of a text in lower case; `getUserName` and `get_user_name` have three."""
    return (match[0].lower() for match in _WORD.finditer(text))
