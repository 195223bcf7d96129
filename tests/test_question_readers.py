"""The readers of questions and answers: mathematics, code and instructions."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poe.data.readers import READERS, alpaca, codealpaca, gsm8k, magicoder, mathinstruct, mbpp
from test_readers import junk, kept, reason, run


def turns(reader: Any, row: Any) -> tuple[str, str]:
    conversation, _ = kept(reader, row)
    assert conversation.tools == []
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"]
    return conversation.messages[0]["content"], conversation.messages[1]["content"]


def test_gsm8k_calculator_notes_are_removed() -> None:
    row = {"question": "Two hens lay 3 eggs each. How many?", "answer": "They lay 2*3=<<2*3=6>>6 eggs.\n#### 6"}
    assert turns(gsm8k, row) == ("Two hens lay 3 eggs each. How many?", "They lay 2*3=6 eggs.\n#### 6")
    assert kept(gsm8k, row)[1] == {"calculator notes removed": 1}
    plain = {**row, "answer": "1 << 2 is 4, and 5 >> 1 is 2.\n#### -1,234"}
    assert turns(gsm8k, plain)[1] == plain["answer"]
    assert kept(gsm8k, plain)[1] == {}


@given(st.lists(st.tuples(st.text("0123456789+-*/=. ", max_size=9), st.text("abc \n$", max_size=9)), max_size=5))
def test_gsm8k_changes_only_the_notes(parts: list[tuple[str, str]]) -> None:
    text = "".join(f"{said}<<{note}=1>>" for note, said in parts) + "end\n#### 7"
    assert turns(gsm8k, {"question": "?", "answer": text})[1] == re.sub("<<.*?>>", "", text).lstrip("\n")


def test_alpaca_with_and_without_an_input() -> None:
    row = {"instruction": "Name a tree.", "input": "", "output": "Birch"}
    assert turns(alpaca, row) == ("Name a tree.", "Birch")
    assert turns(alpaca, {**row, "input": "with needles"})[0] == "Name a tree.\n\nwith needles"
    assert turns(alpaca, {"instruction": "Name a tree.", "input": None, "output": "Birch"})[0] == "Name a tree."
    assert reason(alpaca, {**row, "output": " "}) == "empty turn"
    assert reason(alpaca, {**row, "instruction": ""}) == "empty turn"
    assert reason(alpaca, {"instruction": "Name a tree."}) == "row of an unknown format"
    assert reason(alpaca, {**row, "input": ["birch"]}) == "row of an unknown format"


def test_alpaca_seed_tasks_give_a_conversation_per_instance() -> None:
    instances = [{"input": "3", "output": "odd"}, {"input": "4", "output": "even"}, "5"]
    conversations, counts = run(alpaca, {"id": "seed_task_0", "instruction": "Odd or even?", "instances": instances})
    assert [c.messages[1]["content"] for c in conversations] == ["odd", "even"]
    assert [c.id for c in conversations] == ["row 0.instances[0]", "row 0.instances[1]"]
    assert (counts["read"], counts["dropped"]) == (3, {"row is not an object": 1})
    assert reason(alpaca, {"instruction": "Odd or even?", "instances": []}) == "row of an unknown format"


def test_codealpaca_reads_both_names_of_the_answer_and_keeps_indentation() -> None:
    code = "    if x:\n        return 1"
    for key in ("output", "response"):
        assert turns(codealpaca, {"instruction": "Go on", "input": "def f(x):", key: f"\n{code}\n"})[1] == code
    conversation, _ = kept(codealpaca, {"instruction": "Go on", "input": "", "output": "x"})
    assert (conversation.source, conversation.license) == ("codealpaca", "CC-BY-4.0")


def test_mbpp_adds_the_tests_to_the_task() -> None:
    row = {"item_id": 1, "question": "Write a function that doubles.", "test_list": ["assert double(2) == 4"]}
    row["code"] = "def double(x):\r\n    return 2 * x\r\n"
    expected = "Write a function that doubles.\nIt must pass these tests:\nassert double(2) == 4"
    assert turns(mbpp, row) == (expected, "def double(x):\n    return 2 * x")
    assert kept(mbpp, row)[1] == {"CRLF written as a line feed": 1}
    on_the_hub = {"text": row["question"], "code": "def double(x):\n    return 2 * x", "test_list": row["test_list"]}
    assert kept(mbpp, on_the_hub) == (kept(mbpp, row)[0], {})
    for change in ({"test_list": []}, {"test_list": [5]}, {"code": None}, {"question": 5}):
        assert reason(mbpp, {**row, **change}) == "row of an unknown format"
    assert reason(mbpp, {**row, "question": " "}) == "empty turn"


def test_mathinstruct_and_magicoder() -> None:
    row = {"source": "made/up.json", "instruction": "What is 2+2?", "output": "print(2+2)", "lang": "python"}
    assert turns(mathinstruct, row) == ("What is 2+2?", "print(2+2)")
    assert turns(magicoder, {"problem": "Sort a list.", "solution": "```python\nx.sort()\n```", "seed": "x"}) == (
        "Sort a list.",
        "```python\nx.sort()\n```",
    )
    evolved = {"instruction": "Sort a list.", "response": "```python\nx.sort()\n```"}
    assert turns(magicoder, evolved) == ("Sort a list.", "```python\nx.sort()\n```")
    for row in ({"problem": "Sort a list."}, {"instruction": "Sort a list.", "solution": "x.sort()"}):
        assert reason(magicoder, row) == "row of an unknown format"


@pytest.mark.parametrize("reader", [alpaca, codealpaca, gsm8k, magicoder, mathinstruct, mbpp])
@given(row=junk)
def test_random_rows_never_crash_a_reader_of_questions(reader: Any, row: Any) -> None:
    conversations, counts = run(reader, row)
    assert len(conversations) + sum(counts["dropped"].values()) == counts["read"] >= 1


def test_the_configuration_of_the_hub_is_requested(monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[Any] = []
    monkeypatch.setattr("poe.data.readers.hub_rows", lambda *where, **how: requests.append((*where, how)) or [])
    for name in ("gsm8k", "alpaca"):
        assert list(READERS[name].read(None, None)) == []  # type: ignore[arg-type]
    assert requests == [("openai/gsm8k", "gsm8k", {"config": "main"}), ("tatsu-lab/alpaca", "alpaca", {"config": None})]
