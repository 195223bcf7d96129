"""A sweep: several candidates for one stage, trained on the same cached hidden states and ranked by validation.

The hidden states of the base are computed once (hidden_states/disk_cache.py), so a candidate costs only its own layers
and head. Candidates are trained one after the other. A batch is read in a few milliseconds, so training them side by
side would save little time and need the memory of all.
"""

import itertools
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from poe.cascade import Cascade
from poe.data.given import Data, write_given
from poe.errors import OutputError, PoEError, RecipeError, StageError, TrainingError
from poe.files.output import OWN_FILES, locked_folder, write_file
from poe.stages import Recipe, load_recipe
from poe.training.checkpoints.files import has_checkpoint
from poe.training.interrupts import stop_signals_raise
from poe.training.reporting.progress import Progress
from poe.training.trainer import train_stage

RECORD = "sweep.json"
_KEPT_RECORDS = ("training.json", "metrics.jsonl", "dropped.jsonl", "report.png")  # of all candidates but the best
_DATA_FIELDS = (
    "data seq_len seed train_on isolate_documents augment epochs validation_ratio eval_data near_duplicates eval_rows"
).split()
_FIXED_FIELDS = {  # fields that candidates must share, and why
    **dict.fromkeys(_DATA_FIELDS, "it changes the rows, and candidates are compared on the same rows"),
    "dtype": "it changes the hidden states of the base, which all candidates share",
    "cache_hidden": "every candidate of a sweep is trained on the cache",
    "name": "all candidates are one stage",
    "description": "it does not change the result",
}


@dataclass(frozen=True)
class Candidate:
    """A trained candidate: the values it tried, its best val bits per byte, its size, and its training seconds."""

    folder: str
    tried: dict[str, Any]
    val_bpb: float
    best_step: int
    parameters: int
    delta_bytes: int
    seconds: float


@dataclass(frozen=True)
class SweepRun:
    """The candidates, the best first, and the stage folder of the best."""

    candidates: list[Candidate]
    best: Path


def candidate_recipes(plan: Recipe, tries: Mapping[str, Sequence[Any]]) -> dict[str, Recipe]:
    """Return a recipe for every combination of the values in `tries`, by the name of its folder.

    Raises `RecipeError` for an unknown field, a wrong value, or a field that all candidates must share.
    """
    if not tries:
        raise RecipeError("A sweep needs at least one field with values, such as num_layers=2,4.")
    for name, values in tries.items():
        if name in _FIXED_FIELDS:
            raise RecipeError(
                f"{name} cannot be tried in a sweep: {_FIXED_FIELDS[name]}. Run poe-train stage for each value."
            )
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
    data: Data | None = None,
    output_dir: str | Path | None = None,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    **fields: Any,
) -> SweepRun:
    """Train one candidate for every combination of `tries` (recipe field -> values) and keep the best by val bpb.

    Each candidate has its own folder in `output_dir` (default `runs/NAME-sweep`). The folder of the best is a whole
    stage folder, the others keep their records, and sweep.json has the table. At the end the best stage is active in
    `cascade`. `resume` skips finished candidates and continues the interrupted one. The other arguments are those of
    `train_stage`.

    Raises what `train_stage` raises, and `RecipeError` for candidates that cannot be compared.
    """
    data, eval_data = write_given(data, None)
    plan = (load_recipe(recipe) if isinstance(recipe, str) else recipe).replace(**fields)
    plan = plan.replace(eval_data=eval_data or plan.eval_data)
    plans = candidate_recipes(plan, tries)
    if plan.name in cascade.stages:
        raise StageError(
            f"The cascade already has a stage {plan.name!r}, and a sweep trains a new one: remove it, or choose "
            "another name."
        )
    out = Path(output_dir or f"runs/{plan.name}-sweep").expanduser()
    common = {name: value for name, value in plan.as_dict().items() if name not in tries}
    common |= {"data": data or plan.data, "base": cascade.base_source.fingerprint}
    with stop_signals_raise(), locked_folder(out) as out:
        return _run(cascade, plan, plans, tries, data, out, common, resume, progress)


