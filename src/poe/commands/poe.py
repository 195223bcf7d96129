"""Generate text, make calls, look inside, check, publish. `poe-train` (or `python -m poe train`) trains."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from poe.commands import data, imports, look
from poe.commands.app import FAILED, Program, add_version, err, out, run
from poe.errors import DataError, DecodingError, PoEError, StageError

app = Program(help=__doc__)
app.callback(help=__doc__)(add_version)
app.add_typer(imports.app, name="import")
app.add_typer(data.app, name="data")
app.add_typer(look.app)

CALIBRATED_TOKENS = 512  # of each document

Repo = Annotated[str, typer.Argument(help="a base or a stage: folder, Hub id, or 'demo'", show_default=False)]
Base = Annotated[str | None, typer.Option(help="where the stage's base is, if not where the stage says")]
NewTokens = Annotated[int, typer.Option(help="at most this many new tokens")]
Off = Annotated[bool, typer.Option("--off", help="switch the stage off: the base alone")]


@app.command()
def generate(
    repo: Repo,
    prompt: Annotated[str, typer.Argument(help="text to continue; '-' reads standard input")],
    base: Base = None,
    max_new_tokens: NewTokens = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 0.0,
    seed: int = 0,
    off: Off = False,
    strategy: Annotated[
        str | None,
        typer.Option(
            help="exit=DEPTH: use the first layers of the base; adaptive=FILE: thresholds of `poe calibrate`; "
            "draft=DEPTH: draft with the exit at this depth, verify with full depth"
        ),
    ] = None,
    sibling: Annotated[
        list[str] | None,
        typer.Option("--with", help="REPO=WEIGHT: another stage decides too (repeatable)"),
    ] = None,
) -> None:
    """Continue a text, as it is: no chat template."""
    import torch

    from poe.decoding import Exit, parse_strategy
    from poe.modeling.families import is_prefix_lm

    try:
        chosen = None if strategy is None else parse_strategy(strategy)
    except DecodingError as error:
        raise DecodingError(f"--strategy: {error}") from None
    cascade = _open(repo, base)
    text = sys.stdin.read() if prompt == "-" else prompt
    inputs = cascade.tokenizer(text, return_tensors="pt", return_token_type_ids=False).to(cascade.base.device)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    if is_prefix_lm(cascade.config):
        inputs["token_type_ids"] = inputs["attention_mask"]
    if temperature > 0:
        options["temperature"] = temperature
    stage = None if off or isinstance(chosen, Exit) else cascade.active
    torch.manual_seed(seed)
    if sibling:
        if chosen is not None or off:
            raise DecodingError("--with combines several stages at full depth: leave out --strategy and --off.")
        output = cascade.compose(_weights(cascade, sibling)).generate(**inputs, **options)
    else:
        output = cascade.generate(**inputs, stage=stage, strategy=chosen, **options)
    print(cascade.tokenizer.decode(output[0][inputs["input_ids"].shape[1] :], skip_special_tokens=True))


@app.command()
def calibrate(
    repo: Repo,
    output: Annotated[Path, typer.Option("--out", help="JSON file for `poe generate --strategy adaptive=FILE`")],
    data: Annotated[str, typer.Option(help="text like that to be generated: demo, or text=FILES")] = "demo",
    agreement: Annotated[float, typer.Option(help="share of the tokens that must be full depth's")] = 0.99,
    confidence: Annotated[str, typer.Option(help="margin, probability or agreement")] = "margin",
    rows: Annotated[int, typer.Option(help="documents: half to find thresholds, half to measure")] = 200,
    base: Base = None,
    off: Off = False,
) -> None:
    """Find out on texts where tokens may leave a model early, and write the thresholds."""
    from itertools import islice

    from poe.data.text import documents

    cascade = _open(repo, base)
    texts = [text.text for text in islice(documents(data), rows)]
    ids = cascade.tokenizer(texts, verbose=False)["input_ids"]
    stage = None if off else cascade.active
    depth = cascade.calibrate_depth(
        [row[:CALIBRATED_TOKENS] for row in ids], agreement=agreement, confidence=confidence, stage=stage
    )
    depth.save(output)
    table = Table(
        title=f"agreement with full depth: {depth.agreement:.2%} (asked for {agreement:.2%})", title_justify="left"
    )
    for column in ("layers", f"{confidence} at least", "tokens that leave"):
        table.add_column(column, justify="right")
    thresholds = [*(f"{threshold:.3f}" for threshold in depth.thresholds), ""]
    for layers, threshold, share in zip([*depth.depths, depth.full], thresholds, depth.shares, strict=True):
        table.add_row(str(layers), threshold, f"{share:.1%}")
    out.print(table)
    out.print(f"{output}: for poe generate {repo} TEXT --strategy adaptive={output}", markup=False)


@app.command()
def call(
    repo: Repo,
    question: Annotated[str, typer.Argument(help="what the user asks")],
    tools: Annotated[Path, typer.Option(help="JSON file: a list of OpenAI-style tools")],
    base: Base = None,
    system: Annotated[str | None, typer.Option(help="a system message")] = None,
    max_new_tokens: NewTokens = 256,
    off: Off = False,
) -> None:
    """Answer a question with calls, as JSON: `content`, and `tool_calls` that fit their schemas.

    Exit code 1, and the problems, when a call does not fit the tools or cannot be read.
    """
    from poe.calls.forms.call_forms import parse_reply
    from poe.calls.schema import check_calls
    from poe.data.render import Renderer
    from poe.data.templates import reply_form
    from poe.evaluation.calls import generate_replies

    declared = _read_tools(tools)
    cascade = _open(repo, base)
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": question})
    renderer = Renderer(cascade.tokenizer)
    prompt = renderer.prompt_ids(messages, declared)
    stage = None if off else cascade.active
    text = generate_replies(cascade, stage, [prompt], renderer.stop_token_ids, max_new_tokens=max_new_tokens)[0]
    reply = parse_reply(text, reply_form(cascade.tokenizer))
    wrong = check_calls(reply.calls, declared) + [f"not a call that can be read: {m}" for m in reply.malformed]
    calls = [c.as_openai(i) for i, c in enumerate(reply.calls)]
    print(json.dumps({"content": reply.content or None, "tool_calls": calls}, ensure_ascii=False, indent=2))
    if wrong:
        err.print("error: the calls were not accepted: " + "; ".join(wrong), markup=False, style="red")
        raise typer.Exit(FAILED)


@app.command()
def inspect(repo: Repo, base: Base = None) -> None:
    """Show what a base or a stage folder is, and what it stands on. Reads configs and headers, not weights."""
    from poe.loaders.describe import describe

    table = Table(show_header=False, box=None)
    for key, value in describe(repo, base=base):
        table.add_row(f"[bold]{escape(key)}[/bold]", escape(value))
    out.print(table)


@app.command()
def export(
    repo: Repo,
    native: Annotated[Path, typer.Option(help="new folder for an ordinary checkpoint of the base's family")],
    base: Base = None,
    max_shard_size: Annotated[str, typer.Option(help="largest weight file: a number and a unit")] = "5GB",
) -> None:
    """Write a stage and all it stands on as an ordinary checkpoint, for programs that know nothing of stages.

    The base's layers, the stages' on top, and the folded head: plain transformers loads it with the same logits.
    """
    cascade = _open_stage(repo, base)
    folder = cascade.export_native(cascade.active, native, max_shard_size=max_shard_size)
    out.print(f"{folder}: {cascade.config.model_type}, {_size(folder)}", markup=False)


@app.command()
def fold(
    repo: Repo,
    to: Annotated[Path, typer.Option("--out", help="folder for the stage that carries the whole chain")],
    base: Base = None,
    name: Annotated[str | None, typer.Option(help="its name; default: the stage's, and -folded")] = None,
) -> None:
    """Make one stage of a chain of stages: the same answers from one delta, that needs no parent."""
    from poe.loaders.stage_folder import merge_training_records

    cascade = _open_stage(repo, base)
    chain = cascade.stages[cascade.active].chain
    cascade.fold(cascade.active, name)
    folder = cascade.save_stage(cascade.active, to, merge_training_records(chain))
    out.print(f"{folder}: {len(chain)} stages in one, {_size(folder)}", markup=False)


@app.command()
def compress(
    repo: Repo,
    to: Annotated[Path, typer.Option("--out", help="folder for the smaller stage")],
    rank: Annotated[int | None, typer.Option(help="replace the head delta by the nearest one of this rank")] = None,
    int8: Annotated[bool, typer.Option("--int8", help="store matrices in 8 bits per weight")] = False,
    base: Base = None,
) -> None:
    """Make a stage's files smaller, and say what that costs."""
    import torch

    from poe.loaders.stage_folder import read_training_record

    if rank is None and not int8:
        raise typer.BadParameter("expected --rank, --int8 or both")
    cascade = _open_stage(repo, base)
    name = cascade.active
    stage, training = cascade.stages[name], read_training_record(cascade.stages[name])
    if rank is not None:
        report = cascade.compress_head(name, rank)
        out.print(
            f"head: {report.parameters_before:,} -> {report.parameters_after:,} parameters, "
            f"relative error {report.relative_error:.2e}, {report.energy:.2%} of its energy kept"
        )
    dtype = torch.int8 if int8 else None
    if int8:
        out.print(f"int8: relative error {stage.storage_error(torch.int8):.2e}")
    folder = cascade.save_stage(name, to, training, dtype=dtype)
    out.print(f"{folder}: {_size(folder)}", markup=False)


