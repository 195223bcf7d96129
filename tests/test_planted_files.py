"""Files that a stranger put into a folder do not run code, leave their folder, or fill the memory."""

import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import mostly_slow
from poe import Cascade, StageConfig
from poe.data import sources
from poe.data.drops import DropReport
from poe.data.sources import file_rows
from poe.errors import DataError, OutputError, PoEError, RecipeError, SourceError, StageError
from poe.files.output import locked_folder
from poe.modeling.modeling_poe_stage import PoEStageForCausalLM
from poe.modeling.saves import COMPLETE_SAVE
from poe.stages import Recipe, load_recipe
from poe.stages.recipe import load_base_recipe
from poe.training.sweep import RECORD, sweep


@pytest.fixture
def folder(saved_base: Callable[..., Path], tmp_path: Path) -> Path:
    """A base of its own."""
    return Path(shutil.copytree(saved_base("llama"), tmp_path / "base"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


KERNELS: list[dict[str, Any]] = [
    {"_attn_implementation": "somebody/kernel"},
    {"attn_implementation": {"": "paged|kernels-community/kernel"}},
    {"text_config": {"_experts_implementation": "somebody/kernel:attention"}},
]


@pytest.mark.parametrize("field", KERNELS)
@pytest.mark.parametrize("trust", [False, True])
def test_compiled_kernels_of_another_repository_are_never_fetched(folder: Path, field: dict, trust: bool) -> None:
    edit(folder / "config.json", **field)
    with pytest.raises(SourceError, match="takes code from another repository"):
        Cascade.from_pretrained(folder, trust_remote_code=trust)


@pytest.mark.slow
def test_a_stage_does_not_choose_kernels_either(folder: Path, tmp_path: Path) -> None:
    stage = Cascade.from_pretrained(folder).add_stage(StageConfig("s", 1)).save_stage("s", tmp_path / "s")
    edit(stage / "config.json", **KERNELS[0])
    for door in (Cascade.from_pretrained, PoEStageForCausalLM.from_pretrained):
        model: Any = door(stage)
        assert "/" not in getattr(model.config, "_attn_implementation", "")
    edit(folder / "config.json", **KERNELS[0])
    for door in (Cascade.from_pretrained, PoEStageForCausalLM.from_pretrained):
        with pytest.raises(PoEError):
            door(stage)


def test_a_planted_save_moves_no_file_out_of_or_into_the_folder(folder: Path, tmp_path: Path) -> None:
    """It looks like a save that was interrupted, which is finished when the folder is opened."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / ".bashrc").write_text("mine")
    (folder / COMPLETE_SAVE).symlink_to(mine)
    with pytest.raises(SourceError, match="is a link"):
        Cascade.from_pretrained(folder)
    (folder / COMPLETE_SAVE).unlink()
    (folder / "sub").symlink_to(mine)
    (folder / COMPLETE_SAVE / "sub").mkdir(parents=True)
    (folder / COMPLETE_SAVE / "sub" / ".bashrc").write_text("evil")
    with pytest.raises(SourceError, match="is a link"):
        Cascade.from_pretrained(folder)
    assert (mine / ".bashrc").read_text() == "mine"


def test_a_pipe_among_left_overs_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".poe-x.part")
    with locked_folder(tmp_path):
        assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("name", mostly_slow(["../mine", "/tmp/mine", "..", "", "mine"], ["../mine"]))
def test_a_sweep_empties_no_folder_but_those_of_its_candidates(name: str, demo_base: Path, tmp_path: Path) -> None:
    cascade, out = Cascade.from_pretrained(demo_base), tmp_path / "sweep"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    out.mkdir()
    plan = Recipe(name="t", data="demo=40")
    row = {"folder": name, "tried": {}, "val_bpb": 9.0, "best_step": 1, "parameters": 1, "delta_bytes": 1, "seconds": 1}
    common = {k: v for k, v in plan.as_dict().items() if k != "num_layers"}
    common["base"] = cascade.base_source.fingerprint
    (out / RECORD).write_text(json.dumps({"best": name, "common": common, "candidates": [row]}))
    with pytest.raises(OutputError, match="which is no candidate"):
        sweep(cascade, plan, {"num_layers": [1]}, None, out, resume=True)
    assert (tmp_path / "mine" / "file").read_text() == "mine"


@pytest.mark.parametrize("ids", ['"x"', '[1, "x"]', "1.5", "true", "[[1]]"])
def test_special_tokens_that_are_no_numbers_are_one_error(folder: Path, ids: str, tmp_path: Path) -> None:
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": {ids}}}')
    with pytest.raises(SourceError, match="eos_token_id"):
        Cascade.from_pretrained(folder)


@pytest.mark.parametrize("layers", [-1, 0, 10**9])
def test_a_number_of_layers_that_cannot_be_is_one_error(folder: Path, layers: int) -> None:
    edit(folder / "config.json", num_hidden_layers=layers)
    with pytest.raises(SourceError, match="expected 1 to 10000"):
        Cascade.from_pretrained(folder)
    with pytest.raises((RecipeError, StageError), match=r"at most 1000|1 to 1000"):
        load_recipe("tool", num_layers=layers)
    with pytest.raises(StageError, match="at most 1000"):
        StageConfig("t", num_layers=layers)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nname: b", "'name' is given twice"),
        ("augment:\n  mask: 0.1\n  mask: 0.2", "'mask' is given twice"),
        ("name: ../../x", "name must start with a letter or digit"),
        ("name: 'a\\nb'", "name must start with a letter or digit"),
    ],
)
def test_a_recipe_is_refused_before_any_work(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(tmp_path / "r.yaml")


def test_a_vocabulary_that_no_memory_holds_is_refused() -> None:
    with pytest.raises(RecipeError, match="1 to 10000000"):
        load_base_recipe("text", vocab_size=10**11)


def test_small_archives_of_giant_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_WHOLE", 1 << 20)
    contents = {
        "object.json.gz": b'{"a": "' + b"x" * (1 << 21),
        "table.parquet.gz": b"PAR1" + bytes(1 << 21),
        "space.json.gz": b" " * (1 << 26),
    }
    messages = {"space.json.gz": "is empty"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(gzip.compress(content, 1))
        with pytest.raises(DataError, match=messages.get(name, "must be read at once")):
            list(file_rows(str(tmp_path / name), "s", DropReport()))
