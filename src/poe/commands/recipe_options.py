"""Command-line options from the fields of a recipe: one option a field, with its sentence, type, default and group."""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
import yaml
from rich.markup import escape

from poe.commands.app import Command
from poe.errors import RecipeError
from poe.stages import BaseRecipe, Recipe, list_recipes
from poe.stages.fields import describe_fields, format_value
from poe.stages.recipe import Plan, group_fields, load_plan

# A recipe's own description, and the field that the option --data sets.
NOT_OPTIONS = ("description", "data")


class RecipeCommand(Command):
    """A command that also has an option for every field of a recipe class.

    Its function reads the fields that were given on the command line from `context.obj`, as values by name.
    """

    kind: type[Plan]

    def __init__(self, *args: Any, params: Sequence[Any] | None = None, **settings: Any) -> None:
        self.options = {option.name: option for option in make_options(self.kind)}
        super().__init__(*args, params=[*(params or []), *self.options.values()], **settings)

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Parse the arguments. The recipe's own defaults come first, because parsing prints `--help`."""
        argument = next(param for param in self.params if param.name == "recipe")
        name = args[0] if args and not args[0].startswith("-") else argument.default
        if name:
            with contextlib.suppress(RecipeError, OSError):  # the command itself reports it
                self._set_defaults(load_plan(self.kind, str(name)))
        return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: Any) -> Any:
        """Call the function with its own parameters; `ctx.obj` has the fields that were given."""
        values = {name: ctx.params.pop(name) for name in self.options}
        given = [name for name in values if ctx.get_parameter_source(name).name == "COMMANDLINE"]
        hints = {name: info.hint for name, info in describe_fields(self.kind).items()}
        ctx.obj = {name: parse_field(name, values[name], hints[name]) for name in given}
        return super().invoke(ctx)

    def _set_defaults(self, plan: Plan) -> None:
        for name, option in self.options.items():
            value = getattr(plan, name)
            if option.is_flag:
                option.show_default = format_switch(format_value(value))
            else:
                option.default = format_value(value)


class StageRecipeCommand(RecipeCommand):
    kind = Recipe


class BaseRecipeCommand(RecipeCommand):
    kind = BaseRecipe


def complete_stage(incomplete: str) -> list[tuple[str, str]]:
    """Return the shipped stage recipes that begin with a text, with their descriptions, for the shell."""
    return _complete(Recipe, incomplete)


def complete_base(incomplete: str) -> list[tuple[str, str]]:
    """Return the shipped base recipes that begin with a text, with their descriptions, for the shell."""
    return _complete(BaseRecipe, incomplete)


def _complete(kind: type[Plan], incomplete: str) -> list[tuple[str, str]]:
    names = [name for name in list_recipes(kind) if name.startswith(incomplete)]
    return [(name, load_plan(kind, name).description) for name in names]


def make_options(kind: type[Plan]) -> list[Any]:
    """Return Typer's options for the fields of a recipe class, in the order of the groups."""
    parameters: list[tuple[str, Any, Any]] = []
    for group, infos in group_fields(kind).items():
        for info in infos:
            if info.name in NOT_OPTIONS:
                continue
            flag, name = is_switch(info.hint), info.name.replace("_", "-")
            option = typer.Option(
                f"--{name}/--no-{name}" if flag else f"--{name}",
                help=escape(info.sentence),
                metavar=None if flag else f"<{info.type}>",
                rich_help_panel=f"{group} (recipe)",
                show_default=format_switch(info.default) if flag else True,
            )
            hint, default = (bool, False) if flag else (str, info.default)
            parameters.append((info.name, Annotated[hint, option], default))
    program = typer.Typer(add_completion=False)
    program.command()(dataclasses.make_dataclass("Options", parameters, kw_only=True))
    return list(typer.main.get_command(program).params)


def is_switch(hint: Any) -> bool:
    """Return whether a field of this type has the options --NAME and --no-NAME."""
    return hint is bool or bool in get_args(hint)


def format_switch(value: str) -> str:
    """Return the default of a switch, as YAML text, as `--help` prints it."""
    return {"true": "on", "false": "off"}.get(value, value)


def parse_field(name: str, text: Any, hint: Any) -> Any:
    """Read an option's text as its field's type. The text is YAML: 1e-4, true, null, {glaive: 2}."""
    if not isinstance(text, str) or hint is str or get_origin(hint) is Literal:
        return text
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"--{name.replace('_', '-')} {text!r} is not a value of YAML: {error}") from None
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)  # YAML 1.1 reads 1e-4 as text
    return value
