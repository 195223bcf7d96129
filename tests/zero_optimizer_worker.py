"""The program of the processes of test_zero_optimizer.py, and the problem that they and one process solve.

python zero_optimizer_worker.py RANK PORT FOLDER     # needs FOLDER/whole.safetensors, writes FOLDER/<scenario>-<rank>.*
"""

import gc
import json
import math
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import distributed as dist

from poe.training.checkpoints.optimizer_state import optimizer_tensors, restore_optimizer
from poe.training.optim import MuonAdamW, build_optimizer
from poe.training.parallel import zero

STEPS, HALF = 10, 5
# Numbers and sizes that two processes cannot divide evenly.
SHAPES = {
    "layers.0.up.weight": (24, 16),
    "layers.1.up.weight": (24, 16),
    "layers.2.up.weight": (24, 16),
    "layers.0.down.weight": (16, 24),
    "layers.0.gate.weight": (9, 7),
    "layers.3.never.weight": (5, 5),  # has no gradient in any process
    "layers.0.norm.weight": (17,),
    "layers.0.scale": (),
    "head.weight": (101, 16),
    "head.a": (3, 16),
}
HEAD_ONLY = {"head.weight": (1001, 16)}
Named = list[tuple[str, torch.nn.Parameter]]


def parameters(shapes: dict[str, tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32) -> Named:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes.values()]
    return [(name, torch.nn.Parameter(value)) for name, value in zip(shapes, values, strict=True)]


def gradient(name: str, param: torch.Tensor, index: int, step: int, rank: int) -> torch.Tensor | None:
    """Return the gradient of a process: None for one parameter, on one rank only for some, and not in every step."""
    if "never" in name or ("scale" in name and step == 2):
        return None
    if name in ("layers.1.up.weight", "head.a") and rank != step % 2:
        return None
    generator = torch.Generator().manual_seed(10_000 * step + 100 * rank + index)
    return torch.randn(param.shape, generator=generator).to(param.dtype)


def make(named: Named, process_group: dist.ProcessGroup | None = None) -> MuonAdamW:
    return build_optimizer(
        named,
        768,
        matrix_lr=0.02,
        head_lr=0.01,
        iteration_dtype=torch.float32,
        process_group=process_group,
    )


def train(optimizer: MuonAdamW, named: Named, steps: range, ranks: list[int], max_norm: float | None) -> list[float]:
    """Take `steps` with the sum of the gradients of `ranks`; return the norms."""
    norms = []
    for step in steps:
        for index, (name, param) in enumerate(named):
            found = [g for rank in ranks if (g := gradient(name, param, index, step, rank)) is not None]
            param.grad = sum(found[1:], found[0]) if found else None
        norms.append(float(optimizer.clip_grad_norm_(max_norm)))
        optimizer.step()
    return norms


def names_of(optimizer: MuonAdamW) -> list[str]:
    return [name for group in optimizer.param_groups for name in group["param_names"]]


def state_bytes(optimizer: MuonAdamW) -> int:
    return sum(value.nbytes for state in optimizer.state.values() for value in state.values())


def model() -> torch.nn.Module:
    torch.manual_seed(1)
    return torch.nn.ModuleDict({"layers": torch.nn.Sequential(*(torch.nn.Linear(12, 12) for _ in range(3))),
                                "head": torch.nn.Linear(12, 5)})  # fmt: skip


def learn(rows: slice, process_group: dist.ProcessGroup | None = None) -> list[float]:
    """Train on some rows of every step's eight, the loss divided by all eight; return these rows' share of the loss."""
    net = model()
    optimizer = make(list(net.named_parameters()), process_group)
    losses = []
    for step in range(STEPS):
        x = torch.randn(8, 12, generator=torch.Generator().manual_seed(step))
        y = x[:, :5].sin()
        out = net["head"](net["layers"](x[rows]).tanh())
        loss = (out - y[rows]).square().sum() / y.numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    group = dist.group.WORLD
    assert group is not None

    def keep(scenario: str, optimizer: MuonAdamW, named: Named, norms: list[float]) -> None:
        tensors, numbers = optimizer_tensors(optimizer, names_of(optimizer))
        save_file({name: p.detach() for name, p in named}, folder / f"{scenario}-{rank}.weights")
        save_file(tensors, folder / f"{scenario}-{rank}.state")
        record = {"norms": norms, "numbers": numbers, "state_bytes": state_bytes(optimizer)}
        (folder / f"{scenario}-{rank}.json").write_text(json.dumps(record))

    def run(scenario: str, named: Named, max_norm: float | None = None, steps: int = STEPS) -> MuonAdamW:
        optimizer = make(named, group)
        keep(scenario, optimizer, named, train(optimizer, named, range(steps), [rank], max_norm))
        return optimizer

    run("plain", parameters())
    run("clipped", parameters(), 0.5)
    run("bf16", parameters(dtype=torch.bfloat16))
    run("head_only", parameters(HEAD_ONLY))
    zero.BUCKET_ELEMENTS, usual = 2 * 37, zero.BUCKET_ELEMENTS  # a parameter needs many buckets
    run("buckets", parameters())
    zero.BUCKET_ELEMENTS = usual

    named = parameters()
    first = run("half", named, steps=HALF)
    second = make(named, group)  # as after a restart: current weights and a saved state
    restore_optimizer(second, names_of(second), *optimizer_tensors(first, names_of(first)))
    keep("resumed", second, named, train(second, named, range(HALF, STEPS), [rank], None))

    named = parameters()
    state = load_file(folder / "whole.safetensors")
    with torch.no_grad():
        for name, param in named:
            param.copy_(state.pop(f"weights.{name}"))
    optimizer = make(named, group)
    restore_optimizer(optimizer, names_of(optimizer), state, {})
    keep("from_one", optimizer, named, train(optimizer, named, range(HALF, STEPS), [rank], None))

    losses = learn(slice(0, 5) if rank == 0 else slice(5, 8), group)
    (folder / f"losses-{rank}.json").write_text(json.dumps(losses))

    param = torch.nn.Parameter(torch.zeros(4, 4))
    optimizer = make([("head.weight", param)], group)
    param.grad = torch.full((4, 4), math.inf if rank else 1.0)
    (folder / f"infinite-{rank}.json").write_text(json.dumps(math.isinf(optimizer.clip_grad_norm_(1.0))))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    gc.collect()  # the threads of gloo end with the group, which must happen before the interpreter ends
