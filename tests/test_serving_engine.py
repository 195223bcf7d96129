"""The engine: requests of several stages share passes, come and go, and each reply is the one that it is alone."""

import time
from typing import Any

import pytest
import torch

from conftest import scramble, tiny_base, tiny_tokenizer
from poe import Cascade
from poe.serving.engine import BusyError, ClosedError, Engine, Request
from poe.serving.models import load_models
from poe.serving.sampling import Sampling
from poe.serving.text import TextBuilder
from served_models import Listener, run_until_idle, submit


def make_engine(served: tuple[Cascade, Any], **options: Any) -> Engine:
    cascade, models = served
    return Engine(cascade, [model.stage for model in models.values()], **options)


def alone(served: tuple[Cascade, Any], name: str, prompt: list[int], length: int = 12) -> list[int]:
    """Return the tokens that transformers' generate gives for one prompt."""
    cascade, models = served
    ids = torch.tensor([prompt])
    options = {"do_sample": False, "max_new_tokens": length, "attention_mask": torch.ones_like(ids)}
    output = cascade.generate(ids, stage=models[name].stage, eos_token_id=None, **options)
    return output[0, len(prompt) :].tolist()


def test_replies_of_a_changing_batch_are_those_of_generate(served: tuple[Cascade, Any]) -> None:
    engine, models = make_engine(served, max_batch=5), served[1]
    rows = []
    for number in range(8):
        name = list(models)[number % 4]
        prompt = torch.randint(10, 500, (3 + 5 * (number % 3),), generator=torch.Generator().manual_seed(number))
        length = 4 + number
        row, listener = submit(engine, models, name, prompt.tolist(), max_tokens=length, stop_token_ids=())
        rows.append((name, prompt.tolist(), length, row, listener))
        engine.step()
    run_until_idle(engine)
    for name, prompt, length, row, listener in rows:
        assert row.tokens == alone(served, name, prompt, length), name
        assert listener.text == models[name].tokenizer.decode(row.tokens)
        assert (listener.end.reason, listener.end.tokens) == ("length", length)
    assert engine.decoded_rows > 2 * engine.passes


def test_a_canceled_row_leaves_at_the_next_step_and_changes_no_other(served: tuple[Cascade, Any]) -> None:
    engine, models = make_engine(served), served[1]
    prompt = list(range(20, 30))
    gone, listener = submit(engine, models, "alpha", prompt, stop_token_ids=())
    kept, _ = submit(engine, models, "alpha", prompt, stop_token_ids=())
    engine.step()
    gone.cancel()
    events = len(listener)
    engine.step()
    assert engine.num_running == 1
    assert len(listener) == events
    run_until_idle(engine)
    assert kept.tokens == alone(served, "alpha", prompt)


def test_a_reply_stops_at_its_own_tokens_and_strings(served: tuple[Cascade, Any]) -> None:
    engine, models = make_engine(served), served[1]
    prompt = list(range(20, 30))
    expected = alone(served, "beta", prompt)
    text = models["beta"].tokenizer.decode(expected)
    _, plain = submit(engine, models, "beta", prompt, stop_token_ids=())
    _, by_token = submit(engine, models, "beta", prompt, stop_token_ids=[expected[4]])
    _, by_text = submit(engine, models, "beta", prompt, stop_token_ids=(), stop=[text[5:8], "never said"])
    run_until_idle(engine)
    assert plain.text == text
    assert by_token.text == models["beta"].tokenizer.decode(expected[: expected.index(expected[4])])
    assert by_text.text == text[: text.index(text[5:8])]
    assert [plain.end.reason, by_token.end.reason, by_text.end.reason] == ["length", "stop", "stop"]


def test_sampling_repeats_with_a_seed_and_differs_without(served: tuple[Cascade, Any]) -> None:
    engine, models = make_engine(served), served[1]
    prompt = list(range(20, 30))

    def sample(**sampling: Any) -> list[int]:
        row, _ = submit(engine, models, "alpha", prompt, sampling=Sampling(**sampling), stop_token_ids=(), max_tokens=6)
        run_until_idle(engine)
        return row.tokens

    assert sample(temperature=1.5, seed=3) == sample(temperature=1.5, seed=3)
    assert sample(temperature=1.5) != sample(temperature=1.5)
    assert sample(temperature=1.5, top_p=1e-6) == sample() == alone(served, "alpha", prompt, 6)


def test_scores_are_the_log_probabilities_of_the_model(served: tuple[Cascade, Any]) -> None:
    engine, models = make_engine(served), served[1]
    prompt = list(range(20, 30))
    row, listener = submit(engine, models, "alpha", prompt, stop_token_ids=(), top_logprobs=2, max_tokens=3)
    run_until_idle(engine)
    scores = [score for event in listener[:-1] for score in event.scores]
    assert [score.token for score in scores] == row.tokens
    with torch.no_grad():
        logits = served[0].model("alpha")(torch.tensor([prompt + row.tokens])).logits[0, len(prompt) - 1 : -1]
    expected = logits.float().log_softmax(-1).gather(-1, torch.tensor(row.tokens)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor([score.logprob for score in scores]), expected, atol=1e-4, rtol=1e-4)
    assert all(score.top[0] == (score.token, score.logprob) and len(score.top) == 2 for score in scores)


