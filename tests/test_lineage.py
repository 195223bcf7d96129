"""From a stage to its base: chains, wrong parents, moved bases, and a Hub that does not answer."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import poe.loaders.base
from conftest import mostly_slow, scramble, tiny_base, tiny_tokenizer, token_ids
from poe import Cascade, StageConfig
from poe.errors import DeltaError, FamilyError, FingerprintError, LineageError, SourceError, StageError
from poe.loaders import repository
from poe.loaders.base import save_base_folder


@pytest.fixture
def family(saved_base, tmp_path: Path) -> Path:
    """A folder with `base`, `parent` on it and `child` on the parent, all scrambled."""
    shutil.copytree(saved_base(), tmp_path / "base")
    cascade = Cascade.from_pretrained(tmp_path / "base")
    for name, parent in (("parent", None), ("child", "parent")):
        cascade.add_stage(StageConfig(name, 1, "low_rank" if parent else "dense", 4, parent=parent))
        scramble(cascade.stages[name], seed=len(name))
        with torch.no_grad():  # what is stored is bf16: train on what will be found there
            for parameter in cascade.stages[name].parameters():
                parameter.copy_(parameter.to(torch.bfloat16))
        cascade.save_stage(name, tmp_path / name)
    torch.save(cascade(token_ids()).logits, tmp_path / "expected")
    return tmp_path


def edit(folder: Path, **changes) -> None:
    """Change top-level fields of a folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def test_a_chain_of_two_loads_from_any_location(family: Path, tmp_path: Path) -> None:
    expected = torch.load(family / "expected")
    cascade = Cascade.from_pretrained(family / "child")
    assert list(cascade.stages) == ["parent", "child"]
    assert cascade.active == "child"
    assert torch.equal(cascade(token_ids()).logits, expected)
    assert cascade.stages["child"].parent is cascade.stages["parent"]
    assert config(family / "child")["parent"]["repo"] == "../parent"
    moved = tmp_path / "elsewhere" / "deep"
    moved.parent.mkdir()
    shutil.move(family / "base", tmp_path / "kept")
    shutil.copytree(family, moved, ignore=shutil.ignore_patterns("elsewhere", "kept"))
    shutil.move(tmp_path / "kept", moved / "base")
    shutil.rmtree(family / "child")
    assert torch.equal(Cascade.from_pretrained(moved / "child")(token_ids()).logits, expected)


def test_stages_attach_to_an_open_base(family: Path) -> None:
    expected = torch.load(family / "expected")
    cascade = Cascade.from_pretrained(family / "base").add_stage(StageConfig("other", 1))
    cascade.load_stage(family / "child")
    assert list(cascade.stages) == ["other", "parent", "child"]
    assert torch.equal(cascade(token_ids()).logits, expected)
    parent = cascade.stages["parent"]
    cascade.load_stage(family / "parent")
    assert cascade.stages["parent"] is parent
    cascade.stages.pop("child")
    cascade.load_stage(family / "child")
    assert cascade.stages["child"].parent is parent
    in_memory = Cascade(tiny_base()).load_stage(family / "child")
    assert torch.equal(in_memory(token_ids()).logits, expected)
    with pytest.raises(FingerprintError, match="Wrong base"):
        Cascade(tiny_base(seed=1)).load_stage(family / "child")
    renamed = Cascade.from_pretrained(family / "base").add_stage(StageConfig("parent", 1))
    with pytest.raises(StageError, match="Two stages are called 'parent'"):
        renamed.load_stage(family / "child")
    assert list(renamed.stages) == ["parent"]


def test_a_wrong_base_stops_the_load_before_any_weight(family: Path, saved_base, monkeypatch) -> None:
    shutil.rmtree(family / "base")
    shutil.copytree(saved_base(seed=1), family / "base")
    monkeypatch.setattr(poe.loaders.base, "load_base", lambda *a, **k: pytest.fail("the base was loaded"))
    with pytest.raises(
        FingerprintError, match=r"expected \.\./base \(revision none, \w{12}\), got .*base .*\w{12}\)"
    ) as e:
        Cascade.from_pretrained(family / "parent")
    assert "base=" in str(e.value)
    assert "POE_BASE" in str(e.value)


