"""The sizes of a run that a recipe leaves to the data: the one place where they are chosen.

A number in a recipe is used as it is. `at most N` is a limit, which large data reaches; small data uses less: rows as
long as its longest row, steps so small that a pass has `STEPS_OF_PASS` of them, several passes if steps of one row are
fewer than `MIN_STEPS`, and more validation. docs/log/small-data.md has the measurements behind the numbers.
"""

from dataclasses import dataclass
from math import ceil

import numpy as np

from poe.errors import DataError
from poe.stages.fields import UpTo
from poe.stages.recipe import Recipe

STEPS_OF_PASS = 400  # larger steps learn less from the same rows
MIN_STEPS = 50  # a stage learns little in fewer
MIN_ROWS = 8  # fewer rows are learned by heart
MIN_VALIDATIONS = 5
VALIDATION_RATIO = 0.02
VALIDATION_QUERIES = 20  # of small data, but no more than a tenth
_LENGTH_STEP = 64  # a row's length is a multiple, for whole blocks in matrix products


@dataclass(frozen=True)
class DataSize:
    """The training data as it was read: conversations, packed rows, and the passes that these rows are."""

    conversations: int
    held_out: int  # conversations for validation
    packed_rows: int
    passes: float
    chosen_passes: bool  # by the SPEC, or by the recipe for one of the readers

    @property
    def pass_rows(self) -> int:
        """The packed rows of one pass through the conversations."""
        return max(1, round(self.packed_rows / self.passes))


def choose_validation_ratio(recipe: Recipe, numbers: np.ndarray) -> float:
    """Return the share of the queries to keep for validation. `numbers` are the split numbers of the rows (split.py).

    "auto" is the share that holds out an exact number of queries. A fixed share of a file that `poe data export` wrote
    would hold out none: the export leaves out the rows with the lowest numbers.
    """
    if recipe.validation_ratio != "auto":
        return float(recipe.validation_ratio)
    queries = np.unique(numbers)
    count = max(1, min(VALIDATION_QUERIES, len(queries) // 10), round(VALIDATION_RATIO * len(queries)))
    if len(queries) < 2:
        return VALIDATION_RATIO
    return (float(queries[count - 1]) + float(queries[count])) / 2 / 2**64


def longest_row(recipe: Recipe, max_positions: int | None) -> int:
    """Return the largest number of tokens that a packed row may have; the base has `max_positions` positions."""
    if not isinstance(recipe.seq_len, UpTo):
        return recipe.seq_len
    limits = [int(recipe.seq_len), max_positions or int(recipe.seq_len)]
    return min(limits if isinstance(recipe.tokens_per_step, UpTo) else [*limits, recipe.tokens_per_step])


def choose_seq_len(recipe: Recipe, longest: int, max_positions: int | None) -> int:
    """Return the length of a packed row for documents of at most `longest` tokens.

    Of a step with an exact number of tokens, it is a part without a remainder, if there is one.
    """
    limit = longest_row(recipe, max_positions)
    if not isinstance(recipe.seq_len, UpTo):
        return limit
    needed = min(limit, ceil(max(longest, 1) / _LENGTH_STEP) * _LENGTH_STEP)
    if isinstance(recipe.tokens_per_step, UpTo):
        return needed
    parts = (n for n in range(needed, limit + 1) if recipe.tokens_per_step % n == 0)
    return next(parts, limit)


def resolve_sizes(recipe: Recipe, seq_len: int, ratio: float, size: DataSize, num_processes: int = 1) -> Recipe:
    """Return the recipe with a number for every size.

    Raises `DataError` for data that is too small to learn from, unless the recipe has a number of steps.
    """
    if recipe.max_steps is None and size.conversations < MIN_ROWS:
        raise DataError(
            f"{recipe.data!r} has {size.conversations} rows to train on, too few to learn from: give at least "
            f"{MIN_ROWS} and better hundreds, or choose the number of steps with max_steps to train all the same."
        )
    tokens_per_step = recipe.tokens_per_step
    if isinstance(tokens_per_step, UpTo):
        rows = max(1, min(int(tokens_per_step) // seq_len, size.pass_rows // STEPS_OF_PASS))
        tokens_per_step = ceil(rows / num_processes) * num_processes * seq_len
    rows_per_step = tokens_per_step // seq_len
    max_steps = recipe.max_steps
    if max_steps is None:
        max_steps = max(1, size.packed_rows // max(1, rows_per_step))
        if not size.chosen_passes and max_steps < MIN_STEPS:
            max_steps = ceil(MIN_STEPS / max_steps) * max_steps
    every = recipe.validation_every
    if isinstance(every, UpTo):
        every = max(1, min(int(every), max_steps // MIN_VALIDATIONS))
    return recipe.replace(
        seq_len=seq_len,
        tokens_per_step=tokens_per_step,
        max_steps=max_steps,
        validation_every=every,
        validation_ratio=ratio,
    )


def describe_sizes(recipe: Recipe, resolved: Recipe, size: DataSize) -> str:
    """Return one line with the sizes that `resolve_sizes` chose; "" if the recipe has them all."""
    parts = []
    for name, text in (("seq_len", "rows of {} tokens"), ("tokens_per_step", "{} tokens a step")):
        limit, value = getattr(recipe, name), getattr(resolved, name)
        if isinstance(limit, UpTo):
            parts.append(f"{text.format(f'{value:,}')} (at most {int(limit):,})")
    pass_tokens = size.pass_rows * resolved.seq_len
    if resolved.tokens_per_step > pass_tokens:
        parts.append(f"{resolved.tokens_per_step:,} tokens a step, more than a pass has ({pass_tokens:,})")
    if recipe.max_steps is None and resolved.max_steps is not None:
        passes = resolved.max_steps * resolved.tokens_per_step / pass_tokens
        parts.append(f"{resolved.max_steps:,} steps in {passes:.1f} passes of {pass_tokens:,} tokens")
    if recipe.validation_ratio == "auto":
        parts.append(f"{size.held_out:,} of {size.conversations + size.held_out:,} rows held out")
    return f"sizes for this data: {', '.join(parts)}" if parts else ""
