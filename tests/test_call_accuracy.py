"""Call accuracy: every held-out question is answered once, in its own place, and progress counts the answers."""

from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import scramble
from poe import Cascade, StageConfig
from poe.calls.conversation import Conversation
from poe.chat import generate_replies
from poe.data.readers.demo import evaluation_splits
from poe.data.render import Renderer
from poe.evaluation.calls import evaluate_calls, split_question
from poe.evaluation.teacher_forcing import AnswerForcing, count_forced, measure_teacher_forced
from poe.training.loss import CHUNK_LOGITS


def test_progress_counts_every_question_once(demo_base: Path) -> None:
    cascade = Cascade.from_pretrained(demo_base)
    splits = evaluation_splits(5)
    answered: list[int] = []
    scores = evaluate_calls(cascade, None, splits, max_new_tokens=1, batch_size=2, progress=answered.append)
    assert {name: score.rows for name, score in scores.items()} == dict.fromkeys(splits, 5)
    assert answered == [2, 2, 1] * len(splits)


def test_a_reply_does_not_depend_on_its_batch(demo_base: Path) -> None:
    cascade = Cascade.from_pretrained(demo_base)
    renderer = Renderer(cascade.tokenizer)
    rows = evaluation_splits(3)["unseen values"]
    prompts = [renderer.prompt_ids(split_question(row)[0], row.tools, row.form) for row in rows]
    together, alone = (
        generate_replies(
            cascade.base, cascade.tokenizer, prompts, renderer.stop_token_ids, max_new_tokens=4, batch_size=size
        )
        for size in (3, 1)
    )
    assert together == alone


def first_choices(cascade: Cascade, stage: str | None, row: Conversation) -> list[bool]:
    """Return whether each token of the answer of a row has the largest of all its logits, from a plain forward pass."""
    (rendered,) = Renderer(cascade.tokenizer).render(row)
    ids, is_answer = torch.tensor([rendered.input_ids]), torch.tensor([rendered.loss_mask])
    labels = torch.where(is_answer, ids, -100)  # they tell a stage that is active on the answer where it begins
    with torch.no_grad():
        choices = cascade.model(stage)(input_ids=ids, labels=labels).logits.argmax(-1)
    return (choices[0, :-1] == ids[0, 1:])[is_answer[0, 1:]].tolist()


FORK = {"layers": "fork", "num_layers": 1, "attach_at": 1, "head": "none", "rank": 4, "active": "answer"}


@pytest.mark.parametrize("fields", [None, {"num_layers": 1, "head": "dense"}, FORK])
def test_teacher_forcing_counts_the_tokens_that_have_the_largest_logit(
    fields: dict[str, Any] | None, demo_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cascade = Cascade.from_pretrained(demo_base, dtype=torch.float32)
    scramble(cascade.base, scale=0.1)
    if fields is not None:
        cascade.add_stage(StageConfig(name="s", **fields))
        scramble(cascade.stages["s"], seed=1)
    stage = None if fields is None else "s"
    rows = evaluation_splits(4)["unseen values"]
    monkeypatch.setitem(CHUNK_LOGITS, "cpu", 1500)  # a few positions at a time
    expected = [first_choices(cascade, stage, row) for row in rows]
    renderer = Renderer(cascade.tokenizer, vocab_size=cascade.config.vocab_size)
    for size in (1, 3):
        counted = AnswerForcing(cascade, renderer, size).count_right_tokens(stage, rows)
        assert counted == [(sum(right), len(right)) for right in expected]
    metrics = measure_teacher_forced(cascade, stage, rows)
    assert metrics["teacher_forced_tokens"].value == pytest.approx(
        sum(map(sum, expected)) / sum(map(len, expected)), abs=1e-4
    )


def test_an_answer_is_exact_if_all_its_tokens_are_right() -> None:
    assert count_forced((3, 3))["teacher_forced_exact"] == (1, 1)
    assert count_forced((2, 3)) == {"teacher_forced_exact": (0, 1), "teacher_forced_tokens": (2, 3)}
    assert count_forced((0, 0))["teacher_forced_exact"] == (0, 0)  # it could not be written: it does not count
