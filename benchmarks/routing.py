"""Ten rows over five specialists of one base: one routed batch, against five separate models and PEFT's mixed batch.

    pip install -c constraints.txt -e ".[bench]"
    python benchmarks/routing.py [--small] [--rows 10 --siblings 5 --stage-layers 4 --rounds 5]

A random llama-shaped base; every row is a prompt for one of the specialists, left-padded, and gets the same number of
new tokens greedily, through transformers' own `generate` with a cache. The arms:

    routed        Cascade.generate(stage=[...]): one pass through the trunk, each row's own layers above it
    shells        each specialist's model on its rows, one after the other; all share the base's tensors
    full copies   the same, but every specialist is an ordinary checkpoint of its own (Cascade.export_native)
    PEFT mixed    LoRA on all linear layers of the base, `generate(adapter_names=[...])`
    base alone    all rows by the base: what routing cannot be faster than

Tokens are checked before anything is timed: the routed rows must say what the separate models say. In every round
each arm runs once, the order rotating; medians are reported, with the bytes of all distinct tensors that an arm holds.
Where other programs share the cores, the CPU's time tells more than the clock.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from poe import Cascade, StageConfig
from poe.modeling.heads import FoldedHead

SHAPE = {"layers": 12, "width": 512, "vocab": 16384, "prompt": 32, "new_tokens": 32}
SMALL = {"layers": 4, "width": 128, "vocab": 2048, "prompt": 16, "new_tokens": 16}
LORA_RANK = 16


def base_model(args: argparse.Namespace) -> LlamaForCausalLM:
    """A random base; every call makes the same one."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.width,
        intermediate_size=3 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 64,
        num_key_value_heads=args.width // 64,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    # Not cast after loading: that would round the rotary frequencies, which a checkpoint does not.
    model: LlamaForCausalLM = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype))
    model.to(args.device).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def shake(module: nn.Module, seed: int) -> None:
    """Noise on every parameter, so that the specialists differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_((torch.randn(parameter.shape, generator=generator) * 0.02).to(parameter))


class Arms:
    """Every way to answer the same prompts."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.names = [f"s{i}" for i in range(args.siblings)]
        self.stages = [self.names[row % args.siblings] for row in range(args.rows)]
        self.cascade = Cascade(base_model(args))
        for seed, name in enumerate(self.names):
            self.cascade.add_stage(StageConfig(name, args.stage_layers, head="low_rank", head_rank=64), seed=seed)
            shake(self.cascade.stages[name], seed)
        self.full = {}
        for name in self.names:
            self.cascade.export_native(name, folder / name)
            opened = AutoModelForCausalLM.from_pretrained(folder / name, dtype=getattr(torch, args.dtype))
            self.full[name] = opened.to(args.device).eval()
        self.lora = lora_model(args, self.names)
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(1, args.vocab, (args.rows, args.prompt), generator=generator)
        mask = torch.ones_like(ids)
        for row in range(args.rows):
            mask[row, : row % 8] = 0  # left padding
        self.inputs = {"input_ids": ids.to(args.device), "attention_mask": mask.to(args.device)}
        self.options = {"max_new_tokens": args.new_tokens, "do_sample": False}
        self.run: dict[str, Callable[[], Tensor]] = {
            "routed": lambda: self.cascade.generate(**self.inputs, **self.options, stage=self.stages),
            "shells": lambda: self.one_by_one(self.cascade.model),
            "full copies": lambda: self.one_by_one(self.full.__getitem__),
            "PEFT mixed": lambda: self.lora.generate(**self.inputs, **self.options, adapter_names=self.stages),
            "base alone": lambda: self.cascade.generate(**self.inputs, **self.options, stage=None),
        }

    def one_by_one(self, model: Callable[[str], Any]) -> Tensor:
        """Every specialist answers its rows."""
        said = {}
        for name in self.names:
            rows = [row for row, stage in enumerate(self.stages) if stage == name]
            output = model(name).generate(**{key: x[rows] for key, x in self.inputs.items()}, **self.options)
            said.update(zip(rows, output, strict=True))
        return torch.stack([said[row] for row in range(len(self.stages))])

    def held(self, arm: str) -> int:
        """The bytes of all tensors that an arm needs, folded heads among them."""
        shells = [self.cascade.model(name) for name in self.names]
        modules: dict[str, list[nn.Module]] = {
            "routed": shells,
            "shells": shells,
            "full copies": list(self.full.values()),
            "PEFT mixed": [self.lora],
            "base alone": [self.cascade.base],
        }
        return tensor_bytes(modules[arm])


