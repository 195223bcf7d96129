"""Stage folders, exports and bases carry tokenizer files that transformers 4 and 5 read, the base's own if they can."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from conftest import tiny_base, tiny_tokenizer
from poe import Cascade
from poe.loaders.base import save_base_folder

TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}"


@pytest.fixture
def base(saved_base, tmp_path: Path) -> Path:
    """A base with the tokenizer files of another program: fields and formatting that transformers 5 would not write."""
    folder = Path(shutil.copytree(saved_base(), tmp_path / "base"))
    (folder / "chat_template.jinja").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE, "made_by": "another program"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, separators=(" ,", ": ")))
    (folder / "special_tokens_map.json").write_text('{"bos_token":"<bos>"}')
    (folder / "tokenizer.json").write_text(json.dumps(json.loads((folder / "tokenizer.json").read_text())))
    return folder


def write_all(cascade: Cascade, folder: Path) -> list[Path]:
    """Write a new stage as a stage folder and as an export."""
    cascade.add_stage(name="t", num_layers=1, head="none")
    return [cascade.save_stage("t", folder / "stage"), cascade.export_native("t", folder / "native")]


def test_an_unchanged_tokenizer_keeps_the_files_of_the_base(base: Path, tmp_path: Path) -> None:
    cascade = Cascade.from_pretrained(base)
    cascade.tokenizer(["w5", "w5 w6"], padding=True, truncation=True, max_length=4)  # this too is stored in its state
    written = write_all(cascade, tmp_path)
    again = Cascade.from_pretrained(written[0])
    for folder in [*written, again.save_stage("t", tmp_path / "again")]:
        names = {path.name for path in folder.iterdir()}
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            assert (folder / name).read_bytes() == (base / name).read_bytes(), (folder, name)
        assert "chat_template.jinja" not in names
        assert AutoTokenizer.from_pretrained(folder).chat_template == TEMPLATE


def test_a_changed_chat_template_alone_replaces_that_of_the_base(base: Path, tmp_path: Path) -> None:
    cascade = Cascade.from_pretrained(base)
    cascade.tokenizer.chat_template = "mine"
    for folder in write_all(cascade, tmp_path):
        assert (folder / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
        assert (folder / "chat_template.jinja").read_text() == "mine"
        config = json.loads((folder / "tokenizer_config.json").read_text())
        assert config["made_by"] == "another program"
        assert "chat_template" not in config


def test_a_changed_tokenizer_is_written_in_words_that_older_readers_understand(base: Path, tmp_path: Path) -> None:
    cascade = Cascade.from_pretrained(base)
    cascade.tokenizer.add_special_tokens({"extra_special_tokens": ["<more>"]})
    memory = Cascade(tiny_base(), tiny_tokenizer())
    memory.tokenizer.add_special_tokens({"extra_special_tokens": ["<more>"]})
    for changed, place in ((cascade, tmp_path / "a"), (memory, tmp_path / "b")):
        folders = [*write_all(changed, place), save_base_folder(changed.base, place / "base", changed.tokenizer)]
        for folder in folders:
            config = json.loads((folder / "tokenizer_config.json").read_text())
            assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
            assert config["additional_special_tokens"] == ["<more>"]
            assert "extra_special_tokens" not in config
            again = AutoTokenizer.from_pretrained(folder)
            assert again.extra_special_tokens == ["<more>"]
            assert again("w5 <more>").input_ids == changed.tokenizer("w5 <more>").input_ids
            assert again.chat_template == changed.tokenizer.chat_template
