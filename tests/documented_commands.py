"""Read the code blocks of the documentation, and check or run the commands in them.

A block that the tests cannot run has a comment above it:

    <!-- not run: needs the Hub -->
    ```bash

A `text` block directly below a block holds what that block prints, up to white space; `...` stands for anything. Output
that differs from run to run has a comment above it:

    <!-- output not checked: of a full training run -->
    ```text
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import typer

from poe.commands import poe as poe_command
from poe.commands import train as train_command

ROOT = Path(__file__).parents[1]
LANGUAGES = ("bash", "python")
FENCE = re.compile(r"^```(\w*)\s*$")
COMMENT = re.compile(r"^<!-- (.+) -->$")


@dataclass
class Block:
    """A code block of a page: its first line number, what it contains, and what the page says about it."""

    page: str
    line: int
    language: str
    text: str
    comment: str = ""
    output: "Block | None" = None

    @property
    def reason_not_run(self) -> str | None:
        return _reason(self.comment, "not run: ")

    @property
    def expected_output(self) -> str | None:
        if self.output is None or _reason(self.output.comment, "output not checked: "):
            return None
        return self.output.text

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def _reason(comment: str, prefix: str) -> str | None:
    return comment.removeprefix(prefix) if comment.startswith(prefix) and len(comment) > len(prefix) else None


def pages() -> list[str]:
    """Return the pages a reader works with: README, CONTRIBUTING and the documentation without the log."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    log = ROOT / "docs" / "log"
    return [str(path.relative_to(ROOT)) for path in found if path.exists() and log not in path.parents]


def blocks(page: str) -> list[Block]:
    """Return the code blocks of a page; a `text` block directly below another block is the output of that block."""
    found: list[Block] = []
    for block, follows in _fenced(page):
        if block.language == "text" and follows and found:
            found[-1].output = block
        else:
            found.append(block)
    return found


def _fenced(page: str) -> Iterator[tuple[Block, bool]]:
    """Yield every block of a page, and whether only comments and blank lines stand between it and the one before."""
    comment, follows, block, content = "", False, None, []
    for number, line in enumerate((ROOT / page).read_text(encoding="utf-8").splitlines(), 1):
        if block is not None:
            if line.rstrip() != "```":
                content.append(line)
                continue
            block.text = "\n".join(content) + "\n"
            yield block, follows
            comment, follows, block, content = "", True, None, []
        elif match := FENCE.match(line):
            block = Block(page, number + 1, match[1], "", comment)
        elif match := COMMENT.match(line):
            comment = match[1]
        elif line.strip():
            comment, follows = "", False
    assert block is None, f"{page}: the last code block does not end"


def commands(block: Block) -> list[list[str]]:
    """Return the words of every command in a bash block, without comments."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def check_options(words: list[str]) -> None:
    """Raise click's error if `poe` or `poe-train` has no such command, option or argument."""
    app = {"poe": poe_command.app, "poe-train": train_command.app}[words[0]]
    command: click.Command = typer.main.get_command(app)
    name, rest = words[0], words[1:]
    parent = None
    while True:
        context = command.make_context(name, list(rest), parent=parent)
        if not isinstance(command, click.Group):
            return
        name, command, rest = command.resolve_command(context, [*context.protected_args, *context.args])
        parent = context
