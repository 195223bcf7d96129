"""Write results: every folder and every file that a command leaves behind is written here.

A result is written under a temporary name in its own folder, flushed to the disk, and renamed. So a mount point, a link
to another disk, and a folder with a parent that cannot be written are like any other folder, and a process that is
killed leaves the previous content. What it leaves beside it (`.poe-*`) is removed by the next writer.
"""

import contextlib
import errno
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from poe.errors import OutputError, PoEError
from poe.files.lock import hold, is_held
from poe.modeling.saves import COMPLETE_SAVE, finish_save

OWN_FILES = ".poe-*"  # temporary files and locks; they are no part of a result
LOCK = ".poe-lock"
_PREFIX, _SUFFIX = ".poe-", ".part"
_owners: dict[str, int] = {}  # the thread of this process that has locked a folder
_ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free some space, or choose another place"),
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM, errno.EROFS), "choose a place where you may write, or change its permissions"
    ),
}


def check_output_folder(folder: Path) -> None:
    """Raise `OutputError` unless results can be written into `folder`, which need not exist. Nothing stays behind.

    It does what a save will do: make the folder, lock it, write and flush a file, and rename it.
    """
    with locked_folder(folder):
        pass


def check_output_file(path: Path) -> None:
    """Raise `OutputError` unless a file can be written at `path`. Nothing stays behind."""
    path = _find_file(path)
    made = _make_folder(path.parent)
    try:
        with convert_os_errors(path):
            _try_to_write(path.parent)
    finally:
        _remove_empty(made)


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[Path]:
    """Make `folder`, lock it for the block, remove what killed writers left in it, and yield its absolute path.

    Raises `OutputError` if it cannot be written, or if another process or thread has locked it. A thread may lock a
    folder again that it has locked. At the end, folders that were made here and are empty are removed.
    """
    folder = folder.expanduser().absolute()
    key = os.path.realpath(folder)
    if _owners.get(key) == threading.get_ident():
        yield folder
        return
    made = _make_folder(folder)
    try:
        with contextlib.ExitStack() as stack:
            with convert_os_errors(folder):
                _lock(folder, stack)
                _owners[key] = threading.get_ident()
                stack.callback(_owners.pop, key)
                finish_save(folder)
                sweep(folder)
                _try_to_write(folder)
            yield folder
    finally:
        _remove_empty(made)


def sweep(folder: Path) -> None:
    """Remove the temporary files and folders that killed processes left in `folder`. Those in use stay."""
    for path in folder.glob(f"{_PREFIX}*{_SUFFIX}"):
        with contextlib.suppress(OSError):
            if not is_held(path):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty temporary folder; when the block ends, its files move to `folder`.

    Each written file replaces the file of the same name, and all other files stay. All files are on the disk before the
    first one moves, and a move that is interrupted is finished when the folder is opened or written again. An `OSError`
    inside the block becomes `OutputError` and leaves `folder` unchanged.
    """
    with locked_folder(folder) as target, convert_os_errors(target), scratch_folder(target) as temporary:
        yield temporary
        for path in temporary.rglob("*"):
            place = target / path.relative_to(temporary)
            if place.is_dir() != path.is_dir() and place.exists():
                raise OutputError(f"{place} is in the way: expected no {'folder' if place.is_dir() else 'file'} there.")
        flush(temporary)
        try:
            temporary.rename(target / COMPLETE_SAVE)
            flush(target, recursive=False)
        except OSError:
            shutil.rmtree(target / COMPLETE_SAVE, ignore_errors=True)
            raise
        finish_save(target)  # from here on the save is complete, and a reader finishes it if this process cannot


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends, the file written there takes the name `path`.

    An `OSError` inside the block becomes `OutputError` and leaves the previous file.
    """
    path = _find_file(path)
    made = _make_folder(path.parent)
    temporary = None
    try:
        with convert_os_errors(path):
            sweep(path.parent)
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=_PREFIX, suffix=f"{_SUFFIX}{path.suffix}")
            os.close(handle)
            temporary = Path(name)
            with hold(temporary):
                yield temporary
                temporary.chmod(0o666 & ~_umask())
                flush(temporary)
                temporary.replace(path)
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        _remove_empty(made)


