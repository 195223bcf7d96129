"""Writing folders so that a crash, a full disk or a missing permission leaves what was there before."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from poe.errors import OutputError


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder`; what is written there becomes its content when the block ends.

    If `folder` is new it appears whole. If it exists, each file written replaces its namesake whole, and files of
    other names stay. An `OSError` inside becomes `OutputError` and leaves `folder` as it was.
    """
    temporary: Path | None = None
    try:
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"{folder} is a file: expected a folder, or a name that is free.")
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-", suffix=".part"))
        yield temporary
        _flush(temporary)
        _publish(temporary, folder)
    except OutputError:
        raise
    except Exception as error:
        # The Rust writers (safetensors, tokenizers) raise types of their own for what is an OSError.
        if isinstance(error, OSError) or "os error" in str(error):
            raise OutputError(
                f"{folder} could not be written: {error}. What was there before is unchanged; free some space or "
                "choose another folder."
            ) from error
        raise
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _publish(temporary: Path, folder: Path) -> None:
    if not folder.exists():
        temporary.chmod(0o755)
        temporary.rename(folder)
        return
    # The weights last: a folder in which they are new has everything else that belongs to them.
    files = sorted((path for path in temporary.rglob("*") if path.is_file()), key=lambda p: p.suffix == ".safetensors")
    for path in files:
        target = folder / path.relative_to(temporary)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)
