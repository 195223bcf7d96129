"""bfcl-eval with the packages that it needs to score, in a folder of the cache, and its processes.

The folder is made once and needs no network after that. Nothing of it is imported here: its packages are pinned to
versions that other packages do not want.
"""

import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from poe.data.cache import cached_folder
from poe.errors import EvaluationError, printable
from poe.evaluation import bfcl_command

BFCL = "bfcl-eval==2026.3.23"
PACKAGES = (
    *(BFCL, "filelock==3.20.0", "numpy==1.26.4", "tree-sitter==0.21.3"),  # as bfcl-eval pins them
    *("tree-sitter-java==0.21.0", "tree-sitter-javascript==0.21.4"),
    *("overrides==7.7.0", "python-dotenv==1.0.1", "tabulate==0.9.0", "tenacity==9.1.2", "tqdm==4.67.1"),
    *("pandas==2.2.3", "python-dateutil==2.9.0.post0", "pytz==2025.2", "six==1.17.0", "tzdata==2025.2"),
    *("typer==0.15.4", "click==8.1.8", "shellingham==1.5.4", "typing-extensions==4.14.1"),
)
MODEL = "poe"


@cache
def install_packages() -> Path:
    """Return the folder of bfcl-eval and what it needs to score. It is made at the first call.

    Raises `EvaluationError` if pip cannot install them.
    """
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    key = hashlib.sha256(" ".join([python, sys.platform, *PACKAGES]).encode()).hexdigest()[:16]
    return cached_folder("bfcl", f"{python}-{key}", _install)[0]


def _install(folder: Path) -> dict[str, Any]:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--retries", "2"]
    done = _run([*pip, "install", "--quiet", "--no-deps", "--target", str(folder), *PACKAGES])
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        reason = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1])
        raise EvaluationError(
            f"BFCL is scored by {BFCL} in a folder of its own, and pip could not install it: "
            f"{printable(reason, 200)}. It is needed once, from a package index and for Python 3.11 or 3.12. Without a "
            "network, make a folder of wheels elsewhere and set PIP_NO_INDEX=1 and PIP_FIND_LINKS=FOLDER: "
            f"pip download --no-deps -d FOLDER {' '.join(PACKAGES)}"
        )
    return {"packages": list(PACKAGES)}


def run_bfcl(folder: Path, *arguments: str) -> str:
    """Run the command line of bfcl-eval with `folder` as its project, and return what it prints.

    Raises `EvaluationError` with its last line if it fails.
    """
    python = [sys.executable, "-I", "-S", "-B", "-X", "utf8"]
    script = [*python, bfcl_command.__file__, str(install_packages()), MODEL]
    done = _run([*script, *arguments], BFCL_PROJECT_ROOT=str(folder.absolute()))
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise EvaluationError(f"{BFCL} failed at {' '.join(arguments[:1])}: {printable(last, 300)}.")
    return done.stdout


def _run(command: Sequence[str], **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8", check=False)
