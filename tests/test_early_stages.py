"""An early stage for a base without one: new layers below its own, which change nothing at first."""

from pathlib import Path

import pytest
import torch

from conftest import scramble
from poe.errors import RecipeError
from poe.modeling.early import with_early_layers
from poe.modeling.modeling_poe import PoEForCausalLM
from poe.stages.recipe import load_base_recipe
from poe.training.pretrain import train_base
from poe.training.reporting.progress import Progress
from test_poe_features import COMBINATIONS, IDS, make

LARGER = {"num_hidden_layers": 6, "stage_layers": [2, 4], "layer_scalars": True}


@pytest.mark.parametrize("features", COMBINATIONS, ids=" + ".join)
@torch.no_grad()
def test_new_early_layers_change_no_prediction(features) -> None:
    base = make(features)
    own = base.config.stage_layers or [4]
    changes = {**LARGER, "stage_layers": [2, *own], "combiner": "last"}
    model = with_early_layers(base, **changes).eval()
    for stage, boundary in enumerate(base.config.boundaries):
        state = next(base.model.stages(IDS, boundaries=[boundary]))
        larger = next(model.model.stages(IDS, boundaries=[boundary + 2]))
        torch.testing.assert_close(larger, state)
        assert torch.equal(model.head_weight(stage + 1), base.head_weight(stage))
    assert model.num_parameters() > base.num_parameters()
    scramble(model)
    cached = model.generate(IDS, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(model(cached).logits.argmax(-1)[:, 7:-1], cached[:, 8:])


def test_old_layers_need_the_embedding() -> None:
    with pytest.raises(ValueError, match="layer_scalars"):
        with_early_layers(make(()), num_hidden_layers=5)
    with pytest.raises(ValueError, match="4 layers, more than 3"):
        with_early_layers(make(()), num_hidden_layers=3, layer_scalars=True)


def test_features_of_the_base_must_be_kept() -> None:
    for features, changes in (("smear", {"smear_channels": None}), ("smear", {"smear_channels": 4})):
        with pytest.raises(ValueError, match=r"has model\.smear.* has no such tensor"):
            with_early_layers(make((features,)), num_hidden_layers=5, layer_scalars=True, **changes)
    with pytest.raises(ValueError, match=r"has lm_head_stages\.0\.weight .* has no such tensor"):
        with_early_layers(make(("stage heads",)), num_hidden_layers=5, layer_scalars=True, stage_heads=False)


@pytest.fixture
def trained(demo_base: Path) -> Path:
    """Return the folder of a base with one stage and two layers."""
    return demo_base


SHORT = {
    "data": "demo",
    "vocab_size": 400,
    "hidden_size": 32,
    "num_heads": 2,
    "seq_len": 512,
    "tokens_per_step": 1024,
    "max_steps": 3,
    "dtype": "float32",
    "validation_every": 3,
}


def test_base_training_continues_with_an_early_stage(trained, tmp_path) -> None:
    network = {"layer_scalars": True, "smear_channels": 8}
    recipe = load_base_recipe("demo", **SHORT, num_layers=3, stage_layers=[1, 2], init=str(trained), network=network)
    train_base(recipe, tmp_path / "run", progress=Progress("test", quiet=True))
    model = PoEForCausalLM.from_pretrained(tmp_path / "run")
    assert model.config.boundaries == [1, 3]
    assert model.config.smear_channels == 8
    layers = [model.model.layers[i] for i in range(3)]
    assert all(layer.self_attn.o_proj.weight.any() for layer in layers)  # the new layer was trained as well
    assert layers[1].first_scale.item() > 0.9
    assert 0 < abs(layers[1].resid_scale.item() - 0.02) < 0.1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"network": {"smear_chanels": 8}}, "no 'smear_chanels'. Did you mean 'smear_channels'?"),
        ({"network": {"hidden_size": 8}}, "no 'hidden_size'"),
        ({"network": {"smear_channels": "many"}}, "does not describe a network"),
        ({"network": {"smear_channels": 64}}, "smear_channels"),
        ({"network": {"backout_layer": 9}}, "backout_layer"),
        ({"network": {"value_embedding_layers": [2]}}, "value_embedding_layers"),
        ({"network": {"layer_types": ["round"] * 2}}, "layer_types"),
        ({"init": "trained", "num_layers": 3}, "layer_scalars"),
        ({"init": "trained", "num_layers": 1, "network": {"layer_scalars": True}}, "2 layers, more than 1"),
        ({"init": "trained", "network": {"smear_channels": 64}}, "does not match its init: smear_channels"),
        ({"init": "nowhere"}, "not the folder of a PoE base"),
    ],
)
def test_impossible_network_is_one_message(fields, message, trained, tmp_path) -> None:
    fields = {name: str(trained) if value == "trained" else value for name, value in fields.items()}
    recipe = load_base_recipe("demo", **{**SHORT, "num_layers": 2, **fields})
    with pytest.raises(RecipeError, match=message):
        train_base(recipe, tmp_path / "run", progress=Progress("test", quiet=True))
    assert not (tmp_path / "run").exists()
