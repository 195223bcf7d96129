"""`poe chat`: talk with a model that calls tools."""

import contextlib
import importlib.util
import inspect
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from poe.commands.app import FAILED, Base, Device, Program, Repo, err
from poe.commands.use import NewTokens, Off, open_cascade
from poe.errors import DataError, MissingExtraError, PoEError, escape_controls, printable, suggest
from poe.files.output import write_file

app = Program()

HELP = """/help        these commands
/tools       the tools, and where they run
/reset       forget the conversation
/save FILE   write the conversation and the tools as JSON
/quit        end, as Ctrl-D does; Ctrl-C stops an answer"""
COMMANDS = ("/help", "/tools", "/reset", "/save", "/quit")
WHY = {
    "turns": "the model called tools until the largest number of turns was reached",
    "seconds": "the time was over",
    "tokens": "the tokens were used up",
    "length": "the reply was cut off, so give a larger --max-new-tokens",
    "context": "the conversation does not fit into the model's context, so /reset or ask something shorter",
    "invalid reply": "the model wrote a reply that is not accepted, also after it had read why",
}
SHOWN = 600  # characters of a call or a result
STOPPED = "[stopped by the user]"


@app.command()
def chat(
    repo: Repo,
    tools: Annotated[
        Path | None,
        typer.Option(
            help="Tools: the public functions of a Python file, or a JSON or YAML file in any spelling, of which "
            "calls are checked and not run."
        ),
    ] = None,
    mcp: Annotated[
        list[str] | None,
        typer.Option(help="An MCP server: a command line, or a URL of streamable HTTP (repeatable)."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Run calls without asking.")] = False,
    base: Base = None,
    device: Device = "auto",
    max_new_tokens: NewTokens = 256,
    off: Off = False,
) -> None:
    """Talk with a model that calls tools: its calls and their results are shown.

    It asks before a call, unless the tool's server declares it read-only. Without a terminal it reads a question from
    each line of standard input, runs such calls only with --yes, and exits with 1 if a question got no answer.
    """
    from poe.tools.agent import Agent

    with contextlib.ExitStack() as stack:
        bound = _open_tools(tools, mcp or [], stack)
        cascade = open_cascade(repo, base, device)
        talk = _Terminal() if sys.stdin.isatty() else _Lines()
        stage = None if off else cascade.active
        options: dict[str, Any] = {"stage": stage, "max_new_tokens": max_new_tokens, "stream": True}
        agent = Agent(cascade, bound, approve=None if yes else talk.approve, **options)
        session = _Session(agent, system)
        for line in talk.read():
            with talk.reporting_errors():
                if not session.take(line.strip()):
                    break
    if talk.has_failed:
        raise typer.Exit(FAILED)


def _open_tools(path: Path | None, servers: list[str], stack: contextlib.ExitStack) -> list[Any]:
    """Return the tools of a file and of MCP servers. Those that are only declared are not run."""
    from poe.calls.tool_files import read_tools_file
    from poe.tools.execution import BoundTool, bind_tools
    from poe.tools.mcp_client import connect_mcp

    found: list[Any] = []
    if path is not None and path.suffix == ".py":
        found += _load_functions(path)
    elif path is not None:
        found += [BoundTool(tool, _answer_dry, is_read_only=True) for tool in read_tools_file(path)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        found += [stack.enter_context(connect_mcp(server)) for server in servers]
    for warning in caught:
        err.print(f"note: {warning.message}", markup=False)
    return bind_tools(found)


def _load_functions(path: Path) -> list[Callable[..., Any]]:
    """Run a Python file and return its public functions."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    try:
        module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        spec.loader.exec_module(module)  # type: ignore[union-attr]
    except Exception as error:
        raise DataError(f"The tools file {path} cannot be run: {type(error).__name__}: {error}.") from error
    functions: list[Callable[..., Any]] = [
        member
        for name, member in vars(module).items()
        if inspect.isfunction(member) and member.__module__ == path.stem and name[0] != "_"
    ]
    if not functions:
        raise DataError(f"The tools file {path} has no functions: expected some with type hints and a docstring.")
    return functions


def _answer_dry(arguments: dict[str, Any]) -> Any:
    """Answer a call of a tool that is only declared."""
    from concurrent.futures import Future

    from poe.tools.execution import ToolResult

    future: Future[ToolResult] = Future()
    future.set_result(ToolResult("The call fits its tool. It was not run, because the tool is only declared.", None))
    return future


class _Session:
    """A conversation with an agent, and the commands that begin with a slash."""

    def __init__(self, agent: Any, system: str | None) -> None:
        self.agent = agent
        self._first = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, Any]] = list(self._first)
        self._notes: set[str] = set()

    def take(self, line: str) -> bool:
        """Answer a question or follow a command; return whether the session goes on."""
        command, _, argument = line.partition(" ")
        if command == "/quit":
            return False
        if command == "/help":
            print(HELP)
        elif command == "/tools":
            print("\n".join(map(_describe, self.agent.tools)) or "no tools")
        elif command == "/reset":
            self.messages = list(self._first)
        elif command == "/save":
            self._save(argument.strip())
        elif command.startswith("/"):
            raise DataError(f"There is no command {command!r}.{suggest(command, COMMANDS)}")
        elif line:
            self._ask(line)
        return True

    def _save(self, name: str) -> None:
        if not name:
            raise DataError("/save needs a file name: /save talk.json")
        content = {"messages": self.messages, "tools": [bound.tool for bound in self.agent.tools]}
        write_file(Path(name), json.dumps(content, ensure_ascii=False, indent=2) + "\n")

    def _ask(self, question: str) -> None:
        """Answer a question. Calls that were run stay in the conversation, also after an interrupt or an error."""
        run = self.agent.start([*self.messages, {"role": "user", "content": question}])
        printer = _Printer()
        try:
            for event in run:
                printer.show(event)
        except BaseException as error:
            self._keep(run, STOPPED if isinstance(error, KeyboardInterrupt) else f"[stopped: {error}]")
            raise
        finally:
            printer.end_line()
        for note in run.answer.notes if run.answer else ():
            if note not in self._notes:
                self._notes.add(note)
                err.print(f"note: {note}", markup=False)
        self._keep(run, f"[stopped: {run.reason}]")
        if run.reason != "answer":
            raise DataError(f"The question got no answer: {WHY[run.reason]}.")

    def _keep(self, run: Any, text: str) -> None:
        """Keep what was said and done; `text` stands for an answer after results that the model did not answer."""
        last = run.messages[-1]["role"]
        if last == "user":  # nothing was done: the question can be asked again
            return
        self.messages = run.messages if last == "assistant" else [*run.messages, {"role": "assistant", "content": text}]


class _Lines:
    """Questions from the lines of standard input. No one can be asked, so calls with side effects are refused."""

    def __init__(self) -> None:
        self.has_failed = False

    def read(self) -> Iterator[str]:
        """Yield the lines."""
        yield from sys.stdin

    def approve(self, call: Any) -> bool:
        """Refuse a call."""
        err.print(f"note: {_format(call)} was refused: no one can be asked, so only --yes runs it", markup=False)
        return False

    @contextlib.contextmanager
    def reporting_errors(self) -> Iterator[None]:
        """Print an error, and go on with the next line."""
        try:
            yield
        except PoEError as error:
            self.has_failed = True
            err.print(f"error: {error}", markup=False, style="red")


class _Terminal(_Lines):
    """Questions from a person, with a history for the arrow keys."""

    def __init__(self) -> None:
        super().__init__()
        try:
            from prompt_toolkit import PromptSession
        except ImportError:
            raise MissingExtraError('poe chat needs prompt_toolkit: pip install "poe-cascade[tools]"') from None
        self._prompt: Callable[[str], str] = PromptSession().prompt
        err.print("Ask a question. /help shows the commands, Ctrl-D ends.", markup=False)

    def read(self) -> Iterator[str]:
        """Yield what the person types, until Ctrl-D."""
        while True:
            try:
                yield self._prompt("> ")
            except KeyboardInterrupt:
                continue  # a line that is given up
            except EOFError:
                return

    def approve(self, call: Any) -> bool:
        """Ask whether a call may be run."""
        try:
            return self._prompt(f"\nRun {_format(call)}? [y/N] ").strip().lower() in ("y", "yes")
        except EOFError:
            return False

    @contextlib.contextmanager
    def reporting_errors(self) -> Iterator[None]:
        """Print an error, or that an answer was stopped, and go on with the next question."""
        try:
            with super().reporting_errors():
                yield
        except KeyboardInterrupt:
            err.print("Stopped.", markup=False)
        self.has_failed = False  # the person has read it


class _Printer:
    """Prints an answer while it arrives. Calls and what became of them have lines of their own."""

    def __init__(self) -> None:
        self._is_inside_line = False

    def show(self, event: Any) -> None:
        """Print a part of an answer, or what became of a call."""
        from poe.calls.streaming import CallPart, FaultPart, TextPart

        if isinstance(event, TextPart):
            print(escape_controls(event.text), end="", flush=True)
            self._is_inside_line = not event.text.endswith("\n")
            return
        self.end_line()
        if isinstance(event, CallPart):
            print(f"-> {_format(event.call)}", flush=True)
        elif isinstance(event, FaultPart):
            print(f"-> {printable(str(event.fault), SHOWN)}", flush=True)
        else:
            name = printable(event.call.name, 80)
            print(f"<- {name}, {event.status}: {printable(event.text, SHOWN)}", flush=True)

    def end_line(self) -> None:
        """End the line of text that is not ended yet."""
        if self._is_inside_line:
            print(flush=True)
        self._is_inside_line = False


def _format(call: Any) -> str:
    """Return a call on one line that is safe to print."""
    return printable(f"{call.name}({json.dumps(call.arguments, ensure_ascii=False)})", SHOWN)


def _describe(bound: Any) -> str:
    """Return the line of a tool: its name, where it runs, and what it is for."""
    function = bound.tool["function"]
    place = f" [{bound.server}]" if bound.server else ""
    kind = " (not run)" if bound.start is _answer_dry else " (read-only)" if bound.is_read_only else ""
    return printable(f"{function['name']}{place}{kind}: {function['description']}", SHOWN)
