"""Decode requests of several stages together: they join and leave a batch between passes.

A step is one pass for the rows that run, and then at most one pass over the prompts of rows that wait. Stages that have
a layer in common with the base share a batch (`poe.decoding.branches`); others have a batch of their own.
"""

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from poe.cascade import Cascade
from poe.decoding.branches import build_branched_model
from poe.decoding.routing import RoutedModel
from poe.errors import PoEError
from poe.serving.batch import Batch
from poe.serving.sampling import GREEDY, Sampling, TokenScore, score_token
from poe.serving.text import TextBuilder

PROMPT_TOKENS = 2048  # prompts that wait are read in one pass up to this number of tokens, padding included


class Constraint(Protocol):
    """What a reply may be: a grammar and the tokens it has taken so far."""

    def mask(self, logits: Tensor) -> None:
        """Set the logits (V) of tokens that may not come next to minus infinity."""

    def accept(self, token: int) -> Any:
        """Take the next token."""

    @property
    def is_cut(self) -> bool:
        """Whether the reply was closed because `max_tokens` came near."""


@dataclass(frozen=True)
class Piece:
    """The next text of a reply, perhaps empty, with the scores of its tokens if the request wants them."""

    text: str
    scores: tuple[TokenScore, ...] = ()


@dataclass(frozen=True)
class End:
    """The end of a reply: "stop", "length" (`max_tokens`), "timeout", "canceled", or "error". `tokens` were decoded."""

    reason: str
    tokens: int


@dataclass(frozen=True)
class Request:
    """One reply to generate.

    stage           which stage answers, None for the base
    prompt          its token ids
    stop_token_ids  tokens that end the reply; they are no part of it
    stop            strings that end the reply; they are no part of it
    max_tokens      the reply is cut off after so many
    top_logprobs    None, or how many likely tokens to report at each place
    listener        called in the engine's thread with every `Piece`, then with the `End`
    constraint      what the reply may be, an object of its own
    """

    stage: str | None
    prompt: Sequence[int]
    stop_token_ids: Sequence[int]
    tokenizer: Any
    listener: Callable[[Piece | End], None]
    max_tokens: int
    sampling: Sampling = GREEDY
    stop: Sequence[str] = ()
    top_logprobs: int | None = None
    constraint: Constraint | None = None


class BusyError(PoEError):
    """The engine has as many requests as it takes."""


class ClosedError(PoEError):
    """The engine takes no more requests."""


@dataclass(eq=False)
class Row:
    """A request in the engine. `cancel` ends it at the next step."""

    request: Request
    deadline: float
    is_canceled: bool = False
    end: End | None = None
    tokens: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        request = self.request
        self._text = TextBuilder(request.tokenizer, request.stop)
        self._generator = request.sampling.make_generator()
        self._constraint = request.constraint

    def cancel(self) -> None:
        """End the row at the next step. It gets no more pieces."""
        self.is_canceled = True

    def take(self, logits: Tensor, likeliest: int) -> None:
        """Choose the next token from logits (V) and pass on what is certain of the text."""
        request, token = self.request, likeliest
        if self._constraint is not None:
            allowed = logits.clone()
            self._constraint.mask(allowed)
            token = request.sampling.choose(allowed, self._generator)
        elif request.sampling.temperature:
            token = request.sampling.choose(logits, self._generator)
        self.tokens.append(token)
        if token in request.stop_token_ids:
            is_cut = self._constraint is not None and self._constraint.is_cut
            self.finish("length" if is_cut else "stop")
            return
        if self._constraint is not None:
            self._constraint.accept(token)
        text = self._text.add(token)
        scores = () if request.top_logprobs is None else (score_token(logits, token, request.top_logprobs),)
        if text or scores:
            self._tell(Piece(text, scores))
        if self._text.stopped:
            self.finish("stop")
        elif len(self.tokens) >= request.max_tokens:
            self.finish("length")

    def finish(self, reason: str) -> None:
        """End the row for a reason of `End`."""
        if text := self._text.finish():
            self._tell(Piece(text))
        self.end = End(reason, len(self.tokens))
        self._tell(self.end)

    def _tell(self, event: Piece | End) -> None:
        if self.is_canceled:
            return
        try:
            self.request.listener(event)
        except Exception:  # whoever listened is gone
            self.cancel()


@dataclass(eq=False)
class _Lane:
    """The rows of one batch; `branches` has the index of each stage."""

    batch: Batch
    branches: dict[str | None, int]
    rows: list[Row] = field(default_factory=list)


