"""Forks are trained by the engine: on all tokens, on answers alone, and from a cache of what the base read."""

from functools import partial
from pathlib import Path

import pytest
import torch

from conftest import scramble
from poe import Cascade, StageConfig, train_stage
from poe.data.render import Renderer
from poe.demo.conversations import make_conversation
from poe.errors import FamilyError, RecipeError, TrainingError
from poe.modeling.answer_boundary import AnswerBoundary, _dense_places
from poe.stages import Recipe
from poe.training.parallel.distributed import SINGLE_PROCESS
from poe.training.reporting.progress import Progress
from test_fork import dense_case, forked, masked_logits

SMALL = {
    "seq_len": 512,
    "tokens_per_step": 1024,
    "max_steps": 4,
    "dtype": "float32",
    "validation_ratio": 0.1,
    "head": "none",
    "matrix_optimizer": "adamw",
    "matrix_lr": 0.003,
    "layers": "fork",
    "attach_at": 1,
    "rank": 4,
}


def train(base: Path, folder: Path, **fields: object) -> tuple[list[float], Path]:
    """Train a fork for a few steps and return its losses and its folder."""
    cascade = Cascade.from_pretrained(base, dtype=torch.float32)
    run = train_stage(
        cascade,
        "demo",
        "demo=60",
        folder,
        progress=Progress("test", quiet=True),
        world=SINGLE_PROCESS,
        **{**SMALL, **fields},
    )
    return [step["loss"] for step in run.history.steps], run.folder


