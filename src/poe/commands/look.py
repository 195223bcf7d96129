"""Commands that print facts: about a folder or repository, the recipes, the data readers."""

from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand

from poe.commands.app import Base, Program, Repo, out
from poe.commands.recipe_options import complete_base, complete_stage
from poe.errors import RecipeError, printable, suggest
from poe.stages import Augmentation, BaseRecipe, Recipe, list_recipes
from poe.stages.fields import FieldInfo, describe_fields, format_value
from poe.stages.recipe import Plan, group_fields, load_plan

app = Program()
COMMANDS: dict[str, type[Plan]] = {"stage": Recipe, "base": BaseRecipe}


def complete_any(incomplete: str) -> list[tuple[str, str]]:
    """Return the shipped recipes that begin with a text, for the shell."""
    return [*complete_stage(incomplete), *complete_base(incomplete)]


@app.command()
def inspect(repo: Repo, base: Base = None) -> None:
    """Print what a base or stage is and what it stands on, from its configs and headers, without its weights."""
    from poe.loaders.describe import describe

    table = Table(show_header=False, box=None)
    for key, value in describe(repo, base=base):
        table.add_row(Text(key, style="bold"), printable(value))
    out.print(table)


@app.command(cls=TyperCommand)
def recipes(
    name: Annotated[
        str | None,
        typer.Argument(help="A shipped recipe, or a YAML file.", show_default=False, autocompletion=complete_any),
    ] = None,
) -> None:
    """List the shipped recipes, or print the fields of one recipe with their meaning."""
    if name is None:
        table = Table("command", "description", box=None)
        for command, kind in COMMANDS.items():
            for each in list_recipes(kind):
                table.add_row(f"poe-train {command} {each}", load_plan(kind, each).description)
        out.print(table)
        return
    for command, plan in _load_any(name).items():
        out.print(f"poe-train {command} {name}: {plan.description}", style="bold", markup=False)
        groups: dict[str, list[tuple[FieldInfo, Any]]]
        groups = {group: [(info, plan) for info in infos] for group, infos in group_fields(type(plan)).items()}
        if isinstance(plan, Recipe):
            groups["augment"] = [(info, plan.augment) for info in describe_fields(Augmentation).values()]
        for group, rows in groups.items():
            table = Table("field", "value", "type", "meaning", title=group, title_justify="left")
            for info, owner in rows:
                cells = (info.name, format_value(getattr(owner, info.name)), info.type, info.sentence)
                table.add_row(*cells)
            out.print(table)


@app.command(cls=TyperCommand)
def readers() -> None:
    """List the data readers: the names in a `--data` SPEC, with license and Hub data set."""
    from poe.data.readers import READERS

    table = Table("reader", "license", "data set on the Hub", box=None)
    for reader in READERS.values():
        source = "generated" if reader.generated else reader.hub_id or f"none: {reader.name}=FILE"
        table.add_row(reader.name, reader.license or "not stated", source)
    out.print(table)


def _load_any(name: str) -> dict[str, Plan]:
    """Return the recipes of a name, or of a YAML file, by the command of `poe-train` that trains them."""
    known = {each for kind in COMMANDS.values() for each in list_recipes(kind)}
    if name not in known and not name.endswith((".yaml", ".yml")):
        raise RecipeError(f"Unknown recipe {name!r}.{suggest(name, known)}")
    plans: dict[str, Plan] = {}
    errors = []
    for command, kind in COMMANDS.items():
        try:
            plans[command] = load_plan(kind, name)
        except RecipeError as error:
            errors.append(error)
    if not plans:
        raise errors[0]
    return plans
