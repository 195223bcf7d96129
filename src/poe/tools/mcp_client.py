"""Connect to MCP servers: a program that talks over standard input and output, or a URL with streamable HTTP."""

import contextlib
import json
import logging
import os
import shlex
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TextIO

from poe.calls.tools import read_tools
from poe.errors import MissingExtraError, RowError, ToolError, printable
from poe.tools.execution import BoundTool, ToolFailure, ToolResult

_PAGES = 100  # the most pages of a list of tools
_CONNECT_SECONDS, _READ_SECONDS = 30.0, 300.0  # those of the SDK; a server may hold a response open
_LAST_LINES = 3  # of a server's standard error, in a message


@dataclass(frozen=True)
class McpServer:
    """A connected MCP server and its tools, for `Agent` and `bind_tools`.

    `instructions` is the server's text about itself. It is data: no prompt contains it unless you put it there.
    """

    name: str
    bound_tools: list[BoundTool] = field(repr=False)
    instructions: str = field(repr=False)


@contextlib.contextmanager
def connect_mcp(
    server: str,
    *,
    env: Mapping[str, str] | None = None,
    headers: Mapping[str, str] | None = None,
    start_seconds: float = 30.0,
) -> Iterator[McpServer]:
    """Connect to an MCP server inside a `with` block.

    `server` is a command line (`python -m my_server --flag`), or a URL (`http://...`, streamable HTTP). A program gets
    a few harmless variables of the environment (PATH, HOME, ...) and those of `env`; it is ended with the block, also
    by Ctrl-C. `headers` are sent with each request to a URL, such as `{"Authorization": "Bearer ..."}`. Tools that
    cannot be used are left out with a warning. Raises `ToolError` if the server does not start within `start_seconds`,
    ends, or does not speak the protocol, and `MissingExtraError` without the `mcp` package.
    """
    try:
        import httpx2
        from anyio.from_thread import start_blocking_portal
        from mcp.client.client import Client
        from mcp.client.stdio import StdioServerParameters, stdio_client
        from mcp.client.streamable_http import streamable_http_client
    except ImportError:
        raise MissingExtraError('MCP servers need the mcp package: pip install "poe-cascade[tools]"') from None
    logging.getLogger("mcp").addHandler(logging.NullHandler())  # else its tracebacks go to standard error
    is_url = server.startswith(("http://", "https://"))
    with contextlib.ExitStack() as stack:
        lines = stack.enter_context(_LastLines())
        problems = _Problems(lines)
        http: Any = contextlib.nullcontext()
        if is_url:
            limits = httpx2.Timeout(_CONNECT_SECONDS, read=_READ_SECONDS)
            hooks = {"response": [problems.take_response]}
            http = httpx2.AsyncClient(headers=dict(headers or {}), timeout=limits, event_hooks=hooks)
            target = streamable_http_client(server, http_client=http)
        else:
            command, *arguments = _split_command(server)
            parameters = StdioServerParameters(command=command, args=arguments, env=dict(env or {}))
            target = stdio_client(parameters, errlog=lines.stream)
        portal = stack.enter_context(start_blocking_portal())
        session = _Session(Client(target, message_handler=problems.take_message), http)
        ended = portal.start_task_soon(session.serve)
        stack.callback(_stop, portal, session, ended)
        try:
            session.started.result(start_seconds)
        except TimeoutError:
            raise ToolError(f"{_place(server)} did not start within {start_seconds:g} seconds{problems}.") from None
        except Exception as error:
            reason = problems.explain(error)
            raise ToolError(f"{_place(server)} cannot be used: {reason}{problems}. Check the command or URL.") from None

        def start_call(name: str, arguments: dict[str, Any]) -> Future[ToolResult]:
            try:
                return portal.start_task_soon(session.call, name, arguments, server, problems)
            except RuntimeError:
                raise ToolError(
                    f"{_place(server)} is not connected any more: call its tools inside its block."
                ) from None

        name = session.client.server_info.name if session.client.server_info else "server"
        bound = list(_bind(session.listed, start_call, server))
        yield McpServer(name, bound, session.client.instructions or "")


