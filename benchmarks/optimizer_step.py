"""Time of one optimizer step against torch's optimizers, and of two processes against one.

    pip install -c constraints.txt -e .
    OMP_NUM_THREADS=2 python benchmarks/optimizer_step.py [--width 1024 --rounds 7]

The first table times the optimizers on the matrices and norms of one layer and of four layers (attention 4 d^2,
feed-forward 8 d^2: 12.6 M and 50.3 M parameters at width 1,024), in fp32 with random gradients. In every round each
optimizer takes one step. The second table compares ZeRO-2 on two processes (gloo, half the threads each) with one
process: the losses of a small network on the same rows, and the time of a step on one layer and a dense head delta.
"""

import argparse
import gc
import json
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from poe.training.optim import MuonAdamW, build_optimizer
from poe.training.precision import choose_dtype

Named = list[tuple[str, nn.Parameter]]
STEPS = 30
PROCESSES = 2


def parameters(width: int, layers: int, head: int = 0) -> Named:
    """Return the parameters of `layers` layers and of a head with `head` rows, each with a random gradient."""
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"head.weight": (head, width)} if head else {}
    for i in range(layers):
        shapes |= {f"layers.{i}.{name}.weight": (width, width) for name in ("q", "k", "v", "o")}
        shapes |= {f"layers.{i}.up.weight": (4 * width, width), f"layers.{i}.down.weight": (width, 4 * width)}
        shapes |= {f"layers.{i}.norm{n}.weight": (width,) for n in (1, 2)}
    named = [(name, nn.Parameter(torch.randn(shape, generator=generator))) for name, shape in shapes.items()]
    for _, param in named:
        param.grad = torch.randn(param.shape, generator=generator)
    return named


def peers(width: int, layers: int) -> dict[str, Callable[[], Any]]:
    """Return the step function of every optimizer; each has its own parameters."""

    def ours(dtype: torch.dtype) -> Callable[[], Any]:
        return build_optimizer(parameters(width, layers), width, iteration_dtype=dtype).step

    def torch_muon() -> Callable[[], Any]:
        params = [p for _, p in parameters(width, layers)]
        muon = torch.optim.Muon([p for p in params if p.ndim == 2], lr=0.002)
        adamw = torch.optim.AdamW([p for p in params if p.ndim != 2], lr=1e-4, fused=True)
        return lambda: (muon.step(), adamw.step())

    def torch_adamw(fused: bool) -> Callable[[], Any]:
        return torch.optim.AdamW([p for _, p in parameters(width, layers)], lr=1e-4, fused=fused).step

    return {
        "MuonAdamW, iterating in bf16": ours(torch.bfloat16),
        "MuonAdamW, iterating in fp32": ours(torch.float32),
        "torch.optim.Muon (bf16) + AdamW": torch_muon(),
        "torch.optim.AdamW": torch_adamw(False),
        "torch.optim.AdamW, fused": torch_adamw(True),
    }


