"""Constrained decoding: at every step only tokens are allowed with which the reply stays inside a grammar.

A `Constraint` follows one row. `ConstraintProcessor` is a logits processor for a batch in which each row has its own
constraint, or none. It works with every loop that calls processors: `generate`, `SelfSpeculation`, products, routing.

A reply must also end. Near the end of `max_new_tokens`, a token is allowed only if the reply can still be closed after
it: the constraint writes a short ending on a copy of its state, and counts its tokens. So a model that would repeat
itself for ever gives a valid reply as well, and `is_cut` tells that its ending was not the model's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import llguidance.hf
import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from torch import Tensor
from transformers import LogitsProcessor

from poe.errors import DecodingError

Mask = np.ndarray[Any, np.dtype[np.bool_]]  # (V): which tokens are allowed

_MARGIN = 8  # tokens that the last steps are checked for beyond the length of the grammar's example
_MAX_CLOSING = 400
_NEVER = np.iinfo(np.int64).max
_MARK, _TEXT, _LATER = 1 << 32, 4 << 32, 1 << 40  # ranks of tokens that close a reply, see `_closing_rank`
_FEW = 12


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The tokens of a model, as the grammars see them.

    `stops` end a reply. `special` has the marks that are one special token. `text_tokens` are tokens that only the
    engine takes for special ones, because of their form (`<think>`).
    """

    engine: LLTokenizer
    stops: tuple[int, ...]
    special: dict[str, int]
    text_tokens: tuple[int, ...] = ()
    _openings: dict[str, Mask] = field(default_factory=dict)

    @cached_property
    def closing_order(self) -> np.ndarray[Any, Any]:
        """The preference (V) of each token for closing a reply: the smallest number first.

        Closing marks come first, then commas, other marks, digits, letters, and last what opens an object or array.
        """
        order = np.empty(self.engine.vocab_size, dtype=np.int64)
        for token in range(len(order)):
            text = self.engine.decode_bytes([token])
            order[token] = _closing_rank(text) << 32 | min(len(text), 255) << 24 | token
        return order

    def find_openings(self, text: str) -> Mask:
        """Return which tokens (V) begin a text, or begin with it; only the special token if one begins it."""
        if text not in self._openings:
            whole = text.encode()
            marks = [number for mark, number in self.special.items() if text.startswith(mark)]
            tokens = (self.engine.decode_bytes([token]) for token in range(self.engine.vocab_size))
            found = np.array([bool(t) and not marks and (whole.startswith(t) or t.startswith(whole)) for t in tokens])
            found[marks] = True
            self._openings[text] = found
        return self._openings[text]

    @cached_property
    def first_bytes(self) -> np.ndarray[Any, Any]:
        """The first byte (V) of each token."""
        size = self.engine.vocab_size
        return np.array([(self.engine.decode_bytes([token]) or b"\xff")[0] for token in range(size)], dtype=np.uint8)


def read_vocabulary(tokenizer: Any, vocab_size: int, stops: Sequence[int], marks: Sequence[str] = ()) -> Vocabulary:
    """Return the vocabulary of a fast tokenizer; it is made once. `marks` are texts that may be one special token.

    Raises `DecodingError` for a tokenizer of a kind that the engine does not read.
    """
    known = _VOCABULARIES.setdefault(tokenizer, {})
    key = (len(tokenizer), vocab_size, tuple(stops), tuple(marks))
    if key not in known:
        try:
            size = max(vocab_size, len(tokenizer))
            engine = llguidance.hf.from_tokenizer(tokenizer, n_vocab=size, eos_token=list(stops))
        except Exception as error:  # of several kinds
            raise DecodingError(
                f"Replies cannot be constrained with this tokenizer ({str(error)[:100]}): pass constrain=False, which "
                "only checks the calls."
            ) from None
        numbers = {mark: tokenizer.get_vocab().get(mark) for mark in marks}
        special = {mark: n for mark, n in numbers.items() if n is not None and engine.is_special_token(n)}
        added = tokenizer.added_tokens_decoder.items()
        ours = {*special.values(), *stops}
        text = tuple(n for n, token in added if not token.special and n not in ours and engine.is_special_token(n))
        known[key] = Vocabulary(engine, tuple(stops), special, text)
    return known[key]


