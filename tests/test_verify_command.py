"""`poe verify`: one line per check, and a damaged folder fails only the check of its damage."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from conftest import scramble
from poe import Cascade, StageConfig
from poe.commands.poe import app
from poe.errors import SourceError
from poe.loaders.base import save_base_folder
from poe.loaders.verify import verify
from poe.modeling.fingerprint import fingerprint_tensors
from poe.modeling.tensor_file import read_header, write_tensors


@pytest.fixture(scope="module")
def original(saved_base, tmp_path_factory) -> Path:
    """A folder with `base`, `parent` on it and `child` on the parent."""
    root = tmp_path_factory.mktemp("family")
    shutil.copytree(saved_base("poe"), root / "base")
    cascade = Cascade.from_pretrained(root / "base")
    for name, below in (("parent", None), ("child", "parent")):
        scramble(cascade.add_stage(StageConfig(name, 1, "low_rank", 4, parent=below)).stages[name])
        cascade.save_stage(name, root / name)
    return root


@pytest.fixture
def family(original: Path, tmp_path: Path) -> Path:
    """A copy of it that may be broken."""
    return Path(shutil.copytree(original, tmp_path / "family"))


def failures(folder: Path) -> dict[str, str]:
    return {check.name: check.detail for check in verify(folder) if not check.ok}


def test_an_intact_chain_passes_every_check(family: Path) -> None:
    checks = list(verify(family / "child"))
    assert all(check.ok for check in checks), checks
    assert [check.name for check in checks] == [
        "file names",
        "network files",
        "tokenizer",
        "lineage",
        *(
            f"{name}: {what}"
            for name in ("child", "parent")
            for what in ("header", "fingerprint", "weights are finite")
        ),
        "fingerprints agree",
        "base",
        "base config",
    ]
    assert not failures(family / "base")
    run = CliRunner().invoke(app, ["verify", str(family / "child")])
    assert run.exit_code == 0
    assert len(run.output.splitlines()) == len(checks)


def rewrite(path: Path, value: float, honest: bool) -> None:
    """Put a value into a delta's first tensor; an honest forger makes the fingerprint fit."""
    tensors, (_, metadata) = load_file(path), read_header(path)
    next(iter(tensors.values())).view(-1)[0] = value
    if honest:
        metadata["self_fingerprint"] = fingerprint_tensors(tensors)
    write_tensors(path, tensors, metadata)


def edit(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


BREAKS = {
    "a pickle": (lambda f: (f / "child" / "x.pkl").touch(), {"file names": "x.pkl", "lineage": "x.pkl"}),
    "a bit": (lambda f: rewrite(f / "child/delta.safetensors", 9, False), {"child: fingerprint": "was changed"}),
    "a parent's bit": (lambda f: rewrite(f / "parent/delta.safetensors", 9, False), {"parent: fingerprint": "changed"}),
    "not a number": (
        lambda f: rewrite(f / "child/delta.safetensors", float("nan"), True),
        {"child: weights are finite": "not finite"},
    ),
    "an infinite parent": (
        lambda f: rewrite(f / "parent/delta.safetensors", float("inf"), True),
        {"parent: weights are finite": "not finite", "fingerprints agree": "stands on parent"},
    ),
    "a longer file": (
        lambda f: append(f / "child/delta.safetensors"),
        dict.fromkeys(("child: header", "child: fingerprint", "child: weights are finite", "fingerprints agree"), ""),
    ),
    "other code": (lambda f: append(f / "child/heads.py"), {"network files": "heads.py is not the one"}),
    "no code": (lambda f: (f / "child/heads.py").unlink(), {"network files": "heads.py is missing"}),
    "other classes": (
        lambda f: edit(f / "child", auto_map={"AutoModelForCausalLM": "me/evil--x.Y"}),
        {"network files": "auto_map should be"},
    ),
    "no tokenizer": (lambda f: (f / "child/tokenizer.json").unlink(), {"tokenizer": "there is no tokenizer"}),
    "a broken tokenizer": (lambda f: (f / "child/tokenizer.json").write_text("{"), {"tokenizer": "cannot be used"}),
    "no parent": (lambda f: shutil.rmtree(f / "parent"), {"lineage": "is broken"}),
    "another base": (
        lambda f: save_file(
            {k: v + 1 for k, v in load_file(f / "base/model.safetensors").items()},
            f / "base/model.safetensors",
            {"format": "pt"},
        ),
        {"base": "Wrong base"},
    ),
}


@pytest.mark.parametrize("what", BREAKS)
def test_only_the_check_of_the_damage_fails(family: Path, what: str) -> None:
    change, expected = BREAKS[what]
    change(family)
    found = failures(family / "child")
    assert found.keys() == expected.keys(), found
    for name, part in expected.items():
        assert part in found[name]
    run = CliRunner().invoke(app, ["verify", str(family / "child")])
    assert run.exit_code == 1
    assert run.output.count("FAIL") == len(expected)


def test_a_base_without_stages_is_verified(family: Path) -> None:
    base = family / "base"
    append(base / "modeling_poe.py")
    assert failures(base).keys() == {"network files"}
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"][0, 0] = float("nan")
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    assert "lm_head.weight" in failures(base)["weights are finite"]
    (base / "model.safetensors").write_bytes(b"short")
    assert failures(base).keys() == {"network files", "weights are finite", "fingerprint"}
    (base / "model.safetensors").unlink()
    assert "expected a base in safetensors" in failures(base)["fingerprint"]


def test_a_native_base_has_no_remote_code(saved_base, tmp_path: Path) -> None:
    checks = {check.name: check for check in verify(saved_base("qwen3-tied"))}
    assert all(check.ok for check in checks.values())
    assert "no remote code" in checks["network files"].detail
    bare = save_base_folder(Cascade.from_pretrained(saved_base()).base, tmp_path / "bare")
    assert failures(bare).keys() == {"tokenizer"}


def test_nothing_to_verify_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"has no config\.json"):
        list(verify(tmp_path))


def test_torch_reads_every_file_that_verify_accepts(family: Path) -> None:
    assert all(check.ok for check in verify(family / "parent"))
    for tensor in load_file(family / "parent/delta.safetensors").values():
        assert torch.isfinite(tensor).all()
