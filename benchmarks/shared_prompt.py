"""Several specialists answer one prompt: forks with one shared cache of the prompt, against LoRA adapters of PEFT.

    pip install -c constraints.txt -e ".[bench]"
    python benchmarks/shared_prompt.py --base FOLDER [--specialists 4] [--tokens 1500] [--vllm PYTHON]

A fork that is active on the answer uses the base's keys and values of the prompt, so one prefill serves all forks. A
LoRA adapter changes the keys and values, so each adapter needs its own prefill. The benchmark reports the seconds until
the first token of each specialist, the seconds for all specialists, and the bytes of the keys and values of the prompt.
The tokens are random and the specialists untrained; the time does not depend on them. Times are medians over `--rounds`
rounds, and each arm runs once per round. CPU seconds (of all threads) depend less on other work on the machine.

With `--vllm`, the forks are also written as LoRA adapters, and vLLM on a CPU serves them after the other arms. PYTHON
is an interpreter with vLLM, such as the one that `make test-vllm` makes.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from poe import Cascade

RANK = 16


def cache_bytes(cache: DynamicCache) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def add_forks(base: str, dtype: str, count: int) -> Cascade:
    cascade = Cascade.from_pretrained(base, dtype=dtype)
    for index in range(count):
        name = f"s{index}"
        cascade.add_stage(
            name=name, layers="fork", attach_at="auto", rank=RANK, active="answer", head="none", seed=index
        )
        cascade.model(name)
    return cascade


def forks(base: str, dtype: str, count: int) -> Callable[[torch.Tensor], dict[str, Any]]:
    """Return a function that prefills a prompt once and generates a token with each of `count` forks."""
    cascade = add_forks(base, dtype, count)

    def run(ids: torch.Tensor) -> dict[str, Any]:
        started, used, times = time.perf_counter(), time.process_time(), []
        prompt = DynamicCache(config=cascade.config)
        cascade.base(input_ids=ids[:, :-1], past_key_values=prompt, use_cache=True, logits_to_keep=1)
        for index in range(count):
            options = {"past_key_values": prompt, "max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}
            cascade.generate(input_ids=ids, stage=f"s{index}", **options)
            times.append(time.perf_counter() - started)
            # Remove the entries of this specialist, so that the cache holds only the prompt.
            prompt.crop(ids.shape[1] - 1 - prompt.get_seq_length())
        return {"first_tokens_s": times, "cpu_s": time.process_time() - used, "cache_bytes": cache_bytes(prompt)}

    return run


def adapters(base: str, dtype: str, count: int) -> Callable[[torch.Tensor], dict[str, Any]]:
    """Return a function that prefills a prompt and generates a token with each of `count` LoRA adapters."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(Cascade.from_pretrained(base, dtype=dtype).base, config, adapter_name="s0").eval()
    for index in range(1, count):
        model.add_adapter(f"s{index}", config)

    def run(ids: torch.Tensor) -> dict[str, Any]:
        started, used, times, total_bytes = time.perf_counter(), time.process_time(), [], 0
        for index in range(count):
            model.set_adapter(f"s{index}")
            cache = DynamicCache(config=model.config)
            options = {"past_key_values": cache, "max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}
            model.generate(input_ids=ids, **options)
            times.append(time.perf_counter() - started)
            total_bytes += cache_bytes(cache)
        return {"first_tokens_s": times, "cpu_s": time.process_time() - used, "cache_bytes": total_bytes}

    return run


def serve_in_vllm(python: str, base: str, dtype: str, count: int, rounds: int, ids: torch.Tensor) -> list[Any]:
    """Return the rounds of `vllm_adapters.py` with the forks as LoRA adapters; the first one warms up."""
    cascade = add_forks(base, dtype, count)
    with tempfile.TemporaryDirectory() as folder:
        adapters = [str(cascade.export_peft(name, Path(folder) / name)) for name in cascade.stages]
        command = [python, str(Path(__file__).with_name("vllm_adapters.py")), dtype, str(rounds + 1), base, *adapters]
        environment = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            command, input=json.dumps(ids[0].tolist()), env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"first')][1:]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    for name, value in {"specialists": 4, "tokens": 1500, "rounds": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--vllm", metavar="PYTHON", help="also serve the forks as LoRA adapters with this vLLM")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/shared_prompt.json"))
    args = parser.parse_args()
    arms = {"forks": forks, "LoRA, PEFT": adapters}
    runs = {name: make(args.base, args.dtype, args.specialists) for name, make in arms.items()}
    ids = torch.randint(1000, (1, args.tokens), generator=torch.Generator().manual_seed(0))
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in runs}
    for number in range(args.rounds + 1):
        for name, run in runs.items():
            result = run(ids)
            if number:  # the first round warms up
                rounds[name].append(result)
    if args.vllm:
        rounds["LoRA, vLLM"] = serve_in_vllm(args.vllm, args.base, args.dtype, args.specialists, args.rounds, ids)
    rows = {}
    for name, results in rounds.items():
        times = [statistics.median(column) for column in zip(*(r["first_tokens_s"] for r in results), strict=True)]
        cpu = statistics.median(r["cpu_s"] for r in results)
        rows[name] = {
            "first_tokens_s": times,
            "all_s": times[-1],
            "cpu_s": cpu,
            "cache_bytes": results[0]["cache_bytes"],
        }
    ratio = rows["LoRA, PEFT"]["all_s"] / rows["forks"]["all_s"]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"options": vars(args) | {"out": str(args.out)}, "rows": rows, "ratio": ratio}))
    print("| arm | seconds to each first token | all | CPU | cache of the prompt, MiB |\n|---|---|---:|---:|---:|")
    for name, row in rows.items():
        each = ", ".join(f"{seconds:.2f}" for seconds in row["first_tokens_s"])
        print(f"| {name} | {each} | {row['all_s']:.2f} | {row['cpu_s']:.2f} | {row['cache_bytes'] / 2**20:.1f} |")
    print(f"forks are {ratio:.2f} times as fast for all {args.specialists}")


if __name__ == "__main__":
    main()
