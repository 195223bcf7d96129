"""Commands that write a model in another form: import, export, fold, compress."""

import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from poe.commands.app import Base, Program, Repo, err, out
from poe.errors import StageError
from poe.files.output import check_output_folder

app = Program()
imports = Program(help="Convert a model of another project into a PoE base, or into a stage.")
app.add_typer(imports, name="import")


@imports.command()
def cognica(
    folder: Annotated[Path, typer.Argument(help="Folder of a release, or of a nanochat stage checkpoint.")],
    output: Annotated[Path, typer.Argument(help="Folder for the stage.")],
    base: Annotated[str, typer.Option(help="The PoE base or stage below the stage: folder, Hub id, or 'demo'.")],
    name: Annotated[str, typer.Option(help="Name of the stage.")] = "tool",
) -> None:
    """Convert a stage from the layout of Cognica's releases. Unknown tensors are listed and refused."""
    from poe.cascade import Cascade

    check_output_folder(output)
    cascade = Cascade.from_pretrained(base).import_stage(folder, name)
    cascade.save_stage(name, output)
    size = (output / "delta.safetensors").stat().st_size
    out.print(f"{output}: stage {name!r}, {cascade.stages[name].num_parameters():,} parameters, {size:,} bytes")


@imports.command()
def peft(
    adapter: Annotated[Path, typer.Argument(help="Folder of a LoRA adapter, as PEFT saves it.")],
    output: Annotated[Path, typer.Argument(help="Folder for the stage.")],
    base: Annotated[str, typer.Option(help="The base of the adapter: folder, Hub id, or 'demo'.")],
    name: Annotated[str, typer.Option(help="Name of the stage.")] = "lora",
) -> None:
    """Convert a LoRA adapter into a fork of the base's layers. What a fork cannot compute is refused."""
    from poe.cascade import Cascade

    check_output_folder(output)
    cascade = Cascade.from_pretrained(base)
    if cascade.active is not None:
        raise StageError(f"{base} is a stage, and a LoRA adapter changes a base: expected a base.")
    cascade.import_stage(adapter, name).save_stage(name, output)
    config = cascade.stages[name].config
    out.print(
        f"{output}: stage {name!r}, a fork of layers {config.attach_at} to {cascade.stages[name].depth - 1}, "
        f"rank {config.rank}, active on {config.active}, {_format_size(output)}",
        markup=False,
    )


@imports.command()
def nanochat(
    checkpoint: Annotated[Path, typer.Argument(help="Folder with model_*.pt and meta_*.json; the last step is used.")],
    output: Annotated[Path, typer.Argument(help="Folder for the PoE base.")],
) -> None:
    """Convert a nanochat checkpoint and its tokenizer into a PoE base. Unknown tensors are listed and refused."""
    from poe.loaders.nanochat_base import import_nanochat

    check_output_folder(output)
    result = import_nanochat(checkpoint, output)
    out.print(
        f"{output}: step {result.step:,}, {result.parameters:,} parameters, in the layout of nanochat since "
        f"{result.layout.since}"
    )
    if result.layout.doubt:
        out.print(f"note: {result.layout.doubt}")


@app.command()
def export(
    repo: Repo,
    native: Annotated[
        Path | None, typer.Option(help="New folder for an ordinary checkpoint of the base's family.")
    ] = None,
    peft: Annotated[
        Path | None, typer.Option(help="Folder for a LoRA adapter of PEFT, made of a low-rank fork.")
    ] = None,
    all_tokens: Annotated[
        bool, typer.Option("--all-tokens", help="Let a fork that is active on the answer act on every token.")
    ] = False,
    invocation: Annotated[
        str | None, typer.Option(help="With --peft: the text that ends every prompt, for an Activated LoRA.")
    ] = None,
    base: Base = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file: a number and a unit.")] = "5GB",
) -> None:
    """Write a stage in a form that other programs load: an ordinary checkpoint, or a LoRA adapter.

    A checkpoint (--native) holds the base, the stage and all that it stands on, and one folded head. Transformers loads
    it without this package, with the same logits. An adapter (--peft) holds the changes of a low-rank fork alone.
    """
    target = native or peft
    if target is None or (native is not None and peft is not None):
        raise typer.BadParameter("expected --native or --peft")
    if invocation is not None and (peft is None or all_tokens):
        raise typer.BadParameter("--invocation goes with --peft, and not with --all-tokens")
    check_output_folder(target)
    cascade = _open_stage(repo, base)
    if native is not None:
        with warnings.catch_warnings(record=True) as caught:
            folder = cascade.export_native(cascade.active, native, max_shard_size=max_shard_size, all_tokens=all_tokens)
        for each in caught:
            err.print(f"warning: {each.message}", markup=False)
        out.print(f"{folder}: {cascade.config.model_type}, {_format_size(folder)}", markup=False)
        return
    config = cascade.stages[cascade.active].config
    if bool(invocation) != (config.active == "answer" and not all_tokens):
        raise StageError(
            f"Stage {cascade.active!r} has active={config.active!r}: expected --invocation TEXT or --all-tokens for "
            "active='answer', and no --invocation for active='all'."
        )
    ids = cascade.tokenizer(invocation, add_special_tokens=False).input_ids if invocation else None
    folder = cascade.export_peft(cascade.active, peft, invocation_tokens=ids)
    kind = "LoRA" if ids is None else f"Activated LoRA, invoked by tokens {ids}"
    out.print(f"{folder}: {kind}, {_format_size(folder)}", markup=False)


@app.command()
def fold(
    repo: Repo,
    to: Annotated[Path, typer.Option("--out", help="Folder for the folded stage.")],
    base: Base = None,
    name: Annotated[str | None, typer.Option(help="Name of the new stage; default: the old name and -folded.")] = None,
) -> None:
    """Fold a chain of stages into one stage that computes the same and needs no parent."""
    from poe.loaders.stage_folder import merge_training_records

    check_output_folder(to)
    cascade = _open_stage(repo, base)
    chain = cascade.stages[cascade.active].chain
    cascade.fold(cascade.active, name)
    folder = cascade.save_stage(cascade.active, to, merge_training_records(chain))
    out.print(f"{folder}: {len(chain)} stages in one, {_format_size(folder)}", markup=False)


@app.command()
def compress(
    repo: Repo,
    to: Annotated[Path, typer.Option("--out", help="Folder for the smaller stage.")],
    rank: Annotated[int | None, typer.Option(help="Replace the head delta by the nearest one of this rank.")] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Store the matrices in 8 bits per weight.")] = False,
    base: Base = None,
) -> None:
    """Make the files of a stage smaller, and print the error that this causes."""
    import torch

    from poe.loaders.stage_folder import read_training_record

    if rank is None and not int8:
        raise typer.BadParameter("expected --rank, --int8 or both")
    check_output_folder(to)
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
    out.print(f"{folder}: {_format_size(folder)}", markup=False)


def _open_stage(repo: str, base: str | None) -> Any:
    """Open a stage to write it: in main memory, in the dtype in which its base is stored."""
    from poe.cascade import Cascade

    cascade = Cascade.from_pretrained(repo, base=base)
    if cascade.active is None:
        raise StageError(f"{repo} is a base: expected a stage's folder or repository.")
    return cascade


def _format_size(folder: Path) -> str:
    return f"{sum(path.stat().st_size for path in folder.glob('*.safetensors')):,} bytes of weights"
