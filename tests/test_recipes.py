"""Recipes: every shipped YAML is valid, every field is an option, and the options are frozen here."""

import dataclasses
import os
import subprocess
import sys

import pytest
import yaml

from poe.commands.app import parse_field
from poe.errors import RecipeError
from poe.modeling.stage_config import StageConfig
from poe.stages import Augmentation, BaseRecipe, Recipe, list_recipes, load_base_recipe, load_recipe

PLAN_FIELDS = (
    "seq_len tokens_per_step max_tokens_per_batch max_steps matrix_lr head_lr weight_decay momentum initial_momentum "
    "matrix_optimizer initial_lr_factor warmup_ratio warmdown_ratio final_lr_factor max_grad_norm z_loss "
    "validation_every checkpoint_every keep_checkpoints "
    "track dtype compile checkpoint_activations seed"
).split()
STAGE_OPTIONS = {
    *PLAN_FIELDS,
    *"num_layers head head_rank epochs validation_ratio eval_data near_duplicates augment eval_rows train_on".split(),
    "attach_at",
    "isolate_documents",
    "cache_hidden",
    "shard_base",
}
BASE_OPTIONS = {
    *PLAN_FIELDS,
    *"vocab_size hidden_size num_layers num_heads num_kv_heads attention_logit_scale embed_lr init".split(),
    *"stage_layers stage_heads combiner network learning".split(),
}


def test_shipped_recipes_load_and_survive_a_round_trip(tmp_path) -> None:
    assert list_recipes() == ["demo", "tool"]
    for name in list_recipes():
        recipe = load_recipe(name)
        path = tmp_path / "again.yaml"
        path.write_text(recipe.to_yaml())
        assert load_recipe(path) == recipe
        assert recipe.stage_config().name == name
    for name in list_recipes(BaseRecipe):
        assert load_base_recipe(name).name == name


def test_the_published_hyper_parameters() -> None:
    tool = load_recipe("tool")
    assert (tool.num_layers, tool.matrix_lr, tool.head_lr, tool.weight_decay) == (4, 0.002, 1e-4, 0.1)
    assert (tool.initial_lr_factor, tool.warmup_ratio, tool.warmdown_ratio) == (0.2, 0.05, 0.9)
    assert (tool.seq_len, tool.tokens_per_step) == (2048, 131072)
    assert tool.epochs == {"glaive": 4, "xlam": 3}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: load_recipe("tol"), "Did you mean 'tool'"),
        (lambda: load_base_recipe("tool"), "Known: demo, demo-notations, text"),
        (lambda: load_recipe("tool", matrix_rate=1), "Did you mean 'matrix_lr'"),
        (lambda: load_recipe("tool").replace(layers=2), "Did you mean 'num_layers'"),
        (lambda: load_recipe("tool", head="thick"), "head should be"),
        (lambda: load_recipe("tool", num_layers="many"), "num_layers should be int, got 'many'"),
        (lambda: load_recipe("tool", seq_len=1000), "must be a multiple of seq_len"),
        (lambda: load_recipe("tool", keep_checkpoints=0), "keep_checkpoints is 0, expected at least 1"),
    ],
)
def test_mistakes_are_named(make, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make()


@pytest.mark.parametrize("content", ["- a\n- b\n", "name: [", "seq_len: 5: 6"])
def test_files_that_are_no_recipes(tmp_path, content: str) -> None:
    (tmp_path / "r.yaml").write_text(content)
    with pytest.raises(RecipeError):
        load_recipe(tmp_path / "r.yaml")


def test_options_are_read_as_their_fields_are_typed() -> None:
    hints = {f.name: f.type for f in dataclasses.fields(Recipe)}
    assert "epochs" in hints
    assert parse_field("matrix_lr", "1e-3", float) == 0.001
    assert parse_field("max_steps", "null", int | None) is None
    assert parse_field("epochs", "{glaive: 2}", dict[str, int]) == {"glaive": 2}


def test_augment_is_a_mapping_in_files_and_typed_in_python() -> None:
    recipe = load_recipe("tool", augment={"mask": 0.3, "call_formats": ["xlam"]})
    assert recipe.augment == Augmentation(mask=0.3, call_formats=("xlam",))
    assert recipe.as_dict()["augment"] == {"mask": 0.3, "call_formats": ["xlam"]}
    assert load_recipe("tool").as_dict()["augment"] == {}
    assert recipe.replace(num_layers=2).augment == recipe.augment
    with pytest.raises(RecipeError, match="Did you mean 'mask'"):
        load_recipe("tool", augment={"masks": 0.3})


def test_overrides_reach_the_stage() -> None:
    assert load_recipe("tool", num_layers=2, head="none").stage_config() == StageConfig("tool", 2, head="none")


@pytest.mark.parametrize(
    ("command", "kind", "options"), [("stage", Recipe, STAGE_OPTIONS), ("base", BaseRecipe, BASE_OPTIONS)]
)
def test_the_command_line_is_the_recipe(command: str, kind: type, options: set[str]) -> None:
    """The command line is an interface: changing this test means changing it for everybody."""
    names = {f.name for f in dataclasses.fields(kind)}
    assert names - {"name", "data", "description"} == options
    shown = subprocess.run(
        [sys.executable, "-m", "poe.commands.train", command, "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "200"},
    ).stdout
    for option in options:
        assert f"--{option.replace('_', '-')}" in shown
    for option in ("--data", "--out", "--resume"):
        assert option in shown
    assert yaml.safe_load(load_recipe("tool").to_yaml())
