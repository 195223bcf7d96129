"""Call accuracy: the share of held-out questions that a model answers with the reference calls, or with none."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from poe.calls.conversation import Conversation
from poe.calls.forms.call_forms import parse_reply
from poe.calls.tools import check_calls
from poe.cascade import Cascade
from poe.chat import generate_replies
from poe.data.render import Renderer
from poe.data.templates import reply_form


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


def split_question(conversation: Conversation) -> tuple[list[dict[str, Any]], list[tuple[str, Any]]]:
    """Return the messages before the first assistant turn that is trained on, and its calls as (name, arguments)."""
    question = conversation.question
    calls = conversation.messages[len(question)].get("tool_calls") or []
    return question, [(c["function"]["name"], c["function"]["arguments"]) for c in calls]


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
    cascade: Cascade, stage: str | None, splits: dict[str, list[Conversation]], **options: Any
) -> dict[str, CallScores]:
    """Answer and score every split with `stage` (None: the base alone). Pass `options` to `generate_replies`."""
    renderer = Renderer(cascade.tokenizer, vocab_size=cascade.config.vocab_size)
    form = reply_form(cascade.tokenizer)
    scores = {}
    for name, conversations in splits.items():
        prompts = [renderer.prompt_ids(split_question(c)[0], c.tools, c.form) for c in conversations]
        model, stops = cascade.model(stage), renderer.stop_token_ids
        replies = generate_replies(model, cascade.tokenizer, prompts, stops, **options)
        scores[name] = score_replies(conversations, [reply.text for reply in replies], form)
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
