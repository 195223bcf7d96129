"""The name of a stage: chosen when it is trained or loaded, without a change of its weights or of its identity."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from command_line import run_program
from conftest import scramble, tiny_base, token_ids
from poe import Cascade, StageConfig
from poe.decoding import fit_prompt_center
from poe.errors import RecipeError, StageError
from poe.modeling.delta_file import read_delta_header
from poe.stages import load_base_recipe, load_recipe


@pytest.fixture(scope="module")
def tools(saved_base: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The folders of two different stages, both called `tool`, on one base."""
    root, folders = tmp_path_factory.mktemp("tools"), []
    for seed in (1, 2):
        cascade = Cascade.from_pretrained(saved_base()).add_stage(StageConfig("tool", 1, "low_rank", 4))
        scramble(cascade.stages["tool"], seed)
        folders.append(cascade.save_stage("tool", root / str(seed), dtype=torch.float32))
    return folders


def logits(cascade: Cascade, stage: str | None) -> torch.Tensor:
    with torch.no_grad():
        return cascade(token_ids(), stage=stage).logits


def test_two_stages_of_one_name_live_on_one_base_and_combine(tools: list[Path]) -> None:
    cascade = Cascade.from_pretrained(tools[0]).load_stage(tools[1], name="weather")
    assert (list(cascade.stages), cascade.active) == (["tool", "weather"], "weather")
    assert torch.equal(logits(cascade, "weather"), logits(Cascade.from_pretrained(tools[1]), "tool"))
    assert not torch.equal(logits(cascade, "weather"), logits(cascade, "tool"))
    product = cascade.compose({"tool": 0.5, "weather": 0.5})
    expected = (logits(cascade, "tool").log_softmax(-1) + logits(cascade, "weather").log_softmax(-1)) / 2
    got = product.logits(token_ids())
    torch.testing.assert_close(got, expected.log_softmax(-1))
    for seed, stage in enumerate(cascade.stages.values()):
        fit_prompt_center(cascade.base, stage, token_ids(8, seed=seed).tolist())
    assert set(cascade.route(token_ids()).scores[0]) == {None, "tool", "weather"}


def test_a_new_name_changes_neither_weights_nor_fingerprint(tools: list[Path], tmp_path: Path) -> None:
    cascade = Cascade.from_pretrained(tools[0]).load_stage(tools[1], name="weather")
    published = read_delta_header(tools[1] / "delta.safetensors")
    assert cascade.stages["weather"].source["fingerprint"] == published.self_fingerprint
    cascade.save_stage("weather", tmp_path / "weather")
    saved = read_delta_header(tmp_path / "weather" / "delta.safetensors")
    assert (saved.stage, saved.self_fingerprint) == ("weather", published.self_fingerprint)
    assert Cascade.from_pretrained(tmp_path / "weather").active == "weather"
    cascade.save_stage("tool", tmp_path / "tool")  # a name that was not changed changes no byte
    assert (tmp_path / "tool/delta.safetensors").read_bytes() == (tools[0] / "delta.safetensors").read_bytes()


def test_a_chain_finds_its_parent_under_any_name(tools: list[Path], tmp_path: Path) -> None:
    cascade = Cascade.from_pretrained(tools[0]).load_stage(tools[1], name="weather")
    cascade.add_stage(StageConfig("child", 1, "none", parent="weather"))
    scramble(cascade.stages["child"])
    cascade.save_stage("child", tmp_path / "child", dtype=torch.float32)
    alone = Cascade.from_pretrained(tmp_path / "child")
    assert list(alone.stages) == ["tool", "child"]
    assert torch.equal(logits(alone, "child"), logits(cascade, "child"))
    with pytest.raises(StageError, match=r"Two stages are called 'tool': .* Load that parent before its child, under"):
        Cascade.from_pretrained(tools[0]).load_stage(tmp_path / "child")
    both = Cascade.from_pretrained(tools[0]).load_stage(tools[1], name="weather").load_stage(tmp_path / "child")
    assert list(both.stages) == ["tool", "weather", "child"]
    assert both.stages["child"].parent is both.stages["weather"]
    renamed = Cascade.from_pretrained(tools[1]).load_stage(tmp_path / "child", name="mine")
    assert (renamed.active, renamed.stages["mine"].config.parent) == ("mine", "tool")
    assert torch.equal(logits(renamed, "mine"), logits(cascade, "child"))