_VOCABULARIES: WeakKeyDictionary[Any, dict[Any, Vocabulary]] = WeakKeyDictionary()


class Constraint:
    """The state of one reply inside a grammar in the Lark notation of llguidance.

    `max_new_tokens` is the most tokens of the reply, its stop token included; None: any number. `longest` is a text
    about as long as what can remain to be written before a reply ends, `shortest` is about the shortest reply. Raises
    `DecodingError` for a grammar that the engine refuses, and if the shortest reply has more tokens than
    `max_new_tokens`.

    With `threshold` the first token decides whether the reply is a call, which begins with the text `opening`: it is
    one if the log-odds of such a token, of all that are allowed, are at least the threshold.
    """

    def __init__(
        self,
        grammar: str,
        vocabulary: Vocabulary,
        *,
        longest: str = "",
        shortest: str = "",
        max_new_tokens: int | None = None,
        opening: str = "",
        threshold: float | None = None,
    ) -> None:
        self._vocabulary = vocabulary
        self._matcher = LLMatcher(vocabulary.engine, grammar, log_level=0)
        if self._matcher.is_error():
            raise DecodingError(f"The grammar cannot be used: {self._matcher.get_error()[:300]}")
        self._bits = np.zeros((vocabulary.engine.vocab_size + 31) // 32 * 4, dtype=np.uint8)
        self._tokens: list[int] = []
        self._consumed = 0  # tokens that the grammar has taken: all, except for the stop token and after a wrong token
        self._cut_at: int | None = None
        self._closing: list[int] = []  # the tokens that close the reply after `_tokens`, if they were found
        self._opening, self._threshold, self._is_call = opening, threshold, False
        self._max = max_new_tokens
        self._checked = 0  # the last steps, in which every token is checked
        if max_new_tokens is not None:
            self._checked = _MARGIN + len(vocabulary.engine.tokenize_str(longest))
            least = len(vocabulary.engine.tokenize_str(shortest)) + 1
            if least <= max_new_tokens <= self._checked:  # little room: find an ending before the first token
                self._closing = self._close(self._matcher.deep_copy(), tries_all=True) or []
                least = len(self._closing)
            if least > max_new_tokens:
                raise DecodingError(
                    f"The shortest reply that was found takes about {least} tokens: expected max_new_tokens of at "
                    f"least that, better {self._checked}, got {max_new_tokens}."
                )

    def copy(self) -> "Constraint":
        """Return a constraint in the same state."""
        other = object.__new__(Constraint)
        vars(other).update(vars(self))
        other._matcher, other._tokens = self._matcher.deep_copy(), list(self._tokens)
        other._bits, other._closing = self._bits.copy(), list(self._closing)
        return other

    @property
    def is_finished(self) -> bool:
        """Whether the reply has ended with a stop token."""
        return bool(self._tokens) and self._tokens[-1] in self._vocabulary.stops

    @property
    def is_cut(self) -> bool:
        """Whether the reply was closed because `max_new_tokens` came near."""
        return self._cut_at is not None

    def forced(self) -> list[int]:
        """Return the tokens that the grammar forces now."""
        if self.is_finished or self._consumed < len(self._tokens):
            return []
        return list(self._matcher.compute_ff_tokens())

    def forced_token(self) -> int | None:
        """Return the only token that may come now, None if the logits decide.

        Where the grammar forces a text, it is the first of the tokens with which the tokenizer writes that text. Near
        the end of `max_new_tokens` it can be the next token that closes the reply.
        """
        if self._threshold is not None and not self._tokens:  # the logits decide whether the reply is a call
            return None
        tokens = self.forced()
        if not tokens:
            return None
        closable = self._find_closable(tokens[0]) if self._is_near_end else None
        return tokens[0] if closable is None else closable

    def accept(self, token: int) -> bool:
        """Add a token to the reply. Return whether the grammar allows it; after another one the reply only ends."""
        if self.is_finished:
            return False
        is_valid = self._consumed == len(self._tokens)
        if token in self._vocabulary.stops:
            is_valid = is_valid and self._matcher.is_accepting()
        elif is_valid:
            is_valid = self._matcher.try_consume_tokens([token]) == 1
            self._consumed += is_valid
        self._tokens.append(token)
        self._closing = self._closing[1:] if self._closing[:1] == [token] else []
        return is_valid

    def follow(self, tokens: Sequence[int]) -> None:
        """Go to the state after a reply of these tokens, from any other state. What follows a stop token is ignored."""
        common = next(
            (i for i, (old, new) in enumerate(zip(self._tokens, tokens, strict=False)) if old != new),
            min(len(self._tokens), len(tokens)),
        )
        if common < len(self._tokens):
            self._matcher.rollback(max(0, self._consumed - common))
            self._consumed = min(self._consumed, common)
            del self._tokens[common:]
            self._closing = []
            if self._cut_at is not None and self._cut_at >= common:
                self._cut_at = None
        for token in tokens[common:]:
            if self.is_finished:
                break
            self.accept(token)

    def mask(self, logits: Tensor) -> None:
        """Set the logits (V) of all tokens that are not allowed now to -inf, in place; of none after the end."""
        if self.is_finished:
            return
        forced = self.forced_token()
        if forced is not None:
            allowed = self._only((forced,))
        else:
            allowed = self._allowed(self._matcher) if self._consumed == len(self._tokens) else self._only(())
            if self._threshold is not None:
                allowed = self._decide(allowed, logits)
            if self._is_near_end:
                allowed = self._check(allowed, logits)
        forbidden = torch.from_numpy(~allowed[: logits.shape[-1]]).to(logits.device)
        logits[: len(forbidden)].masked_fill_(forbidden, -torch.inf)
        logits[len(forbidden) :] = -torch.inf

    def score_opening(self, logits: Tensor) -> float:
        """Return the log-odds, from the logits (V) of the first token, that the reply begins with a call."""
        allowed = self._allowed(self._matcher)
        return self._score(allowed & self._vocabulary.find_openings(self._opening), allowed, logits)

    @property
    def _room(self) -> float:
        return math.inf if self._max is None else self._max - len(self._tokens)

    @property
    def _is_near_end(self) -> bool:
        return 0 < self._room <= self._checked

    def _decide(self, allowed: Mask, logits: Tensor) -> Mask:
        """Decide with the first token whether the reply is a call, and hold to a call until its opening is written."""
        if not self._tokens:
            opening = allowed & self._vocabulary.find_openings(self._opening)
            self._is_call = self._score(opening, allowed, logits) >= (self._threshold or 0.0)
            return opening if self._is_call else allowed & ~opening
        if self._is_call and self._tokens[0] not in self._vocabulary.special.values():
            written = self._vocabulary.engine.decode_bytes(self._tokens[: len(self._opening)])
            whole = self._opening.encode()
            if len(written) < len(whole) and whole.startswith(written):
                return allowed & self._vocabulary.find_openings(whole[len(written) :].decode())
        return allowed

    def _score(self, opening: Mask, allowed: Mask, logits: Tensor) -> float:
        size = min(len(allowed), logits.shape[-1])
        scores = logits[:size].float().cpu()
        call, other = (scores[torch.from_numpy(mask[:size])] for mask in (opening, allowed & ~opening))
        return float(call.logsumexp(0) - other.logsumexp(0))

    def _allowed(self, matcher: LLMatcher) -> Mask:
        if matcher.is_stopped():
            return self._only(())
        matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        return np.unpackbits(self._bits, bitorder="little", count=self._vocabulary.engine.vocab_size).view(np.bool_)

    def _only(self, tokens: Sequence[int]) -> Mask:
        """Return that these tokens are allowed, or the stop tokens if there are none."""
        allowed = np.zeros(self._vocabulary.engine.vocab_size, dtype=np.bool_)
        allowed[list(tokens or self._vocabulary.stops)] = True
        return allowed

    def _check(self, allowed: Mask, logits: Tensor) -> Mask:
        """Allow only the most likely token, if the reply can be closed after it, or the next token that closes it."""
        size = min(len(allowed), logits.shape[-1])
        scores = torch.where(torch.from_numpy(allowed[:size]), logits[:size].cpu(), -torch.inf)
        token = self._find_closable(int(scores.argmax()))
        return allowed if token is None else self._only((token,))  # without an ending the reply may be cut off

    def _find_closable(self, token: int) -> int | None:
        """Return the token if the reply can be closed after it, or else the next token that closes the reply.

        None: no ending was found.
        """
        if token in self._vocabulary.stops or self._closing[:1] == [token]:
            return token
        trial = self._matcher.deep_copy()
        if trial.try_consume_tokens([token]) == 1:
            after = self._close(trial)
            if after is not None and len(after) < self._room:
                self._closing = [token, *after]
                return token
        self._closing = self._closing or self._close(self._matcher.deep_copy(), tries_all=True) or []
        if not self._closing:
            return None
        if self._cut_at is None:
            self._cut_at = len(self._tokens)
        return self._closing[0]

    def _close(self, matcher: LLMatcher, *, tries_all: bool = False) -> list[int] | None:
        """Return tokens that end the reply, with a stop token. None if none were found.

        `tries_all`: where a few letters are possible, as at the names of arguments, each is tried for the shortest
        ending. The state of `matcher` changes.
        """
        tokens: list[int] = []
        order, last = self._vocabulary.closing_order, 0
        before: Mask | None = None
        while len(tokens) < _MAX_CLOSING:
            if matcher.is_accepting():
                return [*tokens, self._vocabulary.stops[0]]
            step = matcher.compute_ff_tokens()
            if not step:
                allowed = self._allowed(matcher)
                is_same = before is not None and np.array_equal(allowed, before)
                if self._vocabulary.closing_order[last] < _MARK and not is_same:
                    order = self._vocabulary.closing_order  # a quote began or ended a string
                elif before is not None and (order[last] >= _TEXT or is_same):
                    order = order.copy()  # it was, or may have been, a letter inside a string: prefer others
                    order[last] += _LATER
                last, before = int(np.where(allowed, order, _NEVER).argmin()), allowed
                if tries_all and order[last] >= _TEXT:
                    last = self._choose(matcher, allowed, last)
                step = [last]
            if matcher.try_consume_tokens(step) != len(step):
                return None
            tokens += step
        return None

    def _choose(self, matcher: LLMatcher, allowed: Mask, first: int) -> int:
        """Return the token with the shortest ending, among one for each letter; `first` if there are many letters."""
        tokens = np.flatnonzero(allowed)
        letters, positions = np.unique(self._vocabulary.first_bytes[tokens], return_index=True)
        if len(letters) > _FEW:
            return first
        lengths = {}
        for token in tokens[positions].tolist():
            trial = matcher.deep_copy()
            if trial.try_consume_tokens([token]) == 1 and (rest := self._close(trial)) is not None:
                lengths[token] = len(rest)
        return min(lengths, key=lambda token: lengths[token], default=first)


class ConstraintProcessor(LogitsProcessor):
    """Applies the constraint of each row of a batch, None for a row without one.

    `prompt_length` is the number of tokens before the replies. Rows may go back, as in speculative decoding.
    """

    def __init__(self, constraints: Sequence[Constraint | None], prompt_length: int) -> None:
        self.constraints, self._start = list(constraints), prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return a copy of the scores (B, V) in which the tokens that a row may not have are -inf."""
        if len(input_ids) != len(self.constraints):
            raise DecodingError(
                f"Constrained decoding has {len(self.constraints)} rows, and generate has {len(input_ids)}: leave out "
                "num_beams and num_return_sequences, or pass constrain=False."
            )
        scores = scores.clone()
        for constraint, ids, row in zip(self.constraints, input_ids, scores, strict=True):
            if constraint is not None:
                constraint.follow(ids[self._start :].tolist())
                constraint.mask(row)
        return scores


def _closing_rank(text: bytes) -> int:
    if not text or text.startswith(b"\xff"):  # a special token
        return 10
    if any(letter in b"[{" for letter in text):
        return 9
    if not text.strip(b"\"'}])\\"):  # a quote ends a string, `\"` one inside a string, and in a string the rest is text
        return 1 if b"\\" in text else 0 if text[0] in b"\"'" else 2
    if not text.strip(b", "):
        return 3
    if not text.strip(b"@.:-/"):  # the parts of addresses and times end with these
        return 4
    if all(letter in b"0123456789" for letter in text):
        return 6 if text.strip(b"0") else 7
    return 8 if any(letter > 127 or chr(letter).isalnum() for letter in text) else 5
