"""The server as a process: clients that are killed, broken requests, a restart under load, and signals."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from command_line import run_program


class Process:
    """A server in a process of its own. A test that ended it leaves the next one to `start` it."""

    def __init__(self, *arguments: str) -> None:
        self.arguments, self.port = arguments, 0
        self.process: Any = None

    def start(self) -> "Process":
        """Start the server, unless it runs, on the port that it had."""
        if self.process is not None and self.process.poll() is None:
            return self
        words = [sys.executable, "-m", "poe.commands.poe", "serve", *self.arguments, "--port", str(self.port)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "POE_API_KEY": "a key"}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(words, env=environment, **pipes)
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)/v1", self.line)
        assert found, self.process.communicate()
        self.url, self.port = found[0], int(found[1])
        return self

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key="a key", **{"max_retries": 0, **options})

    def read(self, path: str) -> str:
        request = urllib.request.Request(f"{self.url[:-3]}{path}", headers={"Authorization": "Bearer a key"})
        with urllib.request.urlopen(request, timeout=20) as response:
            return str(response.read().decode())

    def send(self, data: bytes, answer: bool = True) -> bytes:
        """Send bytes over a connection of their own; with `answer` return what comes back, else leave at once."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as connection:
            connection.sendall(data)
            if not answer:
                time.sleep(0.2)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")  # closes with a reset
                return b""
            connection.shutdown(socket.SHUT_WR)
            parts = []
            with contextlib.suppress(ConnectionResetError):
                while part := connection.recv(65536):
                    parts.append(part)
            return b"".join(parts)

    def wait_for(self, condition: Callable[[str], bool]) -> None:
        """Wait until the metrics satisfy a condition."""
        end = time.monotonic() + 20
        while not condition(text := self.read("/metrics")):
            assert time.monotonic() < end, text
            time.sleep(0.05)

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Send a signal; return the exit code and what was printed as errors."""
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=60)
        return self.process.returncode, errors


def chat(server: Process, model: str, number: int, **options: Any) -> str:
    """Return the reply to one question."""
    messages: Any = [{"role": "user", "content": f"number {number}"}]
    with server.client(timeout=60) as client:
        completion = client.chat.completions.create(model=model, messages=messages, max_tokens=20, **options)
    return str(completion.choices[0].message.content)


@pytest.fixture(scope="module")
def server(stage_folders: list[str]) -> Iterator[Process]:
    running = Process(*stage_folders, "--max-batch", "4", "--max-queue", "8")
    yield running
    if running.process is not None and running.process.poll() is None:
        assert running.stop() == (0, "")


def idle(text: str) -> bool:
    return "\npoe_rows_running 0.0" in text and "\npoe_rows_waiting 0.0" in text


@pytest.mark.slow
def test_killed_clients_and_broken_requests_leave_a_server_that_answers(server: Process) -> None:
    assert server.start().line.startswith("base, alpha, beta, gamma at http://127.0.0.1:")
    expected = [chat(server, model, 1) for model in ("base", "alpha", "beta", "gamma")]
    body = {"model": "alpha", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1500}
    for stream in (False, True):
        text = json.dumps({**body, "stream": stream}).encode()
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer a key\r\n"
        head += b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(text)
        for _ in range(4):
            server.send(head + text, answer=False)
    server.wait_for(idle)
    broken = [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(50),  # TLS
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"y" * 200_000 + b"\r\n\r\n",
        head + text[:10],
    ]
    for data in broken:
        answer = server.send(data)
        assert not answer.startswith(b"HTTP/1.1 200"), answer
    length = b"Content-Length: 99999999\r\n\r\n"
    assert b"413" in server.send(head.rpartition(b"Content-Length")[0] + length).partition(b"\r\n")[0]
    assert [chat(server, model, 1) for model in ("base", "alpha", "beta", "gamma")] == expected
    assert 'poe_requests_total{model="alpha",status="499"} 8.0' in server.read("/metrics")


@pytest.mark.slow
def test_no_accepted_reply_is_lost_or_cut_when_a_server_restarts_under_load(server: Process) -> None:
    server.start()
    expected = {(model, i): chat(server, model, i) for model in ("alpha", "beta", "gamma") for i in range(4)}
    right, wrong, done = [0], [], threading.Event()

    def ask_for_ever(seed: int) -> None:
        client = openai.OpenAI(base_url=server.url, api_key="a key", max_retries=0, timeout=60)
        number = seed
        while not done.is_set():
            number += 1
            model, i = ("alpha", "beta", "gamma")[number % 3], number % 4
            messages: Any = [{"role": "user", "content": f"number {i}"}]
            text, chunks = "", None
            try:
                chunks = client.chat.completions.create(model=model, messages=messages, max_tokens=20, stream=True)
                for chunk in chunks:
                    text += chunk.choices[0].delta.content or ""
                    finished = chunk.choices[0].finish_reason
                if text == expected[model, i] and finished == "length":
                    right[0] += 1
                else:
                    wrong.append((model, i, text))
            except openai.APIConnectionError as error:
                if chunks is not None:  # the reply had begun
                    wrong.append((model, i, error))
                time.sleep(0.02)  # no server listens for a moment

    threads = [threading.Thread(target=ask_for_ever, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(2)
    code, errors = server.stop()
    before = right[0]
    server.start()
    time.sleep(2)
    done.set()
    for thread in threads:
        thread.join()
    assert code == 0, errors
    assert errors in ("", "Finishing the replies that run; Ctrl-C again ends them.\n")
    assert wrong == []
    assert before > 8
    assert right[0] > before + 8


@pytest.mark.slow
def test_a_second_signal_ends_the_replies_that_run(server: Process) -> None:
    server.start()
    failures: list[Any] = []

    def ask_long() -> None:
        with server.client(timeout=60) as client:
            messages: Any = [{"role": "user", "content": "Hello"}]
            try:
                fields: Any = {"max_tokens": 1900, "logprobs": True, "top_logprobs": 20}
                client.chat.completions.create(model="alpha", messages=messages, **fields)
            except openai.OpenAIError as error:
                failures.append(error)

    thread = threading.Thread(target=ask_long)
    thread.start()
    server.wait_for(lambda text: "\npoe_rows_running 1.0" in text)
    server.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    code, errors = server.stop(signal.SIGINT)
    thread.join()
    assert code == 130
    assert errors == "Finishing the replies that run; Ctrl-C again ends them.\n"
    assert len(failures) == 1


def test_a_port_in_use_is_one_error_before_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("poe.commands.serve.open_cascade", lambda *args: pytest.fail("the model was loaded"))
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = str(taken.getsockname()[1])
        result = run_program("poe", "serve", "demo", "--port", port)
    assert (result.returncode, result.stdout) == (1, "")
    assert "already in use. Choose another --port" in " ".join(result.stderr.split())
    result = run_program("poe", "serve", "demo", "--host", "no.such.host.invalid")
    assert result.returncode == 1
    assert "cannot listen on no.such.host.invalid" in " ".join(result.stderr.split())


def test_a_server_for_other_machines_without_a_key_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop(Exception):
        pass

    def stop(*args: Any) -> None:
        raise Stop

    monkeypatch.setattr("poe.commands.serve.open_cascade", stop)
    for host, key, warns in (("127.0.0.1", None, False), ("0.0.0.0", None, True), ("0.0.0.0", "a key", False)):
        environment = {} if key is None else {"POE_API_KEY": key}
        result = run_program("poe", "serve", "demo", "--port", "0", "--host", host, environment=environment)
        assert ("everyone who reaches" in result.stderr) == warns
    result = run_program("poe", "serve", "demo", "--port", "0", "--api-key", "with\nline")
    assert "The API key is empty or has characters" in result.stderr


def test_a_missing_extra_is_answered_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("poe.serving.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    result = run_program("poe", "serve", "demo")
    assert result.returncode == 1
    assert 'pip install "poe-cascade[serve]"' in result.stderr


def test_names_are_checked_before_anything_is_served(stage_folders: list[str], demo_base: Path) -> None:
    for arguments, words in (
        ([stage_folders[0], "--name", "a", "--name", "b"], "at most one name for each of 1 models"),
        ([stage_folders[0], stage_folders[0]], "is given twice"),
        ([str(demo_base), stage_folders[0], "--name", "same", "--name", "same"], "Two models are called 'same'"),
    ):
        result = run_program("poe", "serve", *arguments, "--port", "0")
        assert result.returncode == 1
        assert words in " ".join(result.stderr.split())
