"""A wrong input gets one message that names the remedy, before time is spent, and leaves nothing on disk."""

import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from conftest import mostly_slow
from poe.commands import poe as poe_program
from poe.commands import train as train_program
from poe.errors import PoEError
from wrong_inputs import CASES, WrongInput, list_files, make_files

QUICK = [case for case in CASES if case.exit_code == 2 or "--device" in case.command or "jsonl" in case.command]


@pytest.mark.parametrize("case", mostly_slow(CASES, QUICK), ids=lambda case: case.command)
def test_a_wrong_input_gets_one_message_and_leaves_nothing(
    case: WrongInput, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    before = list_files(tmp_path)
    program, *arguments = shlex.split(case.command)
    app = train_program.app if program == "poe-train" else poe_program.app
    run = CliRunner().invoke(app, arguments)
    if run.exception is not None and not isinstance(run.exception, SystemExit):
        assert isinstance(run.exception, PoEError), run.exception
        assert case.exit_code == 1
        assert case.message in str(run.exception)
    else:
        assert run.exit_code == case.exit_code
        assert case.message in " ".join(run.output.split())
    assert list_files(tmp_path) == before


def test_there_are_forty_cases() -> None:
    assert len({case.command for case in CASES}) >= 40
