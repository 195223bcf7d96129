"""The HTTP server: an OpenAI-compatible API over an engine. It is for one machine."""

import asyncio
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from poe.serving import engine as engines
from poe.serving.engine import BusyError, ClosedError, End, Engine, Piece, describe_error
from poe.serving.metrics import Metrics, Watch
from poe.serving.models import ServedModel
from poe.serving.openai_api import ApiError, ChatRequest, Completion, read_request, write_usage
from poe.serving.replies import Choice, Question, read_question
from poe.serving.router import AUTO, Router

BODY_SECONDS = 30  # to send a request
LOOPBACK = ("127.0.0.1", "localhost", "::1", "[::1]")


@dataclass(frozen=True)
class Limits:
    """What a server accepts: tokens of prompt and reply together, and bytes of a request."""

    max_context: int = 4096
    max_body: int = 4 << 20


def build_app(
    engine: Engine,
    models: Mapping[str, ServedModel],
    limits: Limits = Limits(),
    *,
    router: Router | None = None,
    api_key: str | None = None,
    hosts: tuple[str, ...] | None = None,
    report: Callable[[str], None] = print,
) -> ASGIApp:
    """Return the ASGI application. It starts the engine, and closes it after the last reply.

    With `router` there is a model "auto". With `api_key` every request but `/health` needs it. With `hosts` the header
    Host must be one of them. `report` gets the kinds of internal errors, without text of a request.
    """
    service = _Service(engine, models, limits, router)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.close)
        service.close()

    app = FastAPI(title="PoE", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.write(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def list_models() -> Response:
        return JSONResponse({"object": "list", "data": [service.describe(name) for name in service.names]})

    @app.get("/v1/models/{name:path}")
    async def show_model(name: str) -> Response:
        service.check_name(name)
        return JSONResponse(service.describe(name))

    @app.post("/v1/chat/completions")
    async def complete_chat(request: Request) -> Response:
        return await service.answer(request)

    @app.exception_handler(ApiError)
    async def refuse(request: Request, error: ApiError) -> Response:
        return _error_response(error)

    @app.exception_handler(HTTPException)
    async def explain_http_error(request: Request, error: HTTPException) -> Response:
        places = "GET /v1/models, POST /v1/chat/completions, GET /health and GET /metrics"
        text = f"There is no {request.method} {request.url.path}: expected {places}."
        return _error_response(ApiError(error.status_code, text))

    return _Guard(app, api_key, hosts, report)


def _error_response(error: ApiError) -> Response:
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body, error.status, headers)


class _Guard:
    """Checks host and key before anything else, and turns unexpected errors into one line and status 500."""

    def __init__(
        self, app: ASGIApp, api_key: str | None, hosts: tuple[str, ...] | None, report: Callable[[str], None]
    ) -> None:
        self._app, self._hosts, self._report = app, hosts, report
        self._key = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        has_begun = False

        async def note_begin(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        if (refusal := self._find_refusal(scope)) is not None:
            await _error_response(refusal)(scope, receive, send)
            return
        try:
            await self._app(scope, receive, note_begin)
        except Exception as error:
            self._report(describe_error(error))
            if not has_begun:
                await _error_response(ApiError(500, "The server failed."))(scope, receive, send)

    def _find_refusal(self, scope: Scope) -> ApiError | None:
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if self._hosts is not None and name not in self._hosts:
            return ApiError(403, f"This server is for this machine only: expected the host 127.0.0.1, got {name!r}.")
        if self._key is None or scope["path"] == "/health":
            return None
        if not hmac.compare_digest(headers.get(b"authorization", b""), self._key):
            return ApiError(401, "Expected the API key of this server in the header Authorization: Bearer KEY.")
        return None


class _Service:
    """Answers chat requests with an engine."""

    def __init__(
        self, engine: Engine, models: Mapping[str, ServedModel], limits: Limits, router: Router | None
    ) -> None:
        self._engine, self._models, self._limits, self._router = engine, models, limits, router
        self.names = [*models, *([AUTO] if router else [])]
        self._started = int(time.time())
        self._reader = ThreadPoolExecutor(1, "poe-prompts")  # one thread: tokenizers keep state
        self._reading = 0  # replies to requests of which the prompt is written now
        self.metrics = Metrics(engine)

    def close(self) -> None:
        """End the thread that writes prompts."""
        self._reader.shutdown()

    def describe(self, name: str) -> dict[str, Any]:
        """Return a model in OpenAI's form."""
        return {"id": name, "object": "model", "created": self._started, "owned_by": "poe"}

    def check_name(self, name: str) -> None:
        """Raise `ApiError` (404) if there is no model of that name."""
        if name in self.names:
            return
        reason = ""
        if name == AUTO:
            reason = f" Not every stage knows its training prompts, by which {AUTO!r} chooses: see fit_prompt_center."
        text = f"There is no model {name[:80]!r}: expected one of {', '.join(self.names)}.{reason}"
        raise ApiError(404, text, "model", "model_not_found")

    async def answer(self, http: Request) -> Response:
        """Answer one request for a chat completion."""
        watch = Watch(self.metrics)
        try:
            request = read_request(await self._read_body(http))
            self.check_name(request.model)
            watch.model = request.model
            question = await self._read_question(request)
            watch.model = question.model.name
            with _busy_as_api_error(self._engine):
                replies = _Replies(self._engine, question, watch)
        except ApiError as error:
            watch.close(error.status)
            raise
        return _Stream(replies) if request.stream else await replies.whole(http)

    async def _read_question(self, request: ChatRequest) -> Question:
        """Choose the model and write the prompt, unless the server is full; requests that are here count as well."""
        with _busy_as_api_error(self._engine):
            self._engine.check_places(request.choices + self._reading)
        loop, self._reading = asyncio.get_running_loop(), self._reading + request.choices
        try:
            return await loop.run_in_executor(self._reader, self._choose_and_read, request)
        finally:
            self._reading -= request.choices

    def _choose_and_read(self, request: ChatRequest) -> Question:
        routed = self._router if request.model not in self._models else None
        model = routed.choose(request) if routed else self._models[request.model]
        return read_question(model, request, self._limits.max_context)

    async def _read_body(self, http: Request) -> bytes:
        """Return the body of a request. Raises `ApiError` if it is too large, too slow, or no JSON."""
        kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # a page in a browser can send other kinds without asking the server first
            raise ApiError(415, f"Expected the content type application/json, got {kind[:80]!r}.")
        most = self._limits.max_body
        too_large = ApiError(413, f"The request is larger than {most} bytes: send fewer or shorter messages and tools.")
        length = http.headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > most:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in http.stream():
                    body += part
                    if len(body) > most:
                        raise too_large
        except TimeoutError:
            raise ApiError(408, f"The request did not arrive within {BODY_SECONDS} seconds.") from None
        except ClientDisconnect:
            raise ApiError(499, "The client left before its request was whole.") from None
        return bytes(body)


@contextmanager
def _busy_as_api_error(engine: Engine) -> Iterator[None]:
    """Turn a refusal of the engine into an `ApiError`."""
    try:
        yield
    except BusyError as error:
        seconds = 1 + engine.num_waiting // engine.max_batch
        raise ApiError(429, str(error), None, "server_busy", seconds) from None
    except ClosedError as error:
        raise ApiError(503, str(error), None, "shutting_down") from None


class _Replies:
    """The replies to one request, from the engine to the client. `close` ends those that are not whole."""

    def __init__(self, engine: Engine, question: Question, watch: Watch) -> None:
        self._question, self._watch = question, watch
        self._events: asyncio.Queue[tuple[int, Piece | End]] = asyncio.Queue()
        self._choices = [Choice(index, question) for index in range(question.request.choices)]
        self._completion = Completion(question.model.name)
        loop = asyncio.get_running_loop()

        def listen(index: int, event: Piece | End) -> None:
            loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        self._rows = engine.submit([self._make_request(index, partial(listen, index)) for index in self._indices])
        watch.begin(len(question.prompt))

    @property
    def _indices(self) -> range:
        return range(len(self._choices))

    def _make_request(self, index: int, listener: Callable[[Piece | End], None]) -> engines.Request:
        question, request = self._question, self._question.request
        sampling = request.sampling
        if sampling.seed is not None:
            sampling = replace(sampling, seed=sampling.seed + index)
        return engines.Request(
            question.model.stage,
            question.prompt,
            question.model.renderer.stop_token_ids,
            question.model.tokenizer,
            listener,
            question.max_tokens,
            sampling,
            request.stops,
            request.scores,
            question.constraint and question.constraint.copy(),
        )

    def close(self) -> None:
        """End rows that still run. The client has left if the replies are not whole."""
        for row in self._rows:
            row.cancel()
        self._watch.close(499)

    async def whole(self, http: Request) -> Response:
        """Return all replies together, or nothing if the client leaves."""
        work, leaving = asyncio.create_task(self._collect()), asyncio.create_task(_wait_for_disconnect(http))
        try:
            await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
            return work.result() if work.done() else Response(status_code=499)
        except ApiError as error:
            self._watch.close(error.status)
            raise
        except Exception:
            self._watch.close(500)
            raise
        finally:
            work.cancel()
            leaving.cancel()
            self.close()

    async def _collect(self) -> Response:
        async for _ in self._deltas():
            pass
        usage = self._usage
        self._watch.close(200, usage["completion_tokens"])
        return JSONResponse(self._completion.whole([choice.write() for choice in self._choices], usage))

    async def stream(self) -> AsyncIterator[str]:
        """Yield the replies as server-sent events. An error in between is an event, too."""
        options = self._question.request.stream_options
        has_usage = options is not None and bool(options.include_usage)
        try:
            async for deltas in self._deltas():
                for delta in deltas:
                    chunk = self._completion.chunk([delta])
                    yield _write_event({**chunk, "usage": None} if has_usage else chunk)
        except ApiError as error:
            self._watch.close(error.status)
            yield _write_event(error.body)
            return
        usage = self._usage
        if has_usage:
            yield _write_event(self._completion.chunk([], usage))
        self._watch.close(200, usage["completion_tokens"])
        yield "data: [DONE]\n\n"

    async def _deltas(self) -> AsyncIterator[list[dict[str, Any]]]:
        """Yield the parts of all replies until each has ended. Raises `ApiError` if one was not finished."""
        while any(choice.end is None for choice in self._choices):
            index, event = await self._events.get()
            self._watch.note_text()
            choice = self._choices[index]
            yield choice.add(event) if isinstance(event, Piece) else choice.finish(event)

    @property
    def _usage(self) -> dict[str, int]:
        decoded = sum(choice.end.tokens for choice in self._choices if choice.end is not None)
        return write_usage(len(self._question.prompt), decoded)


class _Stream(StreamingResponse):
    """A stream of replies. When the client leaves, the replies are closed."""

    def __init__(self, replies: _Replies) -> None:
        super().__init__(replies.stream(), headers={"Cache-Control": "no-cache"}, media_type="text/event-stream")
        self._replies = replies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._replies.close()


async def _wait_for_disconnect(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _write_event(value: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"
