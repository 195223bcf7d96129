"""Finish a save that was stopped halfway, so that the files of a folder are always of one save."""

import contextlib
import os
import shutil

from .failures import SourceError

COMPLETE_SAVE = ".poe-complete"  # a folder in a model's folder, with the files of a save on their way to their names


def finish_save(folder: str | os.PathLike[str]) -> None:
    """Move the files of a save that was complete on the disk, but was stopped while its files took their names.

    Raises `SourceError` if they cannot be moved, or if a link would lead them to another folder: a stranger can make a
    folder that looks like an interrupted save.
    """
    complete = os.path.join(folder, COMPLETE_SAVE)
    _check_no_link(complete)
    if not os.path.isdir(complete):
        return
    try:
        for where, _, names in os.walk(complete):
            target = os.path.normpath(os.path.join(folder, inner := os.path.relpath(where, complete)))
            if inner != os.curdir:
                _check_no_link(target)
            os.makedirs(target, exist_ok=True)
            # Weights move last: once they are in place, the files that belong to them are there too.
            for name in sorted(names, key=lambda name: name.endswith(".safetensors")):
                with contextlib.suppress(FileNotFoundError):  # another process is finishing the same save
                    os.replace(os.path.join(where, name), os.path.join(target, name))
    except SourceError:
        raise
    except OSError as error:
        raise SourceError(
            f"{folder} holds a save that was interrupted, and it cannot be finished: {error.strerror}. Open the folder "
            "once with permission to write there."
        ) from error
    shutil.rmtree(complete, ignore_errors=True)


def _check_no_link(path: str) -> None:
    if os.path.islink(path):
        raise SourceError(f"{path} is a link: expected a folder with files of a save that was interrupted. Remove it.")
