"""The same questions in several prompt formats: how much the answers depend on what the prompt looks like."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from poe.calls.conversation import Conversation, PromptForm
from poe.calls.forms.prompt_forms import random_form
from poe.cascade import Cascade
from poe.data.render import Renderer
from poe.data.templates import reply_form
from poe.evaluation.call_metrics import AT_FORMAT, Counts
from poe.evaluation.call_suite import CallSuite
from poe.evaluation.suites import Item, Rows, Settings

COMPARED = ("exact", "call_f1", "valid")


def draw_formats(count: int, call_form: str) -> list[PromptForm | None]:
    """Return different prompt formats: first None, the chat template's own, then drawn ones.

    A drawn format lists the tools in a notation, place and wording of its own. Calls are written in `call_form` in all
    of them. A larger number begins with the formats of a smaller one.
    """
    rng = random.Random(0)
    formats: list[PromptForm | None] = [None]
    while len(formats) < count:
        if (drawn := random_form(rng, calls=[call_form])) not in formats:
            formats.append(drawn)
    return formats


class FormatSuite(CallSuite):
    """Asks each question in every format. Metrics are means over the formats.

    For those in `COMPARED` there is also the share in each format (`exact @ 2`), that in the worst one (`exact_worst`),
    and the difference of the best and the worst (`exact_spread`). A question that does not fit in one of the formats is
    not asked.
    """

    def __init__(self, rows: Rows, cascade: Cascade, renderer: Renderer, settings: Settings) -> None:
        self.formats = draw_formats(settings.formats, reply_form(cascade.tokenizer))
        super().__init__(rows, cascade, renderer, settings)
        self.items = [
            replace(
                item,
                id=f"{item.id} @ {number}",
                fingerprint=f"{item.fingerprint}@{number}",
                content=(asked := replace(item.content, form=form)),
                tokens=self._render(asked),
            )
            for item in self.items
            for number, form in enumerate(self.formats, 1)
        ]

    def count(self, items: Sequence[Item], answers: Sequence[dict[str, Any]]) -> list[Counts]:
        """Return what each reply adds to each metric, those of its format included."""
        counts = super().count(items, answers)
        for item, own in zip(items, counts, strict=True):
            number = item.id.rpartition(" @ ")[2]
            own |= {f"{name}{AT_FORMAT}{number}": own[name] for name in COMPARED}
        return counts

    def _encode(self, conversation: Conversation) -> list[int] | str:
        if not conversation.tools:
            return "no tools, so all formats are alike"
        encode = super()._encode
        encoded = [encode(replace(conversation, form=form)) for form in self.formats]
        return next((reason for reason in encoded if isinstance(reason, str)), encoded[0])

    def _render(self, conversation: Conversation) -> list[int]:
        encoded = super()._encode(conversation)
        assert not isinstance(encoded, str)
        return encoded
