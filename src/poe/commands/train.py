"""Train a stage on a frozen base, or a base from scratch. `poe` uses the result."""

import json
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from rich.progress import Progress
from rich.table import Table

from poe.commands.app import FAILED, Device, Program, add_version, err, interruptible, join_processes, out, run
from poe.commands.recipe_options import (
    BaseRecipeCommand,
    StageRecipeCommand,
    complete_base,
    complete_stage,
    parse_field,
)
from poe.errors import RecipeError, TrainingError, suggest
from poe.stages import Recipe, load_base_recipe, load_recipe

if TYPE_CHECKING:
    from poe.cascade import Cascade
    from poe.training.parallel.distributed import World

app = Program(help=__doc__)
app.callback(help=__doc__)(add_version)

StageRecipe = Annotated[str, typer.Argument(help="A shipped recipe, or a YAML file.", autocompletion=complete_stage)]
BaseRecipeName = Annotated[str, typer.Argument(help="A shipped recipe, or a YAML file.", autocompletion=complete_base)]

DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check everything, prepare the data, print the estimate, and train nothing.")
]


@app.command(cls=StageRecipeCommand)
def stage(
    context: typer.Context,
    recipe: StageRecipe = "tool-fork",
    base: Annotated[
        str,
        typer.Option(help="Hub id or folder of the base, or of a stage to stand on; 'demo' is the embedded base."),
    ] = "demo",
    data: Annotated[
        str | None, typer.Option(help="Training data as a SPEC: name[=path][*epochs][:weight], comma-separated.")
    ] = None,
    out_folder: Annotated[Path | None, typer.Option("--out", help="Folder of the run; default: runs/NAME.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    device: Device = "auto",
    no_eval: Annotated[bool, typer.Option("--no-eval", help="Skip the held-out questions after training.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Train a stage and write its folder: delta, card, training.json, report.png.

    The exit code is 1 if the run learned nothing or diverged; its stage is saved all the same.
    """
    plan = load_recipe(recipe, **context.obj)
    folder = out_folder or Path("runs") / plan.name
    _announce(f"stage {plan.name}: opening {base}")
    with join_processes(device) as world, interruptible(f"poe-train stage {recipe}", folder, world):
        from poe.training.trainer import check_stage_run, train_stage

        cascade = _open_base(plan, base, world)
        if cascade.active and plan.name not in cascade.stages:
            err.print(f"stage {plan.name} stands on the stage {cascade.active}", markup=False)
        if dry_run:
            _check_single_process(world, "stage --dry-run")
            options: dict[str, Any] = {"parent": cascade.active, "resume": resume, "has_questions": not no_eval}
            _end_dry_run(check_stage_run(cascade, plan, data, folder, _print_check, **options))
        result = train_stage(
            cascade,
            plan,
            data,
            folder,
            parent=cascade.active,
            resume=resume,
            evaluate=None if no_eval else _evaluate,
            world=world,
        )
        out.print(_format_bpb(result.record))
        if "evaluation" in result.record:
            out.print(_format_scores(result.record["evaluation"]))
        _print_outcome(folder / "delta.safetensors", result.record)
        _raise_failure(result.record)


@app.command(cls=StageRecipeCommand)
def sweep(
    context: typer.Context,
    recipe: StageRecipe = "tool-fork",
    tries: Annotated[
        list[str] | None, typer.Option("--try", help="FIELD=VALUE,VALUE... (repeatable: every combination is trained).")
    ] = None,
    base: Annotated[str, typer.Option(help="Hub id or folder of the base; 'demo' is the embedded one.")] = "demo",
    data: Annotated[
        str | None, typer.Option(help="Training data as a SPEC: name[=path][*epochs][:weight], comma-separated.")
    ] = None,
    out_folder: Annotated[
        Path | None, typer.Option("--out", help="Folder of the sweep; default: runs/NAME-sweep.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the sweep in --out.")] = False,
    device: Device = "auto",
    dry_run: DryRun = False,
) -> None:
    """Train every combination of some field values on the same cached hidden states, and keep the best stage."""
    plan = load_recipe(recipe, **context.obj)
    values = _parse_tries(tries or [])
    folder = out_folder or Path("runs") / f"{plan.name}-sweep"
    with join_processes(device) as world, interruptible(f"poe-train sweep {recipe}", folder, world):
        from poe.training import sweep as sweeping

        _check_single_process(world, "sweep")
        candidates = sweeping.candidate_recipes(plan, values)  # raises for bad values before the base is loaded
        cascade = _open_base(plan, base, world)
        if dry_run:
            _end_dry_run(_check_candidates(cascade, candidates, data, folder, resume))
        result = sweeping.sweep(cascade, plan, values, data, folder, resume=resume)
    table = Table(title="candidates, best first", title_justify="left")
    for column in (*values, "val bpb", "best step", "parameters", "delta bytes", "seconds"):
        table.add_column(column, justify="right")
    for c in result.candidates:
        numbers = (f"{c.val_bpb:.4f}", str(c.best_step), f"{c.parameters:,}", f"{c.delta_bytes:,}", f"{c.seconds:.1f}")
        table.add_row(*(str(c.tried[name]) for name in values), *numbers)
    out.print(table)
    out.print(f"best: {result.best}", markup=False)
    _raise_failure(json.loads((result.best / "training.json").read_text(encoding="utf-8")))


def _parse_tries(options: list[str]) -> dict[str, list[Any]]:
    """Parse options such as `num_layers=2,4` into values by field, in the type of the field."""
    hints = get_type_hints(Recipe)
    tries: dict[str, list[Any]] = {}
    for text in options:
        name, equals, values = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or name in tries:
            raise RecipeError(f"--try {text!r}: expected FIELD=VALUE,VALUE..., and each field once.")
        if name not in hints:
            raise RecipeError(f"--try {text!r}: a recipe has no field {name!r}.{suggest(name, hints)}")
        tries[name] = [parse_field(name, value.strip(), hints[name]) for value in values.split(",")]
    return tries


@app.command(cls=BaseRecipeCommand)
def base(
    context: typer.Context,
    recipe: BaseRecipeName,
    data: Annotated[
        str | None, typer.Option(help="Training texts as a SPEC: demo, notations, text=FILES or text=USER/DATASET.")
    ] = None,
    out_folder: Annotated[
        Path | None, typer.Option("--out", help="Folder of the run; default: runs/base-NAME.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Train a PoE base and its tokenizer from scratch, and write a folder that transformers loads."""
    plan = load_base_recipe(recipe, **context.obj, **({"data": data} if data else {}))
    folder = out_folder or Path("runs") / f"base-{plan.name}"
    with join_processes() as world, interruptible(f"poe-train base {recipe}", folder, world):
        _check_single_process(world, "base")
        from poe.training.pretrain import check_base_run, train_base

        if dry_run:
            _end_dry_run(check_base_run(plan, folder, _print_check, resume=resume))
        train_base(plan, folder, resume=resume)
    record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    out.print(_format_bpb(record))
    _print_outcome(folder / "model.safetensors", record)
    _raise_failure(record)


def _announce(text: str) -> None:
    """Print the first line of a run, before the libraries are imported, which takes longest on a busy machine."""
    if os.environ.get("RANK", "0") == "0":
        err.print(text, markup=False)


def _check_single_process(world: "World", command: str) -> None:
    if world.size > 1:
        raise TrainingError(
            f"poe-train {command} runs in one process, not in {world.size}: start it without a launcher."
        )


def _open_base(plan: Recipe, base: str, world: "World") -> "Cascade":
    from poe.cascade import Cascade
    from poe.training.precision import choose_dtype

    # the layers of a sharded base move to the devices one by one, later
    on_cpu = world.device.type == "cpu" or (plan.shard_base and world.size > 1)
    device_map = None if on_cpu else {"": world.device}
    cascade = Cascade.from_pretrained(base, dtype=choose_dtype(plan.dtype, world.device), device_map=device_map)
    number = f", {world.size} processes" if world.size > 1 else ""
    dtype = str(cascade.base.dtype).removeprefix("torch.")
    err.print(f"stage {plan.name} on {base}: {world.device.type}, {dtype}{number}", markup=False)
    return cascade


def _evaluate(cascade: Any, name: str, held_out: dict[str, Any]) -> dict[str, Any]:
    """Answer the held-out questions with the base and with the stage, and return the scores by split and model.

    If enough are answered with calls and with text, the stage's threshold between the two is fitted on them.
    """
    from poe.evaluation.calls import compare_with_base, evaluate_calls, fit_call_threshold

    rows = sum(map(len, held_out.values()))

    def evaluate(cascade: Any, stage: str | None, splits: dict[str, Any]) -> Any:
        title = f"answering held-out questions with the {'base' if stage is None else 'stage'}"
        err.print(f"{title} ({rows} rows)")
        with Progress(console=err, transient=True, disable=err.quiet or not err.is_interactive) as bars:
            task = bars.add_task(title, total=rows)
            return evaluate_calls(cascade, stage, splits, progress=partial(bars.advance, task))

    scores = compare_with_base(cascade, name, held_out, evaluate)
    threshold = fit_call_threshold(cascade, name, [row for rows in held_out.values() for row in rows])
    if threshold is not None:
        err.print(f"a reply begins with a call where its log-odds are {threshold:+.2f} or more: fitted on these rows")
    return scores


def _check_candidates(
    cascade: "Cascade", candidates: dict[str, Recipe], data: str | None, folder: Path, resume: bool
) -> bool:
    """Check every candidate of a sweep, and return whether all checks passed."""
    from poe.training.reporting.report import check_output
    from poe.training.trainer import check_stage_run

    if not resume:
        check_output(folder, resume)
    passed = True
    for name, candidate in candidates.items():
        out.print(name, markup=False)
        passed &= check_stage_run(cascade, candidate, data, folder / name, _print_check)
    return passed


def _print_check(name: str, problem: str | None) -> None:
    text, style = (f"FAIL {name}: {problem}", "red") if problem else (f"ok   {name}", "green")
    out.print(text, markup=False, style=style)


def _end_dry_run(passed: bool) -> None:
    """Leave the program after a dry run."""
    out.print("dry run: nothing was trained" + ("" if passed else ", and a run with these options would fail"))
    raise typer.Exit(0 if passed else FAILED)


def _raise_failure(record: dict[str, Any]) -> None:
    """Raise `TrainingError` if a finished run is no success, so that the exit code is 1."""
    from poe.loaders.outcome import describe_failure

    if problem := describe_failure(record):
        raise TrainingError(problem)


def _format_bpb(record: dict[str, Any]) -> Table:
    """Return a table of the bits per byte at every validation, with those of each stage of a PoE base."""
    table = Table(title="validation bits per byte", title_justify="left")
    table.add_column("step", justify="right")
    table.add_column("val bpb", justify="right")
    for stage in range(1, len(record["trajectory"][-1].get("stage_bpb", ())) + 1):
        table.add_column(f"stage {stage}", justify="right")
    for point in record["trajectory"]:
        best = " *" if point["step"] == record["best_step"] else "  "
        stages = [f"{bpb:.4f}" for bpb in point.get("stage_bpb", ())]
        table.add_row(str(point["step"]), f"{point['val_bpb']:.4f}{best}", *stages)
    return table


def _print_outcome(result: Path, record: dict[str, Any]) -> None:
    """Print the estimated and the actual cost of a run, and its result."""
    from poe.training.reporting.estimate import estimate_table

    size = result.stat().st_size
    out.print(estimate_table(record["estimate"], {**record["actual"], "result_bytes": size}))
    speed = record["tokens"] / max(record["seconds"], 1e-9)
    before = record["trajectory"][0]["val_bpb"]
    out.print(
        f"{record['steps']:,} steps, {record['tokens']:,} tokens, {speed:,.0f} tokens/s; "
        f"best step {record['best_step']}: val bpb {before:.4f} -> {record['val_bpb']:.4f}"
    )
    out.print(f"{result}: {size:,} bytes, {record['estimate']['parameters']:,} parameters")


def _format_scores(evaluation: dict[str, Any]) -> Table:
    table = Table(title="held-out questions (share of rows, 0 to 1)", title_justify="left")
    for column in ("split", "model", "rows", "exact calls", "right tools", "valid calls", "right abstention"):
        table.add_column(column, justify="left" if column in ("split", "model") else "right")
    for split, models in evaluation.items():
        for label, s in models.items():
            shares = ["-" if s[k] is None else f"{s[k]:.3f}" for k in ("exact", "names", "valid", "abstained")]
            table.add_row(split, label, str(s["rows"]), *shares)
    return table


def main() -> None:
    run(app, "poe-train")


if __name__ == "__main__":
    main()
