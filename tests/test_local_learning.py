"""PoE local learning: every stage learns from its own prediction, with one graph in memory, and can be an exit."""

import json
import math
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from conftest import scramble
from poe import Cascade
from poe.data.packing import Batch
from poe.decoding import Exit
from poe.demo.text import make_text
from poe.errors import DataError, RecipeError
from poe.modeling.modeling_poe import PoEConfig, PoEForCausalLM
from poe.stages import load_base_recipe
from poe.training.hidden_states.sources import StagePredictions
from poe.training.loss import cross_entropy_sum
from poe.training.pretrain import train_base
from poe.training.reporting.progress import Progress

STAGES = [1, 2, 1]
FEATURES = {"layer_scalars": True, "value_embedding_layers": [1, 3], "value_gate_channels": 8, "smear_channels": 8}
QUIET = Progress("", quiet=True)


def make(**fields) -> PoEForCausalLM:
    torch.manual_seed(0)
    config = PoEConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, stage_layers=STAGES, **fields
    )
    model = PoEForCausalLM(config)
    scramble(model)
    return model.train()


def rows(seed: int = 0) -> Batch:
    ids = torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(seed))
    return Batch(ids, ids.roll(-1, 1), torch.arange(12).expand(2, -1))


def learn(source: StagePredictions, batch: Batch, labels: list[Tensor] | None = None) -> list[float]:
    """Compute the gradients of every stage's loss and return the losses; `labels` may differ by stage."""
    losses = []
    for stage, (hidden, weight, _) in enumerate(source.predictions(batch, learning=True)):
        loss = cross_entropy_sum(hidden, weight, batch.labels if labels is None else labels[stage])
        loss.backward()
        losses.append(loss.item())
    return losses


def gradients(model: PoEForCausalLM) -> dict[str, Tensor | None]:
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def stage_of(name: str) -> int:
    """Return the stage of a parameter; parameters before the first layer belong to the first stage."""
    parts = name.split(".")
    if parts[0] == "lm_head_stages":
        return int(parts[1])
    return [0, 1, 1, 2][int(parts[2])] if "layers" in parts else 2 if "backout_scale" in name else 0


@pytest.mark.parametrize("more", [{}, FEATURES, {**FEATURES, "backout_layer": 0}], ids=["plain", "features", "backout"])
@pytest.mark.parametrize("stage_heads", [False, True])
@pytest.mark.parametrize("changed", [1, 2])
def test_labels_of_a_stage_change_its_own_gradients_only(more, stage_heads: bool, changed: int) -> None:
    """Other labels for a stage change the gradients of its layers and of the shared head only."""
    batch, other = rows(), rows(1).labels
    labels = [other if stage == changed else batch.labels for stage in range(3)]
    results = []
    for stage_labels in (None, labels):
        model = make(stage_heads=stage_heads, **more)
        learn(StagePredictions(model, local=True), batch, stage_labels)
        results.append(gradients(model))
    before, after = results
    same = {n for n, g in before.items() if g is not None and torch.equal(g, after[n])}
    own = {n for n in before if n != "lm_head.weight" and "backout" not in n and stage_of(n) == changed}
    assert own
    assert not own & same
    assert "lm_head.weight" not in same
    assert {n for n in before if n != "lm_head.weight" and "backout" not in n} - own <= same
    assert all(g is not None for g in before.values())


def test_learning_backprop_is_ordinary_backpropagation() -> None:
    batch = rows()
    model = make(**FEATURES)
    (loss,) = learn(StagePredictions(model, local=False), batch)
    expected = make(**FEATURES)
    logits = expected.lm_head(expected.model(batch.input_ids, position_ids=batch.position_ids).last_hidden_state)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum").backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected.get_parameter(name).grad, rtol=1e-4, atol=1e-5)
    assert len(list(StagePredictions(model, local=False).predictions(batch))) == 3  # one for every boundary
    assert loss > 0


class SavedTensor:
    """A tensor that autograd has saved; `sizes` has the bytes of all that are alive, `peak` their largest sum."""

    sizes: ClassVar[dict[int, int]] = {}
    peak = 0

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        SavedTensor.sizes[id(self)] = tensor.nbytes
        SavedTensor.peak = max(SavedTensor.peak, sum(SavedTensor.sizes.values()))

    def __del__(self) -> None:
        del SavedTensor.sizes[id(self)]


def test_graph_of_one_stage_is_in_memory_at_a_time() -> None:
    """With four equal stages autograd holds a quarter of the bytes of backpropagation."""
    peaks = {}
    for local in (True, False):
        torch.manual_seed(0)
        shape = {"vocab_size": 61, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 8}
        model = PoEForCausalLM(PoEConfig(**shape, stage_layers=[2, 2, 2, 2]))
        SavedTensor.peak = 0
        with torch.autograd.graph.saved_tensors_hooks(SavedTensor, lambda kept: kept.tensor):
            learn(StagePredictions(model, local), rows())
        peaks[local] = SavedTensor.peak
    assert peaks[True] < 0.3 * peaks[False]


@pytest.mark.slow
def test_locally_trained_base_predicts_after_every_stage(tmp_path: Path) -> None:
    fields = {
        "vocab_size": 500,
        "hidden_size": 32,
        "num_layers": 3,
        "num_heads": 2,
        "stage_layers": [1, 1, 1],
        "stage_heads": True,
        "seq_len": 512,
        "tokens_per_step": 1024,
        "max_steps": 25,
        "validation_every": 25,
        "dtype": "float32",
    }
    folder = train_base(load_base_recipe("demo", **fields), tmp_path / "base", progress=QUIET)
    record = json.loads((folder / "training.json").read_text())
    first, last = record["trajectory"][0], record["trajectory"][-1]
    assert all(b < 0.8 * a for a, b in zip(first["stage_bpb"], last["stage_bpb"], strict=True))
    assert last["val_bpb"] == last["stage_bpb"][-1]
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(s["stage_losses"][-1] == s["loss"] for s in steps if "loss" in s)

    cascade = Cascade.from_pretrained(folder)
    assert cascade.config.stage_layers == [1, 1, 1]
    ids = cascade.tokenizer(make_text(7, seed=9).text, return_tensors="pt").input_ids
    losses = [float(cascade(ids, labels=ids, strategy=Exit(depth)).loss) for depth in (1, 2, 3)]
    assert max(losses) < 0.9 * math.log(500)
    assert len({round(loss, 3) for loss in losses}) == 3
    assert torch.equal(cascade(ids, strategy=Exit(3)).logits, cascade(ids).logits)


def test_failed_start_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere"):
        train_base(load_base_recipe("text", data=f"text={tmp_path}/nowhere.txt"), tmp_path / "base", progress=QUIET)
    assert not (tmp_path / "base").exists()


def test_recipes_with_wrong_stage_layers_are_refused() -> None:
    with pytest.raises(RecipeError, match="sum to the 6 layers"):
        load_base_recipe("demo", stage_layers=[2, 2])
    with pytest.raises(RecipeError, match="stage_layers should be"):
        load_base_recipe("demo", stage_layers=[2, "4"])
    with pytest.raises(RecipeError, match="compile and local learning"):
        load_base_recipe("demo", stage_layers=[2, 4], compile=True)
    assert load_base_recipe("demo", stage_layers=[2, 4], compile=True, learning="backprop").compile
