"""Apply the augmentations of a recipe to a row, in their fixed order."""

import dataclasses
from random import Random

from poe.calls.conversation import Conversation
from poe.calls.renaming import rename_tools
from poe.data.augment.case import change_case
from poe.data.augment.contrast import make_pair
from poe.data.augment.distractors import ToolPool, add_distractors
from poe.data.augment.formats import with_random_form
from poe.data.augment.irrelevance import make_irrelevant
from poe.data.augment.masking import mask
from poe.data.augment.paraphrase import paraphrase
from poe.data.augment.rows import row_digest, row_rng
from poe.stages.augmentation import Augmentation


def augment(
    conversation: Conversation, options: Augmentation, *, epoch: int, seed: int, pool: ToolPool
) -> list[Conversation]:
    """What a row is in this epoch: one conversation, or a contrastive pair. Seed, epoch and row alone decide.

    In this order: paraphrase and case of the user's texts, while the calls still tell what is copied from them;
    irrelevance or contrast; distractors and shuffle of the tools that are left; mask, which renames what is there by
    then; formats. The two rows of a pair share all of it, new names as well.
    """
    digest = row_digest(conversation)

    def chosen(step: str) -> Random | None:
        """The step's randomness if the row is of its share."""
        share = getattr(options, step)
        rng = row_rng(digest, seed=seed, epoch=epoch, step=step) if share else None
        return rng if rng and rng.random() < share else None

    if rng := chosen("paraphrase"):
        conversation = paraphrase(conversation, rng)
    if rng := chosen("case"):
        conversation = change_case(conversation, rng)
    rows = _taken_away(conversation, options, row_rng(digest, seed=seed, epoch=epoch, step="taken away"), pool)
    if rng := chosen("distractors"):
        rows = add_distractors(rows, rng, pool, options.max_distractors, conversation)
    if chosen("shuffle"):
        rows = [_shuffled(row, row_rng(digest, seed=seed, epoch=epoch, step="order")) for row in rows]
    if rng := chosen("mask"):
        _, names = mask(rows[0], rng)  # it has every tool of the second row of a pair
        rows = [rename_tools(row, names) for row in rows]
    if chosen("formats"):
        forms = options.tool_formats, options.call_formats
        rows = [with_random_form(row, row_rng(digest, seed=seed, epoch=epoch, step="form"), *forms) for row in rows]
    return rows


def _taken_away(conversation: Conversation, options: Augmentation, rng: Random, pool: ToolPool) -> list[Conversation]:
    """The row; the row with its tools taken away; or both."""
    at = rng.random()
    if at < options.irrelevance:
        row = make_irrelevant(conversation, rng, pool)
        return [conversation] if row is None else [row]
    if at < options.irrelevance + options.contrast:
        return list(make_pair(conversation, rng, pool) or [conversation])
    return [conversation]


def _shuffled(conversation: Conversation, rng: Random) -> Conversation:
    tools = rng.sample(conversation.tools, len(conversation.tools))
    return dataclasses.replace(conversation, tools=tools)
