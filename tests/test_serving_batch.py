"""Rows of one batch come and go between passes, and each of them computes what it computes alone."""

import random
from typing import Any

import pytest
import torch

from branched_cascade import branched_cascade
from conftest import BASES, mostly_slow, scramble, tiny_base, token_ids
from decoding_models import MODELS
from poe import Cascade
from poe.decoding.branches import build_branched_model
from poe.decoding.routing import RoutedModel
from poe.modeling.families import is_prefix_lm
from poe.serving.batch import Batch

STAGES: list[str | None] = [None, "tool", "math", "low", "child"]


def run_random_schedule(cascade: Cascade, names: list[Any], model: Any, seed: int) -> None:
    """Let rows join, grow and leave at random, and compare the logits of every pass with each row's own model."""
    chance, batch, rows = random.Random(seed), Batch(model), []
    for step in range(10):
        joining = [(chance.randrange(len(names)), chance.randint(2, 9)) for _ in range(chance.choice([0, 0, 1, 1, 3]))]
        if joining:
            prompts = [token_ids(1, length, step * 10 + i)[0].tolist() for i, (_, length) in enumerate(joining)]
            check_rows(cascade, names, prompts, joining, batch.join(prompts, [branch for branch, _ in joining]))
            rows += [(prompt, state) for prompt, state in zip(prompts, joining, strict=True)]
        if rows:
            tokens = token_ids(1, len(rows), 100 + step)[0].tolist()
            rows = [([*ids, token], state) for (ids, state), token in zip(rows, tokens, strict=True)]
            logits = batch.step(tokens)
            check_rows(cascade, names, [ids for ids, _ in rows], [state for _, state in rows], logits)
            kept = [i for i in range(len(rows)) if chance.random() < 0.75]
            batch.keep(kept)
            rows = [rows[i] for i in kept]
        assert len(batch) == len(rows)
    batch.clear()
    assert len(batch) == 0


@torch.no_grad()
def check_rows(cascade: Cascade, names: list[Any], rows: list[list[int]], states: list[Any], logits: Any) -> None:
    for ids, (branch, prompt), row in zip(rows, states, logits, strict=True):
        inputs: dict[str, Any] = {"input_ids": torch.tensor([ids])}
        if is_prefix_lm(cascade.config):
            inputs["token_type_ids"] = torch.tensor([[1] * prompt + [0] * (len(ids) - prompt)])
        expected = cascade.model(names[branch])(**inputs).logits[0, -1]
        torch.testing.assert_close(row, expected, atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize("name", mostly_slow(MODELS, ["poe with everything"]))
def test_rows_that_come_and_go_compute_what_they_compute_alone(name: str) -> None:
    cascade = branched_cascade(name)
    experts = [cascade.expert(stage) for stage in STAGES]
    run_random_schedule(cascade, STAGES, build_branched_model(cascade.base, experts, RoutedModel), seed=1)


@pytest.mark.parametrize("name", mostly_slow(BASES, ["smollm3-tied"]))
def test_rows_of_a_plain_model_come_and_go(name: str) -> None:
    cascade = Cascade(tiny_base(name)).add_stage(name="tool", num_layers=1)
    scramble(cascade.stages["tool"])
    run_random_schedule(cascade, ["tool"], cascade.model("tool"), seed=2)
