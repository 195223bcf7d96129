"""Tokenizers that cannot be used are refused with the reason, by every command, before time is spent."""

import json
import os
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import AddedToken, PreTrainedTokenizerFast

from command_line import run_program
from conftest import mostly_slow, tiny_base, tiny_tokenizer
from poe import Cascade
from poe.data.encoding import TextEncoder
from poe.errors import DataError, TokenizerError
from poe.loaders.tokenizer import check_tokenizer, load_tokenizer
from poe.training.trainer import train_stage

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 12\n"
TOOLS = Path(__file__).parents[1] / "examples" / "tools.json"


def edit(name, change):
    def act(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return act


def write(name, text):
    return lambda folder: (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def replace_with(make):
    def act(folder: Path) -> None:
        (folder / "tokenizer.json").unlink()
        make(folder / "tokenizer.json")

    return act


# what is broken -> (how, a part of the message)
BROKEN = {
    "unknown model": (edit("tokenizer.json", lambda c: c["model"].update(type="Mystery")), "does not know"),
    "unknown normalizer": (edit("tokenizer.json", lambda c: c.update(normalizer={"type": "X"})), "does not know"),
    "LFS pointer": (write("tokenizer.json", LFS), "tokenizer.json is a Git LFS pointer"),
    "LFS settings": (write("tokenizer_config.json", LFS), "tokenizer_config.json is a Git LFS pointer"),
    "truncated": (write("tokenizer.json", '{"model": {"type'), "tokenizer.json is not JSON"),
    "empty": (write("tokenizer.json", ""), "tokenizer.json is empty"),
    "list": (write("tokenizer.json", "[]"), "not a JSON object but a list"),
    "object": (write("tokenizer.json", "{}"), "describes no tokenizer"),
    "binary": (write("tokenizer.json", b"\xff\xfe\x00"), "tokenizer.json is not JSON"),
    "deep": (write("tokenizer.json", "[" * 200_000), "tokenizer.json is not JSON"),
    "wrong type": (edit("tokenizer.json", lambda c: c.update(added_tokens=[{"id": "x"}])), "cannot be used"),
    "folder": (replace_with(Path.mkdir), "not a regular file"),
    "FIFO": (replace_with(os.mkfifo), "not a regular file"),
    "dead link": (replace_with(lambda path: path.symlink_to("nowhere")), "a link to a file that does not exist"),
    "settings list": (write("tokenizer_config.json", "[]"), "not a JSON object but a list"),
    "special number": (edit("tokenizer_config.json", lambda c: c.update(eos_token=5)), "cannot be used"),
    "template bytes": (write("chat_template.jinja", b"\xff\xff"), "cannot be used"),
    "no settings": (lambda folder: (folder / "tokenizer_config.json").unlink(), "encodes text to nothing"),
}


def copy_base(saved_base, tmp_path: Path, change=None) -> Path:
    folder = Path(shutil.copytree(saved_base("qwen3"), tmp_path / "base"))
    if change is not None:
        change(folder)
    return folder


QUICK = ["unknown model", "LFS pointer", "list", "FIFO", "no settings"]


@pytest.mark.parametrize("what", mostly_slow(BROKEN, QUICK))
def test_broken_tokenizer_files_are_named_with_the_reason(saved_base, tmp_path: Path, what: str) -> None:
    change, reason = BROKEN[what]
    folder = copy_base(saved_base, tmp_path, change)
    with pytest.raises(TokenizerError, match=reason) as error:
        load_tokenizer(str(folder))
    assert str(folder) in str(error.value)
    assert len(str(error.value)) < 900
    with pytest.raises(TokenizerError, match=reason):
        Cascade.from_pretrained(folder)


def commands(folder: Path, tmp_path: Path) -> dict[str, list[str]]:
    return {
        "generate": ["poe", "generate", str(folder), "w5 w6"],
        "call": ["poe", "call", str(folder), "w5", "--tools", str(TOOLS)],
        "calibrate": ["poe", "calibrate", str(folder), "--out", str(tmp_path / "depth.json")],
        "show": ["poe", "data", "show", "demo=2", "--base", str(folder)],
        "stage": [
            "poe-train",
            "stage",
            "demo",
            "--base",
            str(folder),
            "--data",
            "demo=40",
            "--out",
            str(tmp_path / "o"),
        ],
    }


REASONS = {"unknown model": "does not know", "LFS pointer": "Git LFS pointer", "none": "has no tokenizer"}


@pytest.mark.parametrize("command", mostly_slow(["generate", "call", "calibrate", "show", "stage"], ["call", "stage"]))
@pytest.mark.parametrize("what", mostly_slow(REASONS, ["unknown model"]))
def test_every_command_refuses_an_unusable_tokenizer(saved_base, tmp_path, command, what) -> None:
    def remove_all(folder: Path) -> None:
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (folder / name).unlink()

    folder = copy_base(saved_base, tmp_path, remove_all if what == "none" else BROKEN[what][0])
    done = run_program(*commands(folder, tmp_path)[command], columns=400)
    assert done.returncode == 1
    assert REASONS[what] in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


@pytest.mark.parametrize(
    "family", mostly_slow(["qwen3", "qwen2", "gemma2", "gemma3", "cohere-tied", "llama"], ["qwen3"])
)
def test_a_base_without_tokenizer_files_has_no_tokenizer(tmp_path: Path, family: str) -> None:
    tiny_base(family).save_pretrained(tmp_path / "base")
    cascade = Cascade.from_pretrained(tmp_path / "base")
    assert cascade.tokenizer is None
    with pytest.raises(TokenizerError, match="has no tokenizer"):
        train_stage(cascade, "demo", "demo=40", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def stub(*special: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer with special tokens only, as transformers makes it without files."""
    inner = Tokenizer(models.BPE())
    inner.add_special_tokens([AddedToken(token, special=True) for token in special])
    template = "{% for m in messages %}{{ m.content }}" + special[0] + "{% endfor %}"
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=special[0], chat_template=template)


def test_a_tokenizer_that_encodes_text_to_nothing_is_refused() -> None:
    with pytest.raises(TokenizerError, match="no vocabulary besides 1 special"):
        check_tokenizer(stub("<|endoftext|>"))
    check_tokenizer(tiny_tokenizer(), 61)


def test_a_prompt_without_tokens_is_an_error() -> None:
    with pytest.raises(DataError, match="has no tokens"):
        TextEncoder(tiny_tokenizer()).encode_plain("")


@pytest.mark.parametrize("role", ["pad_token", "eos_token", "bos_token"])
def test_a_special_token_beyond_the_embedding_is_one_sentence(saved_base, tmp_path: Path, role: str) -> None:
    cascade = Cascade(tiny_base(), tiny_tokenizer())
    cascade.tokenizer.add_special_tokens({role: "[NEW]"})
    with pytest.raises(TokenizerError, match=rf"{role} '\[NEW\]' has the id 61, and the base has 61 embeddings"):
        train_stage(cascade, "demo", "demo=40", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_tokenizer_of_another_model_is_refused() -> None:
    with pytest.raises(TokenizerError, match=r"ids up to 60, and the base has 50 embeddings"):
        check_tokenizer(tiny_tokenizer(), 50)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<image_soft_token>"], special_tokens=True)  # Gemma 3 has one without an embedding
    check_tokenizer(tokenizer, 61)
