"""Commands that run a model: generate text, calibrate adaptive depth, answer with calls."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from poe.commands.app import FAILED, Base, Device, Program, Repo, err, out
from poe.errors import DecodingError, escape_controls, printable
from poe.files.output import check_output_file

app = Program()

CALIBRATION_TOKENS = 512  # of each document

NewTokens = Annotated[int, typer.Option(min=1, help="Largest number of new tokens.")]
Off = Annotated[bool, typer.Option("--off", help="Use the base without the stage.")]


@app.command()
def generate(
    repo: Repo,
    prompt: Annotated[str, typer.Argument(help="Text to continue; '-' reads standard input.")],
    base: Base = None,
    device: Device = "auto",
    max_new_tokens: NewTokens = 128,
    temperature: Annotated[
        float, typer.Option(min=0, help="Sampling temperature, with the model's own generation settings; 0 is greedy.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    off: Off = False,
    strategy: Annotated[
        str | None,
        typer.Option(
            help="How to decode. exit=DEPTH: use the first layers of the base; adaptive=FILE: thresholds of "
            "`poe calibrate`; draft=DEPTH: draft with the exit at this depth, verify with full depth."
        ),
    ] = None,
    sibling: Annotated[
        list[str] | None,
        typer.Option("--with", help="REPO=WEIGHT: combine with another stage by this weight, 0 to 1 (repeatable)."),
    ] = None,
) -> None:
    """Continue a text, without a chat template. Control tokens in the text are read as text."""
    import torch

    from poe.data.encoding import TextEncoder
    from poe.decoding import Exit, parse_strategy
    from poe.decoding.generation import greedy_options
    from poe.loaders.tokenizer import check_tokenizer
    from poe.modeling.families import is_prefix_lm

    try:
        chosen = None if strategy is None else parse_strategy(strategy)
    except DecodingError as error:
        raise DecodingError(f"--strategy: {error}") from None
    cascade = open_cascade(repo, base, device)
    text = sys.stdin.read() if prompt == "-" else prompt
    check_tokenizer(cascade.tokenizer, cascade.config.vocab_size)
    ids = torch.tensor([TextEncoder(cascade.tokenizer, cascade.config.vocab_size).encode_plain(text)])
    ids = ids.to(cascade.base.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    options = greedy_options(max_new_tokens=max_new_tokens)
    if temperature > 0:  # sampling follows the model's own settings
        options = {"max_new_tokens": max_new_tokens, "do_sample": True, "temperature": temperature}
    if is_prefix_lm(cascade.config):
        inputs["token_type_ids"] = inputs["attention_mask"]
    stage = None if off or isinstance(chosen, Exit) else cascade.active
    torch.manual_seed(seed)
    if sibling:
        if chosen is not None or off:
            raise DecodingError("--with combines several stages at full depth: leave out --strategy and --off.")
        output = cascade.compose(_load_siblings(cascade, sibling)).generate(**inputs, **options)
    else:
        output = cascade.generate(**inputs, stage=stage, strategy=chosen, **options)
    text = cascade.tokenizer.decode(output[0][inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(escape_controls(text))


@app.command()
def calibrate(
    repo: Repo,
    output: Annotated[Path, typer.Option("--out", help="JSON file for `poe generate --strategy adaptive=FILE`.")],
    data: Annotated[str, typer.Option(help="Texts like those to generate: demo, or text=FILES.")] = "demo",
    agreement: Annotated[
        float, typer.Option(min=0, max=1, help="Share of tokens that must equal those of full depth.")
    ] = 0.99,
    confidence: Annotated[
        str, typer.Option(help="Measure of confidence: margin, probability or agreement.")
    ] = "margin",
    rows: Annotated[int, typer.Option(min=2, help="Documents: half to choose thresholds, half to measure them.")] = 200,
    base: Base = None,
    device: Device = "auto",
    off: Off = False,
) -> None:
    """Choose the thresholds of adaptive depth on texts, and write them to a file."""
    from itertools import islice

    from poe.data.encoding import TextEncoder
    from poe.data.text import documents
    from poe.loaders.tokenizer import check_tokenizer
    from poe.training.text_rows import encode_texts

    check_output_file(output)
    cascade = open_cascade(repo, base, device)
    check_tokenizer(cascade.tokenizer, cascade.config.vocab_size)
    encoder = TextEncoder(cascade.tokenizer, cascade.config.vocab_size)
    ids = [list(map(int, document)) for document, _ in encode_texts(encoder, islice(documents(data), rows))]
    stage = None if off else cascade.active
    depth = cascade.calibrate_depth(
        [row[:CALIBRATION_TOKENS] for row in ids], agreement=agreement, confidence=confidence, stage=stage
    )
    depth.save(output)
    table = Table(
        title=f"agreement with full depth: {depth.agreement:.2%} (target: {agreement:.2%})", title_justify="left"
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
    question: Annotated[str, typer.Argument(help="The user's question.")],
    tools: Annotated[
        Path, typer.Option(help="JSON or YAML file with tools: OpenAI, Anthropic, MCP, OpenAPI, ... (any spelling).")
    ],
    base: Base = None,
    device: Device = "auto",
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_new_tokens: NewTokens = 256,
    tool_choice: Annotated[
        str, typer.Option(help="auto: calls or text; required: at least one call; none: text; or the name of a tool.")
    ] = "auto",
    free: Annotated[
        bool, typer.Option("--free", help="Do not constrain the reply to calls that fit; only check them.")
    ] = False,
    off: Off = False,
) -> None:
    """Answer a question with calls, printed as JSON: `content`, `tool_calls` and `finish_reason`.

    The reply is constrained to text, or calls that name a given tool and fit its schema. The exit code is 1, and the
    problems are printed, if a call cannot be read or does not fit its schema, or if the reply was cut off
    (`finish_reason: length`).
    """
    from poe.calls.grammar import MODES
    from poe.calls.tool_files import read_tools_file

    notes: dict[str, None] = {}
    declared = read_tools_file(tools, notes.setdefault)
    cascade = open_cascade(repo, base, device)
    stage = None if off else cascade.active
    choice: Any = tool_choice if tool_choice in MODES else {"type": "function", "function": {"name": tool_choice}}
    options = {"max_new_tokens": max_new_tokens, "tool_choice": choice, "constrain": not free}
    answer = cascade.call(question, declared, system=system, stage=stage, **options)
    for note in [f"{tools}: {note}" for note in notes] + answer.notes:
        err.print(f"note: {note}", markup=False)
    content = {
        "content": answer.text or None,
        "tool_calls": answer.message.get("tool_calls", []),
        "finish_reason": answer.finish_reason,
    }
    print(escape_controls(json.dumps(content, ensure_ascii=False, indent=2)))
    problems = [f"the calls were not accepted: {'; '.join(answer.problems)}"] if answer.problems else []
    if answer.finish_reason == "length":
        problems.insert(0, f"the reply was cut off at {max_new_tokens} tokens: give a larger --max-new-tokens")
    if problems:
        err.print(printable(f"error: {'; '.join(problems)}", 2000), style="red")
        raise typer.Exit(FAILED)


def open_cascade(repo: str, base: str | None, device_name: str) -> Any:
    """Open a base or a stage to run it, in the dtype that is fast on the device."""
    from poe.cascade import Cascade
    from poe.training.precision import choose_device, choose_dtype

    device = choose_device(device_name)
    return Cascade.from_pretrained(
        repo,
        dtype=choose_dtype("auto", device),
        device_map=None if device.type == "cpu" else {"": device},
        base=base,
    )


def _load_siblings(cascade: Any, siblings: list[str]) -> dict[str | None, float]:
    """Load the stages of `--with`, and return the weights of all stages. The open stage gets 1 minus their sum."""
    own, weights = cascade.active, {}
    for position, spec in enumerate(siblings, 1):
        repo, _, number = spec.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = -1.0
        if not repo or not 0 <= weight <= 1:
            raise DecodingError(f"--with {spec!r}: expected REPO=WEIGHT with a weight from 0 to 1.")
        weights[cascade.load_stage(repo, name=f"sibling-{position}").active] = weight
    return {own: 1 - sum(weights.values()), **weights}
