"""Bind tools to what runs them, and run calls side by side with a time limit.

A Python function runs in a thread of its own, a tool of an MCP server in that server. What a tool returns, and the
message of its error, is data: it becomes text of bounded length, and nothing in it is obeyed or evaluated.
"""

import asyncio
import copy
import inspect
import json
import re
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, as_completed
from dataclasses import dataclass, replace
from typing import Any, Literal

from poe.calls.conversation import Call, Tool
from poe.calls.tools import read_tools
from poe.calls.typed_arguments import convert_arguments
from poe.errors import DataError, PoEError

Status = Literal["done", "failed", "invalid", "refused", "dry run", "stopped"]


@dataclass(frozen=True)
class ToolResult:
    """What a tool returned: as text for the model, and as a value for plans."""

    text: str
    value: Any


@dataclass(frozen=True)
class BoundTool:
    """A tool and what runs it: `start(arguments)` returns the future of a `ToolResult`.

    `server` is the name of its MCP server, "" for a Python function. `is_read_only`: it declares that it changes
    nothing. `start` is None for a tool that is only declared.
    """

    tool: Tool
    start: Callable[[dict[str, Any]], Future[ToolResult]] | None
    server: str = ""
    is_read_only: bool = False

    @property
    def name(self) -> str:
        """The name under which a model calls it."""
        return str(self.tool["function"]["name"])


@dataclass(frozen=True)
class Outcome:
    """What became of a call.

    status  "done"; "failed", also by a time limit; "invalid": it does not fit its tool; "refused"; "dry run";
            "stopped": its reply was not accepted, or an interrupt came, and then it may have run
    text    the result or the reason, as the model reads it
    value   what the tool returned, None unless done
    """

    call: Call
    status: Status
    text: str
    value: Any = None


class ToolFailure(Exception):
    """A tool reported an error. Its message is the tool's."""


def bind_tools(tools: Any) -> list[BoundTool]:
    """Return tools with what runs them.

    `tools` is one of these, or a list of them: a Python function with type hints and a docstring, an MCP server of
    `connect_mcp`, a `BoundTool`, a declaration in any spelling of `poe.calls.tools`, which nothing runs. Where tools
    share a name, those of servers are renamed to `server__tool`. Raises `RowError` for a tool that cannot be read,
    `DataError` for two functions or declarations of one name.
    """
    bound: list[BoundTool] = []
    servers: Counter[str] = Counter()
    for item in tools if isinstance(tools, list | tuple) else [tools]:
        if isinstance(item, BoundTool):
            bound.append(item)
        elif isinstance(members := getattr(item, "bound_tools", None), list):  # an MCP server
            servers[item.name] += 1
            name = item.name if servers[item.name] == 1 else f"{item.name}_{servers[item.name]}"
            bound += [replace(member, server=name) for member in members]
        else:
            start = _starter(item) if callable(item) and not inspect.isclass(item) else None
            bound += [BoundTool(tool, start) for tool in read_tools(item)]
    counts = Counter(member.name for member in bound)
    bound = [_rename(member) if counts[member.name] > 1 and member.server else member for member in bound]
    if repeated := [name for name, count in Counter(member.name for member in bound).items() if count > 1]:
        raise DataError(f"Tools need names of their own, got two of {repeated[0][:80]!r}: rename one.")
    return bound


def _rename(bound: BoundTool) -> BoundTool:
    prefix = re.sub(r"[^A-Za-z0-9_-]+", "_", bound.server).strip("_") or "server"
    function = {**bound.tool["function"], "name": f"{prefix}__{bound.name}"}
    return replace(bound, tool={**bound.tool, "function": function})


def _starter(function: Callable[..., Any]) -> Callable[[dict[str, Any]], Future[ToolResult]]:
    """Return what starts a Python function in a thread of its own.

    The thread of a function that never returns cannot be stopped. It does not keep the process alive.
    """

    def start(arguments: dict[str, Any]) -> Future[ToolResult]:
        future: Future[ToolResult] = Future()
        future.set_running_or_notify_cancel()
        threading.Thread(target=_run_function, args=(function, arguments, future), daemon=True).start()
        return future

    return start


def _run_function(function: Callable[..., Any], arguments: dict[str, Any], future: Future[ToolResult]) -> None:
    try:
        value = function(**convert_arguments(function, copy.deepcopy(arguments)))
        if inspect.isawaitable(value):
            value = asyncio.run(_wait_for(value))
        future.set_result(ToolResult(result_text(value), value))
    except BaseException as error:  # of any kind, `sys.exit` included: it is the tool's failure
        future.set_exception(error)


async def _wait_for(value: Awaitable[Any]) -> Any:
    return await value


def result_text(value: Any) -> str:
    """Return a value as a model reads it: text unchanged, other values as JSON, what JSON lacks as Python shows it."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text.encode("utf-8", "replace").decode()  # without lone surrogates, which no tokenizer takes


def cut_text(text: str, longest: int) -> str:
    """Return the first `longest` characters of a text, with a note if that is not all of it."""
    if len(text) <= longest:
        return text
    return f"{text[:longest]}\n[cut off: the first {longest:,} of {len(text):,} characters]"


def run_calls(calls: Sequence[tuple[BoundTool, Call]], seconds: float) -> Iterator[tuple[int, Outcome]]:
    """Run calls side by side; yield the position and the outcome of each as it ends.

    A call that takes longer than `seconds` has failed, and is given up if it runs in a server. Arguments must have
    been checked. An error of this package, such as the end of a server, is raised.
    """
    started = {start_call(bound, call): position for position, (bound, call) in enumerate(calls)}
    try:
        for future in as_completed(started, timeout=seconds):
            position = started[future]
            yield position, read_outcome(calls[position][1], future)
    except TimeoutError:
        for future, position in started.items():
            if not future.done():
                yield position, late_outcome(calls[position][1], seconds)
    finally:
        for future in started:
            future.cancel()


def start_call(bound: BoundTool, call: Call) -> Future[ToolResult]:
    """Start a call and return the future of its result. Raises `DataError` for a tool that nothing runs."""
    if bound.start is None:
        raise DataError(
            f"Tool {bound.name!r} is only declared, so nothing runs it: expected a Python function, an MCP server of "
            "connect_mcp, or a dry run."
        )
    return bound.start(call.arguments)


def late_outcome(call: Call, seconds: float) -> Outcome:
    """Return the outcome of a call without a result in time."""
    return Outcome(call, "failed", f"Error: no result within {seconds:g} seconds.")


def read_outcome(call: Call, future: Future[ToolResult]) -> Outcome:
    """Return the outcome of a call that has ended. Raises the errors of this package."""
    error = future.exception()
    if error is None:
        return Outcome(call, "done", future.result().text, future.result().value)
    if isinstance(error, PoEError):
        raise error
    reason = str(error) if isinstance(error, ToolFailure) else f"{type(error).__name__}: {error}"
    return Outcome(call, "failed", f"Error: {result_text(reason)}")


def declarations(bound: Iterable[BoundTool]) -> list[Tool]:
    """Return the tools as a model sees them."""
    return [member.tool for member in bound]
