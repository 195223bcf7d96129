"""`poe import`: what others trained becomes a PoE base, or a stage in the delta format."""

from pathlib import Path
from typing import Annotated

import typer

from poe.commands.app import Program, out

app = Program(help=__doc__)


@app.command()
def cognica(
    folder: Annotated[Path, typer.Argument(help="a release's folder, or a nanochat stage checkpoint's")],
    output: Annotated[Path, typer.Argument(help="folder to write the stage to")],
    base: Annotated[str, typer.Option(help="the PoE base, or the stage, that it stands on")],
    name: Annotated[str, typer.Option(help="the stage's name")] = "tool",
) -> None:
    """Rewrite a stage in the layout of Cognica's releases. Tensors that are not known are listed and refused."""
    from poe.cascade import Cascade

    cascade = Cascade.from_pretrained(base).import_stage(folder, name)
    cascade.save_stage(name, output)
    size = (output / "delta.safetensors").stat().st_size
    out.print(f"{output}: stage {name!r}, {cascade.stages[name].num_parameters():,} parameters, {size:,} bytes")


@app.command()
def nanochat(
    checkpoint: Annotated[Path, typer.Argument(help="folder with model_*.pt and meta_*.json; the last step is taken")],
    output: Annotated[Path, typer.Argument(help="folder to write the PoE base to")],
) -> None:
    """Rewrite a nanochat checkpoint and its tokenizer as a PoE base. What is not known is listed and refused."""
    from poe.loaders.nanochat_base import import_nanochat

    done = import_nanochat(checkpoint, output)
    out.print(
        f"{output}: step {done.step:,}, {done.parameters:,} parameters, in the layout of nanochat since "
        f"{done.layout.since}"
    )
    if done.layout.doubt:
        out.print(f"note: {done.layout.doubt}")
