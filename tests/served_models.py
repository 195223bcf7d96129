"""A tiny base with three random stages, and a server for them in this process."""

import asyncio
from pathlib import Path
from typing import Any

import httpx2
import openai
import torch

from conftest import scramble
from poe import Cascade
from poe.serving.engine import End, Engine, Piece, Request, Row
from poe.serving.models import load_models
from poe.serving.server import build_app

STAGES: dict[str, dict[str, Any]] = {
    "alpha": {"num_layers": 1},
    "beta": {"num_layers": 2, "head": "low_rank", "head_rank": 4},
    "gamma": {"layers": "fork", "attach_at": 1, "rank": 4, "active": "answer"},
}


def save_stages(base: Path, folder: Path) -> list[str]:
    """Write the stages, and return their folders."""
    cascade = Cascade.from_pretrained(base, dtype=torch.float32)
    for seed, (name, fields) in enumerate(STAGES.items()):
        cascade.add_stage(name=name, **fields)
        scramble(cascade.stages[name], seed, scale=0.3)
        cascade.save_stage(name, folder / name, dtype=torch.float32)
    return [str(folder / name) for name in STAGES]


def open_models(repos: list[str]) -> tuple[Cascade, Any]:
    """Return a cascade of a base and saved stages, and the models of a server."""
    cascade = Cascade.from_pretrained(repos[0], dtype=torch.float32)
    return cascade, load_models(cascade, repos)


class Listener(list):
    """Keeps the events of one row."""

    @property
    def text(self) -> str:
        return "".join(event.text for event in self if isinstance(event, Piece))

    @property
    def end(self) -> End | None:
        return self[-1] if self and isinstance(self[-1], End) else None


def submit(engine: Engine, models: Any, name: str, prompt: list[int], **fields: Any) -> tuple[Row, Listener]:
    """Submit one request for a model."""
    model, listener = models[name], Listener()
    request = Request(
        model.stage,
        prompt,
        fields.pop("stop_token_ids", model.renderer.stop_token_ids),
        model.tokenizer,
        listener.append,
        **{"max_tokens": 12, **fields},
    )
    return engine.submit([request])[0], listener


def run_until_idle(engine: Engine) -> None:
    """Run steps until no row is left."""
    while engine.num_running or engine.num_waiting:
        engine.step()


class Server:
    """A server in this process, and OpenAI's client of it. `ask` returns a completion, `post` a response."""

    def __init__(self, engine: Engine, models: Any, **options: Any) -> None:
        self.app, self.reports = None, []  # type: ignore[var-annotated]
        self.engine, self.models = engine, models
        self.app = build_app(engine, models, report=self.reports.append, **options)

    def http(self) -> httpx2.AsyncClient:
        """Return a client of HTTP."""
        return httpx2.AsyncClient(transport=httpx2.ASGITransport(self.app), base_url="http://127.0.0.1:8000")

    def openai(self, key: str = "none") -> openai.AsyncOpenAI:
        """Return OpenAI's client."""
        url = "http://127.0.0.1:8000/v1"
        return openai.AsyncOpenAI(api_key=key, base_url=url, http_client=self.http(), max_retries=0)

    def ask(self, model: str = "alpha", content: str = "Hello", **fields: Any) -> Any:
        """Return one completion."""
        messages = fields.pop("messages", [{"role": "user", "content": content}])

        async def ask() -> Any:
            async with self.openai() as client:
                result = await client.chat.completions.create(model=model, messages=messages, **fields)
                return [chunk async for chunk in result] if fields.get("stream") else result

        return asyncio.run(ask())

    def request(self, method: str, path: str, **options: Any) -> httpx2.Response:
        """Return the response to a plain request."""

        async def send() -> Any:
            async with self.http() as client:
                return await client.request(method, path, **options)

        return asyncio.run(send())

    def post(self, **fields: Any) -> httpx2.Response:
        """Return the response to a chat request with these fields."""
        body = {"model": "alpha", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, **fields}
        return self.request("POST", "/v1/chat/completions", json=body)
