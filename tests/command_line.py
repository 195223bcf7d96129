"""Run `poe` and `poe-train` inside the process of the tests, with the exit code and the output of the real programs.

A process of its own imports torch and transformers again, which takes seconds. Tests that kill, interrupt or limit a
process start a real one.
"""

import contextlib
import importlib
import io
import json
import logging
import os
import subprocess
import sys
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from poe.commands import app

MODULES = {"poe": "poe.commands.poe", "poe-train": "poe.commands.train"}


def run_program(
    program: str,
    *arguments: str | Path,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    columns: int = 80,
) -> subprocess.CompletedProcess[str]:
    """Call the main function of `program` on a terminal of `columns`; return its exit code and what it printed."""
    main = importlib.import_module(MODULES[program]).main
    words = [program, *map(str, arguments)]
    stdout, stderr = io.StringIO(), io.StringIO()
    hub_logger = logging.getLogger("huggingface_hub")
    level = hub_logger.level
    with (
        mock.patch.dict(os.environ, environment or {}),
        mock.patch.object(sys, "argv", words),
        mock.patch.object(app.out, "_width", columns),
        mock.patch.object(app.err, "_width", columns),
        mock.patch.object(sys, "excepthook", sys.excepthook),
        contextlib.chdir(cwd or Path.cwd()),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
        warnings.catch_warnings(),
    ):
        try:
            code = main()
        except SystemExit as end:
            code = end.code
        except Exception:  # what the interpreter does with an error that nothing catches
            traceback.print_exc()
            code = 1
        finally:
            hub_logger.setLevel(level)
    return subprocess.CompletedProcess(words, int(code or 0), stdout.getvalue(), stderr.getvalue())


def run_stranger(code: str, job: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> Any:
    """Run code in a process of its own, with `job` as JSON on its standard input; return the JSON that it prints."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)