def test_a_given_base_must_have_the_fingerprint(family: Path, saved_base, tmp_path, monkeypatch) -> None:
    expected = torch.load(family / "expected")
    shutil.move(family / "base", tmp_path / "moved")
    with pytest.raises(LineageError, match=r"child .* -> parent .* -> .*base ends before its base .*POE_BASE"):
        Cascade.from_pretrained(family / "child")
    assert torch.equal(Cascade.from_pretrained(family / "child", base=tmp_path / "moved")(token_ids()).logits, expected)
    monkeypatch.setenv("POE_BASE", str(tmp_path / "moved"))
    assert torch.equal(Cascade.from_pretrained(family / "child")(token_ids()).logits, expected)
    monkeypatch.setenv("POE_BASE", str(saved_base(seed=1)))
    with pytest.raises(FingerprintError, match="Wrong base"):
        Cascade.from_pretrained(family / "child")
    with pytest.warns(UserWarning, match="verify=False"):
        other = Cascade.from_pretrained(family / "child", verify=False)
    assert not torch.equal(other(token_ids()).logits, expected)


def test_the_embedded_base_is_found_by_fingerprint(family: Path, saved_base, tmp_path, monkeypatch) -> None:
    expected = torch.load(family / "expected")
    shutil.move(family / "base", tmp_path / "assets")
    monkeypatch.setattr(repository, "EMBEDDED_BASE", tmp_path / "assets")
    cascade = Cascade.from_pretrained(family / "child")
    assert torch.equal(cascade(token_ids()).logits, expected)
    assert cascade.base_source.repo == str(tmp_path / "assets")
    assert Cascade.from_pretrained("demo").base_source.repo == str(tmp_path / "assets")
    monkeypatch.setattr(repository, "EMBEDDED_BASE", saved_base(seed=1))
    with pytest.raises(LineageError, match="ends before its base"):
        Cascade.from_pretrained(family / "child")
    monkeypatch.setattr(repository, "EMBEDDED_BASE", tmp_path / "nothing")
    with pytest.raises(SourceError, match="embedded base is missing"):
        Cascade.from_pretrained("demo")


def test_the_error_for_a_cycle_shows_the_chain(family: Path) -> None:
    parent = config(family / "child")["parent"]
    edit(family / "parent", parent={**parent, "repo": "../child"})
    with pytest.raises(LineageError, match=r"child \(.*\) -> parent \(.*\) -> .*child is a cycle"):
        Cascade.from_pretrained(family / "child")


def test_the_error_for_a_missing_parent_shows_the_chain(family: Path) -> None:
    shutil.rmtree(family / "parent")
    with pytest.raises(LineageError, match=r"child \(.*\) -> .*parent is broken: There is no folder"):
        Cascade.from_pretrained(family / "child")


def test_a_chain_longer_than_sixteen_is_refused(family: Path) -> None:
    for index in range(17):
        shutil.copytree(family / "child", family / f"s{index}")
        edit(family / f"s{index}", parent={**config(family / "child")["parent"], "repo": f"../s{index + 1}"})
    with pytest.raises(LineageError, match="longer than 16 stages"):
        Cascade.from_pretrained(family / "s0")


def test_a_wrong_parent_is_refused(family: Path) -> None:
    cascade = Cascade.from_pretrained(family / "base").add_stage(StageConfig("parent", 1))
    cascade.save_stage("parent", family / "parent")
    with pytest.raises(FingerprintError, match=r"Stage 'child' .* stands on parent \.\./parent"):
        Cascade.from_pretrained(family / "child")
    stage = config(family / "child")
    edit(family / "child", parent=None)
    with pytest.raises(FingerprintError, match="stands on parent None"):
        Cascade.from_pretrained(family / "child")
    edit(family / "child", parent=stage["parent"], stage={**stage["stage"], "attach_at": 1})
    with (
        pytest.warns(UserWarning, match="verify=False"),
        pytest.raises(DeltaError, match="attaches stage"),
    ):
        Cascade.from_pretrained(family / "child", verify=False)


