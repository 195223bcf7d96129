"""Greedy is greedy with any generation config of the base, and that config is carried over as it is."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from command_line import run_program
from conftest import VOCABULARY, scramble, tiny_base, tiny_tokenizer, token_ids
from poe import Cascade
from poe.chat import generate_replies
from poe.decoding import SelfSpeculation
from poe.decoding.generation import greedy_options
from poe.errors import SourceError, StageError

SETTINGS: dict[str, dict[str, Any]] = {
    "a repetition penalty": {"repetition_penalty": 5.0},
    "sampling": {"do_sample": True, "temperature": 9.0, "top_k": 3, "top_p": 0.5},
    "no repeated tokens": {"no_repeat_ngram_size": 1},
    "a forced end": {"forced_eos_token_id": 7},
    "suppressed tokens": {"suppress_tokens": list(range(3, VOCABULARY - 3))},
    "suppressed first tokens": {"begin_suppress_tokens": list(range(3, VOCABULARY - 3))},
    "bad words": {"bad_words_ids": [[i] for i in range(3, VOCABULARY - 3)]},
    "beams": {"num_beams": 3, "early_stopping": True, "length_penalty": -5.0},
    "several answers": {"num_return_sequences": 2, "do_sample": True},
    "a bias": {"sequence_bias": [[[5], 50.0]]},
    "a decay": {"exponential_decay_length_penalty": [1, 9.0]},
    "a least length": {"min_new_tokens": 6, "eos_token_id": list(range(20))},
    "stop strings": {"stop_strings": ["w5"]},
}


def cascade_with(setting: str) -> Cascade:
    """Return a cascade with a stage `s` on a base with a generation config."""
    base = tiny_base()
    base.generation_config = GenerationConfig(
        **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **SETTINGS.get(setting, {})}
    )
    cascade = Cascade(base, tiny_tokenizer()).add_stage(name="s", num_layers=1)
    scramble(cascade.stages["s"])
    return cascade


@pytest.fixture
def folder(saved_base: Callable[..., Path], tmp_path: Path) -> Path:
    """The folder of a base whose files the test may change."""
    return Path(shutil.copytree(saved_base("qwen3"), tmp_path / "base"))


def answer(setting: str) -> list[str]:
    cascade = cascade_with(setting)
    prompts = token_ids(2, 5).tolist()
    replies = generate_replies(cascade.model("s"), cascade.tokenizer, prompts, [2], max_new_tokens=6)
    return [reply.text for reply in replies]


@pytest.mark.parametrize("setting", SETTINGS)
def test_held_out_answers_are_greedy_whatever_the_base_recommends(setting: str) -> None:
    assert answer(setting) == answer("plain")


@pytest.mark.parametrize("strategy", [None, SelfSpeculation(1)])
def test_greedy_options_hold_in_strategies_and_products(strategy: Any) -> None:
    options = greedy_options(max_new_tokens=6)
    plain, changed = cascade_with("plain"), cascade_with("a repetition penalty")
    tokens = [c.generate(token_ids(1), stage="s", strategy=strategy, **options) for c in (plain, changed)]
    products = [c.compose({"s": 0.5, None: 0.5}).generate(token_ids(1), **options) for c in (plain, changed)]
    assert torch.equal(*tokens)
    assert torch.equal(*products)


def test_poe_generate_at_temperature_0_is_greedy(folder: Path) -> None:
    texts = []
    for config in ({}, {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1}):
        (folder / "generation_config.json").write_text(json.dumps(config))
        texts.append(run_program("poe", "generate", str(folder), "w5 w6 w7", "--max-new-tokens", "8").stdout)
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.6, "top_p": 0.9},
        {"do_sample": False, "min_p": 0.1, "typical_p": 0.3},
        {"early_stopping": True},
        {"length_penalty": 2.0},
        {"num_return_sequences": 3, "num_beams": 3, "top_k": 4},
        {"pad_token_id": -1},
        {"return_dict_in_generate": False, "output_scores": True},
        {"use_cache": False, "cache_implementation": "static"},
    ],
)
def test_a_generation_config_that_transformers_loads_is_carried_over(
    fields: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, **fields}))
    cascade = Cascade.from_pretrained(folder).add_stage(name="s", num_layers=1)
    cascade.save_stage("s", tmp_path / "s", prompt={"name": "p", "version": "1", "stop": ["w9"]})
    saved = json.loads((tmp_path / "s" / "generation_config.json").read_text())
    assert {name: saved.get(name) for name in fields} == fields
    assert saved["eos_token_id"] == [2, 9]
    reopened = Cascade.from_pretrained(tmp_path / "s")
    reopened.export_native("s", tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config
    assert {name: getattr(exported, name) for name in fields} == fields


def test_a_generation_config_that_was_set_in_memory_is_saved(tmp_path: Path) -> None:
    cascade = cascade_with("plain")
    cascade.base.generation_config.temperature = 0.3
    cascade.save_stage("s", tmp_path / "s")
    assert GenerationConfig.from_pretrained(tmp_path / "s").temperature == 0.3


def test_a_generation_config_that_no_file_can_hold_is_one_message(tmp_path: Path) -> None:
    cascade = cascade_with("plain")
    cascade.base.generation_config.suppress_tokens = torch.tensor([3])
    with pytest.raises(StageError, match="generation config"):
        cascade.save_stage("s", tmp_path / "s")
    assert not any(tmp_path.iterdir())


def test_a_base_with_an_invalid_generation_config_is_refused_in_one_message(
    folder: Path,
) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"max_new_tokens": -1}))
    with pytest.raises(SourceError, match="max_new_tokens"):
        Cascade.from_pretrained(folder)
