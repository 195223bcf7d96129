"""The command that serves a base and its stages over HTTP."""

from typing import Annotated

import typer

from poe.commands.app import INTERRUPTED, Base, Device, Program, err, out
from poe.commands.use import open_cascade
from poe.errors import MissingExtraError, ServingError

app = Program()


@app.command()
def serve(
    repos: Annotated[
        list[str],
        typer.Argument(
            metavar="DIR...",
            help="Stages of one base, or the base first: folders, Hub ids, or 'demo'.",
            show_default=False,
        ),
    ],
    name: Annotated[
        list[str] | None,
        typer.Option(help="What requests call each DIR, in order (repeatable). Default: the stage's own name."),
    ] = None,
    base: Base = None,
    device: Device = "auto",
    host: Annotated[str, typer.Option(help="Address to listen on. The default is reached from this machine only.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    max_batch: Annotated[int, typer.Option(min=1, help="Most replies that are decoded together.")] = 32,
    max_queue: Annotated[
        int, typer.Option(min=0, help="Most replies that wait for a place; more are answered with 429.")
    ] = 256,
    max_context: Annotated[int, typer.Option(min=2, help="Most tokens of a prompt and its reply together.")] = 4096,
    max_seconds: Annotated[float, typer.Option(min=0.1, help="Most seconds for a request, with its waiting.")] = 600.0,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="POE_API_KEY", help="Key that requests must have. Prefer the environment variable."),
    ] = None,
) -> None:
    """Serve a base and its stages to OpenAI's clients, on one machine. Ctrl-C finishes the replies that run."""
    try:
        from poe.serving.process import is_loopback, open_socket, url_of
        from poe.serving.process import serve as serve_until_signal
        from poe.serving.server import LOOPBACK, Limits, build_app
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("fastapi", "starlette", "prometheus_client", "uvicorn"):
            raise
        raise MissingExtraError('Serving needs more packages: pip install "poe-cascade[serve]"') from None
    from poe.serving.engine import Engine
    from poe.serving.models import context_length, load_models
    from poe.serving.router import AUTO, make_router

    if (api_key is not None and not api_key.isprintable()) or api_key == "":
        raise ServingError("The API key is empty or has characters that no header can hold: choose another, or none.")
    opened = open_socket(host, port)
    is_local = is_loopback(opened)
    if not is_local and api_key is None:
        err.print(f"warning: everyone who reaches {host} can use this server: set --api-key or POE_API_KEY.")
    cascade = open_cascade(repos[0], base, device)
    models = load_models(cascade, repos, name or ())

    def report(text: str) -> None:
        err.print(f"error: {text}", markup=False)

    stages = [model.stage for model in models.values()]
    engine = Engine(cascade, stages, max_batch=max_batch, max_queue=max_queue, max_seconds=max_seconds, report=report)
    limits = Limits(max_context=min(max_context, context_length(cascade.config) or max_context))
    router = make_router(cascade, models, limits.max_context)
    application = build_app(
        engine, models, limits, router=router, api_key=api_key, hosts=LOOPBACK if is_local else None, report=report
    )
    names = ", ".join([*models, *([AUTO] if router else [])])
    finished = serve_until_signal(
        application,
        engine,
        opened,
        lambda: out.print(f"{names} at {url_of(opened)}", markup=False, soft_wrap=True),
        lambda: err.print("Finishing the replies that run; Ctrl-C again ends them.", markup=False),
    )
    if not finished:
        raise typer.Exit(INTERRUPTED)
