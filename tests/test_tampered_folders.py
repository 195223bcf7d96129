"""Tampered folders raise an error of ours; they never run code or load another model."""

import json
import random
from pathlib import Path

import pytest
import torch

from conftest import scramble
from poe import Cascade, StageConfig
from poe.errors import PoEError
from poe.modeling.access import Access
from poe.modeling.delta_file import DELTA_NAME, read_delta
from poe.modeling.lineage import resolve_lineage


@pytest.mark.parametrize("flips", [1_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_flipped_bytes_are_refused_or_change_nothing(saved_base, tmp_path: Path, flips: int) -> None:
    """Half of them in the header, which is small and where all that is read first lies."""
    cascade = Cascade.from_pretrained(saved_base("poe")).add_stage(StageConfig("t", 1, "low_rank", 2))
    scramble(cascade.stages["t"])
    folder = cascade.save_stage("t", tmp_path / "t")
    path = folder / DELTA_NAME
    delta = path.read_bytes()
    whole = read_delta(path, "t")
    header_size = 8 + int.from_bytes(delta[:8], "little")
    rng = random.Random(0)
    refused = 0
    for number in range(flips):
        position = rng.randrange(header_size if number % 2 else len(delta))
        changed = bytearray(delta)
        changed[position] ^= rng.randrange(1, 256)
        path.write_bytes(changed)
        try:
            resolve_lineage(str(folder), Access()).verify()
            tensors = read_delta(path, "t")
        except PoEError:
            refused += 1
            continue
        assert tensors.keys() == whole.keys()  # a flip that means nothing, such as another white space
        assert all(torch.equal(tensors[name], whole[name]) for name in whole)
    assert refused > 0.95 * flips


def test_an_invalid_config_value_is_an_error_of_ours(saved_base, tmp_path: Path) -> None:
    """Every value of a stage's config.json in turn becomes something else."""
    cascade = Cascade.from_pretrained(saved_base("qwen3")).add_stage(StageConfig("t", 1))
    scramble(cascade.stages["t"])
    folder = cascade.save_stage("t", tmp_path / "t")
    good = json.loads((folder / "config.json").read_text())
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = Cascade.from_pretrained(folder)(ids).logits
    places = [("poe_format",), ("model_type",), ("base",), ("stage",), ("parent",)]
    places += [("stage", key) for key in good["stage"]] + [("base", key) for key in good["base"]]
    for place in places:
        for value in (None, -1, 0, 3, 1e9, "../../../../etc", "/etc/passwd", [], {}, True):
            changed = json.loads(json.dumps(good))
            at = changed
            for key in place[:-1]:
                at = at[key]
            at[place[-1]] = value
            (folder / "config.json").write_text(json.dumps(changed))
            try:
                with torch.no_grad():
                    logits = Cascade.from_pretrained(folder)(ids).logits
            except PoEError:
                continue
            assert torch.equal(logits, expected), (place, value)
