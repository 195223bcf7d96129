"""One routed batch for several specialists of one base, against separate models and PEFT's mixed batch.

    pip install -c constraints.txt -e ".[bench]"
    python benchmarks/routing.py [--small] [--rows 10 --siblings 5 --stage-layers 4 --rounds 5]

The base is a random Llama model. Every row is a left-padded prompt for one specialist. Every row gets the same number
of new tokens from the `generate` method of transformers, greedily and with a cache. The arms:

    routed        Cascade.generate(stage=[...]): one pass of the batch through the trunk, then the layers of each stage
    shells        the model of each specialist on its rows, one after another; all models share the base's tensors
    full copies   like shells, but every specialist is a separate full checkpoint (Cascade.export_native)
    PEFT mixed    LoRA on all linear layers of the base, `generate(adapter_names=[...])`
    base alone    all rows with the base alone; this is the limit of routing

Before timing, the benchmark compares the tokens of routed rows and separate models; in float32 all must be equal. In
every round each arm runs once; the order rotates. The table has medians, and the bytes of all distinct tensors of an
arm. CPU time is more reliable than wall time if other programs use the same cores.
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
    """Return a random base; every call returns the same weights."""
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
    # Set the dtype at creation: a later cast would round the rotary frequencies, which loading a checkpoint does not.
    model: LlamaForCausalLM = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype))
    model.to(args.device).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def add_noise(module: nn.Module, seed: int) -> None:
    """Add noise to every parameter, so that the specialists differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_((torch.randn(parameter.shape, generator=generator) * 0.02).to(parameter))


class Arms:
    """All arms, with the prompts that every arm gets."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.names = [f"s{i}" for i in range(args.siblings)]
        self.stages = [self.names[row % args.siblings] for row in range(args.rows)]
        self.cascade = Cascade(base_model(args))
        for seed, name in enumerate(self.names):
            self.cascade.add_stage(StageConfig(name, args.stage_layers, head="low_rank", head_rank=64), seed=seed)
            add_noise(self.cascade.stages[name], seed)
        self.full = {}
        for name in self.names:
            self.cascade.export_native(name, folder / name)
            model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=getattr(torch, args.dtype))
            self.full[name] = model.to(args.device).eval()
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
            "shells": lambda: self.generate_one_by_one(self.cascade.model),
            "full copies": lambda: self.generate_one_by_one(self.full.__getitem__),
            "PEFT mixed": lambda: self.lora.generate(**self.inputs, **self.options, adapter_names=self.stages),
            "base alone": lambda: self.cascade.generate(**self.inputs, **self.options, stage=None),
        }

    def generate_one_by_one(self, model: Callable[[str], Any]) -> Tensor:
        """Generate the rows of each specialist with its model, one specialist after another."""
        outputs = {}
        for name in self.names:
            rows = [row for row, stage in enumerate(self.stages) if stage == name]
            output = model(name).generate(**{key: x[rows] for key, x in self.inputs.items()}, **self.options)
            outputs.update(zip(rows, output, strict=True))
        return torch.stack([outputs[row] for row in range(len(self.stages))])

    def tensor_bytes(self, arm: str) -> int:
        """Return the bytes of all tensors of an arm, including folded heads."""
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
    """Return the base with one LoRA adapter per specialist."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=LORA_RANK, target_modules="all-linear")
    model = get_peft_model(base_model(args), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    for seed, (path, module) in enumerate(model.named_modules()):
        if "lora_B." in path:
            add_noise(module, seed)
    return model.to(dtype=getattr(torch, args.dtype)).eval()


@torch.no_grad()
def tensor_bytes(modules: Iterable[nn.Module]) -> int:
    """Return the bytes of all distinct storages of parameters, buffers and folded heads."""
    storages = {}
    for model in modules:
        folded = [m.weight for m in model.modules() if isinstance(m, FoldedHead)]
        for tensor in (*model.parameters(), *model.buffers(), *folded):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def time_call(call: Callable[[], Tensor], device: str) -> tuple[float, float]:
    """Return the wall time and the CPU time of one call in seconds; wall time includes the work on the GPU."""
    started, used = time.perf_counter(), time.process_time()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, time.process_time() - used


@torch.no_grad()
def agreement(arms: Arms) -> float:
    """Return the share of tokens that are equal in the routed batch and the full copies; bf16 ties may differ."""
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
            raise SystemExit(
                f"Expected routed rows and separate models to generate equal tokens, but only {agreed:.1%} are equal."
            )
        names = list(arms.run)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        for name in names:
            time_call(arms.run[name], args.device)  # the first call folds heads and fills caches
        for turn in range(args.rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                times[name].append(time_call(arms.run[name], args.device))
    tokens = args.rows * args.new_tokens
    wall, cpu = ({name: statistics.median(t[i] for t in times[name]) for name in names} for i in range(2))
    rows = [
        {
            "arm": name,
            "tokens_per_s": round(tokens / wall[name], 1),
            "tokens_per_cpu_s": round(tokens / cpu[name], 1),
            "routed_is_faster_by": round(wall[name] / wall["routed"], 2),
            "by_cpu_time": round(cpu[name] / cpu["routed"], 2),
            "tensor_mib": round(arms.tensor_bytes(name) / 2**20, 1),
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
