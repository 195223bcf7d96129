"""Call accuracy: every held-out question is answered once, in its own place, and progress counts the answers."""

from pathlib import Path

from poe import Cascade
from poe.chat import generate_replies
from poe.data.readers.demo import evaluation_splits
from poe.data.render import Renderer
from poe.evaluation.calls import evaluate_calls, split_question


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
