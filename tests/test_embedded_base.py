"""The base inside the package: its size, its origin, and that it copies values from its prompt."""

import json

import torch

from poe import Cascade
from poe.loaders.repository import EMBEDDED_BASE


def test_it_is_small_and_loads_by_name() -> None:
    weights = EMBEDDED_BASE / "model.safetensors"
    assert weights.stat().st_size <= 8_000_000
    cascade = Cascade.from_pretrained("demo")
    assert cascade.base.dtype == torch.bfloat16
    assert cascade.tokenizer.chat_template
    record = json.loads((EMBEDDED_BASE / "training.json").read_text())
    assert (record["recipe"]["data"], record["recipe"]["learning"]) == ("demo:2,notations", "local")
    assert cascade.base.config.boundaries == [1, 7]
    assert not [path for ending in ("bin", "pkl", "pt") for path in EMBEDDED_BASE.glob(f"*.{ending}")]


def test_it_copies_words_it_was_not_trained_on() -> None:
    """The demo needs this: the base fills in a form with an invented name."""
    text = (
        "Forms:\nbook_zorvex(person: string, days: integer) - Book a zorvex\n"
        "Note: Please book a zorvex for Plumkirk for 37 days.\nbook_zorvex: person"
    )
    cascade = Cascade.from_pretrained("demo", dtype=torch.float32)
    ids = cascade.tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    output = cascade.generate(**ids, max_new_tokens=14, do_sample=False, eos_token_id=None)
    reply = cascade.tokenizer.decode(output[0, ids["input_ids"].shape[1] :])
    assert reply.startswith(' = "Plumkirk"; days = 37'), reply
