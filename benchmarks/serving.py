"""64 clients against `poe serve` with three stages: is a reply lost or mixed up, and how long does it take?

    pip install -c constraints.txt -e ".[dev]"
    python benchmarks/serving.py [--base demo] [--clients 64] [--seconds 120] [--json results.json]

Three random stages are made on the base: new layers, new layers with a low-rank head, and a fork that is active on the
answer. Each client sends one streamed request after another, to a random model, for `--seconds`; then what runs is
finished. There are two kinds of requests, and each reply is checked by its content:

    plain     a question out of a pool; the reply must equal the one that the server gave to it alone, before the load
    ticket    a tool with a number that only this request has, and tool_choice required; the call must hold that number

The arms, one after the other on the same cores:

    batch            poe serve, both kinds, all models
    one at a time    the same with --max-batch 1
    batch, plain     poe serve, plain questions for one stage
    transformers     `transformers serve` on the export of that stage, the same questions

A plain reply that is not the expected one is counted as different: in bf16 the rounding of larger matrix products flips
a token now and then, where two are almost equally likely. The default is fp32, where that is rare. A ticket has no such
excuse: a wrong one is counted as mixed up. `transformers serve` ignores tool_choice, so it gets no tickets; it finds
the class of a model by its name in transformers, so it cannot serve the export of a PoE base (`--base demo`).
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch

from poe import Cascade

STAGES: dict[str, dict[str, Any]] = {
    "layers": {"num_layers": 2},
    "head": {"num_layers": 1, "head": "low_rank", "head_rank": 8},
    "fork": {"layers": "fork", "rank": 8, "active": "answer"},
}
EXPORTED = "layers"
LAUNCHERS = {
    "auto": "from poe.commands.poe import main; main()",
    "float32": "from poe.training import precision; precision.bf16_is_fast = lambda device: False; "
    "from poe.commands.poe import main; main()",
}
POOL = 6  # plain questions for each model
NAMES = ("Marla", "Oskar", "Rosa", "Tariq", "Yuki", "Bela")


def make_stages(base: str, folder: Path) -> list[str]:
    """Write the stages and the export of one; return the stages' folders."""
    cascade = Cascade.from_pretrained(base)
    generator = torch.Generator().manual_seed(0)
    exits = getattr(cascade.config, "stage_layers", None)
    below = exits[0] if exits else cascade.config.num_hidden_layers // 2
    for name, fields in STAGES.items():
        cascade.add_stage(name=name, **fields, **({"attach_at": below} if name == "fork" else {}))
        with torch.no_grad():
            for parameter in cascade.stages[name].parameters():
                if parameter.requires_grad:
                    noise = torch.randn(parameter.shape, generator=generator) * 0.02
                    parameter.add_(noise.to(parameter))
        cascade.save_stage(name, folder / name)
    cascade.export_native(EXPORTED, folder / "export")
    return [str(folder / name) for name in STAGES]


@contextlib.contextmanager
def running(words: list[str], ready: str, log: Path) -> Iterator[tuple[str, int]]:
    """Start a server, wait for a line with its address, and yield host and port; then stop it."""
    with log.open("w+") as output:
        process = subprocess.Popen(
            words, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, "HF_HUB_OFFLINE": "1"}
        )
        try:
            while not (found := re.search(ready, log.read_text())):
                if process.poll() is not None:
                    raise SystemExit(f"{' '.join(words[:4])} ended: {log.read_text()[-2000:]}")
                time.sleep(0.2)
            yield found[1], int(found[2])
        finally:
            process.terminate()
            process.wait(timeout=60)


@dataclass(frozen=True)
class Request:
    """One request: what is sent, and what the reply must be (None: not known yet)."""

    body: dict[str, Any]
    kind: str
    key: Any
    expected: str | None = None


@dataclass
class Results:
    """What the clients of one arm saw. Times are in seconds."""

    arm: str
    started: int = 0
    right: int = 0
    different: int = 0
    mixed_up: int = 0
    failures: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0

    def summary(self) -> dict[str, Any]:
        """Return the numbers of the table."""
        finished = self.right + self.different + self.mixed_up
        lost = self.started - finished - len(self.failures)
        counts = {"requests": self.started, "right": self.right, "different": self.different}
        counts |= {"mixed up": self.mixed_up, "lost": lost, "failed": len(self.failures)}
        times = {
            f"{name} p{share}": round(quantiles(values, n=100)[share - 1], 3) if len(values) > 1 else None
            for name, values in (("first", self.first), ("whole", self.whole))
            for share in (50, 95, 99)
        }
        return {"arm": self.arm, **counts, **times, "tokens/s": round(self.tokens / self.seconds, 1)}