@pytest.mark.parametrize("active", ["all", "answer"])
@pytest.mark.parametrize("rank", [4, None])
def test_a_fork_learns_the_same_with_and_without_a_cache(
    demo_base: Path, tmp_path: Path, active: str, rank: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POE_CACHE", str(tmp_path / "cache"))
    losses, folder = train(demo_base, tmp_path / "plain", active=active, rank=rank)
    cached, _ = train(demo_base, tmp_path / "cached", active=active, rank=rank, cache_hidden=True)
    assert cached == pytest.approx(losses, rel=2e-3)  # the cache is in bf16
    stage = Cascade.from_pretrained(folder).stages["demo"]
    assert (stage.config.layers, stage.config.active, stage.config.rank) == ("fork", active, rank)
    assert any(
        tensor.abs().sum() > 0 for name, tensor in stage.delta_state_dict().items() if name.endswith(("b", "delta"))
    )


@pytest.mark.parametrize("rank", [4, None])
def test_matrix_lr_is_the_rate_of_a_forks_changes(demo_base: Path, tmp_path: Path, rank: int | None) -> None:
    _, folder = train(demo_base, tmp_path / "head", rank=rank, matrix_lr=0.0, head_lr=0.01, max_steps=2)
    changes = Cascade.from_pretrained(folder).stages["demo"].delta_state_dict()
    assert not any(tensor.any() for name, tensor in changes.items() if name.endswith((".b", ".delta")))


def test_answers_of_different_lengths_pass_a_fork_in_few_shapes() -> None:
    seen = set()
    for length in range(1, 200):
        active = torch.arange(1000).expand(2, -1) < length
        places = _dense_places(active)
        assert active.gather(1, places).sum() == active.sum()
        seen.add(places.shape[1])
    assert seen == {64, 128, 192, 256}
    assert _dense_places(torch.ones(1, 40, dtype=torch.bool)).shape == (1, 40)


@pytest.mark.parametrize("attach_at", [0, 1])
@torch.no_grad()
def test_a_child_learns_what_it_will_be_where_its_parent_is_active_on_the_answer_too(attach_at: int) -> None:
    cascade = forked(active="answer")
    cascade.add_stage(
        StageConfig("child", layers="fork", attach_at=attach_at, active="answer", parent="f", head="none")
    )
    scramble(cascade.stages["child"], seed=3)
    ids, positions, labels, turns = dense_case(cascade.base)
    boundary = AnswerBoundary(cascade.base, cascade.stages["child"])
    hidden = boundary.above(boundary.below(ids, positions), ids, positions, labels != -100)
    logits = cascade.model("child").get_output_embeddings()(hidden)
    for document, start, end in turns:
        expected = masked_logits(cascade, ids[:1, document:end], start - document)
        torch.testing.assert_close(logits[:1, start - 1 : end - 1], expected)


def test_a_child_begins_no_higher_than_a_parent_that_is_active_on_the_answer() -> None:
    cascade = forked(active="answer", attach_at=0)
    cascade.add_stage(StageConfig("child", layers="fork", attach_at=1, active="answer", parent="f"))
    with pytest.raises(FamilyError, match="begins at layer 1, above layer 0 of a parent"):
        AnswerBoundary(cascade.base, cascade.stages["child"])


def test_a_stage_for_every_token_is_not_trained_on_one_for_the_answer(demo_base: Path, tmp_path: Path) -> None:
    cascade = Cascade.from_pretrained(demo_base, dtype=torch.float32)
    cascade.add_stage(StageConfig("f", layers="fork", attach_at=1, active="answer", head="none"))
    cascade.save_stage("f", tmp_path / "f", dtype=torch.float32)
    cascade = Cascade.from_pretrained(tmp_path / "f", base=demo_base, dtype=torch.float32)
    with pytest.raises(TrainingError, match="would act on every token, and the stage 'f' below it"):
        train_stage(cascade, "demo", "demo=60", tmp_path / "out", parent="f", **{**SMALL, "active": "all"})


@pytest.mark.slow
@pytest.mark.parametrize(("active", "cache_hidden"), [("answer", False), ("answer", True), ("all", True)])
def test_a_compiled_fork_learns_the_same_in_whole_graphs(
    demo_base: Path, tmp_path: Path, active: str, cache_hidden: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POE_CACHE", str(tmp_path / "cache"))
    fields = {"active": active, "cache_hidden": cache_hidden, "tokens_per_step": 512, "max_steps": 2}
    losses, _ = train(demo_base, tmp_path / "plain", **fields)
    graphs = []

    def keep_graph(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph  # runs as it was captured, without the minutes of inductor

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=keep_graph, fullgraph=True))
    again, _ = train(demo_base, tmp_path / "compiled", compile=True, **fields)
    assert again == pytest.approx(losses, rel=1e-5)
    # the stage (for a first number of answer tokens, then for any), and without a cache the trunk
    assert len(graphs) <= (2 if active == "answer" else 1) + (not cache_hidden)


def test_an_interrupted_fork_ends_with_the_same_bytes(demo_base: Path, tmp_path: Path) -> None:
    _, whole = train(demo_base, tmp_path / "whole", active="answer")

    class StopAtStepTwo(Progress):
        def show_step(self, step: int, *args: object) -> None:
            if step == 2 and not (tmp_path / "stopped").exists():
                (tmp_path / "stopped").touch()
                raise KeyboardInterrupt

    cascade = Cascade.from_pretrained(demo_base, dtype=torch.float32)
    fields = {**SMALL, "active": "answer", "checkpoint_every": 0.0}
    with pytest.raises(KeyboardInterrupt):
        train_stage(cascade, "demo", "demo=60", tmp_path / "run", progress=StopAtStepTwo("t", quiet=True), **fields)
    cascade = Cascade.from_pretrained(demo_base, dtype=torch.float32)
    train_stage(cascade, "demo", "demo=60", tmp_path / "run", resume=True, progress=Progress("t", quiet=True), **fields)
    written = [(folder / "delta.safetensors").read_bytes() for folder in (whole, tmp_path / "run")]
    assert written[0] == written[1]


def test_a_run_reports_where_the_fork_begins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for attach_at, words in (("auto", "begins at layer 5 of 7"), (6, "a fork above it learns to copy badly")):
        cascade = Cascade.from_pretrained("demo", dtype=torch.float32)
        fields = {**SMALL, "attach_at": attach_at, "active": "answer", "max_steps": 1}
        train_stage(cascade, "demo", "demo=60", tmp_path / str(attach_at), **fields)
        assert words in capsys.readouterr().err


def test_a_fork_does_not_stand_on_a_divided_base() -> None:
    with pytest.raises(RecipeError, match="shard_base divides"):
        Recipe(name="f", layers="fork", attach_at=1, shard_base=True)
    with pytest.raises(RecipeError, match="at least 1 for new layers"):
        Recipe(name="f", attach_at=0)


def test_a_trained_stage_is_found_by_prompts_like_those_of_its_training(demo_base: Path, tmp_path: Path) -> None:
    """Also one that does not read prompts; other text goes to the base. Padding is not read."""
    _, folder = train(demo_base, tmp_path / "run", active="answer", max_steps=1)
    cascade = Cascade.from_pretrained(folder)
    renderer = Renderer(cascade.tokenizer, vocab_size=cascade.config.vocab_size)
    rows = [make_conversation(number, "unseen_values", kind="call") for number in range(6)]
    questions = [renderer.prompt_ids(row.question, row.tools, row.form) for row in rows]
    text = "The lighthouse keeper counted forty boats in the harbor before the storm came in from the north. " * 3
    others = [cascade.tokenizer(text)["input_ids"]] * 2
    for prompts, name in ((questions, "demo"), (others, None)):
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        assert cascade.route(ids, mask).stages == [name] * len(prompts)
