"""Measure a base and a stage on questions with reference calls and on texts; compare evaluations."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from poe.commands.app import INTERRUPTED, Base, Device, Program, Repo, err, join_processes, out
from poe.commands.use import NewTokens, Off, open_cascade
from poe.errors import FingerprintError


class EvaluationGroup(TyperGroup):
    """`poe eval DIR ...` runs an evaluation; the other words are commands."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the name of the command first if it was left out."""
        is_named = not args or args[0] in (*self.commands, "--help")
        return super().parse_args(ctx, args if is_named else ["run", *args])


app = Program(help=f"{__doc__} `poe eval DIR --suite SPEC` is `poe eval run DIR --suite SPEC`.", cls=EvaluationGroup)


@app.command("run")
def run_evaluation(
    repo: Repo,
    suite: Annotated[
        str,
        typer.Option(
            help="Suites as a SPEC: name=path, comma-separated; also demo=N, text=FILES, plans=FILE, tau2=retail, "
            "bfcl, lm-eval=TASK."
        ),
    ],
    out_folder: Annotated[
        Path | None, typer.Option("--out", help="Folder of the answers and results; default: runs/eval-NAME.")
    ] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Most rows of each suite: a random sample.")] = None,
    free: Annotated[bool, typer.Option("--free", help="Do not constrain replies to calls that fit.")] = False,
    both: Annotated[bool, typer.Option("--both", help="Measure constrained replies, and also free ones.")] = False,
    max_new_tokens: NewTokens = 256,
    formats: Annotated[int, typer.Option(min=1, help="Ask each question in so many prompt formats.")] = 1,
    temperature: Annotated[
        float, typer.Option(min=0, help="Sample replies at this temperature; 0 takes the most likely tokens.")
    ] = 0.0,
    samples: Annotated[int, typer.Option(min=1, help="Sampled replies to each question.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sample of rows, of replies, and of the bootstrap.")] = 0,
    stage_only: Annotated[
        bool, typer.Option("--stage-only", help="Do not ask the base, which often takes longer than the stage.")
    ] = False,
    off: Off = False,
    base: Base = None,
    device: Device = "auto",
) -> None:
    """Answer the questions of suites with the base and with the stage, and print every metric with its interval.

    The folder has answers.jsonl, results.json and results.md. The same command continues an evaluation that was
    stopped. Processes that a launcher starts (torchrun) share the questions.
    """
    if free and both:
        raise typer.BadParameter("--both measures free replies as well: leave out --free.")
    if stage_only and off:
        raise typer.BadParameter("--stage-only leaves out the base, and --off the stage: nothing is left to measure.")
    with join_processes(device) as world:
        from poe.evaluation.kinds import read_sources
        from poe.evaluation.run import TABLE, Evaluation
        from poe.evaluation.suites import Settings
        from poe.evaluation.unchanged import hash_base_alone
        from poe.files.output import check_output_folder
        from poe.training.reporting.progress import Progress

        settings = Settings(
            constrain=not free,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            samples=samples,
            rows=rows,
            seed=seed,
            formats=formats,
        )
        folder = out_folder or Path("runs") / f"eval-{Path(repo).name}"
        if world.is_main:
            check_output_folder(folder)
        sources = read_sources(suite)
        alone = None
        if world.is_main and not off:
            alone = hash_base_alone(repo, lambda place: open_cascade(place, None, str(world.device)), base)
        cascade = open_cascade(repo, base, str(world.device))
        stage = None if off else cascade.active
        if stage_only and stage is None:
            raise typer.BadParameter(f"--stage-only measures a stage, and {repo} is a base.")
        evaluation = Evaluation(
            cascade, sources, folder, stage=stage, settings=settings, both=both, stage_only=stage_only
        )
        for note in evaluation.notes:
            err.print(f"note: {note}", markup=False)
        number, names = evaluation.num_answers, f"{', '.join(evaluation.models)}; {', '.join(evaluation.suites)}"
        err.print(f"{number} answers: {names}", markup=False)
        try:
            results = evaluation.run(alone, Progress("eval", quiet=not world.is_main), world)
        except KeyboardInterrupt:
            with world.report_once("interrupted") as is_reporter:
                err.quiet = not is_reporter
                err.print(f"Stopped; the answers are in {folder}. To continue: the same command.", markup=False)
            raise typer.Exit(INTERRUPTED) from None
        if world.is_main:
            out.print((folder / TABLE).read_text(encoding="utf-8"), end="")
        if not results.get("base_unchanged", {"is_equal": True})["is_equal"]:
            raise FingerprintError(
                f"The base with the stage off is not the base alone: see base_unchanged in {folder}."
            )


@app.command()
def compare(
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR DIR...", help="Folders of evaluations; the first is the reference.")
    ],
) -> None:
    """Compare evaluations question by question: each metric, and its difference from the first with its interval."""
    from poe.errors import EvaluationError
    from poe.evaluation.results import compare_runs, read_run

    if len(folders) < 2:
        raise EvaluationError("Expected at least two evaluations to compare, got one.")
    out.print(compare_runs([read_run(folder) for folder in folders]), end="")