class Engine:
    """Decodes requests for the base (None) and stages of a cascade, at most `max_batch` together.

    `max_queue` more may wait. `max_seconds` are for a request's waiting and decoding. `start` runs steps in a thread.
    `report` is called with the text of an error that ended a pass; it has no text of a request.
    """

    def __init__(
        self,
        cascade: Cascade,
        stages: Sequence[str | None],
        *,
        max_batch: int = 32,
        max_queue: int = 256,
        max_seconds: float = 600.0,
        report: Callable[[str], None] = print,
    ) -> None:
        self.max_batch, self.max_queue, self.max_seconds = max_batch, max_queue, max_seconds
        self.passes = self.decoded_rows = 0
        self._lanes = _build_lanes(cascade, stages)
        self._waiting: deque[Row] = deque()
        self._changed = threading.Condition()
        self._is_closing = self._is_canceling = False
        self._report = report
        self._thread = threading.Thread(target=self._run, name="poe-engine", daemon=True)

    @property
    def num_running(self) -> int:
        """The number of rows that are decoded."""
        return sum(len(lane.rows) for lane in self._lanes)

    @property
    def num_waiting(self) -> int:
        """The number of rows that wait for a place."""
        return len(self._waiting)

    def start(self) -> None:
        """Run steps in a thread until `close`."""
        self._thread.start()

    def check_places(self, count: int) -> None:
        """Raise `BusyError` or `ClosedError` if so many requests would not be taken now."""
        if self._is_closing:
            raise ClosedError("The server is shutting down.")
        if self.num_running + self.num_waiting + count > self.max_batch + self.max_queue:
            raise BusyError(f"{self.num_running} requests run and {self.num_waiting} wait: try again later.")

    def submit(self, requests: Sequence[Request]) -> list[Row]:
        """Take all these requests or none. Raises `BusyError` or `ClosedError`."""
        deadline = time.monotonic() + self.max_seconds
        rows = [Row(request, deadline) for request in requests]
        with self._changed:
            self.check_places(len(rows))
            self._waiting.extend(rows)
            self._changed.notify()
        return rows

    def close(self, *, cancel: bool = False) -> None:
        """Take no more requests, finish those that were taken (with `cancel`: end them), and wait for the thread."""
        if cancel:
            self.cancel_all()
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def cancel_all(self) -> None:
        """End all requests at the next step. It may be called in a signal handler: it takes no lock."""
        self._is_canceling = True

    def step(self) -> None:
        """Run one pass for the rows that are decoded, then at most one over prompts that wait."""
        self._drop_rows()
        for lane in self._lanes:
            if lane.rows:
                self._decode(lane, lane.rows, partial(lane.batch.step, [row.tokens[-1] for row in lane.rows]))
        if joining := self._next_rows():
            lane = self._find_lane(joining[0])
            prompts = [row.request.prompt for row in joining]
            branches = [lane.branches[row.request.stage] for row in joining]
            lane.rows += joining
            self._decode(lane, joining, partial(lane.batch.join, prompts, branches))

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self.num_running:
                    if self._is_closing:
                        return
                    self._changed.wait()
            self.step()

    def _decode(self, lane: _Lane, rows: list[Row], compute: Callable[[], Tensor]) -> None:
        """Run one pass and give each row its next token. If the pass fails, these rows end and the others go on."""
        try:
            logits = compute()
            likeliest = logits.argmax(-1).tolist()
        except Exception as error:  # of any kind: out of memory, for example. The server goes on with other requests.
            self._report(describe_error(error))
            for row in rows:
                row.finish("error")
            lane.rows = [row for row in lane.rows if row.end is None]
            if not lane.rows:
                lane.batch.clear()
            return
        self.passes, self.decoded_rows = self.passes + 1, self.decoded_rows + len(rows)
        for row, row_logits, token in zip(rows, logits, likeliest, strict=True):
            try:
                row.take(row_logits, token)
            except Exception as error:  # of a listener or a grammar
                self._report(describe_error(error))
                row.finish("error")
        self._keep_rows(lane, [row.end is None for row in lane.rows])

    def _drop_rows(self) -> None:
        """Remove rows that were canceled or are late."""
        now = time.monotonic()
        with self._changed:
            rows = [*self._waiting, *(row for lane in self._lanes for row in lane.rows)]
            for row in rows:
                if self._is_canceling:
                    row.finish("canceled")
                elif row.deadline < now:
                    row.finish("timeout")
            self._waiting = deque(row for row in self._waiting if not row.is_canceled and row.end is None)
        for lane in self._lanes:
            self._keep_rows(lane, [not row.is_canceled and row.end is None for row in lane.rows])

    def _keep_rows(self, lane: _Lane, kept: list[bool]) -> None:
        if not all(kept):
            indices = [i for i, is_kept in enumerate(kept) if is_kept]
            lane.batch.keep(indices)
            lane.rows = [lane.rows[i] for i in indices]

    def _next_rows(self) -> list[Row]:
        """Take the rows whose prompts are read next: the first that waits, and those after it that fit into a pass."""
        places = self.max_batch - self.num_running
        joining: list[Row] = []
        with self._changed:
            while self._waiting and len(joining) < places:
                row = self._waiting[0]
                longest = max(len(each.request.prompt) for each in [*joining, row])
                fits = longest * (len(joining) + 1) <= PROMPT_TOKENS
                if joining and not (fits and self._find_lane(row) is self._find_lane(joining[0])):
                    break
                joining.append(self._waiting.popleft())
        return joining

    def _find_lane(self, row: Row) -> _Lane:
        return next(lane for lane in self._lanes if row.request.stage in lane.branches)


def _build_lanes(cascade: Cascade, stages: Sequence[str | None]) -> list[_Lane]:
    """Return the batches of these stages: one for all that can share the base's layers, one for each other."""
    base = cascade.base

    def shares(name: str | None) -> bool:
        if base.config._attn_implementation == "flex_attention":  # its block masks cannot be split by rows
            return False
        if name is None:
            return bool(getattr(base.config, "combiner", "last") == "last")
        return cascade.stages[name].foot > 0

    sharing = [name for name in dict.fromkeys(stages) if shares(name)]
    groups = [[name] for name in dict.fromkeys(stages) if name not in sharing]
    lanes = [_Lane(Batch(cascade.model(name)), {name: 0}) for (name,) in groups]
    if len(sharing) == 1:
        lanes.append(_Lane(Batch(cascade.model(sharing[0])), {sharing[0]: 0}))
    elif sharing:
        model = build_branched_model(base, [cascade.expert(name) for name in sharing], RoutedModel)
        lanes.append(_Lane(Batch(model), {name: index for index, name in enumerate(sharing)}))
    return lanes


def describe_error(error: Exception) -> str:
    """Return the kind of an error and its place in the code, without its message: that may quote a request."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    kind = type(error).__name__
    return f"{kind}{place}" + (": out of memory" if isinstance(error, torch.OutOfMemoryError) else "")