async def ask(host: str, port: int, request: Request) -> tuple[str, int, float, float]:
    """Send a request as a stream; return the reply's content or call, its tokens, and the seconds to first and last."""
    data = json.dumps({**request.body, "stream": True, "stream_options": {"include_usage": True}}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(f"{head}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data)
        status = await reader.readline()
        if b" 200 " not in status:
            raise RuntimeError(f"{status.decode().strip()}: {(await reader.read())[-300:].decode()}")
        text, pieces, first, usage, is_whole = "", 0, 0.0, None, False
        while line := await reader.readline():
            if not line.startswith(b"data: "):
                continue
            if line.startswith(b"data: [DONE]"):
                is_whole = True
                break
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise RuntimeError(str(chunk["error"]))
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:
                delta = choice["delta"]
                new = delta.get("content") or ""
                new += "".join(call["function"]["arguments"] for call in delta.get("tool_calls") or ())
                if new:
                    text, pieces, first = text + new, pieces + 1, first or time.perf_counter() - start
                is_whole = is_whole or bool(choice.get("finish_reason"))
        if not is_whole:
            raise RuntimeError("the stream ended before the reply")
        whole = time.perf_counter() - start
        return text, (usage or {}).get("completion_tokens") or pieces, first or whole, whole
    finally:
        writer.close()


def plain_request(model: str, number: int, length: int) -> Request:
    """Return a question out of the pool."""
    text = f"Please book a gondola for {NAMES[number % len(NAMES)]} for {3 + number} people and tell me the way there."
    body = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": length, "temperature": 0}
    return Request(body, "plain", (model, number))


def ticket_request(model: str, number: int, length: int) -> Request:
    """Return a request that only one reply answers."""
    ticket = f"T-{number:07d}"
    schema = {"type": "object", "properties": {"ticket": {"enum": [ticket]}}, "required": ["ticket"]}
    tool = {"type": "function", "function": {"name": "close_ticket", "description": "Close it.", "parameters": schema}}
    messages = [{"role": "user", "content": f"Close the ticket {ticket}."}]
    body = {"model": model, "messages": messages, "tools": [tool], "tool_choice": "required", "max_tokens": length}
    return Request(body, "ticket", ticket, json.dumps({"ticket": ticket}))


async def load(
    arm: str, host: str, port: int, models: list[str], kinds: list[str], args: argparse.Namespace
) -> Results:
    """Let the clients ask until the time is over, and wait for every reply."""
    references: dict[Any, str] = {}
    for model in models:
        for number in range(POOL):
            request = plain_request(model, number, args.tokens)
            references[request.key] = (await ask(host, port, request))[0]
    results, chance, tickets = Results(arm), random.Random(0), iter(range(10**7))
    start = time.perf_counter()

    async def client() -> None:
        while time.perf_counter() - start < args.seconds:
            model, kind = chance.choice(models), chance.choice(kinds)
            if kind == "plain":
                request = plain_request(model, chance.randrange(POOL), args.tokens)
                expected = references[request.key]
            else:
                request = ticket_request(model, next(tickets), args.tokens)
                expected = request.expected or ""
            results.started += 1
            try:
                text, tokens, first, whole = await ask(host, port, request)
            except (RuntimeError, OSError, ValueError) as error:
                results.failures.append(str(error)[:300])
                continue
            results.tokens += tokens
            results.first.append(first)
            results.whole.append(whole)
            if text == expected:
                results.right += 1
            elif kind == "ticket":
                results.mixed_up += 1
            else:
                results.different += 1

    await asyncio.gather(*(client() for _ in range(args.clients)))
    results.seconds = time.perf_counter() - start
    return results


def main() -> None:
    """Run the arms and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="demo", help="the embedded base, or a folder")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120, help="of each arm")
    parser.add_argument("--tokens", type=int, default=48, help="of a reply, at most")
    parser.add_argument("--dtype", choices=list(LAUNCHERS), default="float32")
    parser.add_argument("--max-batch", type=int, default=32)
    parser.add_argument("--arms", help="some of batch,one,plain,transformers; all that the base allows if left out")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    args = parser.parse_args()
    summaries = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        stages = make_stages(args.base, folder)
        poe = [sys.executable, "-c", LAUNCHERS[args.dtype], "serve", args.base, *stages]
        poe += ["--name", "base", "--port", "0"]
        ours = r"http://([\d.]+):(\d+)/v1"
        theirs = [str(Path(sys.executable).with_name("transformers")), "serve", str(folder / "export")]
        port = str(random.randint(20000, 60000))
        theirs += ["--trust-remote-code", "--dtype", args.dtype, "--host", "127.0.0.1", "--port", port]
        every, both = ["base", *STAGES], ["plain", "ticket"]
        arms: dict[str, tuple[str, list[str], str, list[str], list[str]]] = {
            "batch": ("batch", [*poe, "--max-batch", str(args.max_batch)], ours, every, both),
            "one": ("one at a time", [*poe, "--max-batch", "1"], ours, every, both),
            "plain": ("batch, plain", [*poe, "--max-batch", str(args.max_batch)], ours, [EXPORTED], ["plain"]),
            "transformers": ("transformers", theirs, r"http://([\d.]+):(\d+)", [str(folder / "export")], ["plain"]),
        }
        allowed = [name for name in arms if name != "transformers" or args.base != "demo"]
        for name in args.arms.split(",") if args.arms else allowed:
            title, words, ready, models, kinds = arms[name]
            with running(words, ready, folder / f"{name}.log") as (host, number):
                results = asyncio.run(load(title, host, number, models, kinds, args))
            summaries.append({**results.summary(), "first failures": results.failures[:3]})
            print(json.dumps(summaries[-1]), flush=True)
    columns = [column for column in summaries[0] if column != "first failures"]
    print("\n| " + " | ".join(columns) + " |\n|---|" + "---:|" * (len(columns) - 1))
    for summary in summaries:
        print("| " + " | ".join(str(summary[column]) for column in columns) + " |")
    if args.json:
        settings = {name: str(value) for name, value in vars(args).items()}
        args.json.write_text(json.dumps({"settings": settings, "arms": summaries}, indent=1))


if __name__ == "__main__":
    main()
