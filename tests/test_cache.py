"""The cache of prepared rows and hidden states: damaged folders are made again, and no other user may write."""

import json
import os
import stat
from pathlib import Path

import pytest

from poe.data import cache, corpus
from poe.data.cache import cache_root, cached_folder
from poe.data.drops import DropReport
from poe.errors import DataError, OutputError
from poe.files.lock import hold
from poe.stages import Recipe

CONTENT = b"tokens" * 100


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POE_CACHE", str(tmp_path / "cache"))


def make(folder: Path) -> dict:
    (folder / "train").mkdir()
    (folder / "train" / "tokens.bin").write_bytes(CONTENT)
    (folder / "stats.json").write_text("{}")
    return {"rows": 3}


def zero(folder: Path) -> None:
    """Damage the tokens without changing the size or the times of the file."""
    path = folder / "train" / "tokens.bin"
    before = path.stat()
    path.write_bytes(CONTENT[:100] + bytes(400) + CONTENT[500:])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def change_marker(folder: Path) -> None:
    (folder / "complete.json").write_text(json.dumps({"rows": 3}))


DAMAGES = {
    "a missing marker": lambda folder: (folder / "complete.json").unlink(),
    "an empty marker": lambda folder: (folder / "complete.json").write_bytes(b""),
    "a marker of zeros": lambda folder: (folder / "complete.json").write_bytes(bytes(80)),
    "a marker that is a list": lambda folder: (folder / "complete.json").write_text("[]"),
    "a marker without a manifest": change_marker,
    "zeroed bytes": zero,
    "a truncated file": lambda folder: os.truncate(folder / "train" / "tokens.bin", 17),
    "a missing file": lambda folder: (folder / "stats.json").unlink(),
    "an extra file": lambda folder: (folder / "extra").write_text("mine"),
    "a link": lambda folder: ((folder / "stats.json").unlink(), (folder / "stats.json").symlink_to("/etc/hostname")),
    "no permission": lambda folder: ((folder / "train").chmod(0), folder.chmod(0)),
    "a file in its place": lambda folder: (folder.rename(folder.with_name("x")), folder.write_text("mine")),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_folder_is_made_again(damage) -> None:
    folder, result = cached_folder("packed", "key", make)
    damage(folder)
    made: list[Path] = []
    for _ in range(2):
        assert cached_folder("packed", "key", lambda scratch: made.append(scratch) or make(scratch)) == (folder, result)
        assert (folder / "train" / "tokens.bin").read_bytes() == CONTENT
    assert len(made) == (0 if damage is DAMAGES["no permission"] and os.geteuid() == 0 else 1)
    assert not list(folder.parent.glob(".poe-*"))


def test_the_marker_is_written_when_everything_else_is_on_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []
    real = cache.flush

    def flush(path: Path, **options) -> None:
        flushed.append(f"{path.name if path.name.endswith('.json') else 'folder'}, {(path / 'complete.json').exists()}")
        real(path, **options)

    monkeypatch.setattr(cache, "flush", flush)
    cached_folder("packed", "key", make)
    assert flushed == ["folder, False", "complete.json, False", "folder, False"]


def test_folders_are_private_to_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = cached_folder("hidden/states", "key", make)
    for path in (folder, *folder.parents[:3]):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700, path
    folder.parent.chmod(0o777)
    cached_folder("hidden/states", "key", make)
    assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(OutputError, match=r"belongs to another user.*POE_CACHE"):
        cached_folder("hidden/states", "key", make)


def test_the_folder_that_holds_the_cache_keeps_its_permissions(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir(mode=0o755)
    cached_folder("packed", "key", make)
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o755


def test_scratch_folders_of_killed_processes_are_removed() -> None:
    folder, _ = cached_folder("packed", "key", make)
    for name in ("dead", "used"):
        (folder.parent / f".poe-{name}.part" / "train").mkdir(parents=True)
    with hold(folder.parent / ".poe-used.part"):
        cached_folder("packed", "other", make)
    assert sorted(path.name for path in folder.parent.iterdir()) == [".poe-used.part", "key", "other"]


def write(path: Path, word: str) -> Path:
    rows = [{"messages": [{"role": "user", "content": f"{word} {n}"}, {"role": "assistant", "content": word}]}
            for n in range(40)]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def exchange(path: Path) -> None:
    """Write other rows of the same size, and set the old time of modification."""
    before = path.stat()
    write(path, "bad!")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("role", ["data", "eval_data"])
@pytest.mark.parametrize("change_back", [False, True])
def test_a_file_that_changes_between_its_digest_and_its_reading_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: str, change_back: bool
) -> None:
    """The rows of one content must never be found under the digest of another."""
    files = {name: write(tmp_path / f"{name}.jsonl", "good") for name in ("data", "eval_data")}
    recipe = Recipe(name="r", data=f"messages={files['data']}", eval_data=f"messages={files['eval_data']}")
    real = corpus.read_source

    def read_changed(source, report):
        if source.path == str(files[role]):
            exchange(files[role])
        yield from real(source, report)
        if change_back and source.path == str(files[role]):
            write(files[role], "good")

    with monkeypatch.context() as patch:
        patch.setattr(corpus, "read_source", read_changed)
        with pytest.raises(DataError, match=rf"{role}\.jsonl changed while it was being read"):
            corpus.read_corpus(recipe, DropReport())
    assert not list((cache_root() / "rows").iterdir())
    write(files[role], "good")
    rows = corpus.read_corpus(recipe, DropReport()).rows
    assert {row.messages[-1]["content"] for row in rows} == {"good"}
