"""Recipes: the shipped files are valid, every field is documented and checked, and the options are frozen here."""

import dataclasses
import re
import subprocess
from pathlib import Path
from typing import Annotated

import pytest
import typer
import yaml

from command_line import run_program
from poe.commands.recipe_options import (
    NOT_OPTIONS,
    StageRecipeCommand,
    format_switch,
    is_switch,
    parse_field,
)
from poe.commands.reference import write_reference
from poe.data.readers import READERS
from poe.data.spec import parse_spec
from poe.errors import RecipeError
from poe.modeling.stage_config import StageConfig
from poe.stages import Augmentation, BaseRecipe, Recipe, list_recipes, load_base_recipe, load_recipe
from poe.stages.fields import describe_fields, format_value
from poe.stages.recipe import GROUPS, group_fields

PLAN_FIELDS = (
    "seq_len tokens_per_step max_tokens_per_batch max_steps matrix_lr head_lr weight_decay momentum initial_momentum "
    "matrix_optimizer initial_lr_factor warmup_ratio warmdown_ratio final_lr_factor max_grad_norm z_loss "
    "validation_every checkpoint_every keep_checkpoints "
    "track dtype compile checkpoint_activations seed"
).split()
STAGE_OPTIONS = {
    *PLAN_FIELDS,
    *"num_layers head head_rank epochs validation_ratio eval_data near_duplicates augment eval_rows train_on".split(),
    *"attach_at layers rank active".split(),
    "isolate_documents",
    "cache_hidden",
    "shard_base",
}
BASE_OPTIONS = {
    *PLAN_FIELDS,
    *"vocab_size hidden_size num_layers num_heads num_kv_heads attention_logit_scale embed_lr init".split(),
    *"stage_layers stage_heads combiner network learning".split(),
}


def test_shipped_recipes_survive_a_round_trip_through_yaml(tmp_path) -> None:
    siblings = ("chat", "code", "math", "tool")
    assert list_recipes() == sorted(["demo", *siblings, *(f"{name}-fork" for name in siblings)])
    for name in list_recipes():
        recipe = load_recipe(name)
        path = tmp_path / "again.yaml"
        path.write_text(recipe.to_yaml())
        assert load_recipe(path) == recipe
        assert recipe.stage_config().name == name
    for name in list_recipes(BaseRecipe):
        assert load_base_recipe(name).name == name


def test_the_tool_recipe_has_the_published_hyperparameters() -> None:
    tool = load_recipe("tool")
    assert (tool.num_layers, tool.matrix_lr, tool.head_lr, tool.weight_decay) == (4, 0.002, 1e-4, 0.1)
    assert (tool.initial_lr_factor, tool.warmup_ratio, tool.warmdown_ratio) == (0.2, 0.05, 0.9)
    assert (tool.seq_len, tool.tokens_per_step) == (2048, 131072)
    assert tool.epochs == {"glaive": 4, "xlam": 3}


