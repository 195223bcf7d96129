"""`cascade.call` and `cascade.chat`: prompts, tools as Python functions, checked calls, streams; words of PEFT."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from command_line import run_program
from conftest import scramble
from poe import Cascade, StageConfig
from poe.calls.conversation import Call
from poe.calls.streaming import CallPart, FaultPart, Reply, join_parts
from poe.chat import Answer, read_messages
from poe.errors import DataError, RowError, StageError, TokenizerError
from poe.loaders import familiar_names

QUESTION = [{"role": "user", "content": "What is the weather in Lisbon?"}]
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Lisbon"}}\n</tool_call>'


def get_weather(city: str, days: int = 1) -> str:
    """Get the weather.

    Args:
        city: The city.
        days: Number of days.
    """
    return city * days


@pytest.fixture(scope="module")
def cascade(demo_base: Path) -> Cascade:
    """A random base with one scrambled stage."""
    cascade = Cascade.from_pretrained(demo_base).add_stage(StageConfig("s", 1, "none"))
    scramble(cascade.stages["s"])
    return cascade


@pytest.fixture
def say(cascade: Cascade, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that makes the stage's model write a text; `stop=False` leaves out the stop token."""

    def prepare(text: str, stop: bool = True) -> None:
        tokenizer = cascade.tokenizer
        ids = tokenizer(text, add_special_tokens=False).input_ids + [tokenizer.eos_token_id] * stop

        def generate(**given: Any) -> torch.Tensor:
            if streamer := given.get("streamer"):
                streamer.put(given["input_ids"])
                for token in ids:
                    streamer.put(torch.tensor([token]))
            return torch.cat([given["input_ids"], torch.tensor([ids])], 1)

        monkeypatch.setattr(cascade.model("s"), "generate", generate)

    return prepare


def test_a_call_is_read_and_checked_against_a_python_function(cascade: Cascade, say: Callable[..., None]) -> None:
    say(f"I look. {CALL}")
    answer = cascade.call("What is the weather in Lisbon?", [get_weather])
    assert (answer.calls, answer.text, answer.problems) == ([Call("get_weather", {"city": "Lisbon"})], "I look.", [])
    assert (answer.finish_reason, answer.raw) == ("tool_calls", f"I look. {CALL}")
    assert answer.message["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": '{"city": "Lisbon"}'}
    assert cascade.call("?", get_weather) == answer  # one function
    assert cascade.call("?", []).problems == ["get_weather: call to a tool that is not offered"]
    say(CALL.replace('"Lisbon"', "3"))
    assert cascade.call("?", [get_weather]).problems[0].startswith("get_weather: ")


def test_an_answer_is_the_next_message_of_the_conversation(cascade: Cascade, say: Callable[..., None]) -> None:
    say(CALL)
    answer = cascade.chat(QUESTION, [get_weather])
    assert answer.message["content"] is None
    result = {"role": "tool", "tool_call_id": "call_1", "name": "get_weather", "content": {"sky": "blue"}}
    longer = [*QUESTION, answer.message, result]
    say("It is sunny.")
    answer = cascade.chat(longer, [get_weather])
    assert (answer.text, answer.finish_reason) == ("It is sunny.", "stop")
    assert answer.message == {"role": "assistant", "content": "It is sunny."}
    read = read_messages(longer)
    assert read[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Lisbon"}
    assert read[2]["content"] == '{"sky": "blue"}'


def test_a_reply_that_was_cut_off_says_length(cascade: Cascade, say: Callable[..., None]) -> None:
    say(CALL[:-20], stop=False)
    answer = cascade.call("?", [get_weather])
    assert answer.finish_reason == "length"
    assert answer.problems[0].startswith("this call cannot be read")
    say("It is", stop=False)
    assert (cascade.chat(QUESTION).finish_reason, cascade.chat(QUESTION).text) == ("length", "It is")


def test_poe_call_fails_for_a_reply_that_was_cut_off(demo_base: Path, tmp_path: Path) -> None:
    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps([{"name": "f", "parameters": {"type": "object", "properties": {}}}]))
    done = run_program("poe", "call", demo_base, "Hello", "--tools", tools, "--max-new-tokens", "1")
    assert done.returncode == 1
    assert json.loads(done.stdout)["finish_reason"] == "length"
    assert "the reply was cut off at 1 tokens: give a larger --max-new-tokens" in done.stderr


def test_a_stream_yields_the_text_that_chat_returns(cascade: Cascade) -> None:
    whole = cascade.chat(QUESTION, max_new_tokens=12)
    stream = cascade.chat(QUESTION, stream=True, max_new_tokens=12)
    pieces = list(stream)
    assert "".join(pieces) == whole.raw
    assert len(pieces) > 1
    assert stream.answer == whole
    unread = cascade.chat(QUESTION, stream=True, max_new_tokens=12, stage=None)
    assert unread.answer == cascade.chat(QUESTION, max_new_tokens=12, stage=None) != whole