@app.command()
def verify(
    repo: Repo,
    base: Base = None,
    revision: Annotated[str | None, typer.Option(help="branch, tag or commit of a repository")] = None,
) -> None:
    """Check whether every byte of a base or stage is what it says; a line per check, exit code 1 if one fails.

    Reads all weights; those of a repository are fetched. What may be a pickle is refused by name, never fetched.
    """
    from poe.loaders.verify import verify as checks

    failed = 0
    for check in checks(repo, base=base, revision=revision):
        failed += not check.ok
        mark = "[green]ok  [/green]" if check.ok else "[red]FAIL[/red]"
        out.print(f"{mark} {escape(check.name)}: {escape(check.detail)}")
    if failed:
        raise typer.Exit(FAILED)


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="folder of a stage or base", show_default=False)],
    repo: Annotated[str, typer.Argument(help="Hub repository, me/name; it is made if need be", show_default=False)],
    base: Annotated[str | None, typer.Option(help="where the stage's base is on the Hub, if it names a folder")] = None,
    parent: Annotated[str | None, typer.Option(help="where its parent is on the Hub, if it names a folder")] = None,
    private: Annotated[bool, typer.Option("--private", help="make the repository private")] = False,
    revision: Annotated[str | None, typer.Option(help="branch to push to; it is made if need be")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check, show files and sizes, upload nothing")] = False,
) -> None:
    """Check a stage's or base's folder, then upload it in one commit.

    Files that do not belong to a stage are refused by name; checkpoints and rows that a run left beside it stay here.
    """
    from poe.loaders.hub import plan_upload, upload

    plan = plan_upload(folder, repo, base=base, parent=parent)
    table = Table(box=None, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, size in plan.sizes().items():
        note = " (changed for others to find what it stands on)" if isinstance(plan.files[name], bytes) else ""
        table.add_row(escape(name) + note, f"{size:,}")
    table.add_row(f"{len(plan.files)} files to {repo}", f"{sum(plan.sizes().values()):,} bytes")
    out.print(table)
    if plan.left_out:
        out.print(f"not uploaded: {escape(', '.join(plan.left_out))}")
    if dry_run:
        out.print("dry run: nothing was uploaded")
        return
    out.print(f"pushed: {upload(plan, private=private or None, revision=revision).commit_url}")


def _size(folder: Path) -> str:
    return f"{sum(path.stat().st_size for path in folder.glob('*.safetensors')):,} bytes of weights"


def _open_stage(repo: str, base: str | None) -> Any:
    """Open a stage in the dtype in which its base is stored, in main memory: to write it, not to run it."""
    from poe.cascade import Cascade

    cascade = Cascade.from_pretrained(repo, base=base)
    if cascade.active is None:
        raise StageError(f"{repo} is a base: expected a stage's folder or repository.")
    return cascade


def _open(repo: str, base: str | None) -> Any:
    from poe.cascade import Cascade
    from poe.training.precision import choose_dtype, default_device

    device = default_device()
    return Cascade.from_pretrained(
        repo,
        dtype=choose_dtype("auto", device),
        device_map=None if device.type == "cpu" else {"": device},
        base=base,
    )


def _weights(cascade: Any, siblings: list[str]) -> dict[str | None, float]:
    """Load the stages of `--with` beside the one that is open; returns all weights, which sum to one."""
    own, weights = cascade.active, {}
    for spec in siblings:
        place, _, number = spec.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = -1.0
        if not place or not 0 <= weight <= 1:
            raise DecodingError(f"--with {spec!r}: expected REPO=WEIGHT with a weight from 0 to 1.")
        weights[cascade.load_stage(place).active] = weight
    return {own: 1 - sum(weights.values()), **weights}


def _read_tools(path: Path) -> list[dict[str, Any]]:
    from poe.calls.schema import as_tool
    from poe.errors import RowError

    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"The tools file {path} cannot be read: {error.strerror or error}.") from None
    except ValueError as error:
        raise DataError(f"The tools file {path} is not JSON: {error}") from None
    if not isinstance(content, list) or not all(isinstance(tool, dict) for tool in content):
        raise DataError(f"{path}: expected a list of tools, each an object, got {type(content).__name__}.")
    tools = []
    for number, tool in enumerate(content):
        function = tool.get("function", tool)
        try:
            tools.append(as_tool(function.get("name"), function.get("description"), function.get("parameters")))
        except (RowError, PoEError, AttributeError) as error:
            raise DataError(f"{path}: tool {number + 1} cannot be used: {error}") from None
    return tools


def main() -> None:
    run(app, "poe")


if __name__ == "__main__":
    main()
