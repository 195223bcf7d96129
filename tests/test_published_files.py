"""A push packs regular files by exact names, and nothing private."""

import json
import os
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from conftest import scramble
from poe import Cascade, StageConfig
from poe.commands.poe import app
from poe.errors import DeltaError, PoEError
from poe.loaders.card import stage_card
from poe.loaders.hub import plan_upload


@pytest.fixture
def base(saved_base, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved_base("llama"), tmp_path / "base"))


@pytest.mark.parametrize(
    "name",
    ["NOTICE", "NOTICE-1", "LICENSE", "README.md", "model.safetensors", "model-1.safetensors", "vocab.txt", "sub"],
)
def test_a_link_is_never_packed(base: Path, tmp_path: Path, name: str) -> None:
    secret = tmp_path / "secret"
    shutil.copyfile(base / "model.safetensors", secret)
    if name == "sub":
        secret.unlink()
        secret.mkdir()
    (base / name).unlink(missing_ok=True)
    (base / name).symlink_to(secret)
    with pytest.raises(PoEError, match=r"\(a link, or no file at all\)|which does not belong|is not a regular file"):
        plan_upload(base, "me/base")


@pytest.mark.parametrize("name", ["NOTICE", "report.png", "pipe", "generation_config.json"])
def test_a_pipe_is_never_opened(base: Path, name: str) -> None:
    (base / name).unlink(missing_ok=True)
    os.mkfifo(base / name)
    with pytest.raises(PoEError, match=r"a link, or no file at all|is not a regular file"):
        plan_upload(base, "me/base")


@pytest.mark.parametrize(
    "name",
    [
        "NOTICE-1",
        "LICENSE.env",
        "model-1.safetensors",
        "model-00001-of-00002.safetensors.old",
        "readme.md",
        ".env",
        "x/NOTICE",
    ],
)
def test_only_exact_names_are_packed(base: Path, name: str) -> None:
    (base / name).parent.mkdir(exist_ok=True)
    (base / name).write_text("text")
    with pytest.raises(DeltaError, match="does not belong to a base"):
        plan_upload(base, "me/base")


def test_changed_code_beside_a_base_is_not_packed(base: Path) -> None:
    (base / "modeling_poe.py").write_text("print('mine')")
    with pytest.raises(DeltaError, match="changed, or of another version"):
        plan_upload(base, "me/base")


SECRETS = {
    "training.json": '{"environment": {"HF_TOKEN": "hf_%s"}}' % ("a" * 30),
    "README.md": "export OPENAI_API_KEY=sk-proj-" + "b" * 30,
    "NOTICE": "-----BEGIN OPENSSH PRIVATE KEY-----",
    "LICENSE": "https://me:password@example.com/data",
    "generation_config.json": '{"note": "ghp_%s"}' % ("c" * 36),
    "chat_template.jinja": "{# AKIA" + "D" * 16 + " #}",
}


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_in_a_text_file_is_refused(base: Path, name: str) -> None:
    (base / name).write_text(SECRETS[name])
    with pytest.raises(DeltaError, match=f"{name} holds what looks like a secret") as refusal:
        plan_upload(base, "me/base")
    assert SECRETS[name] not in str(refusal.value)


def test_folders_of_this_machine_are_not_published(base: Path) -> None:
    record = {
        "data": {"spec": "xlam=/home/me/private/rows.json*2,text=C:\\Users\\me\\a.txt", "sources": {"~/x/y.json": {}}},
        "url": "https://example.com/a/b",
        "share": "3/4 of and/or",
    }
    (base / "training.json").write_text(json.dumps(record))
    plan = plan_upload(base, "me/base")
    assert json.loads(plan.files["training.json"]) == {
        "data": {"spec": "xlam=rows.json*2,text=a.txt", "sources": {"y.json": {}}},
        "url": "https://example.com/a/b",
        "share": "3/4 of and/or",
    }
    assert json.loads((base / "training.json").read_text()) == record
    run = CliRunner().invoke(app, ["push", str(base), "me/base", "--dry-run"])
    assert run.exit_code == 0
    assert "training.json (changed for the Hub)" in run.output


def test_a_card_shows_what_a_record_says_and_obeys_none_of_it(saved_base, tmp_path: Path) -> None:
    cascade = Cascade.from_pretrained(saved_base("llama")).add_stage(StageConfig("t", 1, "none"))
    scramble(cascade.stages["t"])
    config = json.loads((cascade.save_stage("t", tmp_path / "t") / "config.json").read_text())
    evil = "a\n# Title\n| x | <script>![p](http://x/p.png)`\x1b[2J\u202e"
    config["prompt"] = {"name": evil, "version": evil, "stop": [evil, "\n"]}
    training = {
        "license": "mit",
        "recipe": {"name": evil, "note": "```\n# Title"},
        "steps": 1,
        "environment": {"device": evil, "versions": {evil: evil}},
        "data": {
            "sources": {evil: {"license": evil, "hub_id": None}},
            "rows": {evil: {"read": 1, "dropped": {evil: 1}}},
        },
        "evaluation": {evil: {evil: {"rows": 1}}},
    }
    card = stage_card(config, training, parameters=1)
    assert "\x1b" not in card
    assert "\u202e" not in card
    prose = card.split("---", 2)[2]
    assert not [line for line in prose.splitlines() if line.startswith("# ") and line != "# t"]
    outside = "".join(prose.replace("````", "```").split("```")[::2])
    assert "<script>" not in outside.replace(f"`` {evil}", "").split("## Ask it")[1]
    assert "![p]" not in outside.split("## Ask it")[1]