def lora_model(args: argparse.Namespace, names: list[str]) -> Any:
    """The base with one LoRA for each specialist."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=LORA_RANK, target_modules="all-linear")
    model = get_peft_model(base_model(args), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    for seed, (path, module) in enumerate(model.named_modules()):
        if "lora_B." in path:
            shake(module, seed)
    return model.to(dtype=getattr(torch, args.dtype)).eval()


@torch.no_grad()
def tensor_bytes(modules: Iterable[nn.Module]) -> int:
    """The bytes of all distinct storages of parameters, buffers and folded heads."""
    storages = {}
    for model in modules:
        folded = [m.weight for m in model.modules() if isinstance(m, FoldedHead)]
        for tensor in (*model.parameters(), *model.buffers(), *folded):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def seconds(call: Callable[[], Tensor], device: str) -> tuple[float, float]:
    """The wall time of one call, to the end of the device's work, and the CPU's time in it."""
    started, used = time.perf_counter(), time.process_time()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, time.process_time() - used


@torch.no_grad()
def agreement(arms: Arms) -> float:
    """The share of tokens in which the routed batch says what the full copies say (ties in bf16 may fall otherwise)."""
    ours, theirs = arms.run["routed"](), arms.run["full copies"]()
    start = arms.inputs["input_ids"].shape[1]
    return float((ours[:, start:] == theirs[:, start:]).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a base of four layers and width 128")
    counts = {"rows": 10, "siblings": 5, "stage_layers": 4, "rounds": 5}
    for name, value in counts.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, default=Path("runs/bench/routing.json"))
    args = parser.parse_args()
    shape = SMALL if args.small else SHAPE
    vars(args).update(shape)
    with tempfile.TemporaryDirectory(prefix="poe-routing-") as scratch, torch.no_grad():
        arms = Arms(args, Path(scratch))
        agreed = agreement(arms)
        if args.dtype == "float32" and agreed < 1.0:
            raise SystemExit(f"Routed rows say something else than the separate models: {agreed:.1%} of tokens agree.")
        names = list(arms.run)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        for name in names:
            seconds(arms.run[name], args.device)  # first calls fold heads and fill caches
        for turn in range(args.rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                times[name].append(seconds(arms.run[name], args.device))
    tokens = args.rows * args.new_tokens
    wall, cpu = ({name: statistics.median(t[i] for t in times[name]) for name in names} for i in range(2))
    rows = [
        {
            "arm": name,
            "tokens_per_s": round(tokens / wall[name], 1),
            "tokens_per_cpu_s": round(tokens / cpu[name], 1),
            "routed_is_faster_by": round(wall[name] / wall["routed"], 2),
            "by_cpu_time": round(cpu[name] / cpu["routed"], 2),
            "tensor_mib": round(arms.held(name) / 2**20, 1),
        }
        for name in names
    ]
    args.json.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "shape": {**shape, **{name: getattr(args, name) for name in counts}},
        "dtype": args.dtype,
        "device": torch.cuda.get_device_name()
        if args.device == "cuda"
        else f"cpu, {torch.get_num_threads()} thread(s)",
        "tokens_agree": agreed,
        "rows": rows,
        "seconds": times,
    }
    args.json.write_text(json.dumps(content, indent=2) + "\n")
    print(f"{content['device']}, {args.dtype}; routed and separate models agree on {agreed:.2%} of tokens\n")
    print("| arm | tokens/s | tokens/CPU s | routed is faster by | by CPU time | tensors MiB |")
    print("|---|---:|---:|---:|---:|---:|")
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")


if __name__ == "__main__":
    main()
