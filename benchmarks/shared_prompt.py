"""Several specialists answer one prompt: forks over one prefilled cache beside LoRA adapters of PEFT, in the same run.

    pip install -c constraints.txt -e ".[bench]"
    python benchmarks/shared_prompt.py --base FOLDER [--specialists 4] [--tokens 1500]

A fork that is active on the answer starts from the keys and values that the base left of the prompt, so the prompt is
read once for all. A LoRA adapter changes them, so each adapter reads the prompt itself. Reported are the seconds to the
first token of every specialist, the seconds of all of them, and the bytes of the prompt's keys and values.
Weights are random: the time does not depend on them. Medians of `--rounds` rounds, alternating.
"""

import argparse
import json
import statistics
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


def forks(base: str, dtype: str, count: int) -> Callable[[torch.Tensor], dict[str, Any]]:
    """Return a run of `count` forks that answer over one cache."""
    cascade = Cascade.from_pretrained(base, dtype=dtype)
    for index in range(count):
        name = f"s{index}"
        cascade.add_stage(
            name=name, layers="fork", attach_at="auto", rank=RANK, active="answer", head="none", seed=index
        )
        cascade.model(name)

    def run(ids: torch.Tensor) -> dict[str, Any]:
        started, times = time.perf_counter(), []
        prompt = DynamicCache(config=cascade.config)
        cascade.base(input_ids=ids[:, :-1], past_key_values=prompt, use_cache=True, logits_to_keep=1)
        for index in range(count):
            options = {"past_key_values": prompt, "max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}
            cascade.generate(input_ids=ids, stage=f"s{index}", **options)
            times.append(time.perf_counter() - started)
            # What the specialist added goes: the next one starts from the same prompt.
            prompt.crop(ids.shape[1] - 1 - prompt.get_seq_length())
        return {"first_tokens_s": times, "cache_bytes": cache_bytes(prompt)}

    return run


def adapters(base: str, dtype: str, count: int) -> Callable[[torch.Tensor], dict[str, Any]]:
    """Return a run of `count` LoRA adapters on all linear layers, each of which reads the prompt itself."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(Cascade.from_pretrained(base, dtype=dtype).base, config, adapter_name="s0").eval()
    for index in range(1, count):
        model.add_adapter(f"s{index}", config)

    def run(ids: torch.Tensor) -> dict[str, Any]:
        started, times, held = time.perf_counter(), [], 0
        for index in range(count):
            model.set_adapter(f"s{index}")
            cache = DynamicCache(config=model.config)
            options = {"past_key_values": cache, "max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}
            model.generate(input_ids=ids, **options)
            times.append(time.perf_counter() - started)
            held += cache_bytes(cache)
        return {"first_tokens_s": times, "cache_bytes": held}

    return run


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    for name, value in {"specialists": 4, "tokens": 1500, "rounds": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/shared_prompt.json"))
    args = parser.parse_args()
    arms = {"forks": forks, "LoRA, PEFT": adapters}
    runs = {name: make(args.base, args.dtype, args.specialists) for name, make in arms.items()}
    ids = torch.randint(1000, (1, args.tokens), generator=torch.Generator().manual_seed(0))
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in runs}
    for number in range(args.rounds + 1):
        for name, run in runs.items():
            result = run(ids)
            if number:  # the first round prepares
                rounds[name].append(result)
    rows = {}
    for name, results in rounds.items():
        times = [statistics.median(column) for column in zip(*(r["first_tokens_s"] for r in results), strict=True)]
        rows[name] = {"first_tokens_s": times, "all_s": times[-1], "cache_bytes": results[0]["cache_bytes"]}
    ratio = rows["LoRA, PEFT"]["all_s"] / rows["forks"]["all_s"]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"options": vars(args) | {"out": str(args.out)}, "rows": rows, "ratio": ratio}))
    print("| arm | seconds to each first token | all | cache of the prompt, MiB |\n|---|---|---:|---:|")
    for name, row in rows.items():
        each = ", ".join(f"{seconds:.2f}" for seconds in row["first_tokens_s"])
        print(f"| {name} | {each} | {row['all_s']:.2f} | {row['cache_bytes'] / 2**20:.1f} |")
    print(f"forks are {ratio:.2f} times as fast for all {args.specialists}")


if __name__ == "__main__":
    main()
