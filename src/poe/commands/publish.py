"""Commands that check a folder and upload it."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from poe.commands.app import FAILED, Base, Program, Repo, out
from poe.errors import printable

app = Program()


@app.command()
def verify(
    repo: Repo,
    base: Base = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a repository.")] = None,
) -> None:
    """Check every byte of a base or stage: one line per check, exit code 1 if a check fails.

    All weights are read; those of a repository are downloaded. Files that may hold a pickle are refused by name and
    never downloaded.
    """
    from poe.loaders.verify import verify as run_checks

    failed = 0
    for check in run_checks(repo, base=base, revision=revision):
        failed += not check.ok
        mark = ("ok  ", "green") if check.ok else ("FAIL", "red")
        out.print(Text.assemble(mark, f" {printable(check.name, 200)}: {printable(check.detail)}"))
    if failed:
        raise typer.Exit(FAILED)


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Folder of a stage or base.", show_default=False)],
    repo: Annotated[str, typer.Argument(help="Hub repository, me/name; created if it is new.", show_default=False)],
    base: Annotated[str | None, typer.Option(help="Hub id of the stage's base, if the stage names a folder.")] = None,
    parent: Annotated[str | None, typer.Option(help="Hub id of the stage's parent, if it names a folder.")] = None,
    license: Annotated[
        str | None, typer.Option(help="License of the stage, as an identifier of the Hub: apache-2.0, mit, other.")
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option(help="Folder of the stage's evaluation, for the card; default: eval-NAME beside FOLDER."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; created if it is new.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, print files and sizes, upload nothing.")] = False,
) -> None:
    """Check the folder of a stage or base, and upload it in one commit.

    Files that do not belong to a stage are refused by name. The checkpoints and rows of a training run are not
    uploaded.
    """
    from poe.loaders.hub import plan_upload, upload

    measured = _read_measured(folder, results)
    plan = plan_upload(folder, repo, base=base, parent=parent, license=license, measured=measured)
    table = Table(box=None, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, size in plan.sizes().items():
        note = " (changed for the Hub)" if isinstance(plan.files[name], bytes) else ""
        table.add_row(name + note, f"{size:,}")
    table.add_row(f"{len(plan.files)} files to {repo}", f"{sum(plan.sizes().values()):,} bytes")
    out.print(table)
    for problem in plan.problems:
        out.print(f"warning: {printable(problem)}", markup=False, style="yellow")
    if plan.left_out:
        out.print(f"not uploaded: {printable(', '.join(plan.left_out))}")
    if dry_run:
        out.print("dry run: nothing was uploaded")
        return
    out.print(f"pushed: {upload(plan, private=private or None, revision=revision).commit_url}")


def _read_measured(folder: Path, results: Path | None) -> dict[str, Any] | None:
    """Return what the card shows of an evaluation: the given one, or the one beside the folder, if there is one."""
    from poe.evaluation.results import RESULTS, describe_for_card, read_run

    beside = folder.parent / f"eval-{folder.name}"
    found = results or (beside if (beside / RESULTS).is_file() else None)
    if found is None:
        return None
    run = read_run(found)
    if results is None and run.results["stage"] is None:  # it measured a base
        return None
    measured = describe_for_card(run.results)
    out.print(f"the card shows the results of {found}", markup=False)
    return measured
