"""Effect of each data augmentation: train the demo's stage with all of them, without one group of them, and with none.

    python benchmarks/augmentation.py [--steps 380 --seeds 0 1 2 --rows 100 --arms plain all ...] [--json FILE]

Every arm has the same base, rows and number of tokens. Every arm is evaluated on:

- the prompt and call format of its training (the chat template);
- five prompt formats that no arm was trained on (tools as TypeScript, XML or a list, in the system or user turn);
- two call forms that only arms with `formats` were trained on;
- two call forms that no arm was trained on;
- masked names;
- tools that no arm was trained on;
- questions that no tool fits.

"Trained" means the stage: the training text of the embedded base contains all of these notations. A call is correct if
its names and arguments equal the reference.

The benchmark writes the JSON file after every run. A repeated command skips the runs in that file. To run arms in
parallel, give each process its own file.
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
UNSEEN = {  # prompts with tool forms that no arm was trained on
    "typescript": PromptForm("typescript", "hermes", "system", 3),
    "xml": PromptForm("xml", "hermes", "system", 22),
    "list": PromptForm("list", "hermes", "system", 30),
    "typescript, user": PromptForm("typescript", "hermes", "user", 41),
    "xml, user": PromptForm("xml", "hermes", "user", 17),
}
OTHER_CALLS = {  # call forms of `formats`, with tool forms that no arm was trained on
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
    """Return the evaluation splits by name; each format has half as many rows as the other splits."""
    demo = evaluation_splits(rows)
    values = demo["unseen values"]
    masked = [mask(row, row_rng(row_digest(row), seed=1, epoch=0, step="benchmark"))[0] for row in values]
    formats = {**UNSEEN, **OTHER_CALLS, **UNSEEN_CALLS}
    by_format = {name: [replace(row, form=form) for row in values[: rows // 2]] for name, form in formats.items()}
    return {"trained format": values, "unseen tools": demo["unseen tools"], **by_format, "masked names": masked} | {
        "no tool fits": demo["no tool fits"]
    }


def run(arm: str, seed: int, steps: int, rows: int) -> dict[str, Any]:
    """Train and evaluate one arm."""
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
    """Return a Markdown table of means over the seeds, each with half of the range between lowest and highest."""
    lines = []
    for arm in dict.fromkeys(result["arm"] for result in results):
        scores = [result["scores"] for result in results if result["arm"] == arm]
        series = {
            "trained format": [s["trained format"]["exact"] for s in scores],
            "five unseen prompt formats": [statistics.mean(s[n]["exact"] for n in UNSEEN) for s in scores],
            "other call forms": [statistics.mean(s[n]["exact"] for n in OTHER_CALLS) for s in scores],
            "unseen call forms": [statistics.mean(s[n]["exact"] for n in UNSEEN_CALLS) for s in scores],
            "masked names": [s["masked names"]["exact"] for s in scores],
            "unseen tools": [s["unseen tools"]["exact"] for s in scores],
            "no tool fits": [s["no tool fits"]["abstained"] for s in scores],
        }
        if not lines:
            lines = [f"| arm | seeds | {' | '.join(series)} |", "|---|---:|" + "---:|" * len(series)]
        cells = [f"{statistics.mean(v):.3f} ±{(max(v) - min(v)) / 2:.3f}" for v in series.values()]
        lines.append(f"| {arm} | {len(scores)} | {' | '.join(cells)} |")
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
