"""Print rows after each step of the pipeline, count them, export them."""

import json
from dataclasses import asdict
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from poe.commands.app import Program, err, out
from poe.errors import escape_controls, printable
from poe.files.output import check_output_file
from poe.stages import Augmentation, Recipe, load_recipe

app = Program(help=__doc__)

Spec = Annotated[
    str, typer.Argument(help="Data as a SPEC: name[=path][*epochs][:weight], comma-separated.", show_default=False)
]
Base = Annotated[str, typer.Option(help="Base with the tokenizer and chat template: folder, Hub id, or 'demo'.")]
RecipeName = Annotated[
    str, typer.Option("--recipe", help="Recipe with the options for the data: a shipped recipe, or a YAML file.")
]


POOL_ROWS = 200  # rows of a source to read beyond those to print, as a pool of tools for the augmentation


class Step(StrEnum):
    """The steps of the pipeline, in order."""

    READ = "read"
    AUGMENT = "augment"
    RENDER = "render"


@app.command()
def show(
    spec: Spec,
    after: Annotated[Step, typer.Option(help="Last step to apply.")] = Step.RENDER,
    count: Annotated[int, typer.Option("-n", help="Number of rows of each source.", min=1)] = 3,
    base: Base = "demo",
    recipe: RecipeName = "tool",
    epoch: Annotated[int, typer.Option(help="Number of the pass, which decides the augmentation.", min=0)] = 0,
) -> None:
    """Print the first rows after a step. In rendered rows the trained tokens are green."""
    from poe.data.augment import ToolPool, augment
    from poe.data.drops import DropReport
    from poe.data.readers import READERS, read_source
    from poe.data.readers.guess import find_reader
    from poe.data.spec import parse_spec

    plan = load_recipe(recipe)
    options = Augmentation() if after is Step.READ else plan.augment
    renderer = _load_renderer(base) if after is Step.RENDER else None
    if after is Step.AUGMENT and plan.augment == Augmentation():
        err.print(
            f"recipe {plan.name} has no augmentation, so these are the rows as read; try --recipe FILE.yaml",
            markup=False,
        )
    report = DropReport()
    for source in parse_spec(spec, READERS, find_reader):
        rows = list(islice(read_source(source, report), count + (POOL_ROWS if options.draws_tools else 0)))
        pool = ToolPool.from_conversations(rows)
        for row in rows[:count]:
            for augmented in augment(row, options, epoch=epoch, seed=plan.seed, pool=pool):
                out.rule(printable(f"{source} · {row.id or row.source}", 200), align="left")
                _print_row(augmented, renderer)


@app.command()
def stats(
    spec: Spec,
    base: Base = "demo",
    page: Annotated[Path | None, typer.Option("--out", help="Also write a page: .html, or .md with a .png.")] = None,
    recipe: RecipeName = "tool",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Count rows, calls, tokens, licenses, repetitions, and dropped rows by reason."""
    from poe.data.drops import DropReport
    from poe.data.samples import sample_rows
    from poe.data.statistics import compute_statistics
    from poe.data.statistics_page import write_page

    if page is not None:
        check_output_file(page)
    report, renderer = DropReport(), _load_renderer(base)
    corpus = _read_corpus(spec, load_recipe(recipe), report)
    counted = compute_statistics(corpus, renderer, report)
    if page is not None:
        write_page(page, counted, report, sample_rows(corpus, renderer))
        err.print(f"wrote {page}", markup=False)
    if as_json:
        content = {"sources": [s.as_dict() for s in counted], "rows": report.as_dict()}
        print(escape_controls(json.dumps(content, ensure_ascii=False)))
        return
    for s in counted:
        out.print(_format_counts(f"{s.source} · {s.license or 'license not stated'}", s.as_dict()))
    for source, counts in report.as_dict().items():
        title = f"{printable(source)}: {counts['read']:,} read, {counts['kept']:,} kept"
        if not counts["dropped"]:
            out.print(title, markup=False)
            continue
        table = Table("reason to drop", "rows", title=title, title_justify="left")
        for reason, number in counts["dropped"].items():
            table.add_row(printable(reason), f"{number:,}")
        out.print(table)


@app.command()
def export(
    spec: Spec,
    file: Annotated[Path, typer.Argument(help="New .jsonl or .parquet file.", show_default=False)],
    recipe: RecipeName = "tool",
) -> None:
    """Write the training rows without repetitions, in the `messages` format of TRL and Axolotl."""
    from poe.data.corpus import TRAIN
    from poe.data.drops import DropReport
    from poe.data.export import export as write

    check_output_file(file)
    report = DropReport()
    corpus = _read_corpus(spec, load_recipe(recipe), report)
    numbers = [i for n in range(len(corpus.sources)) for i in corpus.row_numbers(n, TRAIN).tolist()]
    written = write((corpus.rows[i] for i in numbers), file)
    out.print(f"{file}: {written:,} rows", markup=False)


def _print_row(row: Any, renderer: Any) -> None:
    """Print a row as JSON, or as the renderer's tokens if there is a renderer."""
    if renderer is None:
        content = {"messages": row.messages, "tools": row.tools}
        out.print_json(json.dumps(content | ({"form": asdict(row.form)} if row.form else {}), ensure_ascii=False))
        return
    for part in renderer.render(row):
        out.print(_color_tokens(renderer.tokenizer, part.input_ids, part.loss_mask))
        out.print(f"{len(part.input_ids)} tokens, {sum(part.loss_mask)} trained", style="dim")


def _read_corpus(spec: str, recipe: Recipe, report: Any) -> Any:
    from poe.data.corpus import read_corpus

    return read_corpus(recipe.replace(data=spec), report)


def _load_renderer(base: str) -> Any:
    from poe.data.render import Renderer
    from poe.data.templates import complete_template
    from poe.loaders.repository import locate
    from poe.loaders.tokenizer import check_tokenizer, load_tokenizer

    tokenizer = load_tokenizer(locate(base))
    check_tokenizer(tokenizer, owner=base)
    complete_template(tokenizer)  # as in training
    return Renderer(tokenizer)


def _color_tokens(tokenizer: Any, ids: list[int], mask: list[bool]) -> Text:
    """Return the text of a row with its trained tokens in green."""
    from poe.data.samples import split_by_mask

    return Text.assemble(
        *((part, "green" if is_trained else "") for part, is_trained in split_by_mask(tokenizer, ids, mask))
    )


def _format_counts(title: str, content: dict[str, Any]) -> Table:
    table = Table("what", "value", title=title, title_justify="left")
    for name, value in content.items():
        if name in ("source", "license"):
            continue
        text = ", ".join(f"{k}: {v:,}" for k, v in value.items() if v) if isinstance(value, dict) else value
        table.add_row(name.replace("_", " "), f"{text:,}" if isinstance(text, int) else str(text or "-"))
    return table
