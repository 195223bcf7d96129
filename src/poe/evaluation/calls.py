"""Call accuracy: the share of held-out questions that a model answers with the reference calls, or with none."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch

from poe.calls.conversation import Conversation
from poe.calls.forms.call_forms import parse_reply
from poe.calls.tools import check_calls
from poe.cascade import Cascade
from poe.data.render import Renderer
from poe.data.templates import reply_form
from poe.decoding.generation import REPLY_BATCH, REPLY_TOKENS
from poe.errors import DataError
from poe.evaluation.call_metrics import split_question
from poe.evaluation.call_suite import Questions
from poe.evaluation.suites import Settings
from poe.modeling.families import is_prefix_lm
from poe.modeling.placement import device_of

THRESHOLD_ROWS = 10
"""The fewest questions with calls, and without, on which a threshold is fitted: fewer would move it by chance."""


@dataclass(frozen=True)
class CallScores:
    """Scores of one split, as shares from 0 to 1.

    `exact`, `names` and `valid` are shares of the rows with reference calls, `abstained` of the rows without. A share
    of no rows is None.

    exact      the calls equal the reference as JSON values, in order
    names      the calls have the tools of the reference, in order
    valid      there is at least one call, and every call can be read and fits its schema
    abstained  the reply is text without calls
    """

    rows: int
    exact: float | None
    names: float | None
    valid: float | None
    abstained: float | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def score_replies(conversations: Sequence[Conversation], replies: Sequence[str], form: str = "hermes") -> CallScores:
    """Compare replies with the reference answers of `conversations`.

    A reply is parsed in the call form of its conversation, or in `form` if the conversation has none.
    """
    exact = names = valid = rows_with_calls = abstained = rows_without_calls = 0
    for conversation, text in zip(conversations, replies, strict=True):
        expected = split_question(conversation)[1]
        reply = parse_reply(text, conversation.form.calls if conversation.form else form)
        got = [(call.name, call.arguments) for call in reply.calls]
        if expected:
            rows_with_calls += 1
            exact += got == expected and not reply.malformed
            names += [n for n, _ in got] == [n for n, _ in expected]
            valid += bool(got) and not reply.malformed and not check_calls(reply.calls, conversation.tools)
        else:
            rows_without_calls += 1
            abstained += not got and not reply.malformed and bool(reply.content)
    return CallScores(
        rows=len(conversations),
        exact=_share(exact, rows_with_calls),
        names=_share(names, rows_with_calls),
        valid=_share(valid, rows_with_calls),
        abstained=_share(abstained, rows_without_calls),
    )


def _share(hits: int, rows: int) -> float | None:
    return round(hits / rows, 4) if rows else None


def evaluate_calls(
    cascade: Cascade,
    stage: str | None,
    splits: dict[str, list[Conversation]],
    *,
    constrain: bool = False,
    threshold: float | None = None,
    max_new_tokens: int = REPLY_TOKENS,
    batch_size: int = REPLY_BATCH,
    progress: Callable[[int], None] | None = None,
) -> dict[str, CallScores]:
    """Answer and score every split with `stage` (None: the base alone), greedily.

    With `constrain` each reply is text or calls that fit their tools, and `threshold` decides between the two
    (`fit_call_threshold`); by default replies are free. `progress` is called after each batch with the number of its
    questions.
    """
    questions = Questions(cascade, Renderer(cascade.tokenizer, vocab_size=cascade.config.vocab_size))
    settings = Settings(constrain=constrain, max_new_tokens=max_new_tokens)
    scores = {}
    for name, conversations in splits.items():
        prompts = [questions.encode(conversation) for conversation in conversations]
        replies = questions.ask(
            *(stage, conversations, prompts, settings),
            threshold=threshold,
            batch_size=batch_size,
            progress=progress,
        )
        form = reply_form(cascade.tokenizer)
        scores[name] = score_replies(conversations, [reply.text for reply, _ in replies], form)
    return scores


def compare_with_base(
    cascade: Cascade,
    stage: str,
    splits: dict[str, list[Conversation]],
    evaluate: Callable[..., dict[str, CallScores]] = evaluate_calls,
) -> dict[str, Any]:
    """Answer and score every split with the base and with a stage; return the scores by split and model.

    `train_stage(evaluate=compare_with_base)` does it after training.
    """
    results: dict[str, Any] = {}
    for label, name in (("base", None), ("stage", stage)):
        for split, score in evaluate(cascade, name, splits).items():
            results.setdefault(split, {})[label] = score.as_dict()
    return results


@torch.no_grad()
def score_openings(cascade: Cascade, stage: str | None, conversations: Sequence[Conversation]) -> list[float]:
    """Return for each question the log-odds that the reply begins with a call, from the logits of its first token."""
    questions = Questions(cascade, Renderer(cascade.tokenizer, vocab_size=cascade.config.vocab_size))
    model: Any = cascade.model(stage).eval()
    device = device_of(model.get_input_embeddings())
    scores = []
    for conversation in conversations:
        constraint = questions.make_constraint(conversation)
        if constraint is None:
            raise DataError("Expected questions with tools: without them there is nothing to decide.")
        ids = torch.tensor([questions.encode(conversation)], device=device)
        inputs = {"token_type_ids": torch.ones_like(ids)} if is_prefix_lm(model.config) else {}
        logits = model(input_ids=ids, logits_to_keep=1, use_cache=False, **inputs).logits[0, -1]
        scores.append(constraint.score_opening(logits))
    return scores


def choose_threshold(scores: Sequence[float], has_calls: Sequence[bool]) -> float | None:
    """Return the threshold that decides best whether to call, None if the rows are all of one kind.

    Rows with calls and rows without count equally as kinds. Among equally good thresholds, the one with the most room
    to the scores on both sides wins.
    """
    with_calls = sorted(s for s, called in zip(scores, has_calls, strict=True) if called)
    without = sorted(s for s, called in zip(scores, has_calls, strict=True) if not called)
    if not with_calls or not without:
        return None
    ordered = sorted({*with_calls, *without})
    edges = [ordered[0] - 2.0, *ordered, ordered[-1] + 2.0]
    best = (-1.0, 0.0, 0.0)
    for low, high in pairwise(edges):
        middle = (low + high) / 2
        called = sum(s >= middle for s in with_calls) / len(with_calls)
        abstained = sum(s < middle for s in without) / len(without)
        best = max(best, (called + abstained, high - low, middle))
    return round(best[2], 4)


def fit_call_threshold(cascade: Cascade, stage: str, conversations: Sequence[Conversation]) -> float | None:
    """Fit the threshold with which `cascade.chat(tool_choice="auto")` decides between a call and text.

    It is kept in the stage's prompt format, which `save_stage` writes. Returns None, and changes nothing, unless at
    least `THRESHOLD_ROWS` questions with tools are answered with calls, and as many with text.
    """
    rows = [c for c in conversations if c.tools]
    has_calls = [bool(split_question(c)[1]) for c in rows]
    if min(sum(has_calls), len(rows) - sum(has_calls)) < THRESHOLD_ROWS:
        return None
    threshold = choose_threshold(score_openings(cascade, stage, rows), has_calls)
    if threshold is not None:
        target = cascade.stages[stage]
        target.prompt = {**(target.prompt or {}), "call_threshold": threshold}
    return threshold
