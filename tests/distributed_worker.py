"""The program of two processes in test_distributed.py: `torchrun distributed_worker.py FOLDER BASE`.

`... distributed_worker.py train stage ...` is `poe-train stage ...` with the optimizer's iteration in fp32:
in bf16 a difference of one bit grows.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from poe import Cascade, train_stage
from poe.commands.train import main
from poe.data.packing import Batch
from poe.training.parallel.distributed import World, join_world
from poe.training.parallel.sharding import resident_bytes
from poe.training.reporting.progress import Progress
from poe.training.step import TrainingStep

FIELDS: dict[str, Any] = {
    "seq_len": 512,
    "tokens_per_step": 2048,
    "max_tokens_per_batch": 1024,
    "validation_every": 3,
    "eval_rows": 2,
    "dtype": "float32",
    "num_layers": 1,
    "validation_ratio": 0.1,
}
DATA = "demo=120"
STEPS = 6
PROMPT = [list(range(40, 60))]


def rows_seen() -> list[list[int]]:
    """Return a list that collects the rows of every step from now on, each row as a hash."""
    seen: list[list[int]] = []
    micro_batches = TrainingStep._micro_batches

    def recorded(self: TrainingStep, batch: Batch):  # type: ignore[no-untyped-def]
        seen.append([hash(tuple(row)) for row in batch.input_ids.tolist()])
        return micro_batches(self, batch)

    TrainingStep._micro_batches = recorded  # type: ignore[method-assign]
    return seen


def answer(cascade: Cascade, name: str, held_out: dict[str, Any]) -> dict[str, Any]:
    """Return the first tokens of the stage and of the base. With a sharded base every process must call this."""
    ids = torch.tensor(PROMPT)
    answers = {}
    for label, stage in (("base", None), ("stage", name)):
        tokens = cascade.generate(ids, stage=stage, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        answers[label] = {"tokens": tokens[0, ids.shape[1] :].tolist()}
    return {"first words": answers}


def train(base: Path, out: Path, world: World, **fields: Any) -> tuple[Cascade, dict[str, Any]]:
    """Train once, and return the cascade and the numbers that the test compares."""
    cascade = Cascade.from_pretrained(base, dtype=torch.float32)
    whole = resident_bytes(cascade.base)
    quiet = Progress("test", quiet=True)
    plan = {**FIELDS, "max_steps": STEPS, **fields}
    run = train_stage(cascade, "demo", DATA, out, world=world, progress=quiet, evaluate=answer, **plan)
    return cascade, {
        "losses": [record["loss"] for record in run.history.steps],
        "evals": [record["val_loss"] for record in run.history.evals],
        "evaluation": run.record["evaluation"],
        "bytes": [whole, resident_bytes(cascade.base)],
    }


def check(folder: Path, base: Path) -> None:
    with join_world() as world:
        results: dict[str, Any] = {}
        seen = rows_seen()
        _, results["plain"] = train(base, folder / "plain", world)
        results["rows"] = list(seen)
        cascade, results["divided"] = train(base, folder / "divided", world, shard_base=True)
        # generate must run in both processes until the longer one has finished
        cascade.generate(torch.tensor(PROMPT), max_new_tokens=1 + 2 * world.rank, do_sample=False)
        (folder / f"rank-{world.rank}.json").write_text(json.dumps(results))
        world.barrier()
        if world.rank == 1:
            raise MemoryError("the second process failed")
        world.barrier()


if __name__ == "__main__":
    if sys.argv[1] == "train":
        del sys.argv[1]
        main()
    else:
        check(Path(sys.argv[1]), Path(sys.argv[2]))
