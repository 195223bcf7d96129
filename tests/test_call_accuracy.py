"""Call accuracy: every held-out question is answered once, in its own place, and progress counts the answers."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from poe import Cascade
from poe.chat import generate_replies
from poe.data.readers.demo import evaluation_splits
from poe.data.render import Renderer
from poe.evaluation.calls import evaluate_calls, split_question
from poe.evaluation.teacher_forcing import measure_teacher_forced


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


class Oracle(torch.nn.Module):
    """Gives the largest score to the next token of its input, except after the token `wrong_after`."""

    def __init__(self, base: Any, wrong_after: int = -1) -> None:
        super().__init__()
        self.get_input_embeddings = base.get_input_embeddings
        self.wrong_after = wrong_after

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        following = input_ids.roll(-1, 1)
        following[input_ids == self.wrong_after] = 0
        return SimpleNamespace(logits=torch.nn.functional.one_hot(following, 2000).float())


def test_teacher_forcing_counts_the_tokens_of_the_first_answer(
    demo_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cascade = Cascade.from_pretrained(demo_base)
    rows = evaluation_splits(4)["unseen values"]
    monkeypatch.setattr(cascade, "model", lambda stage: Oracle(cascade.base))
    scores = measure_teacher_forced(cascade, None, rows, batch_size=3)
    assert {name: (metric.value, metric.rows) for name, metric in scores.items()} == {
        "teacher_forced_exact": (1.0, 4), "teacher_forced_tokens": (1.0, 4),
    }  # fmt: skip
    rendered = Renderer(cascade.tokenizer).render(rows[0])[0]
    last = rendered.input_ids[rendered.loss_mask.index(True)]  # the first token of the answer
    monkeypatch.setattr(cascade, "model", lambda stage: Oracle(cascade.base, last))
    wrong = measure_teacher_forced(cascade, None, rows)
    assert wrong["teacher_forced_exact"].value == 0.0
    assert 0.5 < wrong["teacher_forced_tokens"].value < 1.0


def test_teacher_forcing_does_not_depend_on_the_batch(demo_base: Path) -> None:
    cascade = Cascade.from_pretrained(demo_base)
    rows = evaluation_splits(3)["unseen values"]
    together, alone = (measure_teacher_forced(cascade, None, rows, batch_size=size) for size in (3, 1))
    assert together == alone
