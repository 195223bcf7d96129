"""Names that users type become places: folders, Hub repositories, and the base inside this package."""

import os
from pathlib import Path

from poe.errors import SourceError
from poe.modeling.opening import absolute

EMBEDDED_BASE = Path(__file__).parents[1] / "assets" / "demo"


def place(repo: str | os.PathLike[str]) -> str:
    """Return a folder's absolute path, the embedded base's for "demo", or a Hub name as it is."""
    where = os.path.expanduser(os.fspath(repo))
    if where == "demo" and not os.path.isdir(where):
        if not embedded_folders():
            raise SourceError(f"The embedded base is missing from this installation: expected {EMBEDDED_BASE}.")
        return str(EMBEDDED_BASE)
    return absolute(where)


def embedded_folders() -> list[str]:
    """Return the folders in which a base may lie that a stage's own path does not lead to."""
    return [str(EMBEDDED_BASE)] if (EMBEDDED_BASE / "config.json").is_file() else []