def test_a_parent_must_be_saved_in_its_current_state(saved_base, tmp_path: Path) -> None:
    cascade = Cascade.from_pretrained(saved_base()).add_stage(StageConfig("parent", 1))
    cascade.add_stage(StageConfig("child", 1, parent="parent"))
    with pytest.raises(StageError, match="'parent' has no files yet"):
        cascade.save_stage("child", tmp_path / "child")
    cascade.save_stage("parent", tmp_path / "parent")
    cascade.save_stage("child", tmp_path / "child")
    scramble(cascade.stages["parent"])
    with pytest.raises(StageError, match="'parent' has changed since it was saved"):
        cascade.save_stage("child", tmp_path / "child")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"poe_format": "9"}, DeltaError, "format '9', expected 1 or 2"),
        ({"stage": {"name": "parent"}}, DeltaError, "'stage' lacks num_layers, attach_at, head"),
        ({"base": None}, DeltaError, "'base' lacks fingerprint"),
        ({"model_type": "gpt2"}, FamilyError, "'gpt2' cannot be grown: its layers have no"),
    ],
)
def test_an_invalid_stage_config_is_refused(family: Path, changes: dict, error: type, message: str) -> None:
    edit(family / "parent", **changes)
    with pytest.raises(error, match=message):
        Cascade.from_pretrained(family / "parent")


def test_a_stage_with_its_own_norm_is_refused(family: Path) -> None:
    edit(family / "parent", stage={**config(family / "parent")["stage"], "own_norm": True})
    with pytest.raises(DeltaError, match="final norm"):
        Cascade.from_pretrained(family / "parent")


def test_a_stage_on_a_base_in_memory_needs_its_location(tmp_path: Path) -> None:
    cascade = Cascade(tiny_base(), tiny_tokenizer()).add_stage(StageConfig("t", 1))
    cascade.save_stage("t", tmp_path / "t")
    assert config(tmp_path / "t")["base"]["repo"] is None
    assert config(tmp_path / "t")["base_config"]["model_type"] == "qwen3"
    with pytest.raises(LineageError, match="never saved: give its location with base="):
        Cascade.from_pretrained(tmp_path / "t")
    base = save_base_folder(tiny_base(), tmp_path / "base")
    assert Cascade.from_pretrained(tmp_path / "t", base=base).active == "t"


@pytest.mark.parametrize("place", ["./nowhere", "/no/such/folder", "a/b/c", r"C:\models\mine", r"models\mine"])
def test_a_missing_folder_is_refused(place: str) -> None:
    with pytest.raises(SourceError, match="There is no folder"):
        Cascade.from_pretrained(place)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"has no config\.json"):
        Cascade.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{not json")
    with pytest.raises(SourceError, match="not readable JSON"):
        Cascade.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(SourceError, match="expected a base in safetensors"):
        Cascade.from_pretrained(tmp_path)


HUB = """
import sys, time
from poe import Cascade, PoEError
start = time.monotonic()
for call in (
    lambda: Cascade.from_pretrained("missing/nothing"),
    lambda: Cascade.from_pretrained({stage!r}, base="missing/nothing"),
    lambda: Cascade.from_pretrained({stage!r}).push_to_hub("missing/nothing", token="hf_none", base="missing/base"),
):
    try:
        call()
    except PoEError as error:
        print(type(error).__name__, "|", str(error).replace("\\n", " "))
print(time.monotonic() - start, file=sys.stderr)
"""


@pytest.mark.parametrize("offline", mostly_slow([True, False], [False]))
def test_without_a_network_a_clear_error_comes_soon(family: Path, offline: bool) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"} if offline else dict(os.environ)
    environment["HF_ENDPOINT"] = "http://127.0.0.1:9"  # nothing listens there
    code = HUB.format(stage=str(family / "parent"))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    lines = done.stdout.splitlines()
    assert [line.split(" | ")[0] for line in lines] == ["SourceError", "LineageError", "SourceError"], done.stderr
    assert "missing/nothing" in lines[0]
    assert ("HF_HUB_OFFLINE forbids the network" if offline else "cannot be reached: check the network") in lines[0]
    assert float(done.stderr.splitlines()[-1]) < 15  # seconds


def test_an_incomplete_base_is_refused(tmp_path: Path) -> None:
    """Otherwise transformers would fill what is missing with random numbers and only warn."""
    from safetensors.torch import load_file, save_file

    folder = save_base_folder(tiny_base("qwen3"), tmp_path / "base", tiny_tokenizer())
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"incomplete: 1 tensors.*layers\.1\.mlp\.up_proj.*Fetch it again\."):
        Cascade.from_pretrained(folder)
