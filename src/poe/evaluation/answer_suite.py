"""Questions that are answered with text: bits per byte of the reference answers, and checks of the replies.

The reference is the first turn of the assistant that is trained on. Bits per byte need no reply: they are those of the
reference after its question, so they also measure answers of which no two are written alike. A suite with a check asks
each question as well, greedily, and adds the metrics of the check (`reply_checks.py`) and `clean_stop`, the share of
replies that end by themselves.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from poe.calls.conversation import Conversation
from poe.cascade import Cascade
from poe.chat import generate_replies
from poe.data.render import RenderedRow, Renderer, token_bytes
from poe.decoding.generation import REPLY_BATCH
from poe.evaluation.call_metrics import Counts
from poe.evaluation.suites import Item, Rows, Settings
from poe.modeling.families import is_prefix_lm
from poe.modeling.placement import device_of

Check = Callable[[Conversation, str], Counts]


class AnswerSuite:
    """Predicts the reference answer of each row, and with a `check` also answers its question."""

    batch_size = REPLY_BATCH
    success = None  # replies are greedy and free

    def __init__(
        self, rows: Rows, cascade: Cascade, renderer: Renderer, settings: Settings, check: Check | None = None
    ) -> None:
        self.rows, self._cascade, self._renderer, self._settings = rows, cascade, renderer, settings
        self._check = check
        self._longest = getattr(cascade.config, "max_position_embeddings", None)
        self._token_bytes = token_bytes(cascade.tokenizer, cascade.config.vocab_size)
        self.items, self.dropped = rows.choose(self._encode, settings.rows, settings.seed)

    def answer(self, stage: str | None, items: Sequence[Item]) -> list[dict[str, Any]]:
        """Return the bits and bytes of each reference, and the replies of a stage (None: the base) if they count."""
        model = self._cascade.model(stage).eval()
        answers = []
        for item in items:
            started = time.perf_counter()
            row = render_answer(self._renderer, item.content)
            bits, num_bytes, labels = measure_answer(model, row, self._token_bytes)
            seconds = round(time.perf_counter() - started, 4)
            answers.append({"bits": bits, "bytes": num_bytes, "tokens": labels, "seconds": seconds})
        return answers if self._check is None else self._reply(model, items, answers)

    def count(self, items: Sequence[Item], answers: Sequence[dict[str, Any]]) -> list[Counts]:
        """Return the bits and the bytes of each reference, and what each reply adds to the metrics of the check."""
        counts: list[Counts] = [{"bits_per_byte": (float(a["bits"]), float(a["bytes"]))} for a in answers]
        if self._check is None:
            return counts
        return [
            {**count, **self._check(item.content, a["reply"]), "clean_stop": (float(a["finish_reason"] == "stop"), 1.0)}
            for count, item, a in zip(counts, items, answers, strict=True)
        ]

    def _reply(self, model: Any, items: Sequence[Item], answers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the answers with the replies of a model."""
        started = time.perf_counter()
        replies = generate_replies(
            model,
            self._cascade.tokenizer,
            [item.tokens for item in items],
            self._renderer.stop_token_ids,
            max_new_tokens=self._settings.max_new_tokens,
            batch_size=len(items),
        )
        seconds = (time.perf_counter() - started) / len(items)
        return [
            {
                **answer,
                "reply": reply.text,
                "finish_reason": "stop" if reply.is_complete else "length",
                "tokens": reply.num_tokens,
                "seconds": round(answer["seconds"] + seconds, 4),
            }
            for answer, reply in zip(answers, replies, strict=True)
        ]

    def _encode(self, conversation: Conversation) -> list[int] | str:
        """Return the tokens of the question, or a reason to drop the row."""
        row = render_answer(self._renderer, conversation)
        prompt = self._renderer.prompt_ids(conversation.question, conversation.tools, conversation.form)
        if not self._token_bytes[torch.tensor(row.input_ids)][torch.tensor(row.loss_mask)].sum():
            return "answer without text"
        length = max(len(row.input_ids), len(prompt) + self._settings.max_new_tokens if self._check else 0)
        if self._longest and length > self._longest:
            return f"longer than {self._longest} tokens with its answer"
        return prompt


def render_answer(renderer: Renderer, conversation: Conversation) -> RenderedRow:
    """Render a conversation up to the end of its first answer, which alone is labeled."""
    first = next(iter(conversation.cut_at_answers()))
    return next(row for row in renderer.render(first) if any(row.loss_mask))


@torch.no_grad()
def measure_answer(model: Any, row: RenderedRow, sizes: torch.Tensor) -> tuple[float, int, int]:
    """Return the bits and the bytes of the labeled tokens that have bytes, and how many tokens are labeled.

    `sizes` (V,) has the bytes of every token. A stage that is active on the answer acts from where the labels begin.
    """
    ids = torch.tensor([row.input_ids], device=device_of(model.get_input_embeddings()))
    is_labeled = torch.tensor([row.loss_mask], device=ids.device)
    inputs = {"input_ids": ids, "labels": ids.masked_fill(~is_labeled, -100)}
    if is_prefix_lm(model.config):
        inputs["token_type_ids"] = (is_labeled.cumsum(1) == 0).long()
    places, targets = is_labeled[0, 1:], ids[0, 1:][is_labeled[0, 1:]]
    log_p = model(**inputs, use_cache=False).logits[0, :-1][places].float().log_softmax(-1)
    nats = -log_p.gather(1, targets[:, None])[:, 0].double()
    num_bytes = sizes.to(ids.device)[targets]
    return float(nats[num_bytes > 0].sum()) / math.log(2), int(num_bytes.sum()), len(targets)
