"""Run the server in this process: its socket, its signals, and the line that says where it is."""

import ipaddress
import socket
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn

from poe.errors import ServingError
from poe.serving.engine import Engine


def open_socket(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0 takes a free one. Raises `ServingError` if the address cannot be used."""
    address: Any = (host, port)
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        opened = socket.socket(family, kind)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
        opened.listen(2048)
        return opened
    except OSError as error:
        reason = error.strerror or str(error)
        raise ServingError(
            f"The server cannot listen on {host}, port {port}: {reason}. Choose another --port (0: a free one), or an "
            "address of this machine as --host."
        ) from None


def url_of(opened: socket.socket) -> str:
    """Return the address of a socket as OpenAI's clients take it."""
    host, port = opened.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def is_loopback(opened: socket.socket) -> bool:
    """Return whether only programs of this machine can reach a socket."""
    return ipaddress.ip_address(opened.getsockname()[0].partition("%")[0]).is_loopback


def serve(
    app: Any, engine: Engine, opened: socket.socket, on_ready: Callable[[], None], on_stopping: Callable[[], None]
) -> bool:
    """Serve until a signal. Return whether every reply was finished.

    The first signal refuses new requests and finishes those that were accepted. The second ends them.
    """
    config = uvicorn.Config(
        app, log_level="critical", access_log=False, server_header=False, ws="none", timeout_keep_alive=75
    )
    sys.setswitchinterval(0.0005)  # passes give up the interpreter at every operation, and get it back sooner
    server = _Server(config, engine, on_ready, on_stopping)
    server.run(sockets=[opened])
    engine.close(cancel=server.force_exit)
    return not server.force_exit


class _Server(uvicorn.Server):
    def __init__(
        self, config: uvicorn.Config, engine: Engine, on_ready: Callable[[], None], on_stopping: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._engine, self._on_ready, self._on_stopping = engine, on_ready, on_stopping

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._engine.num_running or self._engine.num_waiting:
            self._on_stopping()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self._engine.cancel_all()
            self.force_exit = True
        self.should_exit = True
