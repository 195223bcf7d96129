"""Strategies: `generate(strategy=...)` takes one of them, and the command line's text names one."""

from pathlib import Path

import pytest
import torch

from decoding_models import decoding_cascade, prompts
from poe.decoding import AdaptiveDepth, Exit, SelfSpeculation, parse_strategy
from poe.errors import DecodingError

GREEDY = {"max_new_tokens": 6, "do_sample": False}


def test_text_names_a_strategy(tmp_path: Path) -> None:
    file = tmp_path / "depth=1.json"
    saved = AdaptiveDepth((1,), (0.5,), "margin", 4, 0.9, 0.9, (0.5, 0.5), "0" * 64)
    saved.save(file)
    assert parse_strategy("exit=6") == Exit(6)
    assert parse_strategy("draft=2") == SelfSpeculation(2)
    assert parse_strategy(f"adaptive={file}") == saved


@pytest.mark.parametrize("text", ["", "exit", "exit=", "exit=one", "exit=-1", "draft=1.5", "adaptive=", "beam=2"])
def test_other_text_is_refused_with_what_was_expected(text: str) -> None:
    with pytest.raises(DecodingError, match="expected exit=DEPTH, adaptive=FILE or draft=DEPTH"):
        parse_strategy(text)


@torch.no_grad()
def test_a_strategy_works_in_generate_in_calls_and_as_a_model() -> None:
    cascade, inputs = decoding_cascade("llama"), prompts(2)
    left = cascade(**inputs, strategy=Exit(2)).logits
    assert torch.equal(cascade.model(None, Exit(2))(**inputs).logits, left)
    assert not torch.equal(cascade(**inputs).logits, left)
    assert cascade.model(None, Exit(2)) is cascade.model(None, Exit(2))
    assert cascade.model(None, SelfSpeculation(2)) is cascade.base
    with pytest.raises(DecodingError, match=r"strategy should be an Exit, .* got 2"):
        cascade.generate(**inputs, **GREEDY, strategy=2)
