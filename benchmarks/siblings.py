"""Memory and load time of ten specialists on one base, against ten full models and ten PEFT adapters.

    pip install -c constraints.txt -e ".[bench]"
    python benchmarks/siblings.py [--siblings 10 --layers 12 --width 512 --vocab 16384 --stage-layers 4 --rounds 3]
    python benchmarks/siblings.py --base FOLDER --sibling tool=xlam=FILE --sibling math=gsm8k=FILE ... [--out FOLDER]

With --base the question is another one: what real siblings answer alone, chained, composed, and routed. See
`sibling_scores.py`; the same command continues where it was stopped.

The base is a random Qwen3 model in bf16. Every specialist is on disk in the format of each arm. Each arm runs in a
separate process, which loads the base, attaches every specialist and runs one forward pass with each, so that mapped
pages are in memory. It reports the bytes of all distinct tensors, resident memory, and the seconds to attach each
specialist. In every round each arm runs once; the table has medians. The limit is one read of the base and of all
deltas.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from poe import Cascade, StageConfig

ARMS = {
    "stages, dense head": "dense",
    "stages, low-rank head": "low_rank",
    "stages, low-rank head, verify=False": "low_rank",
    "LoRA r16 all-linear, PEFT": "lora",
    "full models": "full",
}


def prepare(folder: Path, args: argparse.Namespace) -> None:
    """Write the base and every specialist to `folder`."""
    torch.manual_seed(0)
    base = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=args.vocab,
            hidden_size=args.width,
            intermediate_size=3 * args.width,
            num_hidden_layers=args.layers,
            num_attention_heads=args.width // 64,
            num_key_value_heads=args.width // 64,
            head_dim=64,
            tie_word_embeddings=False,
        )
    ).to(torch.bfloat16)
    base.save_pretrained(folder / "base")
    for number in range(args.siblings):
        for head in ("dense", "low_rank"):
            cascade = Cascade.from_pretrained(folder / "base")
            cascade.add_stage(StageConfig(f"s{number}", args.stage_layers, head=head), seed=number)
            with torch.no_grad():
                for parameter in cascade.stages[f"s{number}"].parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.02)
            cascade.save_stage(f"s{number}", folder / head / str(number))
            if head == "dense":
                cascade.export_native(f"s{number}", folder / "full" / str(number))
        from peft import LoraConfig, get_peft_model

        adapted = get_peft_model(
            AutoModelForCausalLM.from_pretrained(folder / "base"), LoraConfig(r=16, target_modules="all-linear")
        )
        adapted.save_pretrained(folder / "lora" / str(number))


def openers(arm: str, folder: Path) -> tuple[Callable[[], Any], Callable[[Any, int], Callable[..., Any]]]:
    """Return the function that loads the base of an arm, and the function that attaches a specialist and returns it."""
    kind = ARMS[arm]

    def attach(loaded: Any, number: int) -> Callable[..., Any]:
        if kind == "full":
            loaded.append(AutoModelForCausalLM.from_pretrained(folder / "full" / str(number)))
            return loaded[-1]
        if kind == "lora":
            from peft import PeftModel

            if not isinstance(loaded[0], PeftModel):
                loaded[0] = PeftModel.from_pretrained(loaded[0], folder / "lora" / "0", adapter_name="s0")
            else:
                loaded[0].load_adapter(folder / "lora" / str(number), adapter_name=f"s{number}")
            loaded[0].set_adapter(f"s{number}")
            return loaded[0]
        loaded[0].load_stage(folder / kind / str(number), verify="verify=False" not in arm)
        return loaded[0].model(f"s{number}")

    def base() -> Any:
        if kind == "full":
            return []
        return [(AutoModelForCausalLM if kind == "lora" else Cascade).from_pretrained(folder / "base")]

    return base, attach


def tensor_bytes(modules: Iterable[torch.nn.Module]) -> int:
    """Return the bytes of all distinct storages of parameters and buffers."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for module in modules
        for tensor in (*module.parameters(), *module.buffers())
    }
    return sum(storages.values())


def run_arm(arm: str, folder: Path, count: int) -> dict[str, Any]:
    """Attach every specialist and run one forward pass with each; return times and memory."""
    base, attach = openers(arm, folder)
    ids = torch.arange(1, 33)[None]
    before = resident()
    started = time.perf_counter()
    loaded = base()
    open_seconds = time.perf_counter() - started
    seconds, models = [], []
    with torch.no_grad():
        for number in range(count):
            started = time.perf_counter()
            model = attach(loaded, number)
            seconds.append(time.perf_counter() - started)
            model(input_ids=ids, use_cache=False)
            models.append(model)
    return {
        "open_s": open_seconds,
        "attach_s": seconds,
        "tensor_bytes": tensor_bytes({id(m): m for m in models}.values()),
        "resident_bytes": resident() - before,
    }


def resident() -> int:
    """Return the resident memory of this process in bytes, or its peak on systems without /proc."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = {"siblings": 10, "layers": 12, "width": 512, "vocab": 16384, "stage_layers": 4, "rounds": 3}
    for name, value in shape.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--json", type=Path, default=Path("runs/bench/siblings.json"))
    real = parser.add_argument_group("siblings on a real base")
    real.add_argument("--base", type=Path, help="folder of a pretrained base, for example of benchmarks/smollm2.py")
    real.add_argument("--sibling", action="append", default=[], help="NAME=SPEC; chains stand on the first")
    real.add_argument("--out", type=Path, default=Path("runs/siblings"))
    sizes = {"steps": 48, "tokens_per_step": 1024, "seq_len": 512, "train_rows": 400, "test_rows": 24, "seed": 0}
    for name, value in {**sizes, "asked": 16, "max_new_tokens": 160}.items():
        real.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(run_arm(args.arm, args.folder, args.siblings)))
        return
    if args.base:
        from sibling_scores import make_result, measure, write_tables

        results = measure(args)
        write_json(args.json, results)
        write_json(args.out / "result.json", make_result(results, args))
        print(write_tables(results), end="")
        return
    with tempfile.TemporaryDirectory(prefix="poe-siblings-") as scratch:
        folder = Path(scratch)
        prepare(folder, args)
        runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
        for _ in range(args.rounds):
            for arm in ARMS:
                command = [sys.executable, __file__, "--arm", arm, "--folder", str(folder)]
                command += ["--siblings", str(args.siblings)]
                printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                runs[arm].append(json.loads(printed.splitlines()[-1]))
        on_disk = {
            arm: sum(f.stat().st_size for f in (folder / kind).rglob("*.safetensors")) for arm, kind in ARMS.items()
        }
    rows = []
    for arm, results in runs.items():
        rows.append(
            {
                "arm": arm,
                "tensor_mib": round(statistics.median(r["tensor_bytes"] for r in results) / 2**20, 1),
                "resident_mib": round(statistics.median(r["resident_bytes"] for r in results) / 2**20, 1),
                "disk_mib": round(on_disk[arm] / 2**20, 1),
                "open_base_s": round(statistics.median(r["open_s"] for r in results), 3),
                "attach_first_s": round(statistics.median(r["attach_s"][0] for r in results), 3),
                "attach_last_s": round(statistics.median(r["attach_s"][-1] for r in results), 3),
            }
        )
    write_json(args.json, {"shape": {name: getattr(args, name) for name in shape}, "rows": rows, "runs": runs})
    print("| arm | tensors MiB | resident MiB | on disk MiB | open base s | attach first s | attach last s |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")


if __name__ == "__main__":
    main()
