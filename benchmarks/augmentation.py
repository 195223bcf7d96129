"""What each augmentation is worth: the demo's stage trained with all of them, with each switched off, and with none.

    python benchmarks/augmentation.py [--steps 380 --seeds 0 1 2 --rows 100 --arms plain all ...] [--json FILE]

Every arm has the same base, rows and tokens. It is asked: in the format of its training (the chat template); in five
prompt formats that no arm was trained on (tools written as TypeScript, as XML, as a list, in the system's or the user's
turn), for calls in the form of its training; the same for two call forms that arms with `formats` have seen, and for
two that none has; with masked names; and where no tool fits. "Not trained on" speaks of the stage: the embedded base
has read all of these notations. A call counts if names and arguments equal the reference.

Results are added to the JSON file after every run, so that a stopped benchmark goes on where it stopped, and arms can
be run side by side into files of their own.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from poe import Cascade
from poe.calls.conversation import Conversation, PromptForm
from poe.data.augment import mask
from poe.data.augment.rows import row_digest, row_rng
from poe.data.readers.demo import evaluation_splits
from poe.evaluation.calls import evaluate_calls
from poe.stages import Augmentation
from poe.training.trainer import train_stage

SEEN = {
    "tool_formats": ["indent0", "indent2", "lines", "openai", "python"],
    "call_formats": ["hermes", "glaive", "llama", "openai"],
}
UNSEEN = {  # of prompts: tool forms that no arm has seen
    "typescript": PromptForm("typescript", "hermes", "system", 3),
    "xml": PromptForm("xml", "hermes", "system", 22),
    "list": PromptForm("list", "hermes", "system", 30),
    "typescript, user": PromptForm("typescript", "hermes", "user", 41),
    "xml, user": PromptForm("xml", "hermes", "user", 17),
}
OTHER_CALLS = {  # call forms that `formats` trains, with tools in forms that no arm has seen
    "llama": PromptForm("typescript", "llama", "system", 5),
    "openai": PromptForm("xml", "openai", "user", 9),
}
UNSEEN_CALLS = {
    "xlam": PromptForm("typescript", "xlam", "system", 3),
    "mistral": PromptForm("xml", "mistral", "system", 17),
}
ALL: dict[str, Any] = {
    "mask": 0.33,
    "irrelevance": 0.1,
    "contrast": 0.05,
    "distractors": 0.3,
    "shuffle": 1.0,
    "case": 0.1,
    "paraphrase": 0.3,
    "formats": 0.5,
    **SEEN,
}
PARTS = {
    "mask": ("mask",),
    "irrelevance and contrast": ("irrelevance", "contrast"),
    "distractors and shuffle": ("distractors", "shuffle"),
    "case and paraphrase": ("case", "paraphrase"),
    "formats": ("formats",),
}
ARMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all": ALL,
    **{f"without {name}": {k: v for k, v in ALL.items() if k not in keys} for name, keys in PARTS.items()},
}


def questions(rows: int) -> dict[str, list[Conversation]]:
    """The splits that every arm is asked; of each format half as many rows."""
    demo = evaluation_splits(rows)
    values = demo["unseen values"]
    masked = [mask(row, row_rng(row_digest(row), seed=1, epoch=0, step="benchmark"))[0] for row in values]
    formats = {**UNSEEN, **OTHER_CALLS, **UNSEEN_CALLS}
    by_format = {name: [replace(row, form=form) for row in values[: rows // 2]] for name, form in formats.items()}
    return {"trained format": values, "unseen tools": demo["unseen tools"], **by_format, "masked names": masked} | {
        "no tool fits": demo["no tool fits"]
    }


def run(arm: str, seed: int, steps: int, rows: int) -> dict[str, Any]:
    """Train and ask one arm."""
    cascade = Cascade.from_pretrained("demo", dtype="bfloat16")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="poe-augmentation-") as folder:
        result = train_stage(
            cascade,
            "demo",
            output_dir=Path(folder) / "run",
            max_steps=steps,
            seed=seed,
            seq_len=1024,
            validation_every=steps,
            augment=Augmentation.from_dict(ARMS[arm]),
        )
    scores = evaluate_calls(cascade, "demo", questions(rows), max_new_tokens=120)
    return {
        "arm": arm,
        "seed": seed,
        "val_bpb": result.history.best_bpb,
        "seconds": round(time.perf_counter() - started),
        "left_plain": result.record["data"]["augmented_rows_left_plain"],
        "scores": {name: score.as_dict() for name, score in scores.items()},
    }


def table(results: list[dict[str, Any]]) -> str:
    """Means over the seeds, and the spread between the lowest and the highest."""
    lines = []
    for arm in dict.fromkeys(result["arm"] for result in results):
        of = [result["scores"] for result in results if result["arm"] == arm]
        series = {
            "trained format": [s["trained format"]["exact"] for s in of],
            "five unseen prompt formats": [statistics.mean(s[n]["exact"] for n in UNSEEN) for s in of],
            "other call forms": [statistics.mean(s[n]["exact"] for n in OTHER_CALLS) for s in of],
            "unseen call forms": [statistics.mean(s[n]["exact"] for n in UNSEEN_CALLS) for s in of],
            "masked names": [s["masked names"]["exact"] for s in of],
            "unseen tools": [s["unseen tools"]["exact"] for s in of],
            "no tool fits": [s["no tool fits"]["abstained"] for s in of],
        }
        if not lines:
            lines = [f"| arm | seeds | {' | '.join(series)} |", "|---|---:|" + "---:|" * len(series)]
        cells = [f"{statistics.mean(v):.3f} ±{(max(v) - min(v)) / 2:.3f}" for v in series.values()]
        lines.append(f"| {arm} | {len(of)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=380)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--json", type=Path, default=Path("runs/bench/augmentation.json"))
    args = parser.parse_args()
    args.json.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(args.json.read_text()) if args.json.exists() else []
    for seed in args.seeds:
        for arm in args.arms:
            if not any((result["arm"], result["seed"]) == (arm, seed) for result in results):
                results.append(run(arm, seed, args.steps, args.rows))
                args.json.write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
