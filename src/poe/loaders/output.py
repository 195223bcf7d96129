"""Write folders atomically: a crash, a full disk or a missing permission leaves the previous content."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from poe.errors import OutputError


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty temporary folder; when the block ends, its files move to `folder`.

    A new `folder` appears complete. In an existing one each written file replaces the file of the same name, and all
    other files stay. An `OSError` inside the block becomes `OutputError` and leaves `folder` unchanged.
    """
    temporary: Path | None = None
    try:
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"{folder} is a file: expected a folder or an unused name.")
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-", suffix=".part"))
        yield temporary
        _flush_files(temporary)
        _move_files(temporary, folder)
    except OutputError:
        raise
    except Exception as error:
        # The Rust writers (safetensors, tokenizers) report an OSError as a type of their own.
        if isinstance(error, OSError) or "os error" in str(error):
            raise OutputError(
                f"{folder} could not be written: {error}. Its previous content is unchanged; free some space or "
                "choose another folder."
            ) from error
        raise
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _flush_files(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _move_files(temporary: Path, folder: Path) -> None:
    if not folder.exists():
        temporary.chmod(0o755)
        temporary.rename(folder)
        return
    # Weights move last: once they are in place, the files that belong to them are there too.
    files = sorted((path for path in temporary.rglob("*") if path.is_file()), key=lambda p: p.suffix == ".safetensors")
    for path in files:
        target = folder / path.relative_to(temporary)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)
