"""Apply the augmentations of a recipe to a row, in their fixed order."""

import dataclasses
from random import Random

from poe.calls.conversation import Conversation
from poe.calls.renaming import rename_tools
from poe.data.augment.case import change_case
from poe.data.augment.distractors import ToolPool, add_distractors
from poe.data.augment.formats import set_random_form
from poe.data.augment.irrelevance import make_contrast_pair, make_irrelevant
from poe.data.augment.masking import mask
from poe.data.augment.paraphrase import paraphrase
from poe.data.augment.rows import row_digest, row_rng
from poe.stages.augmentation import Augmentation


def augment(
    conversation: Conversation, options: Augmentation, *, epoch: int, seed: int, pool: ToolPool
) -> list[Conversation]:
    """Return the row of this epoch: one conversation, or a contrastive pair. It depends on seed, epoch and row.

    The order is: paraphrase and case of the user's texts, because the calls still show which parts they copy;
    irrelevance or contrast; distractors and shuffle of the remaining tools; mask, which renames all tools; formats. The
    two rows of a pair get the same changes, including new names.
    """
    digest = row_digest(conversation)

    def draw(step: str) -> Random | None:
        """Return the step's random generator if the row is in the step's share."""
        share = getattr(options, step)
        rng = row_rng(digest, seed=seed, epoch=epoch, step=step) if share else None
        return rng if rng and rng.random() < share else None

    if rng := draw("paraphrase"):
        conversation = paraphrase(conversation, rng)
    if rng := draw("case"):
        conversation = change_case(conversation, rng)
    rows = _remove_tools(conversation, options, row_rng(digest, seed=seed, epoch=epoch, step="taken away"), pool)
    if rng := draw("distractors"):
        rows = add_distractors(rows, rng, pool, options.max_distractors, conversation)
    if draw("shuffle"):
        rows = [_shuffle_tools(row, row_rng(digest, seed=seed, epoch=epoch, step="order")) for row in rows]
    if rng := draw("mask"):
        _, names = mask(rows[0], rng)  # the first row of a pair has every tool of the second
        rows = [rename_tools(row, names) for row in rows]
    if draw("formats"):
        forms = options.tool_formats, options.call_formats
        rows = [set_random_form(row, row_rng(digest, seed=seed, epoch=epoch, step="form"), *forms) for row in rows]
    return rows


def _remove_tools(conversation: Conversation, options: Augmentation, rng: Random, pool: ToolPool) -> list[Conversation]:
    """Return the row, the row without the tools that it needs, or both."""
    point = rng.random()
    if point < options.irrelevance:
        row = make_irrelevant(conversation, rng, pool)
        return [conversation] if row is None else [row]
    if point < options.irrelevance + options.contrast:
        return list(make_contrast_pair(conversation, rng, pool) or [conversation])
    return [conversation]


def _shuffle_tools(conversation: Conversation, rng: Random) -> Conversation:
    tools = rng.sample(conversation.tools, len(conversation.tools))
    return dataclasses.replace(conversation, tools=tools)
