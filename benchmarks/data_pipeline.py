"""Speed and memory of the data pipeline (read, augment, render, pack) on up to a million rows.

    python benchmarks/data_pipeline.py [--rows 1000000 --workers 2 --seq-len 1024 --plain]

The rows are generated (reader `demo`), with every augmentation, the tokenizer of the embedded base, and an empty cache.
Memory is the sum of the proportional set sizes of the process and its workers, sampled four times a second; a page that
several processes share counts once. The results also contain the speed in multiples of two training speeds: the
measured speed of the demo, and a calculated one of a four-layer stage on a 1.3 B base on one H100 (2 FLOPs per base
parameter and token, 6 per stage parameter, 40 % of 989 TFLOP/s).
"""

import argparse
import json
import os
import tempfile
import threading
import time
from pathlib import Path

from poe.data.corpus import read_corpus
from poe.data.drops import DropReport
from poe.data.pipeline import prepare
from poe.data.render import Renderer
from poe.loaders.repository import locate
from poe.loaders.tokenizer import load_tokenizer
from poe.stages import Augmentation, Recipe

DEMO_TRAINER = 9_511  # tokens/s of `make demo` on two cores
H100_TRAINER = 0.4 * 989e12 / (2 * 1.384e9 + 6 * 163.6e6)
EVERYTHING = Augmentation(
    mask=0.33, irrelevance=0.1, contrast=0.1, distractors=0.3, shuffle=1.0, case=0.1, paraphrase=0.3, formats=0.3
)


class Memory(threading.Thread):
    """A thread that records the peak proportional set size of this process and its children, in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.start()

    def run(self) -> None:
        while True:
            self.peak = max(self.peak, sum(map(_proportional_set_size, [os.getpid(), *_children()])))
            time.sleep(0.25)


def _children() -> list[int]:
    text = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text()
    return [int(pid) for pid in text.split()]


def _proportional_set_size(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--plain", action="store_true", help="without augmentation")
    parser.add_argument("--json", type=Path, default=Path("runs/bench/data_pipeline.json"))
    args = parser.parse_args()
    memory = Memory()
    with tempfile.TemporaryDirectory(prefix="poe-data-") as cache:
        os.environ["POE_CACHE"] = cache
        renderer = Renderer(load_tokenizer(locate("demo")))
        imported = memory.peak
        started = time.perf_counter()
        augmentation = Augmentation() if args.plain else EVERYTHING
        recipe = Recipe(
            name="benchmark",
            data=f"demo={args.rows}",
            seq_len=args.seq_len,
            tokens_per_step=args.seq_len,
            augment=augmentation,
        )
        read_corpus(recipe, DropReport())
        read_s = time.perf_counter() - started
        started = time.perf_counter()
        data = prepare(recipe, renderer, workers=args.workers)
        render_s = time.perf_counter() - started
        disk = sum(f.stat().st_size for f in Path(cache).rglob("*") if f.is_file())
    tokens = data.summary["tokens"]
    per_core = tokens / render_s / args.workers
    result = {
        "rows": args.rows,
        "workers": args.workers,
        "documents": data.train.stats.documents,
        "tokens": tokens,
        "fill": data.summary["fill"],
        "read_s": round(read_s, 1),
        "rows_read_per_s": round(args.rows / read_s),
        "render_and_pack_s": round(render_s, 1),
        "tokens_per_s_per_core": round(per_core),
        "times_the_demo_trainer": round(per_core / DEMO_TRAINER, 1),
        "h100_trainer_tokens_per_s": round(H100_TRAINER),
        "times_the_h100_trainer": round(per_core / H100_TRAINER, 2),
        "imported_mib": round(imported / 2**20),
        "peak_mib": round(memory.peak / 2**20),
        "disk_mib": round(disk / 2**20),
        "dropped": data.summary["rows"]["demo"]["dropped"],
        "left_plain": data.summary["augmented_rows_left_plain"],
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(result, indent=2) + "\n")
    print("| what | value |\n|---|---:|")
    for name, value in result.items():
        print(f"| {name.replace('_', ' ')} | {value} |")


if __name__ == "__main__":
    main()
