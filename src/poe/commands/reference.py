"""Write the reference of recipe fields: `python -m poe.commands.reference > docs/reference/recipes.md`."""

from poe.stages import Augmentation, BaseRecipe, Recipe, list_recipes
from poe.stages.fields import FieldInfo, describe_fields
from poe.stages.recipe import Plan, group_fields, load_plan

HEADER = """\
# Recipe fields

<!-- Written by `python -m poe.commands.reference > docs/reference/recipes.md` from the classes in `poe/stages`. -->

A recipe is a YAML file, a dataclass and the options of a command at once: `warmup_ratio: 0.1` in a file,
`warmup_ratio=0.1` in Python, `--warmup-ratio 0.1` on the command line. A YAML file of your own is a recipe too:
`poe-train stage my.yaml`. The tables give the defaults of the classes. `poe-train stage NAME --help` shows the defaults
of a shipped recipe.
"""


def write_reference() -> str:
    """Return the page as Markdown."""
    parts = [
        HEADER,
        "## Stage recipes\n",
        _list_recipes(Recipe),
        *_tables(Recipe),
        "### augment\n",
        "The mapping `augment: {mask: 0.33, formats: 0.5}`. [How to augment](../how-to/augment.md) has examples.\n",
        _table(list(describe_fields(Augmentation).values())),
        "## Base recipes\n",
        _list_recipes(BaseRecipe),
        *_tables(BaseRecipe),
    ]
    return "\n".join(parts)


def _list_recipes(kind: type[Plan]) -> str:
    command = "stage" if kind is Recipe else "base"
    lines = [f"- `{name}`: {load_plan(kind, name).description}" for name in list_recipes(kind)]
    return f"For `poe-train {command}`. Shipped:\n\n" + "\n".join(lines) + "\n"


def _tables(kind: type[Plan]) -> list[str]:
    return [part for group, infos in group_fields(kind).items() for part in (f"### {group}\n", _table(infos))]


def _table(infos: list[FieldInfo]) -> str:
    rows = [f"| `{i.name}` | {_escape(i.type)} | `{i.default}` | {_escape(i.sentence)} |" for i in infos]
    return "| field | type | default | meaning |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("[*", "[\\*")


if __name__ == "__main__":
    print(write_reference(), end="")