def test_a_full_engine_refuses_and_a_late_request_ends(served: tuple[Cascade, Any]) -> None:
    engine, models = make_engine(served, max_batch=1, max_queue=1, max_seconds=0.2), served[1]
    _, running = submit(engine, models, "alpha", [20, 21], max_tokens=10_000, stop_token_ids=())
    engine.step()
    _, waiting = submit(engine, models, "alpha", [20, 21])
    with pytest.raises(BusyError, match="1 requests run and 1 wait"):
        submit(engine, models, "alpha", [20, 21])
    time.sleep(0.25)
    engine.step()
    assert [running.end.reason, waiting.end.reason] == ["timeout", "timeout"]
    assert engine.num_running == engine.num_waiting == 0
    engine.close()
    with pytest.raises(ClosedError):
        submit(engine, models, "alpha", [20, 21])


def test_a_failed_pass_ends_its_rows_and_the_engine_goes_on(
    served: tuple[Cascade, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    reports: list[str] = []
    engine, models = make_engine(served, report=reports.append), served[1]
    kept, _ = submit(engine, models, "beta", [20, 21, 22], stop_token_ids=())
    engine.step()
    _, failed = submit(engine, models, "alpha", [20, 21, 22])
    batch = engine._lanes[0].batch
    with monkeypatch.context() as patch:
        patch.setattr(batch, "join", lambda *args: (_ for _ in ()).throw(RuntimeError("a secret prompt")))
        engine.step()
    assert failed.end.reason == "error"
    assert "RuntimeError" in reports[0]
    assert "secret" not in reports[0]
    _, good = submit(engine, models, "alpha", [20, 21, 22])
    run_until_idle(engine)
    assert good.end.reason in ("stop", "length")
    assert kept.tokens == alone(served, "beta", [20, 21, 22])
    _, failed = submit(engine, models, "alpha", [20, 21, 22])
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(batch, "step", lambda *args: (_ for _ in ()).throw(RuntimeError("a secret prompt")))
        engine.step()
    assert failed.end.reason == "error"
    assert len(batch) == engine.num_running == 0


def test_a_listener_that_fails_ends_only_its_row(served: tuple[Cascade, Any]) -> None:
    engine, models = make_engine(served), served[1]
    bad = Request("alpha", [20, 21], (), models["alpha"].tokenizer, lambda event: 1 / 0, 12)
    engine.submit([bad])
    _, good = submit(engine, models, "alpha", [20, 21], stop_token_ids=())
    run_until_idle(engine)
    assert good.end.tokens == 12


def test_stages_that_share_no_layer_have_a_batch_of_their_own() -> None:
    cascade = Cascade(tiny_base("llama"), tiny_tokenizer())
    cascade.add_stage(name="whole", layers="fork", attach_at=0, rank=2)
    cascade.add_stage(name="top", num_layers=1)
    engine = Engine(cascade, [None, "whole", "top"])
    assert sorted(sorted(map(str, lane.branches)) for lane in engine._lanes) == [["None", "top"], ["whole"]]
    rows = {}
    for stage in (None, "whole", "top"):
        listener = Listener()
        request = Request(stage, [5, 6, 7], (), cascade.tokenizer, listener.append, 5)
        rows[stage] = engine.submit([request])[0]
    run_until_idle(engine)
    for stage, row in rows.items():
        output = cascade.generate(torch.tensor([[5, 6, 7]]), stage=stage, max_new_tokens=5, do_sample=False)
        assert row.tokens[:5] == output[0, 3:].tolist()[:5]


@pytest.mark.parametrize("stop", [[], ["gondola f"], ["xyz", "é🦆"]])
def test_pieces_of_text_are_whole_characters_and_hide_stop_strings(stop: list[str], demo_base: Any) -> None:
    tokenizer = Cascade.from_pretrained(demo_base).tokenizer
    text = " Grüße, gondola for Zoé🦆🦆 \n and 漢字"
    builder = TextBuilder(tokenizer, stop)
    pieces = []
    for token in tokenizer.encode(text, add_special_tokens=False):
        pieces.append(builder.add(token))
        if builder.stopped:
            break
    pieces.append(builder.finish())
    cut = min([text.index(string) for string in stop if string in text], default=len(text))
    assert "".join(pieces) == text[:cut]
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > 5


def test_stages_of_one_name_are_called_as_their_folders(demo_base: Any, tmp_path: Any) -> None:
    for folder, seed in (("first", 1), ("second", 2)):
        cascade = Cascade.from_pretrained(demo_base).add_stage(name="demo", num_layers=1, seed=seed)
        scramble(cascade.stages["demo"], seed)
        cascade.save_stage("demo", tmp_path / folder)
    repos = [str(tmp_path / "first"), str(tmp_path / "second")]
    assert list(load_models(Cascade.from_pretrained(repos[0]), repos)) == ["base", "demo", "second"]
    assert list(load_models(Cascade.from_pretrained(repos[0]), repos, ["a", "b"])) == ["base", "a", "b"]


def test_models_are_named_by_their_files_and_the_base_by_its_folder(served: tuple[Cascade, Any]) -> None:
    assert list(served[1]) == ["base", "alpha", "beta", "gamma"]
    cascade = Cascade.from_pretrained("demo").add_stage(name="demo", num_layers=1)
    assert {name: model.stage for name, model in load_models(cascade, ["runs/demo"]).items()} == {
        "base": None,
        "demo": "demo",
    }