def test_the_recipes_of_siblings_have_the_settings_of_the_tool_recipes() -> None:
    own = {"name", "description", "data", "epochs", "num_layers", "augment"}
    tool = load_recipe("tool")
    for name, shape, epochs in (
        ("math", 4, {"gsm8k": 20, "mathinstruct": 4}),
        ("code", 4, {}),
        ("chat", 2, {}),
    ):
        recipe = load_recipe(name)
        assert (recipe.num_layers, recipe.epochs) == (shape, epochs)
        assert {source.name for source in parse_spec(recipe.data, READERS)} >= epochs.keys()
        for published, sibling in ((tool, recipe), (load_recipe("tool-fork"), load_recipe(f"{name}-fork"))):
            changed = {field for field, value in sibling.as_dict().items() if value != published.as_dict()[field]}
            assert changed <= own, changed


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: load_recipe("tol"), "Did you mean 'tool'"),
        (lambda: load_base_recipe("tool"), "Known: demo, demo-notations, text"),
        (lambda: load_recipe("tool", matrix_rate=1), "Did you mean 'matrix_lr'"),
        (lambda: load_recipe("tool").replace(num_layer=2), "Did you mean 'num_layers'"),
        (lambda: load_recipe("tool", head="thick"), "head should be"),
        (lambda: load_recipe("tool", num_layers="many"), "num_layers should be a whole number .1 to 1000., got 'many'"),
        (lambda: load_recipe("tool", seq_len=1000, tokens_per_step=4096), "must be a multiple of seq_len"),
        (
            lambda: load_recipe("tool", keep_checkpoints=0),
            "keep_checkpoints should be .*, got 0",
        ),
    ],
)
def test_a_bad_recipe_raises_an_error_with_the_reason(make, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make()


@pytest.mark.parametrize("content", ["- a\n- b\n", "name: [", "seq_len: 5: 6"])
def test_a_file_without_recipe_fields_is_refused(tmp_path, content: str) -> None:
    (tmp_path / "r.yaml").write_text(content)
    with pytest.raises(RecipeError):
        load_recipe(tmp_path / "r.yaml")


def test_options_are_parsed_in_the_type_of_their_field() -> None:
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


def test_changed_fields_reach_the_stage_config() -> None:
    assert load_recipe("tool", num_layers=2, head="none").stage_config() == StageConfig("tool", 2, head="none")


@pytest.mark.parametrize("kind", [Recipe, BaseRecipe, Augmentation])
def test_every_field_has_a_sentence(kind: type) -> None:
    for info in describe_fields(kind).values():
        assert re.fullmatch(r"[A-Z].+\.", info.sentence), f"{kind.__name__}.{info.name} needs a sentence under it"


@pytest.mark.parametrize("kind", [Recipe, BaseRecipe])
def test_every_field_is_in_one_group(kind: type) -> None:
    grouped = [info.name for infos in group_fields(kind).values() for info in infos]
    assert sorted(grouped) == sorted(f.name for f in dataclasses.fields(kind))
    unknown = {name for names in GROUPS.values() for name in names.split()}
    assert unknown == {f.name for each in (Recipe, BaseRecipe) for f in dataclasses.fields(each)}


@pytest.mark.parametrize(
    ("field", "below", "above"),
    [
        *((name, -0.1, 1.1) for name in "initial_lr_factor warmup_ratio warmdown_ratio final_lr_factor".split()),
        *((name, -0.1, 1.1) for name in "validation_ratio near_duplicates".split()),
        *((name, -0.1, 1.0) for name in ("momentum", "initial_momentum")),
        *((name, -1e-9, float("inf")) for name in "matrix_lr head_lr weight_decay z_loss checkpoint_every".split()),
        *((name, 0, 1.5) for name in "seq_len tokens_per_step max_tokens_per_batch max_steps validation_every".split()),
        *((name, 0, 1.5) for name in "keep_checkpoints num_layers head_rank attach_at rank".split()),
        ("max_grad_norm", 0.0, float("nan")),
        ("eval_rows", -1, 0.5),
        ("epochs", {"glaive": 0}, {1: 1}),
    ],
)
def test_ranges_are_enforced(field: str, below: object, above: object) -> None:
    for value in (below, above):
        with pytest.raises(RecipeError, match=f"Recipe 'tool': {field} should be "):
            load_recipe("tool", **{field: value})


def test_the_reference_page_is_current() -> None:
    page = Path(__file__).parents[1] / "docs" / "reference" / "recipes.md"
    assert page.read_text() == write_reference(), "python -m poe.commands.reference > docs/reference/recipes.md"


def run_train(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_program("poe-train", *arguments, environment={"COLUMNS": "200"})


def test_help_prints_sentence_type_and_default_by_group() -> None:
    shown = run_train("stage", "demo", "--help").stdout
    recipe = load_recipe("demo")
    position = 0
    for group, infos in group_fields(Recipe).items():
        position = shown.index(f"{group} (recipe)", position)
        text = " ".join(shown[position:].replace("│", "").split())
        for info in infos:
            if info.name in NOT_OPTIONS:
                continue
            flag, name = is_switch(info.hint), info.name.replace("_", "-")
            default = format_value(getattr(recipe, info.name))
            default = f"({format_switch(default)})" if flag else default
            option = text[text.index(f"--{name} ") :]
            assert f"--no-{name} " in option or not flag
            assert ("<bool>" if flag else f"<{info.type}>") in option
            assert f"{info.sentence} [default: {default}]" in option, info.name
    assert "[default: 4]" in run_train("stage", "--help").stdout  # num_layers of `tool`, the default recipe
    assert "[default: 12]" in run_train("base", "--help").stdout


def test_only_what_is_given_overrides_the_recipe(tmp_path: Path) -> None:
    command = ["stage", "--head-rank", "64", "demo", "--augment", "{mask: 2}", "--out", str(tmp_path)]
    refused = run_train(*command)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "augment.mask should be a number (0 to 1), got 2" in refused.stderr
    given: dict[str, object] = {}

    class Probe(StageRecipeCommand):
        def invoke(self, ctx):
            self.callback = lambda **parameters: given.update(ctx.obj)
            return super().invoke(ctx)

    app = typer.Typer()

    @app.command(cls=Probe)
    def stage(recipe: Annotated[str, typer.Argument()] = "tool") -> None: ...

    options = ["--matrix-lr", "1e-3", "--max-steps", "null", "--augment", "{mask: 0.3}", "--cache-hidden"]
    typer.main.get_command(app).main(["--head-rank", "64", "demo", *options], standalone_mode=False)
    assert given == {
        "head_rank": 64,
        "matrix_lr": 0.001,
        "max_steps": None,
        "augment": {"mask": 0.3},
        "cache_hidden": True,
    }
    assert load_recipe("demo", **given).augment == Augmentation(mask=0.3)
    given.clear()
    switches = {info.name for info in describe_fields(Recipe).values() if is_switch(info.hint)}
    options = [f"--no-{name.replace('_', '-')}" for name in sorted(switches)]  # a recipe may have set any of them
    typer.main.get_command(app).main(["demo", *options], standalone_mode=False)
    assert given == dict.fromkeys(switches, False)
    assert {"compile", "cache_hidden", "isolate_documents"} <= switches


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--warmup-ratoi", "0.1"), "--warmup-ratio"),
        (("--warmup-ratio",), "requires an argument"),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: tuple[str, ...], message: str) -> None:
    refused = run_train("stage", *arguments)
    assert refused.returncode == 2
    assert message in refused.stderr


@pytest.mark.parametrize(
    ("command", "kind", "options"), [("stage", Recipe, STAGE_OPTIONS), ("base", BaseRecipe, BASE_OPTIONS)]
)
def test_every_recipe_field_is_an_option(command: str, kind: type, options: set[str]) -> None:
    """The options are a public interface: a change here changes the command line of every user."""
    names = {f.name for f in dataclasses.fields(kind)}
    assert names - {"name", "data", "description"} == options
    shown = run_train(command, "--help").stdout
    for option in options:
        assert f"--{option.replace('_', '-')}" in shown
    for option in ("--data", "--out", "--resume"):
        assert option in shown
    assert yaml.safe_load(load_recipe("tool").to_yaml())