def test_the_parts_of_a_stream_are_text_and_checked_calls(cascade: Cascade, say: Callable[..., None]) -> None:
    say(f"I look. {CALL} {CALL.replace('city', 'town')} <tool_call>{{")
    stream = cascade.chat(QUESTION, [get_weather], stream=True)
    parts = list(stream.parts())
    first, second = (part for part in parts if isinstance(part, CallPart))
    assert first == CallPart(Call("get_weather", {"city": "Lisbon"}))
    assert [fault.path for fault in second.faults] == ["get_weather: arguments.city", "get_weather: arguments.town"]
    answer, (fault,) = stream.answer, (part.fault for part in parts if isinstance(part, FaultPart))
    assert join_parts(parts) == Reply(answer.text, answer.calls, [fault])
    assert answer.problems == [*map(str, second.faults), str(fault)]
    assert str(fault) == "this call cannot be read (the text ends inside the call): {"
    say('{"name": "x"}')
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    stream = cascade.chat(QUESTION, stream=True, response_format=schema)
    assert "".join(part.text for part in stream.parts()) == '{"name": "x"}'


def test_a_stream_keeps_unfinished_characters_until_they_are_whole(cascade: Cascade, say: Callable[..., None]) -> None:
    say("Grüße, 日本 🙂 !")
    pieces = list(cascade.chat(QUESTION, stream=True))
    assert "".join(pieces) == "Grüße, 日本 🙂 !"
    assert not any("\ufffd" in piece for piece in pieces)


def test_errors_of_a_stream_are_raised_where_it_is_read_and_closing_ends_it(
    cascade: Cascade, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="model_kwargs"):
        list(cascade.chat(QUESTION, stream=True, no_option=1))
    stopped = threading.Event()

    def endless(**given: Any) -> torch.Tensor:
        try:
            given["streamer"].put(given["input_ids"])
            while True:
                given["streamer"].put(torch.tensor([100]))
                time.sleep(0.001)
        finally:
            stopped.set()

    monkeypatch.setattr(cascade.model("s"), "generate", endless)
    stream = cascade.chat(QUESTION, stream=True)
    next(iter(stream))
    del stream
    assert stopped.wait(5)


def test_messages_and_tools_that_cannot_be_used_are_refused(cascade: Cascade) -> None:
    for messages in ("Hello", [], {"role": "user"}, [{"content": "x"}], ["x"]):
        with pytest.raises(DataError, match="expected a list of messages"):
            cascade.chat(messages)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="The last message is the assistant's"):
        cascade.chat([*QUESTION, {"role": "assistant", "content": "x"}])
    with pytest.raises(RowError, match=r"tools\[0\].*Python function that does not describe a tool"):
        cascade.call("?", [lambda city: city])
    with pytest.raises(RowError, match="image in the content"):
        cascade.chat([{"role": "user", "content": [{"type": "image", "image": "x"}]}])
    with pytest.raises(TokenizerError):
        Cascade(cascade.base).chat(QUESTION)


def test_options_of_generate_can_be_given(cascade: Cascade) -> None:
    torch.manual_seed(0)
    texts = {cascade.chat(QUESTION, max_new_tokens=6, do_sample=True, temperature=3.0).raw for _ in range(3)}
    assert len(texts) > 1
    assert isinstance(cascade.chat(QUESTION, max_new_tokens=2, num_beams=2), Answer)


def test_words_of_peft_and_transformers_work_or_name_ours(
    cascade: Cascade, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = cascade.stages["s"].num_parameters()
    every = trained + sum(p.numel() for p in cascade.base.parameters())
    cascade.print_trainable_parameters()
    shares = f"trainable params: {trained:,} || all params: {every:,} || trainable%: {100 * trained / every:.4f}\n"
    assert capsys.readouterr().out == shares
    cascade.save_pretrained(tmp_path / "s")
    assert Cascade.from_pretrained(tmp_path / "s").active == "s"
    with cascade.activated(None), pytest.raises(StageError, match=r"No stage is active: expected save_stage\(name"):
        cascade.save_pretrained(tmp_path / "none")
    with pytest.raises(AttributeError, match=r"no attribute 'merge_and_unload': cascade\.export_native"):
        cascade.merge_and_unload()
    with pytest.raises(AttributeError, match=r"no attribute 'blah'$"):
        cascade.blah  # noqa: B018
    assert not any(hasattr(Cascade, name) for name in familiar_names.NAMES)


def test_blocks_of_calls_and_results_are_read_in_a_conversation() -> None:
    messages = [
        {"role": "user", "content": "Book 3"},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "book", "input": {"n": 3}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "done"}]},
    ]
    call, result = read_messages(messages)[1:]
    assert call["tool_calls"][0]["function"] == {"name": "book", "arguments": {"n": 3}}
    assert (result["role"], result["content"], result["tool_call_id"]) == ("tool", "done", "t1")
