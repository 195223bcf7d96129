"""Rows that have ended leave their batch: the replies stay, and the passes get smaller."""

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from conftest import BASES, demo_tokenizer, mostly_slow, scramble, tiny_model
from decoding_models import MODELS
from poe import Cascade, StageConfig
from poe.chat import generate_replies

NAMES = [*MODELS, *(name for name in BASES if name not in MODELS)]
PROMPTS = [[7, 8, 9, 10, 11, 12, 13], [14, 15], [16, 17, 18, 19], [21, 22, 23]]
STOPS = list(range(2, 110))  # a random model ends soon, each row at another token
OPTIONS: dict[str, Any] = {"max_new_tokens": 24}


def make_model(name: str) -> PreTrainedModel:
    model_type, fields = MODELS[name] if name in MODELS else BASES[name]
    size = {"vocab_size": 600, "max_position_embeddings": 256, "eos_token_id": 1}
    return tiny_model(model_type, {**fields, **({"num_hidden_layers": 4} if name in MODELS else {}), **size}, seed=5)


def count_rows(model: Any) -> list[int]:
    """Return the list that gets the number of rows of each pass."""
    rows: list[int] = []
    model.register_forward_pre_hook(lambda _, args, given: rows.append(len(given["input_ids"])), with_kwargs=True)
    return rows


@pytest.mark.parametrize("name", mostly_slow(NAMES, ["poe with everything", "qwen3-sliding", "hrm"]))
def test_the_replies_are_those_of_generate(name: str) -> None:
    model, tokenizer = make_model(name), demo_tokenizer()
    ordinary = generate_replies(model, tokenizer, PROMPTS, STOPS, generate=model.generate, **OPTIONS)
    rows = count_rows(model)
    assert generate_replies(model, tokenizer, PROMPTS, STOPS, **OPTIONS) == ordinary
    assert rows == sorted(rows, reverse=True)
    lengths = [reply.num_tokens + reply.is_complete for reply in ordinary]
    assert len(set(lengths)) > 1
    if rows[0] != rows[-1]:  # all but recurrent states, of which no rows are taken
        assert sum(rows) == sum(lengths)


def test_forks_that_are_active_on_the_answer_and_their_product_give_the_replies_of_generate() -> None:
    cascade = Cascade(make_model("qwen3"), demo_tokenizer())
    for seed, name in enumerate(("s", "t")):
        cascade.add_stage(StageConfig(name, 1, "none", attach_at=1, layers="fork", rank=4, active="answer"))
        scramble(cascade.stages[name], seed=seed)
    for model in (cascade.model("s"), cascade.compose({"s": 0.5, "t": 0.5})):
        ordinary = generate_replies(model, cascade.tokenizer, PROMPTS, STOPS, generate=model.generate, **OPTIONS)
        assert generate_replies(model, cascade.tokenizer, PROMPTS, STOPS, **OPTIONS) == ordinary


def test_a_sampled_reply_depends_on_its_seed_alone() -> None:
    model, tokenizer, seeds = make_model("qwen3"), demo_tokenizer(), [5, 6, 7, 8]
    options = {**OPTIONS, "do_sample": True, "temperature": 1.0, "top_k": 0}
    together = generate_replies(model, tokenizer, PROMPTS, STOPS, seeds=seeds, **options)
    torch.manual_seed(3)
    pairs = [
        generate_replies(model, tokenizer, PROMPTS[i : i + 1], STOPS, seeds=seeds[i : i + 1], **options)[0]
        for i in range(4)
    ]
    assert together == pairs
    assert generate_replies(model, tokenizer, PROMPTS, STOPS, seeds=[9, 9, 9, 9], **options) != together
    same = generate_replies(model, tokenizer, PROMPTS[:1] * 3, STOPS, seeds=[1, 1, 2], **options)
    assert same[0] == same[1] != same[2]
