"""`poe chat`: lines of standard input, commands, calls and results; errors and interrupts keep the session."""

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from command_line import run_program
from poe.chat import Answer
from poe.errors import ToolError
from poe.tools import agent as agent_module
from test_agent import scripted

TOOLS = '''
"""Boats."""
from os import path  # not a tool


def book(person: str) -> str:
    """Book a boat.

    Args:
        person: who
    """
    return f"\\x1b[31mbooked for {person}"


def fail() -> str:
    """Fail."""
    raise RuntimeError("no boats")


def _hidden() -> str:
    return ""
'''
BOOK = [("book", {"person": "Marla"})]


@pytest.fixture
def talk(
    demo_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs `poe chat` with lines as standard input and replies in the place of the model's."""
    (tmp_path / "tools.py").write_text(TOOLS)

    def run(lines: str, *replies: Any, options: tuple[str, ...] = ("--tools", "tools.py"), stdin: Any = None) -> Any:
        policy = scripted(*replies)
        if replies:
            monkeypatch.setattr(agent_module.AgentRun, "_ask", lambda run, tools: policy(list(run.messages), tools))
        monkeypatch.setattr(sys, "stdin", stdin or io.StringIO(lines))
        return run_program("poe", "chat", demo_base, *options, cwd=tmp_path)

    return run


def test_lines_are_questions_and_calls_are_shown(talk: Callable[..., Any], tmp_path: Path) -> None:
    done = talk("Book a boat.\n\n/save talk.json\n", BOOK, "All done.", options=("--tools", "tools.py", "--yes"))
    assert (done.returncode, done.stderr) == (0, "")
    assert '-> book({"person": "Marla"})\n<- book, done: \\u001b[31mbooked for Marla\nAll done.\n' in done.stdout
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert [message["role"] for message in saved["messages"]] == ["user", "assistant", "tool", "assistant"]
    assert [tool["function"]["name"] for tool in saved["tools"]] == ["book", "fail"]


def test_the_models_text_is_printed_as_it_comes(talk: Callable[..., Any]) -> None:
    done = talk("Hello\n", options=("--max-new-tokens", "60"))  # the model itself, with random weights
    assert done.stdout.strip() or done.returncode == 1
    assert "\x1b" not in done.stdout
    assert "Traceback" not in done.stderr


def test_without_a_terminal_side_effects_need_yes(talk: Callable[..., Any]) -> None:
    done = talk("Book a boat.\n", BOOK, "Not booked.")
    assert done.returncode == 0
    assert "<- book, refused: The user refused this call." in done.stdout
    assert "only --yes runs it" in done.stderr


def test_declared_tools_are_not_run(talk: Callable[..., Any], tmp_path: Path) -> None:
    declared = {"name": "book", "description": "Book", "input_schema": {"type": "object", "properties": {}}}
    (tmp_path / "tools.json").write_text(json.dumps([declared]))
    done = talk("/tools\nBook a boat.\n", [("book", {})], "Well.", options=("--tools", "tools.json"))
    assert "book (not run): Book\n" in done.stdout
    assert "It was not run, because the tool is only declared." in done.stdout


def test_commands_and_errors_go_on_with_the_next_line(talk: Callable[..., Any], tmp_path: Path) -> None:
    lines = "/help\n/tools\nBook.\n/rest\n/save\nAgain.\n/save a.json\n/reset\n/save b.json\n/quit\nnever asked\n"
    fails = [("fail", {})]
    options = ("--tools", "tools.py", "--yes", "--system", "Be brief.")
    done = talk(lines, fails, fails, "never", options=options)
    assert done.returncode == 1
    assert "/reset       forget the conversation" in done.stdout
    assert "book: Book a boat." in done.stdout
    assert "error: Tool 'fail' failed twice with the same arguments" in done.stderr
    assert "There is no command '/rest'. Did you mean '/reset'?" in done.stderr
    assert "/save needs a file name" in done.stderr
    kept = json.loads((tmp_path / "a.json").read_text())["messages"]
    assert [message["role"] for message in kept][:6] == ["system", "user", "assistant", "tool", "assistant", "tool"]
    assert json.loads((tmp_path / "b.json").read_text())["messages"] == [{"role": "system", "content": "Be brief."}]


def test_a_question_without_an_answer_is_an_error(talk: Callable[..., Any]) -> None:
    cut = Answer("I boo", [], [], "length", "I boo", [])
    done = talk("Book.\n", cut)
    assert done.returncode == 1
    assert "got no answer: the reply was cut off, so give a larger --max-new-tokens" in done.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x = 1", "has no functions"),
        ("1 / 0", "cannot be run: ZeroDivisionError"),
        (None, "cannot be run: FileNotFound"),
    ],
)
def test_a_tools_file_that_cannot_be_used_is_one_error(
    talk: Callable[..., Any], tmp_path: Path, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "bad.py").write_text(content)
    done = talk("", options=("--tools", "bad.py"))
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_server_that_does_not_start_is_one_error_before_the_model_is_opened(talk: Callable[..., Any]) -> None:
    done = talk("Hello\n", options=("--mcp", "no-such-program-here", "--base", "/nowhere"))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: The MCP server 'no-such-program-here' cannot be used: FileNotFoundError")
    assert done.stderr.count("\n") == 1


