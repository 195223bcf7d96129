"""Where results are written: a scratch folder inside the target, one lock, a save that is whole or not there."""

import contextlib
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import mostly_slow
from poe.errors import OutputError
from poe.files.lock import hold, is_held
from poe.files.output import (
    LOCK,
    atomic_file,
    atomic_folder,
    check_output_file,
    check_output_folder,
    locked_folder,
    write_file,
)
from poe.modeling import saves


@pytest.fixture
def other_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that behaves like a mount point: nothing can be renamed into it from outside, or out of it."""
    target = tmp_path / "mounted"
    target.mkdir()

    def guard(function):
        def rename(source, destination, *args, **kwargs):
            if (target in Path(source).parents) != (target in Path(destination).parents):
                raise OSError(errno.EXDEV, "Invalid cross-device link")
            if target in (Path(source), Path(destination)):
                raise OSError(errno.EBUSY, "Device or resource busy")
            return function(source, destination, *args, **kwargs)

        return rename

    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, guard(getattr(os, name)))
    return target


def files_of(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_on_another_disk_than_its_parent_can_be_written(other_disk: Path) -> None:
    check_output_folder(other_disk)
    with atomic_folder(other_disk) as scratch:
        (scratch / "a").write_text("1")
    assert files_of(other_disk) == {"a": "1"}


def test_a_link_to_another_disk_can_be_written(other_disk: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(other_disk)
    with atomic_folder(tmp_path / "link") as scratch:
        (scratch / "sub").mkdir()
        (scratch / "sub" / "a").write_text("1")
    assert files_of(other_disk) == {"sub/a": "1"}
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EIO])
def test_a_folder_that_cannot_be_written_is_found_before_any_work(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", refuse)
        for check in (check_output_folder, lambda path: check_output_file(path / "file")):
            with pytest.raises(OutputError, match=os.strerror(number)):
                check(tmp_path / "new" / "run")
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_way_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for target in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(OutputError, match=f"{tmp_path / 'file'} is a file"):
            check_output_folder(target)
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    with pytest.raises(OutputError, match="is a link to a folder that does not exist"):
        check_output_folder(tmp_path / "nowhere")
    (tmp_path / "run" / "a").mkdir(parents=True)
    with pytest.raises(OutputError, match="run/a is in the way"), atomic_folder(tmp_path / "run") as scratch:
        (scratch / "a").write_text("1")
    assert list((tmp_path / "run").iterdir()) == [tmp_path / "run" / "a"]


def test_a_folder_in_the_way_of_a_file_is_named(tmp_path: Path) -> None:
    for write in (check_output_file, lambda path: write_file(path, "text")):
        with pytest.raises(OutputError, match="is a folder"):
            write(tmp_path)
        with pytest.raises(OutputError, match="/dev/null is a device"):
            write(Path("/dev/null"))


def test_a_link_is_not_taken_for_a_lock_or_replaced_by_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).symlink_to(tmp_path / "mine")
    with pytest.raises(OutputError, match="could not be written"):
        check_output_folder(tmp_path / "run")
    assert (tmp_path / "mine").read_text() == "mine"
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    write_file(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "mine").read_text() == "new"


def fail_to_write(target: Path) -> None:
    target.write_text("new")
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_failed_save_leaves_the_previous_files_and_nothing_beside_them(tmp_path: Path) -> None:
    write_file(tmp_path / "run" / "a", "old")
    with pytest.raises(OutputError, match="No space"), atomic_folder(tmp_path / "run") as scratch:
        fail_to_write(scratch / "a")
    with pytest.raises(OutputError, match="No space"), atomic_file(tmp_path / "run" / "a") as part:
        fail_to_write(part)
    assert files_of(tmp_path / "run") == {"a": "old"}


@pytest.mark.parametrize("moves", mostly_slow(range(4), [2]))
def test_a_save_that_is_killed_while_its_files_move_is_finished_later(
    moves: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever file was the last to move, the folder is opened with all files of one save."""
    for name in ("a.json", "b.json", "c.safetensors"):
        write_file(tmp_path / name, "old")
    replace, left = os.replace, [moves]

    def stop_after(source, destination):
        if saves.COMPLETE_SAVE in str(source):
            if not left[0]:
                raise SystemExit
            left[0] -= 1
        replace(source, destination)

    with monkeypatch.context() as patched, contextlib.suppress(SystemExit):
        patched.setattr(os, "replace", stop_after)
        with atomic_folder(tmp_path) as scratch:
            for name in ("a.json", "b.json", "c.safetensors"):
                (scratch / name).write_text("new")
    saves.finish_save(tmp_path)
    assert files_of(tmp_path) == dict.fromkeys(("a.json", "b.json", "c.safetensors"), "new")


def test_what_killed_writers_left_is_removed_and_what_others_use_stays(tmp_path: Path) -> None:
    (tmp_path / ".poe-dead.part").mkdir()
    (tmp_path / ".poe-dead.part" / "delta").write_text("half")
    (tmp_path / ".poe-dead-file.part").write_text("half")
    (tmp_path / ".poe-used.part").mkdir()
    with hold(tmp_path / ".poe-used.part"):
        check_output_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".poe-used.part"]


HOLDER = """
import sys, time
from pathlib import Path
from poe.files.output import locked_folder
with locked_folder(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_two_processes_do_not_write_one_folder_and_a_killed_one_does_not_keep_it(tmp_path: Path) -> None:
    """The message names the holder. The lock file of a killed holder stays, and locks nothing."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(OutputError, match=rf"in use by process {process.pid} on .*, since \d{{4}}-"):
            check_output_folder(tmp_path)
    finally:
        process.kill()
        process.wait()
    assert (tmp_path / LOCK).is_file()
    check_output_folder(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_text_of_a_lock_file_locks_nothing(tmp_path: Path) -> None:
    """Neither a process id that is used again nor one of another host."""
    (tmp_path / LOCK).write_text(f"process {os.getpid()} on this-host")
    check_output_folder(tmp_path)


def test_a_thread_may_lock_its_folder_twice_and_a_forked_worker_does_not_keep_the_lock(tmp_path: Path) -> None:
    with locked_folder(tmp_path), locked_folder(tmp_path):
        if not (child := os.fork()):
            os.kill(os.getpid(), 19)  # SIGSTOP: it outlives the block below
        os.waitpid(child, os.WUNTRACED)
    try:
        assert not is_held(tmp_path / LOCK)
        check_output_folder(tmp_path)
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
