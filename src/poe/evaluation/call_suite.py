"""Questions that are answered with calls of tools, or with text where no call is right."""

import hashlib
import time
from collections.abc import Callable, Sequence
from typing import Any

from poe.calls.conversation import Conversation
from poe.calls.forms.call_forms import parse_reply
from poe.cascade import Cascade
from poe.chat import RawReply, generate_replies, plan_reply, read_call_threshold
from poe.data.render import Renderer
from poe.data.templates import reply_form
from poe.decoding.constraints import Constraint
from poe.decoding.generation import REPLY_BATCH
from poe.errors import DecodingError
from poe.evaluation.call_metrics import Counts, count_replies, split_question
from poe.evaluation.suites import Item, Rows, Settings
from poe.evaluation.teacher_forcing import AnswerForcing, count_forced


class Questions:
    """Asks a base and its stages questions: writes the prompts, makes the constraints, generates the replies."""

    def __init__(self, cascade: Cascade, renderer: Renderer) -> None:
        self.cascade, self.renderer = cascade, renderer

    def encode(self, conversation: Conversation) -> list[int]:
        """Return the tokens of the prompt."""
        return self.renderer.prompt_ids(split_question(conversation)[0], conversation.tools, conversation.form)

    def make_constraint(
        self, conversation: Conversation, threshold: float | None = None, max_new_tokens: int | None = None
    ) -> Constraint | None:
        """Return the constraint of a reply; None without tools, or if no grammar can be made of them."""
        form = None if conversation.form is None else conversation.form.calls
        stops, size = self.renderer.stop_token_ids, self.cascade.config.vocab_size
        try:
            plan = plan_reply(self.cascade.tokenizer, size, stops, conversation.tools, form=form, threshold=threshold)
            return plan.make_constraint(max_new_tokens)
        except DecodingError:
            return None

    def ask(
        self,
        stage: str | None,
        conversations: Sequence[Conversation],
        prompts: Sequence[Sequence[int]],
        settings: Settings,
        *,
        threshold: float | None = None,
        seeds: Sequence[int] | None = None,
        batch_size: int = REPLY_BATCH,
        progress: Callable[[int], None] | None = None,
    ) -> list[tuple[RawReply, bool]]:
        """Return the reply of a stage (None: the base) to each prompt, and whether it was constrained.

        `threshold` decides between a call and text where replies are constrained. `seeds` are of sampled replies.
        """
        options: dict[str, Any] = {}
        if settings.temperature:
            options = {"do_sample": True, "temperature": settings.temperature, "top_k": 0, "seeds": seeds}
        constraints: list[Constraint | None] = [None] * len(prompts)
        if settings.constrain:
            constraints = [self.make_constraint(c, threshold, settings.max_new_tokens) for c in conversations]
        replies = generate_replies(
            self.cascade.model(stage),
            self.cascade.tokenizer,
            prompts,
            self.renderer.stop_token_ids,
            max_new_tokens=settings.max_new_tokens,
            batch_size=batch_size,
            constraints=constraints,
            progress=progress,
            **options,
        )
        return [(reply, constraint is not None) for reply, constraint in zip(replies, constraints, strict=True)]


class CallSuite:
    """Asks each question, and compares the calls of the reply with those of the reference.

    The reference is the first turn of the assistant that is trained on. With `constrain` a reply is text, or calls that
    name a given tool and fit its schema, and the stage's threshold decides between the two, as in `Cascade.chat`.
    """

    batch_size = REPLY_BATCH
    success = "exact"

    def __init__(self, rows: Rows, cascade: Cascade, renderer: Renderer, settings: Settings) -> None:
        self.rows, self._settings = rows, settings
        self._questions = Questions(cascade, renderer)
        self._forcing = AnswerForcing(cascade, renderer)
        self._form = reply_form(cascade.tokenizer)
        self._longest = getattr(cascade.config, "max_position_embeddings", None)
        self.items, self.dropped = rows.choose(self._encode, settings.rows, settings.seed)

    def answer(self, stage: str | None, items: Sequence[Item]) -> list[dict[str, Any]]:
        """Return the replies of a stage, None for the base. `seconds` is each one's share of the time of the batch.

        `teacher_forced` are the tokens of the reference that the model would choose, and all its tokens.
        """
        started = time.perf_counter()
        replies = self._questions.ask(
            stage,
            [item.content for item in items],
            [item.tokens for item in items],
            self._settings,
            threshold=find_call_threshold(self._questions.cascade, stage),
            seeds=[make_seed(self._settings.seed, item) for item in items],
            batch_size=len(items),
        )
        seconds = round((time.perf_counter() - started) / len(items), 4)
        firsts = [item for item in items if item.sample == 0]  # every sample has the same reference
        forced = self._forcing.count_right_tokens(stage, [item.content for item in firsts])
        right = dict(zip([item.fingerprint for item in firsts], forced, strict=True))
        answers = []
        for item, (reply, is_constrained) in zip(items, replies, strict=True):
            calls = parse_reply(reply.text, self._form_of(item.content)).calls
            reason = "length" if not reply.is_complete else "tool_calls" if calls else "stop"
            answers.append(
                {
                    "reply": reply.text,
                    "calls": [{"name": call.name, "arguments": call.arguments} for call in calls],
                    "finish_reason": reason,
                    "is_constrained": is_constrained,
                    "tokens": reply.num_tokens,
                    "seconds": seconds,
                    "teacher_forced": (0, 0) if item.sample else right[item.fingerprint],
                }
            )
        return answers

    def count(self, items: Sequence[Item], answers: Sequence[dict[str, Any]]) -> list[Counts]:
        """Return what each reply adds to each metric of calls."""
        replies = [RawReply(answer["reply"], answer["finish_reason"] != "length") for answer in answers]
        counts = count_replies([item.content for item in items], replies, self._form)
        return [own | count_forced(answer["teacher_forced"]) for own, answer in zip(counts, answers, strict=True)]

    def _encode(self, conversation: Conversation) -> list[int] | str:
        ids = self._questions.encode(conversation)
        if self._longest and len(ids) + self._settings.max_new_tokens > self._longest:
            return f"longer than {self._longest} tokens with its reply"
        return ids

    def _form_of(self, conversation: Conversation) -> str:
        return conversation.form.calls if conversation.form else self._form


def make_seed(seed: int, item: Item) -> int:
    """Return the seed of one sampled reply: it depends on the question and the number of the sample alone."""
    text = f"{seed}\n{item.fingerprint}\n{item.sample}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])


def find_call_threshold(cascade: Cascade, stage: str | None) -> float | None:
    """Return the threshold with which a stage decides between a call and text, None for the base or without one."""
    return None if stage is None else read_call_threshold(cascade.stages[stage].prompt)
