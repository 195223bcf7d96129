"""Questions that are answered with calls of tools, or with text where no call is right."""

import time
from collections.abc import Sequence
from typing import Any

from poe.calls.conversation import Conversation
from poe.calls.forms.call_forms import parse_reply
from poe.cascade import Cascade
from poe.chat import RawReply, generate_replies, plan_reply, read_call_threshold
from poe.data.render import Renderer
from poe.data.render_worker import REFUSED
from poe.data.templates import reply_form
from poe.decoding.constraints import Constraint
from poe.decoding.generation import REPLY_BATCH
from poe.errors import DataError, DecodingError, RowError
from poe.evaluation.call_metrics import Counts, count_replies, split_question
from poe.evaluation.suites import Item, Rows, Settings


class CallSuite:
    """Asks each question, and compares the calls of the reply with those of the reference.

    The reference is the first turn of the assistant that is trained on. Decoding is greedy. With `constrain` a reply is
    text, or calls that name a given tool and fit its schema, and the stage's threshold decides between the two, as in
    `Cascade.chat`.
    """

    batch_size = REPLY_BATCH

    def __init__(self, rows: Rows, cascade: Cascade, renderer: Renderer, settings: Settings) -> None:
        self.rows, self._cascade, self._renderer, self._settings = rows, cascade, renderer, settings
        self._form = reply_form(cascade.tokenizer)
        self._longest = getattr(cascade.config, "max_position_embeddings", None)
        self.items, self.dropped = rows.choose(self._encode, settings.rows, settings.seed)

    def answer(self, stage: str | None, items: Sequence[Item]) -> list[dict[str, Any]]:
        """Return the replies of a stage, None for the base. `seconds` is each one's share of the time of the batch."""
        started = time.perf_counter()
        threshold = find_call_threshold(self._cascade, stage)
        constraints = [self._make_constraint(item.content, threshold) for item in items]
        replies = generate_replies(
            self._cascade.model(stage),
            self._cascade.tokenizer,
            [item.tokens for item in items],
            self._renderer.stop_token_ids,
            max_new_tokens=self._settings.max_new_tokens,
            batch_size=len(items),
            constraints=constraints,
        )
        seconds = round((time.perf_counter() - started) / len(items), 4)
        answers = []
        for item, reply, constraint in zip(items, replies, constraints, strict=True):
            calls = parse_reply(reply.text, self._form_of(item.content)).calls
            reason = "length" if not reply.is_complete else "tool_calls" if calls else "stop"
            answers.append(
                {
                    "reply": reply.text,
                    "calls": [{"name": call.name, "arguments": call.arguments} for call in calls],
                    "finish_reason": reason,
                    "is_constrained": constraint is not None,
                    "tokens": reply.num_tokens,
                    "seconds": seconds,
                }
            )
        return answers

    def count(self, items: Sequence[Item], answers: Sequence[dict[str, Any]]) -> list[Counts]:
        """Return what each reply adds to each metric of calls."""
        replies = [RawReply(answer["reply"], answer["finish_reason"] != "length") for answer in answers]
        return count_replies([item.content for item in items], replies, self._form)

    def _encode(self, conversation: Conversation) -> list[int] | str:
        try:
            ids = self._renderer.prompt_ids(split_question(conversation)[0], conversation.tools, conversation.form)
        except RowError as error:
            return error.reason
        except DataError:
            return REFUSED
        if self._longest and len(ids) + self._settings.max_new_tokens > self._longest:
            return f"longer than {self._longest} tokens with its reply"
        return ids

    def _form_of(self, conversation: Conversation) -> str:
        return conversation.form.calls if conversation.form else self._form

    def _make_constraint(self, conversation: Conversation, threshold: float | None) -> Constraint | None:
        """Return the constraint of a reply; None if it is free, or if its tools cannot be made into a grammar."""
        form = None if conversation.form is None else conversation.form.calls
        options: dict[str, Any] = {"constrain": self._settings.constrain, "form": form, "threshold": threshold}
        stops, vocab_size = self._renderer.stop_token_ids, self._cascade.config.vocab_size
        try:
            plan = plan_reply(self._cascade.tokenizer, vocab_size, stops, conversation.tools, **options)
            return plan.make_constraint(self._settings.max_new_tokens)
        except DecodingError:
            return None


def find_call_threshold(cascade: Cascade, stage: str | None) -> float | None:
    """Return the threshold with which a stage decides between a call and text, None for the base or without one."""
    return None if stage is None else read_call_threshold(cascade.stages[stage].prompt)