def test_a_child_is_not_called_like_its_parent_in_memory_or_on_disk(tools: list[Path], tmp_path: Path) -> None:
    cascade = Cascade(tiny_base()).load_stage(tools[0], name="weather")
    with pytest.raises(StageError, match="'tool' would stand on a stage of that name"):
        cascade.add_stage(StageConfig("tool", 1, parent="weather"))
    cascade.add_stage(StageConfig("child", 1, "none", parent="weather")).save_stage("child", tmp_path / "c")
    with pytest.raises(StageError, match=r"A parent of .* is called 'tool'"):
        Cascade(tiny_base()).load_stage(tmp_path / "c", name="tool")


def test_names_that_are_taken_or_impossible_are_refused_before_weights_are_read(
    tools: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cascade = Cascade.from_pretrained(tools[0])
    monkeypatch.setattr("poe.loaders.chains.load_stages", lambda *a, **k: pytest.fail("weights were read"))
    with pytest.raises(StageError, match=r"Two stages are called 'tool'.*load_stage\('.*2', name='\.\.\.'\)"):
        cascade.load_stage(tools[1])
    with pytest.raises(StageError, match="Two stages are called 'tool'"):
        cascade.load_stage(tools[1], name="tool")
    with pytest.raises(StageError, match="must start with a letter"):
        cascade.load_stage(tools[1], name="../tool")
    assert list(cascade.stages) == ["tool"]


def test_loading_again_reuses_a_stage_and_another_name_copies_it(tools: list[Path]) -> None:
    cascade = Cascade.from_pretrained(tools[0])
    tool = cascade.stages["tool"]
    cascade.load_stage(tools[0], name="copy").load_stage(tools[0], name="tool").load_stage(tools[0])
    assert (list(cascade.stages), cascade.active) == (["tool", "copy"], "tool")
    assert cascade.stages["tool"] is tool
    assert torch.equal(logits(cascade, "copy"), logits(cascade, "tool"))


def test_generate_combines_two_published_stages_of_one_name(tools: list[Path]) -> None:
    done = run_program("poe", "generate", tools[0], "w5 w6", "--max-new-tokens", "2", "--with", f"{tools[1]}=0.5")
    assert done.returncode == 0, done.stderr


def test_a_recipe_takes_a_name_and_refuses_an_impossible_one() -> None:
    assert load_recipe("demo", name="weather").stage_config().name == "weather"
    assert load_base_recipe("demo", name="mine").name == "mine"
    with pytest.raises(RecipeError, match="must start with a letter"):
        load_recipe("demo", name="my stage")


@pytest.mark.parametrize("program", ["stage", "sweep"])
def test_the_name_of_a_run_is_the_stage_and_the_folder(
    program: str, demo_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}
    target = {"stage": "poe.training.trainer.train_stage", "sweep": "poe.training.sweep.sweep"}[program]

    def stop(cascade: Cascade, plan: object, *rest: object, **options: object) -> None:
        seen.update(plan=plan, folder=next(part for part in rest if isinstance(part, Path)))
        raise RecipeError("stopped")

    monkeypatch.setattr(target, stop)
    options = ["--try", "num_layers=1"] if program == "sweep" else []
    run_program("poe-train", program, "demo", "--name", "weather", "--base", demo_base, *options, cwd=tmp_path)
    assert seen["plan"].name == "weather"
    assert str(seen["folder"]) == {"stage": "runs/weather", "sweep": "runs/weather-sweep"}[program]


def test_a_missing_recipe_file_is_no_unknown_recipe(tmp_path: Path) -> None:
    done = run_program("poe-train", "stage", "my-recipe.yaml", cwd=tmp_path)
    assert done.returncode == 1
    assert f"There is no such file: my-recipe.yaml (from the folder {tmp_path})" in done.stderr
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(RecipeError, match="cannot be read: Is a directory"):
        load_recipe(tmp_path / "folder.yaml")
    with pytest.raises(RecipeError, match=r"Unknown recipe 'tol'\. Did you mean 'tool'"):
        load_recipe("tol")
