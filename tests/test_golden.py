"""Golden numbers: files and losses from an earlier version of this package."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from poe import Cascade, train_stage

GOLDEN = Path(__file__).parent / "golden" / "stage_v1"

# Four steps of the demo recipe on the embedded base, in float32 on one thread.
LOSSES = [5.055215466660236, 5.85817564910788, 2.63720502186214, 3.788541732295867]
VAL_BPB = [8.722398403328295, 7.341045954549035]


def test_stages_of_an_earlier_version_load_with_the_same_logits() -> None:
    expected = load_file(GOLDEN / "logits.safetensors")
    cascade = Cascade.from_pretrained(GOLDEN / "child")
    for name in ("base", "parent", "child"):
        logits = cascade(expected["input_ids"], stage=None if name == "base" else name).logits
        torch.testing.assert_close(logits, expected[name], rtol=1e-5, atol=1e-5)


def test_stage_of_an_earlier_version_is_saved_with_the_same_bytes(tmp_path: Path) -> None:
    cascade = Cascade.from_pretrained(GOLDEN / "child")
    for name in ("parent", "child"):
        cascade.save_stage(name, tmp_path / name)
        before, after = (folder / name / "delta.safetensors" for folder in (GOLDEN, tmp_path))
        assert after.read_bytes() == before.read_bytes()


def test_short_run_has_the_recorded_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POE_CACHE", str(tmp_path / "cache"))
    cascade = Cascade.from_pretrained("demo", dtype=torch.float32)
    fields = {"max_steps": 4, "tokens_per_step": 2048, "dtype": "float32"}
    run = train_stage(cascade, "demo", "demo=200", tmp_path / "run", **fields)
    assert [step["loss"] for step in run.history.steps] == pytest.approx(LOSSES, rel=1e-4)
    assert [point["val_bpb"] for point in run.history.evals] == pytest.approx(VAL_BPB, rel=1e-4)