def write_file(path: Path, content: str | bytes) -> None:
    """Write a whole file at once, see `atomic_file`. Text is UTF-8. Raises `OutputError`."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)


@contextlib.contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """Make a temporary folder in `parent` and hold it; remove it at the end unless it was renamed."""
    temporary = Path(tempfile.mkdtemp(dir=parent, prefix=_PREFIX, suffix=_SUFFIX))
    try:
        with hold(temporary):
            yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def flush(path: Path, *, recursive: bool = True) -> None:
    """Wait until a file, or a folder and its files, are on the disk."""
    if recursive and path.is_dir():
        for inner in path.rglob("*"):
            flush(inner, recursive=False)
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def convert_os_errors(target: Path) -> Iterator[None]:
    """Raise `OutputError`, with advice, for an error of the operating system while `target` is written."""
    try:
        yield
    except PoEError:
        raise
    except Exception as error:
        if is_os_error(error):
            raise write_error(target, error) from error
        raise


def is_os_error(error: BaseException) -> bool:
    """Return whether the operating system refused. The Rust writers (safetensors, tokenizers) have their own types."""
    return isinstance(error, OSError) or "os error" in str(error)


def write_error(target: Path, error: Exception) -> OutputError:
    """Return the error for a `target` that could not be written, with the reason and advice."""
    number = error.errno if isinstance(error, OSError) else None
    reason = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
    advice = _ADVICE.get(number or 0, "choose another place")
    return OutputError(f"{target} could not be written: {reason}. Its previous content is unchanged; {advice}.")


def _lock(folder: Path, stack: contextlib.ExitStack) -> None:
    """Lock a folder until `stack` closes. Raises `OutputError` that names the holder."""
    path = folder / LOCK
    while True:
        attempt = contextlib.ExitStack()
        try:
            handle = attempt.enter_context(hold(path, create=True))
        except BlockingIOError:
            raise OutputError(
                f"{folder} is in use by {_read_holder(path)}: wait until it ends, or choose another folder."
            ) from None
        # The holder before removes the file when it ends: this lock may be on a file that has no name any more.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(handle)):
                break
        attempt.close()
    stack.push(attempt.pop_all())
    stack.callback(path.unlink, missing_ok=True)
    holder = f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"
    os.ftruncate(handle, 0)
    os.pwrite(handle, holder.encode(), 0)


def _read_holder(path: Path) -> str:
    with contextlib.suppress(OSError):
        text = path.read_bytes()[:200].decode("utf-8", "replace")
        return "".join(c if c.isprintable() else "?" for c in text) or "another process"
    return "another process"


def _find_file(path: Path) -> Path:
    """Return the place of a file, behind links. Raises `OutputError` for a folder or a device, such as /dev/null."""
    path = Path(os.path.realpath(path.expanduser()))
    if path.exists() and not path.is_file():
        raise OutputError(f"{path} is a {'folder' if path.is_dir() else 'device'}: expected the name of a file.")
    return path


def _make_folder(folder: Path) -> list[Path]:
    """Make a folder and its parents, and return those that were made, the innermost first. Raises `OutputError`."""
    missing: list[Path] = []
    for path in (folder, *folder.parents):
        if path.exists():
            break
        missing.append(path)
    existing = path
    if not existing.is_dir():
        expected = "a folder or an unused name" if existing == folder else "a folder"
        raise OutputError(f"{existing} is a file: expected {expected}.")
    made: list[Path] = []
    try:
        for path in reversed(missing):
            if path.is_symlink():
                raise OutputError(f"{path} is a link to a folder that does not exist: make it, or remove the link.")
            path.mkdir(exist_ok=True)
            made.insert(0, path)
    except OSError as error:
        _remove_empty(made)
        if isinstance(error, OutputError):
            raise
        raise write_error(folder, error) from error
    return made


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:  # it has a result in it
            return


def _try_to_write(folder: Path) -> None:
    """Write, flush, and rename a file in a folder, as a save does, and remove it. Raises `OSError`."""
    with scratch_folder(folder) as temporary:
        file, moved = temporary / "probe", folder / f"{temporary.name}.probe{_SUFFIX}"
        file.write_bytes(b"\0")
        flush(file)
        file.replace(moved)
        moved.unlink()


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
