"""`poe-train`: train a stage on a frozen base, or a base from scratch."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from poe.commands.app import FAILED, err, interrupted, out, recipe_options, run
from poe.errors import PoEError, TrainingError
from poe.stages import BaseRecipe, Recipe, load_base_recipe, load_recipe

if TYPE_CHECKING:
    from poe.training.distributed import World

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, rich_markup_mode="rich")


@app.command()
@recipe_options(Recipe)
def stage(
    recipe: Annotated[str, typer.Argument(help="a shipped recipe, or a YAML file")] = "tool",
    base: Annotated[str, typer.Option(help="Hub id or folder of the base; 'demo' is the embedded one")] = "demo",
    data: Annotated[str | None, typer.Option(help="name[=path][*epochs][:weight], comma-separated")] = None,
    out_folder: Annotated[Path | None, typer.Option("--out", help="the run's folder [runs/RECIPE]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue the run in --out")] = False,
    no_eval: Annotated[bool, typer.Option("--no-eval", help="do not answer held-out questions at the end")] = False,
    fields: dict[str, Any] | None = None,
) -> None:
    """Train a stage and write its folder: delta, card, training.json, loss.png."""
    with _launched() as world:
        _stage(world, recipe, base, data, out_folder, resume, no_eval, fields or {})


def _stage(
    world: "World",
    recipe: str,
    base: str,
    data: str | None,
    out_folder: Path | None,
    resume: bool,
    no_eval: bool,
    fields: dict[str, Any],
) -> None:
    from poe.cascade import Cascade
    from poe.training.engine import Interrupted
    from poe.training.precision import choose_dtype
    from poe.training.trainer import train_stage

    plan = load_recipe(recipe, **fields)
    folder = out_folder or Path("runs") / plan.name
    # a base that is to be divided moves to the devices layer by layer
    place = None if plan.shard_base and world.size > 1 else _placement(world.device)
    cascade = Cascade.from_pretrained(base, dtype=choose_dtype(plan.dtype, world.device), device_map=place)
    number = f", {world.size} processes" if world.size > 1 else ""
    dtype = str(cascade.base.dtype).removeprefix("torch.")
    err.print(f"stage {plan.name} on {base}: {world.device.type}, {dtype}{number}", markup=False)
    try:
        result = train_stage(
            cascade, plan, data, folder, resume=resume, evaluate=None if no_eval else _evaluate, world=world
        )
    except Interrupted:
        with world.one_speaks("interrupted") as mine:
            err.quiet = not mine
            raise interrupted(f"poe-train stage {recipe}", folder) from None
    out.print(_bpb_table(result.record))
    if "evaluation" in result.record:
        out.print(_score_table(result.record["evaluation"]))
    size = result.delta_bytes
    parameters = cascade.stages[plan.name].num_parameters()
    out.print(f"{folder}/delta.safetensors: {size:,} bytes ({size / 2**20:.1f} MiB), {parameters:,} parameters")
    out.print(f"{result.record['tokens_per_s']:,} tokens/s in training; best step {result.record['best_step']}")


@app.command()
@recipe_options(BaseRecipe)
def base(
    recipe: Annotated[str, typer.Argument(help="a shipped base recipe, or a YAML file")],
    data: Annotated[str | None, typer.Option(help="demo, or text=FILES")] = None,
    out_folder: Annotated[Path | None, typer.Option("--out", help="the run's folder [runs/base-RECIPE]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue the run in --out")] = False,
    fields: dict[str, Any] | None = None,
) -> None:
    """Train a PoE base from scratch, tokenizer included, and write a folder that transformers loads."""
    from poe.training.engine import Interrupted
    from poe.training.pretrain import train_base

    with _launched() as world:
        if world.size > 1:
            raise TrainingError("A base is trained by one process: start poe-train base without a launcher.")
    plan = load_base_recipe(recipe, **(fields or {}), **({"data": data} if data else {}))
    folder = out_folder or Path("runs") / f"base-{plan.name}"
    try:
        train_base(plan, folder, resume=resume)
    except Interrupted:
        raise interrupted(f"poe-train base {recipe}", folder) from None
    size = (folder / "model.safetensors").stat().st_size
    out.print(f"{folder}/model.safetensors: {size:,} bytes ({size / 1e6:.2f} MB)")


@contextmanager
def _launched() -> "Iterator[World]":
    """Join the launcher's processes. The main one reports; an error is said once, by one that met it."""
    from poe.training.distributed import ALONE, joined_world

    world = ALONE
    try:
        with joined_world() as world:
            out.quiet = err.quiet = not world.is_main
            yield world
    except PoEError as error:
        if world.size == 1:
            raise
        with world.one_speaks(str(error)) as mine:
            err.quiet = not mine
            who = "" if world.is_main else f" (rank {world.rank} of {world.size})"
            err.print(f"error{who}: {error}", markup=False, style="red")
        raise typer.Exit(FAILED) from None
    finally:
        out.quiet = err.quiet = False


def _placement(device: Any) -> Any:
    return None if device.type == "cpu" else {"": device}


def _evaluate(cascade: Any, name: str, held_out: dict[str, Any]) -> dict[str, Any]:
    """Answer the held-out questions with the base and with the stage."""
    from poe.evaluation.calls import evaluate_calls

    results: dict[str, Any] = {}
    for label, stage_name in (("base", None), ("stage", name)):
        err.print(f"answering held-out questions with the {label} ({sum(map(len, held_out.values()))} rows)")
        scores = evaluate_calls(cascade, stage_name, held_out)
        for split, score in scores.items():
            results.setdefault(split, {})[label] = score.as_dict()
    return results


def _bpb_table(record: dict[str, Any]) -> Table:
    table = Table(title="validation bits per byte", title_justify="left")
    table.add_column("step", justify="right")
    table.add_column("val bpb", justify="right")
    for point in record["trajectory"]:
        best = " *" if point["step"] == record["best_step"] else "  "
        table.add_row(str(point["step"]), f"{point['val_bpb']:.4f}{best}")
    return table


def _score_table(evaluation: dict[str, Any]) -> Table:
    table = Table(title="held-out questions (shares of rows)", title_justify="left")
    for column in ("split", "model", "rows", "exact calls", "right tools", "valid calls", "right abstention"):
        table.add_column(column, justify="left" if column in ("split", "model") else "right")
    for split, models in evaluation.items():
        for label, s in models.items():
            shares = ["-" if s[k] is None else f"{s[k]:.3f}" for k in ("exact", "names", "valid", "abstained")]
            table.add_row(split, label, str(s["rows"]), *shares)
    return table


def main() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    run(app)


if __name__ == "__main__":
    main()
