"""Call accuracy: the share of held-out questions that a model answers with the reference calls, or with none."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from poe.calls.conversation import Conversation
from poe.calls.forms.call_forms import parse_reply
from poe.calls.tools import check_calls
from poe.cascade import Cascade
from poe.data.render import Renderer
from poe.data.templates import reply_form
from poe.decoding.generation import greedy_options
from poe.modeling.families import is_prefix_lm
from poe.modeling.placement import device_of


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
    """Return the messages before the first assistant turn, and the calls of that turn as (name, arguments) pairs.

    A turn with the weight 0, which is not trained on, is no reference.
    """
    answers = (i for i, m in enumerate(conversation.messages) if m["role"] == "assistant" and m.get("weight") != 0)
    first = next(answers)
    calls = conversation.messages[first].get("tool_calls") or []
    return conversation.messages[:first], [(c["function"]["name"], c["function"]["arguments"]) for c in calls]


def generate_replies(
    cascade: Cascade,
    stage: str | None,
    prompts: Sequence[Sequence[int]],
    stop_token_ids: Sequence[int],
    *,
    max_new_tokens: int = 160,
    batch_size: int = 32,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Generate a reply to each prompt (a list of token ids) by greedy decoding, in batches of similar length.

    The replies keep their special tokens. `progress` is called after each batch with the number of its prompts.
    """
    tokenizer = cascade.tokenizer
    pad = tokenizer.pad_token_id
    if pad is None or pad >= cascade.config.vocab_size:
        pad = stop_token_ids[0]
    device = device_of(cascade.model(stage).eval().get_input_embeddings())
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        width = max(len(prompts[i]) for i in part)
        ids = torch.tensor([[pad] * (width - len(prompts[i])) + list(prompts[i]) for i in part])
        mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in part])
        prefix: dict[str, Any] = {"token_type_ids": mask.to(device)} if is_prefix_lm(cascade.config) else {}
        output = cascade.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            **prefix,
            stage=stage,
            **greedy_options(max_new_tokens=max_new_tokens, eos_token_id=list(stop_token_ids), pad_token_id=pad),
        )
        for row, i in zip(output[:, width:].tolist(), part, strict=True):
            end = next((k for k, token in enumerate(row) if token in stop_token_ids), len(row))
            texts[i] = tokenizer.decode(row[:end], skip_special_tokens=False)
        if progress is not None:
            progress(len(part))
    return texts


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
        replies = generate_replies(cascade, stage, prompts, renderer.stop_token_ids, **options)
        scores[name] = score_replies(conversations, replies, form)
    return scores
