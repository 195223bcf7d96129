"""Several candidates for one stage, trained from the same hidden states, and a table that picks one.

What the base makes of the rows is computed once (hidden_cache.py); a candidate costs its own layers and head. The
candidates are trained one after the other: a batch is read in a few milliseconds, so stepping them side by side would
save next to nothing, and one at a time needs the memory of one.
"""

import itertools
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from poe.cascade import Cascade
from poe.errors import OutputError, PoEError, RecipeError, StageError, TrainingError
from poe.stages import Recipe, load_recipe
from poe.training.checkpoints.files import has_checkpoint
from poe.training.reporting.progress import Progress
from poe.training.trainer import train_stage

RECORD = "sweep.json"
_RECORDS = ("training.json", "metrics.jsonl", "dropped.jsonl", "report.png")  # what a candidate that lost leaves
_DATA = (
    "data seq_len seed train_on isolate_documents augment epochs validation_ratio eval_data near_duplicates eval_rows"
).split()
_FIXED = {
    **dict.fromkeys(_DATA, "it changes the rows, and candidates are compared on the same"),
    "dtype": "it changes what the base computes, and candidates stand on the same hidden states",
    "cache_hidden": "every candidate of a sweep is trained on the cache",
    "name": "the candidates are the same stage",
    "description": "it changes nothing",
}


@dataclass(frozen=True)
class Candidate:
    """A trained candidate: what was tried, its best val bits per byte, its size, and its seconds of training."""

    folder: str
    tried: dict[str, Any]
    val_bpb: float
    best_step: int
    parameters: int
    delta_bytes: int
    seconds: float


@dataclass(frozen=True)
class SweepRun:
    """The candidates, the best first, and the stage folder of that one."""

    candidates: list[Candidate]
    best: Path


def grid(plan: Recipe, tries: Mapping[str, Sequence[Any]]) -> dict[str, Recipe]:
    """Return every combination of the values tried, as a recipe by the name of its folder.

    Raises `RecipeError` for an unknown field, a value that does not fit, or a field in which candidates may not differ.
    """
    if not tries:
        raise RecipeError("A sweep needs something to try, such as num_layers=2,4.")
    for name, values in tries.items():
        if name in _FIXED:
            raise RecipeError(f"{name} cannot be tried in a sweep: {_FIXED[name]}. Run poe-train stage for each value.")
        if not values or len({str(v) for v in values}) < len(values):
            raise RecipeError(f"{name}: expected different values to try, got {list(values)}.")
    plans = {}
    for values in itertools.product(*tries.values()):
        chosen = dict(zip(tries, values, strict=True))
        plans["+".join(f"{k}={v}" for k, v in chosen.items())] = plan.replace(**chosen, cache_hidden=True)
    return plans


def sweep(
    cascade: Cascade,
    recipe: str | Recipe,
    tries: Mapping[str, Sequence[Any]],
    data: str | None = None,
    output_dir: str | Path | None = None,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    **fields: Any,
) -> SweepRun:
    """Train one candidate for every combination of `tries` (recipe field -> values) and keep the best by val bpb.

    Each has a folder of its own in `output_dir` (default `runs/RECIPE-sweep`): the best one's is a whole stage folder,
    the others keep their records; sweep.json has the table. The best stage is active in `cascade` afterwards. `resume`
    leaves finished candidates alone and continues the one that was interrupted. Other arguments as `train_stage`.

    Raises what `train_stage` raises, and `RecipeError` for candidates that cannot be compared.
    """
    plan = (load_recipe(recipe) if isinstance(recipe, str) else recipe).replace(**fields)
    plans = grid(plan, tries)
    if plan.name in cascade.stages:
        raise StageError(f"There is a stage {plan.name!r} already: a sweep trains new ones. Remove it, or rename.")
    out = Path(output_dir or f"runs/{plan.name}-sweep").expanduser()
    common = {name: value for name, value in plan.as_dict().items() if name not in tries}
    common |= {"data": data or plan.data, "base": cascade.base_source.fingerprint}
    known = _known(out, common, resume)
    for number, (folder, candidate) in enumerate(plans.items(), 1):
        if folder in known:
            continue
        unfinished = has_checkpoint(out / folder)
        if not unfinished:  # stopped before its first checkpoint, or before sweep.json knew of it
            shutil.rmtree(out / folder, ignore_errors=True)
        title = f"candidate {number}/{len(plans)} {folder}"
        run = train_stage(
            cascade,
            candidate,
            data,
            out / folder,
            resume=unfinished,
            progress=Progress(title, quiet=progress is not None and progress.quiet),
        )
        known[folder] = Candidate(
            folder,
            {name: getattr(candidate, name) for name in tries},
            run.record["val_bpb"],
            run.record["best_step"],
            cascade.stages[plan.name].num_parameters(),
            run.delta_bytes,
            run.record["seconds"],
        )
        cascade.remove_stage(plan.name)
        _write(out, common, known)
        for loser in _ranked(known)[1:]:
            _reduce(out / loser.folder)
    ranked = [candidate for candidate in _ranked(known) if candidate.folder in plans]
    if (out / ranked[0].folder / "delta.safetensors").is_file():
        cascade.load_stage(out / ranked[0].folder)
    return SweepRun(ranked, out / ranked[0].folder)


def _ranked(known: Mapping[str, Candidate]) -> list[Candidate]:
    return sorted(known.values(), key=lambda candidate: (candidate.val_bpb, candidate.parameters))


def _known(out: Path, common: dict[str, Any], resume: bool) -> dict[str, Candidate]:
    """Return the candidates that an earlier run finished. Refuses a folder that holds something, unless resuming."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        content = sorted(path.name for path in out.iterdir())
        if not resume:
            if content:
                raise OutputError(
                    f"The output folder {out} is not empty ({', '.join(content[:4])}): go on with --resume, choose "
                    "another with --out, or empty it."
                )
            return {}
        if RECORD not in content:
            return {}
        record = json.loads((out / RECORD).read_text(encoding="utf-8"))
        differing = [
            f"{k}: {record['common'].get(k)!r} -> {v!r}" for k, v in common.items() if record["common"][k] != v
        ]
        if differing:
            raise TrainingError(
                f"The sweep in {out} is another one (then -> now): {'; '.join(differing)}. Resume with the options it "
                "was started with, or choose another output folder."
            )
        return {row["folder"]: Candidate(**row) for row in record["candidates"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, PoEError):
            raise
        raise OutputError(f"The sweep in {out} cannot be continued: {error}. Choose another folder.") from error


def _write(out: Path, common: dict[str, Any], known: Mapping[str, Candidate]) -> None:
    ranked = _ranked(known)
    rows = [asdict(candidate) for candidate in ranked]
    record = {"best": ranked[0].folder, "common": common, "candidates": rows}
    new = out / f"{RECORD}.new"
    try:
        new.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        os.replace(new, out / RECORD)
    except OSError as error:
        raise OutputError(f"{out / RECORD} could not be written: {error}. Free some space, then --resume.") from error


def _reduce(folder: Path) -> None:
    """Leave of a candidate that lost its records alone."""
    for path in folder.iterdir():
        if path.name not in _RECORDS:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