class Person:
    """A terminal at which a person types lines and presses keys."""

    def __init__(self, *typed: Any) -> None:
        self.typed, self.seen = iter(typed), []

    def prompt(self, text: str) -> str:
        self.seen.append(text)
        key = next(self.typed, EOFError())
        if isinstance(key, BaseException):
            raise key
        return str(key)


@pytest.fixture
def sit_down(talk: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return a function that runs `poe chat` for a person."""
    import prompt_toolkit

    def run(person: Person, *replies: Any, **given: Any) -> Any:
        monkeypatch.setattr(prompt_toolkit, "PromptSession", lambda: person)
        stdin = io.StringIO()
        stdin.isatty = lambda: True  # type: ignore[method-assign]
        return talk("", *replies, stdin=stdin, **given)

    return run


def test_a_person_is_asked_before_a_call(sit_down: Callable[..., Any]) -> None:
    person = Person("Book.", "y", "Book again.", "")
    done = sit_down(person, BOOK, "Booked.", BOOK, "Not booked.")
    assert done.returncode == 0
    assert person.seen[1] == '\nRun book({"person": "Marla"})? [y/N] '
    assert "<- book, done: \\u001b[31mbooked" in done.stdout
    assert "<- book, refused: " in done.stdout


def test_ctrl_c_stops_an_answer_and_keeps_the_session(sit_down: Callable[..., Any], tmp_path: Path) -> None:
    person = Person(KeyboardInterrupt(), "Book.", KeyboardInterrupt(), "/save a.json", EOFError())
    done = sit_down(person, BOOK, "never asked")
    assert done.returncode == 0
    assert "Stopped." in done.stderr
    kept = json.loads((tmp_path / "a.json").read_text())["messages"]
    assert kept[-1] == {"role": "assistant", "content": "[stopped by the user]"}
    assert kept[-2]["content"] == "The call was not run: the agent was stopped before."


def test_an_interrupted_question_without_calls_is_forgotten(sit_down: Callable[..., Any], tmp_path: Path) -> None:
    done = sit_down(Person("Hello", "/save a.json"), Raising(KeyboardInterrupt()))
    assert done.returncode == 0
    assert json.loads((tmp_path / "a.json").read_text())["messages"] == []


class Raising(list):
    """A reply that raises instead."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def __iter__(self) -> Any:
        raise self.error


def test_a_dead_server_does_not_end_the_session(sit_down: Callable[..., Any]) -> None:
    person = Person("Hello", "Hello again")
    done = sit_down(person, Raising(ToolError("The MCP server ended.")), "Hi.")
    assert (done.returncode, "error: The MCP server ended." in done.stderr) == (0, True)
