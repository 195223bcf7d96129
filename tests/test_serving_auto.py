"""The model "auto": a server, and `Cascade.chat`, choose the stage whose training prompts are like the request's."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from poe import Cascade
from poe.calls.tools import read_tools
from poe.data.render import Renderer
from poe.data.templates import complete_template
from poe.decoding.prompt_center import fit_prompt_center
from poe.serving.engine import Engine
from poe.serving.router import make_router
from poe.serving.server import Limits
from served_models import Server, open_models, save_stages

TOOL = {"type": "function", "function": {"name": "book", "parameters": {"type": "object", "properties": {}}}}
SAILOR = {"role": "system", "content": "oooo oooo oooo oooo oooo oooo oooo oooo oooo oooo"}
CONTEXT = 400


def conversation(kind: str, number: int) -> dict[str, Any]:
    """Return messages and tools as one of the stages has them in training."""
    question = {"role": "user", "content": f"Number {100 + number}"}
    return {"messages": [question], "tools": [TOOL]} if kind == "alpha" else {"messages": [SAILOR, question]}


@pytest.fixture(scope="module")
def folders(demo_base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The base and two stages that know their training prompts: `alpha` offers a tool, `gamma` a system message."""
    root = tmp_path_factory.mktemp("routed")
    saved = [folder for folder in save_stages(demo_base, root) if not folder.endswith("beta")]
    for folder in saved:
        cascade, name = Cascade.from_pretrained(folder), Path(folder).name
        complete_template(cascade.tokenizer)
        renderer = Renderer(cascade.tokenizer, vocab_size=cascade.config.vocab_size)
        rows = [conversation(name, number) for number in range(20)]
        prompts = [renderer.prompt_ids(row["messages"], read_tools(row.get("tools", ()))) for row in rows]
        assert fit_prompt_center(cascade.base, cascade.stages[name], prompts)
        cascade.save_stage(name, root / f"{name}-fitted" / name)
    return [str(demo_base), *(str(root / f"{name}-fitted" / name) for name in ("alpha", "gamma"))]


@pytest.fixture(scope="module")
def opened(folders: list[str]) -> tuple[Cascade, Any]:
    return open_models(folders)


@pytest.fixture(scope="module")
def server(opened: tuple[Cascade, Any]) -> Iterator[Server]:
    cascade, models = opened
    engine = Engine(cascade, [model.stage for model in models.values()])
    engine.start()
    yield Server(engine, models, router=make_router(cascade, models, CONTEXT), limits=Limits(max_context=CONTEXT))
    engine.close()


def test_each_request_is_answered_by_the_stage_that_it_is_for(server: Server, opened: tuple[Cascade, Any]) -> None:
    assert [model["id"] for model in server.request("GET", "/v1/models").json()["data"]] == [
        *("base", "alpha", "gamma", "auto")
    ]
    assert server.request("GET", "/v1/models/auto").json()["id"] == "auto"
    unlike = {"messages": [{"role": "user", "content": "zq" * 60}]}
    for expected, fields in (
        ("alpha", conversation("alpha", 5)),
        ("gamma", conversation("gamma", 6)),
        ("base", unlike),
    ):
        chosen = server.ask("auto", **fields, max_tokens=8)
        assert chosen.model == expected
        alone = server.ask(expected, **fields, max_tokens=8)
        assert chosen.choices[0].message == alone.choices[0].message
        answer = opened[0].chat(**fields, stage="auto", max_new_tokens=8)
        name = None if expected == "base" else expected
        assert answer.notes[0] == f"answered by {f'the stage {name!r}' if name else 'the base'}"
        assert answer.raw == opened[0].chat(**fields, stage=name, max_new_tokens=8).raw
    metrics = server.request("GET", "/metrics").text
    assert 'model="gamma"' in metrics
    assert 'model="auto"' not in metrics


def test_a_streamed_reply_names_the_stage(server: Server) -> None:
    chunks = server.ask("auto", **conversation("gamma", 5), max_tokens=4, stream=True)
    assert {chunk.model for chunk in chunks} == {"gamma"}


def test_what_no_model_can_use_is_refused_as_for_the_base(server: Server) -> None:
    for fields in ({"messages": [{"role": "user", "content": "word " * 500}]}, {"messages": []}):
        refused, plain = (server.post(model=name, **fields) for name in ("auto", "base"))
        assert refused.status_code == plain.status_code == 400
        assert refused.json() == plain.json()


def test_without_training_prompts_auto_is_no_model(served: tuple[Cascade, Any], folders: list[str]) -> None:
    cascade, models = served
    assert make_router(cascade, models, CONTEXT) is None
    server = Server(Engine(cascade, [None]), models)
    message = server.post(model="auto").json()["error"]["message"]
    assert "expected one of base, alpha, beta, gamma" in message
    assert "fit_prompt_center" in message
    cascade = Cascade.from_pretrained(folders[0])
    cascade.load_stage(folders[1], name="auto")
    named = {**models, "auto": models["alpha"]}
    assert make_router(cascade, named, CONTEXT) is None
