"""Generate text, answer with calls, measure, inspect, convert, publish. `poe-train` (`python -m poe train`) trains."""

from poe.commands import chat, convert, data, evaluate, look, publish, serve, use
from poe.commands.app import Program, add_version, run

app = Program(help=__doc__)
app.callback(help=__doc__)(add_version)
for topic in (use, chat, serve, look, convert, publish):
    app.add_typer(topic.app)
app.add_typer(data.app, name="data")
app.add_typer(evaluate.app, name="eval")


def main() -> None:
    run(app, "poe")


if __name__ == "__main__":
    main()