class _Session:
    """A client and the task that holds it, in the thread of the portal."""

    def __init__(self, client: Any, http: Any) -> None:
        import anyio

        self.client, self._http = client, http
        self.started: Future[None] = Future()
        self.listed: list[Any] = []
        self._make_event = anyio.Event
        self._finished: Any = None

    async def serve(self) -> None:
        self._finished = self._make_event()
        try:
            async with self._http, self.client:
                cursor = None
                for _ in range(_PAGES):
                    page = await self.client.list_tools(cursor=cursor)
                    self.listed += page.tools
                    cursor = page.next_cursor
                    if cursor is None:
                        break
                self.started.set_result(None)
                await self._finished.wait()
        except BaseException as error:
            if self.started.done():
                raise
            self.started.set_exception(error)

    async def stop(self) -> None:
        if self._finished is not None:
            self._finished.set()

    async def call(self, name: str, arguments: dict[str, Any], server: str, problems: "_Problems") -> ToolResult:
        from mcp.shared.exceptions import MCPError
        from mcp_types import CONNECTION_CLOSED

        try:
            result = await self.client.call_tool(name, arguments)
        except MCPError as error:
            if error.code == CONNECTION_CLOSED:
                text = f"{_place(server)} ended while {name!r} ran{problems}. The call may have had its effect."
                raise ToolError(text) from None
            raise ToolFailure(str(error)) from None
        except Exception as error:  # a result that does not fit the declared output, a broken connection, ...
            raise ToolFailure(problems.explain(error)) from None
        text = "\n".join(map(_block_text, result.content))
        if result.is_error:
            raise ToolFailure(text or "the tool gave no reason")
        structured = result.structured_content
        if structured is None:
            return ToolResult(text, _parse(text))
        return ToolResult(text or json.dumps(structured, ensure_ascii=False), structured)


def _stop(portal: Any, session: _Session, ended: Future[None]) -> None:
    """End the session, and the server's process with it."""
    with contextlib.suppress(RuntimeError):
        if session.started.done():
            portal.call(session.stop)
        else:
            ended.cancel()
    with contextlib.suppress(Exception):
        ended.result()


def _bind(listed: list[Any], start_call: Callable[..., Future[ToolResult]], server: str) -> Iterator[BoundTool]:
    """Yield the tools of a server that can be used."""
    for declared in listed:
        try:
            (tool,) = read_tools([declared.model_dump(mode="json", by_alias=True, exclude_none=True)])
        except RowError as error:
            warnings.warn(f"{_place(server)}: tool left out: {printable(str(error), 300)}", stacklevel=4)
            continue

        def start(arguments: dict[str, Any], name: str = declared.name) -> Future[ToolResult]:
            return start_call(name, arguments)

        hints = declared.annotations
        yield BoundTool(tool, start, "", bool(hints and hints.read_only_hint))


def _block_text(block: Any) -> str:
    """Return a block of a result as text. What is no text is named, not shown."""
    if block.type == "text":
        return str(block.text)
    if block.type == "resource" and hasattr(block.resource, "text"):
        return str(block.resource.text)
    if block.type == "resource_link":
        return f"[a link to the resource {block.uri}]"
    data = block.resource.blob if block.type == "resource" else block.data
    kind = block.resource.mime_type if block.type == "resource" else block.mime_type
    return f"[{block.type} of the type {kind}, {len(data) * 3 // 4:,} bytes, not shown]"


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _split_command(server: str) -> list[str]:
    try:
        words = shlex.split(server)
    except ValueError as error:
        raise ToolError(f"The command {server!r} cannot be read: {error}. Quote it as in a shell.") from None
    if not words:
        raise ToolError("Expected the command or URL of an MCP server, got an empty text.")
    return words


def _place(server: str) -> str:
    return f"The MCP server {printable(server, 200)!r}"


class _Problems:
    """What a server did beside the protocol, for messages: lines of its standard error, and what is no message."""

    def __init__(self, lines: "_LastLines") -> None:
        self.lines = lines
        self._found = ""

    async def take_message(self, message: Any) -> None:
        if isinstance(message, Exception) and not self._found:
            self._found = printable(str(message), 200)

    async def take_response(self, response: Any) -> None:
        if response.status_code >= 400:
            self._found = f"the status {response.status_code}"

    def explain(self, error: BaseException) -> str:
        """Return the innermost reason of an error."""
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        return printable(f"{type(error).__name__}: {error}", 300)

    def __str__(self) -> str:
        texts = [f"it answered what is no message of the protocol: {self._found}"] if self._found else []
        if last := self.lines.read():
            texts.append(f"its last lines: {last}")
        return f" ({'; '.join(texts)})" if texts else ""


class _LastLines:
    """A pipe that keeps the last lines written to it. Bind `stream` to a program's standard error."""

    def __enter__(self) -> "_LastLines":
        reader, writer = os.pipe()
        self.stream: TextIO = os.fdopen(writer, "w")
        self._lines: deque[bytes] = deque(maxlen=_LAST_LINES)
        self._thread = threading.Thread(target=self._read, args=(reader,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()

    def read(self) -> str:
        """Return the last lines; what an ended program wrote is there after a moment."""
        self._thread.join(0.2)
        return printable(" | ".join(line.decode("utf-8", "replace") for line in self._lines), 600)

    def _read(self, reader: int) -> None:
        with os.fdopen(reader, "rb") as file:
            while line := file.readline(10_000):
                if line.strip():
                    self._lines.append(line)