def time_steps(optimizers: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of every optimizer's step in every round; the first round warms up and does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    for round_number in range(rounds + 1):
        for name, step in optimizers.items():
            started = time.perf_counter()
            step()
            if round_number:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def state_bytes(optimizer: MuonAdamW) -> int:
    return sum(value.nbytes for state in optimizer.state.values() for value in state.values())


class Network(nn.Module):
    """A small network that predicts the next token from the current one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(97, 64)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(64, 256, bias=False), nn.GELU(), nn.Linear(256, 64, bias=False)) for _ in range(3)
        )
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 97, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(self.norm(x))


def trajectory(rank: int, ranks: int, group: dist.ProcessGroup | None) -> list[float]:
    """Train on the rows of this rank; return its part of the loss of every step."""
    net = Network()
    optimizer = build_optimizer(
        net.named_parameters(), 64, matrix_lr=0.02, iteration_dtype=torch.float32, process_group=group
    )
    losses = []
    for step in range(STEPS):
        ids = torch.randint(0, 97, (8, 32), generator=torch.Generator().manual_seed(step)).sort(dim=1).values
        own_rows = ids[rank::ranks]
        summed = nn.functional.cross_entropy(
            net(own_rows[:, :-1]).flatten(0, 1), own_rows[:, 1:].flatten(), reduction="sum"
        )
        loss = summed / ids[:, 1:].numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def time_optimizer_step(args: argparse.Namespace, group: dist.ProcessGroup | None) -> dict[str, Any]:
    """Time the step and its communication on the parameters of one layer and a dense head delta, in seconds."""
    optimizer = build_optimizer(parameters(args.width, 1, args.vocab), args.width, process_group=group)
    total, traffic = [], []
    for _ in range(args.rounds + 1):
        if group is not None:
            dist.barrier(group)
        started = time.perf_counter()
        if optimizer.shards is not None:
            optimizer.shards.reduce()
        reduced = time.perf_counter()
        optimizer.step()
        total.append(time.perf_counter() - started)
        if optimizer.shards is not None:  # gather once more to time it separately
            gather_started = time.perf_counter()
            optimizer.shards.gather()
            traffic.append(reduced - started + time.perf_counter() - gather_started)
    return {"step": total[1:], "traffic": traffic[1:], "state_bytes": state_bytes(optimizer)}


def process(rank: int, port: int, folder: Path, args: argparse.Namespace) -> None:
    torch.set_num_threads(max(1, args.threads // PROCESSES))
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=PROCESSES)
    record = {"losses": trajectory(rank, PROCESSES, dist.group.WORLD), **time_optimizer_step(args, dist.group.WORLD)}
    (folder / f"{rank}.json").write_text(json.dumps(record))
    dist.destroy_process_group()
    gc.collect()  # free the last reference to the group, so that gloo's threads end before the interpreter


def compare_two_processes_with_one(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            port = server.getsockname()[1]
        torch.multiprocessing.spawn(process, (port, Path(folder), args), nprocs=PROCESSES)
        shares = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(PROCESSES)]
    one = {"losses": trajectory(0, 1, None), **time_optimizer_step(args, None)}
    together = [sum(losses) for losses in zip(*(share["losses"] for share in shares), strict=True)]
    return {
        "loss_first_and_last": [one["losses"][0], one["losses"][-1]],
        "largest_loss_difference": max(abs(a - b) for a, b in zip(one["losses"], together, strict=True)),
        "state_share": [share["state_bytes"] / one["state_bytes"] for share in shares],
        "step_ms": {"one": 1e3 * statistics.median(one["step"]), "two": 1e3 * statistics.median(shares[0]["step"])},
        "traffic_ms": 1e3 * statistics.median(shares[0]["traffic"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"width": 1024, "vocab": 16384, "rounds": 7}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", type=Path, default=Path("runs/bench/optimizer_step.json"))
    args = parser.parse_args()
    args.threads = torch.get_num_threads()
    sizes = {layers: 12 * args.width**2 * layers for layers in (1, 4)}
    seconds = {size: time_steps(peers(args.width, layers), args.rounds) for layers, size in sizes.items()}
    result = {
        "shape": {k: v for k, v in vars(args).items() if k != "json"},
        "torch": torch.__version__,
        "cpus": os.cpu_count(),
        "default_iteration_dtype": str(choose_dtype("auto")),
        "seconds": seconds,
        "two_processes": compare_two_processes_with_one(args),
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(result, indent=2) + "\n")
    print("| optimizer | " + " | ".join(f"{size / 1e6:.1f} M, ms" for size in seconds) + " |\n|---|---:|---:|")
    for name in seconds[sizes[1]]:
        print(f"| {name} | " + " | ".join(f"{1e3 * statistics.median(s[name]):,.0f}" for s in seconds.values()) + " |")
    two = result["two_processes"]
    print("\n| ZeRO-2, two processes against one | |\n|---|---:|")
    print(f"| largest difference of the loss in {STEPS} steps | {two['largest_loss_difference']:.1e} |")
    print(f"| state bytes per process | {', '.join(f'{share:.3f}x' for share in two['state_share'])} |")
    print(f"| step of one process, ms | {two['step_ms']['one']:,.0f} |")
    print(f"| step of two, ms | {two['step_ms']['two']:,.0f} |")
    print(f"| of which communication, ms | {two['traffic_ms']:,.0f} |")


if __name__ == "__main__":
    main()