def _run(
    cascade: Cascade,
    plan: Recipe,
    plans: Mapping[str, Recipe],
    tries: Mapping[str, Sequence[Any]],
    data: str | None,
    out: Path,
    common: dict[str, Any],
    resume: bool,
    progress: Progress | None,
) -> SweepRun:
    """Train the candidates that are not finished, in the locked folder `out`."""
    finished = _read_finished(out, common, resume)
    for number, (folder, candidate) in enumerate(plans.items(), 1):
        if folder in finished:
            continue
        unfinished = has_checkpoint(out / folder)
        if not unfinished:  # it stopped before its first checkpoint, or between its end and the write of sweep.json
            _remove_all_but(out / folder)
        title = f"candidate {number}/{len(plans)} {folder}"
        run = train_stage(
            cascade,
            candidate,
            data,
            out / folder,
            resume=unfinished,
            progress=Progress(title, quiet=progress is not None and progress.quiet),
        )
        finished[folder] = Candidate(
            folder,
            {name: getattr(candidate, name) for name in tries},
            run.record["val_bpb"],
            run.record["best_step"],
            cascade.stages[plan.name].num_parameters(),
            run.delta_bytes,
            run.record["seconds"],
        )
        cascade.remove_stage(plan.name)
        _write_table(out, common, finished)
        for worse in _rank(finished)[1:]:
            _remove_all_but(out / worse.folder, _KEPT_RECORDS)
    ranked = [candidate for candidate in _rank(finished) if candidate.folder in plans]
    if (out / ranked[0].folder / "delta.safetensors").is_file():
        cascade.load_stage(out / ranked[0].folder)
    return SweepRun(ranked, out / ranked[0].folder)


def _rank(candidates: Mapping[str, Candidate]) -> list[Candidate]:
    return sorted(candidates.values(), key=lambda candidate: (candidate.val_bpb, candidate.parameters))


def _read_finished(out: Path, common: dict[str, Any], resume: bool) -> dict[str, Candidate]:
    """Return the candidates that an earlier run finished, by folder; none for a new sweep.

    Raises `OutputError` for a folder that is not empty unless `resume`, `TrainingError` for that of another sweep.
    """
    try:
        content = sorted(path.name for path in out.iterdir() if not path.match(OWN_FILES))
        if not resume:
            if content:
                raise OutputError(
                    f"The output folder {out} is not empty ({', '.join(content[:4])}): continue it with --resume, "
                    "choose another with --out, or empty it."
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
                f"The sweep in {out} has other options (then -> now): {'; '.join(differing)}. Resume with the "
                "options it was started with, or choose another output folder."
            )
        candidates = [Candidate(**row) for row in record["candidates"]]
        for candidate in candidates:  # folders are emptied by name
            if Path(candidate.folder).name != candidate.folder or "=" not in candidate.folder:
                raise ValueError(f"{RECORD} names the folder {candidate.folder[:80]!r}, which is no candidate")
        return {candidate.folder: candidate for candidate in candidates}
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, PoEError):
            raise
        raise OutputError(f"The sweep in {out} cannot be continued: {error}. Choose another folder.") from error


def _write_table(out: Path, common: dict[str, Any], candidates: Mapping[str, Candidate]) -> None:
    ranked = _rank(candidates)
    rows = [asdict(candidate) for candidate in ranked]
    record = {"best": ranked[0].folder, "common": common, "candidates": rows}
    write_file(out / RECORD, json.dumps(record, indent=2) + "\n")


def _remove_all_but(folder: Path, kept: Sequence[str] = ()) -> None:
    """Remove everything but `kept` from the folder of a candidate. Raises `OutputError` if another run uses it."""
    with locked_folder(folder):
        for path in folder.iterdir():
            if path.name not in kept and not path.match(OWN_FILES):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
