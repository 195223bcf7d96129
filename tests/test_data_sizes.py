"""The sizes of a run follow its data where the recipe has a limit or nothing; what is set is used as it is."""

import json
from pathlib import Path

import numpy as np
import pytest

from conftest import demo_tokenizer
from poe.data.pipeline import prepare
from poe.data.render import Renderer
from poe.data.sizes import (
    DataSize,
    choose_seq_len,
    choose_validation_ratio,
    describe_sizes,
    longest_row,
    resolve_sizes,
)
from poe.data.split import find_held_out
from poe.errors import DataError, RecipeError
from poe.stages import Recipe, load_recipe
from poe.stages.fields import UpTo


def size_of(packed_rows: int, conversations: int = 1000, passes: float = 1.0, chosen: bool = False) -> DataSize:
    return DataSize(conversations, 20, packed_rows, passes, chosen)


def split_numbers(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 2**64, count, dtype=np.uint64)


def resolve(recipe: Recipe, rows: int, seq_len: int = 512, **size) -> Recipe:
    return resolve_sizes(recipe, seq_len, 0.02, size_of(rows, **size))


def test_a_limit_is_written_at_most_and_survives_files(tmp_path: Path) -> None:
    recipe = Recipe(name="mine", seq_len="at most 640", tokens_per_step=1280)
    assert (type(recipe.seq_len), type(recipe.tokens_per_step)) == (UpTo, int)
    (tmp_path / "mine.yaml").write_text(recipe.to_yaml())
    assert "seq_len: at most 640" in recipe.to_yaml()
    assert type(load_recipe(tmp_path / "mine.yaml").seq_len) is UpTo
    with pytest.raises(RecipeError, match="seq_len should be a whole number"):
        Recipe(name="mine", seq_len="at most many")


@pytest.mark.parametrize("name", ["tool", "tool-fork"])
def test_large_data_has_the_published_sizes(name: str) -> None:
    recipe = load_recipe(name)
    assert choose_seq_len(recipe, 2048, 8192) == 2048
    resolved = resolve(recipe, 100_000, 2048)
    assert resolved.tokens_per_step == recipe.tokens_per_step
    assert resolved.max_steps == 100_000 * 2048 // recipe.tokens_per_step
    assert resolved.validation_every == recipe.validation_every
    assert choose_validation_ratio(recipe, split_numbers(100_000)) == pytest.approx(0.02, rel=0.05)
    assert not any(isinstance(value, UpTo) for value in vars(resolved).values())


@pytest.mark.parametrize(
    ("rows", "rows_per_step", "steps"),
    [(3, 1, 51), (19, 1, 57), (49, 1, 98), (160, 1, 160), (1600, 4, 400), (16_000, 32, 500)],
)
def test_small_data_gets_small_steps_and_several_passes(rows: int, rows_per_step: int, steps: int) -> None:
    resolved = resolve(load_recipe("tool-fork"), rows)
    assert (resolved.tokens_per_step, resolved.max_steps) == (rows_per_step * 512, steps)
    assert resolved.tokens_per_step <= rows * 512
    assert resolved.validation_every == min(50, steps // 5)


def test_what_is_set_is_used_as_it_is() -> None:
    fields = {"seq_len": 300, "tokens_per_step": 600_000, "max_steps": 3, "validation_every": 7}
    recipe = load_recipe("tool-fork", **fields, validation_ratio=0.5)
    assert choose_seq_len(recipe, 20, 64) == 300
    assert choose_validation_ratio(recipe, split_numbers(10)) == 0.5
    resolved = resolve(recipe, 10, 300, conversations=2)
    assert {name: getattr(resolved, name) for name in fields} == fields
    assert "more than a pass has (3,000)" in describe_sizes(recipe, resolved, size_of(10))


def test_chosen_epochs_are_not_multiplied() -> None:
    recipe = load_recipe("tool-fork")
    assert resolve(recipe, 40, passes=4.0, chosen=True).max_steps == 40
    assert resolve(recipe, 3200, passes=4.0, chosen=True).tokens_per_step == 2 * 512  # a four-hundredth of one pass


def test_steps_are_divided_evenly_among_processes() -> None:
    resolved = resolve_sizes(load_recipe("tool-fork"), 512, 0.02, size_of(160), num_processes=4)
    assert resolved.tokens_per_step == 4 * 512


@pytest.mark.parametrize(
    ("fields", "longest", "expected"),
    [
        ({}, 300, 320),
        ({}, 5000, 1500),  # the base has so many positions
        ({"tokens_per_step": 4096}, 600, 1024),  # a part of the step
        ({"tokens_per_step": 512}, 600, 512),
        ({"seq_len": 128}, 600, 128),
    ],
)
def test_rows_are_as_long_as_the_longest_document_within_the_limits(
    fields: dict[str, int], longest: int, expected: int
) -> None:
    recipe = load_recipe("tool-fork", **fields)
    assert choose_seq_len(recipe, min(longest, longest_row(recipe, 1500)), 1500) == expected


def test_data_too_small_to_learn_from_is_refused_in_one_sentence() -> None:
    with pytest.raises(DataError, match="has 5 rows to train on, too few to learn from"):
        resolve(load_recipe("tool-fork", data="messages=a.jsonl"), 3, conversations=5)
    assert resolve(load_recipe("tool-fork", max_steps=2), 3, conversations=5).max_steps == 2


@pytest.mark.parametrize(("queries", "held_out"), [(2, 1), (9, 1), (30, 3), (150, 15), (999, 20)])
def test_small_data_holds_out_an_exact_number_of_queries(queries: int, held_out: int) -> None:
    numbers = split_numbers(queries)
    ratio = choose_validation_ratio(load_recipe("tool-fork"), numbers)
    assert find_held_out(numbers, ratio).sum() == held_out


def test_prepared_data_has_the_resolved_recipe_and_is_the_same_from_it(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"say {i} " * (1 + i % 9)}, {"role": "assistant", "content": f"{i}"}]}
        for i in range(30)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = Recipe(name="test", data=f"messages={tmp_path}/rows.jsonl", near_duplicates=None)
    renderer = Renderer(demo_tokenizer())
    data = prepare(recipe, renderer)
    assert data.recipe.seq_len == data.train.seq_len == data.val.seq_len < 200
    assert data.val.num_rows >= 1
    assert data.recipe.max_steps * data.recipe.tokens_per_step >= 50 * data.train.seq_len
    again = prepare(data.recipe, renderer)
    assert again.recipe == data.recipe
    for left, right in ((data.train, again.train), (data.val, again.val)):
        assert left.batch(0, left.num_rows).input_ids.tolist() == right.batch(0, right.num_rows).input_ids.tolist()


def test_rows_that_were_exported_without_those_held_out_are_split_like_others() -> None:
    numbers = split_numbers(3_000)
    exported = numbers[~find_held_out(numbers, 0.05)]
    ratio = choose_validation_ratio(load_recipe("tool-fork"), exported)
    assert find_held_out(exported, ratio).sum() == round(0.02 * len(exported))
