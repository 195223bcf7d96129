"""Suites of answers in text: final numbers, code that is parsed and never run, bits per byte of references."""

import json
import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import scramble
from poe import Cascade, StageConfig
from poe.calls.conversation import Conversation
from poe.data.render import Renderer, token_bytes
from poe.errors import DataError
from poe.evaluation.answer_suite import measure_answer, render_answer
from poe.evaluation.kinds import read_sources
from poe.evaluation.reply_checks import check_code, check_number, find_code, find_number
from poe.evaluation.run import Evaluation, Settings

SQUARE = "def square(x):\n    return x * x"


def asked(question: str, answer: str) -> Conversation:
    return Conversation([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 3 eggs and sells 2, so 1 is left.", "1"),
        ("3 + 4 = 7\n#### 7\nQuestion: 9?", "7"),
        ("#### 1,234.50", "1234.5"),
        ("#### $-5", "-5"),
        ("It is $1,200.", "1200"),
        ("10-5", "5"),
        ("a loss of -5 dollars", "-5"),
        ("a loss of \N{MINUS SIGN}5", "-5"),
        ("in 1,2345 parts", "2345"),
        ("5.0", "5"),
        ("none", None),
        ("it was 3 ####", None),
        ("", None),
    ],
)
def test_the_final_number_of_a_text(text: str, number: str | None) -> None:
    assert find_number(text) == (None if number is None else Decimal(number))


def test_a_reply_is_right_if_its_final_number_is() -> None:
    question = asked("How many?", "3 * 4 = 12\n#### 12")
    for reply, final, marked in (
        ("#### 12.0", 1, 1),
        ("That makes 12", 1, 0),
        ("12 eggs, of 13", 0, 0),
        ("12\n#### 13", 0, 0),
        ("", 0, 0),
    ):
        assert check_number(question, reply) == {"final_number": (final, 1), "marked_number": (marked, 1)}, reply
    assert check_number(asked("How many?", "No one can say."), "12") == {}


@pytest.mark.parametrize(
    ("reply", "parses", "defines", "same"),
    [
        (SQUARE, 1, 1, 1),
        (f"Here it is:\n```python\n{SQUARE}  # the square\n```\nDone.", 1, 1, 1),
        (f"```\n{SQUARE}", 1, 1, 1),  # cut off before the fence is closed
        ("def square(x): return x ** 2", 1, 1, 0),
        ("def cube(x): return x * x", 1, 0, 0),
        ("def square(x) return x", 0, 0, 0),
        ("I cannot do that.", 0, 0, 0),
        ("", 0, 0, 0),
        ("(" * 5000, 0, 0, 0),
        ("x = " + "-" * 20000 + "1", 0, 0, 0),
    ],
)
def test_code_is_compared_as_a_program(reply: str, parses: int, defines: int, same: int) -> None:
    question = asked("Square a number.\nIt must pass these tests:\nassert square(3) == 9", SQUARE)
    counts = check_code(question, reply)
    assert [counts[name] for name in ("parses", "defines", "same_code")] == [(parses, 1), (defines, 1), (same, 1)]
    assert counts["similarity"][0] == 1 if find_code(reply) == SQUARE else counts["similarity"][0] < 1


def test_the_similarity_of_code_counts_characters_in_order() -> None:
    assert check_code(asked("?", "abcd"), "bcde")["similarity"] == (0.75, 1)  # bcd, twice, of eight characters


def test_only_functions_that_the_question_calls_must_be_defined() -> None:
    reference = f"def helper():\n    pass\n{SQUARE}"
    assert check_code(asked("assert square(3) == 9", reference), SQUARE)["defines"] == (1, 1)
    assert "defines" not in check_code(asked("Square a number.", reference), SQUARE)


def test_code_of_a_reply_is_never_run(tmp_path: Path) -> None:
    code = f"open({str(tmp_path / 'made')!r}, 'w')\ndef square(x): return x"
    assert check_code(asked("square(2)", SQUARE), code)["parses"] == (1, 1)
    assert not (tmp_path / "made").exists()


FORK = {"layers": "fork", "attach_at": 1, "active": "answer", "rank": 2}


@pytest.mark.parametrize("fields", [{"num_layers": 1}, FORK])
@torch.no_grad()
def test_bits_are_those_of_generating_the_answer(demo_base: Path, fields: dict[str, Any]) -> None:
    cascade = Cascade.from_pretrained(demo_base, dtype=torch.float32).add_stage(StageConfig("s", **fields))
    scramble(cascade.stages["s"], scale=0.3)
    renderer = Renderer(cascade.tokenizer, vocab_size=cascade.config.vocab_size)
    row = render_answer(renderer, asked("How many boats?", "Forty boats."))
    sizes = token_bytes(cascade.tokenizer, cascade.config.vocab_size)
    prompt = renderer.prompt_ids([{"role": "user", "content": "How many boats?"}])
    answer = row.input_ids[len(prompt) :]
    assert row.input_ids[: len(prompt)] == prompt
    model = cascade.model("s").eval()
    generated = model.generate(
        torch.tensor([prompt]),
        prefix_allowed_tokens_fn=lambda _, ids: [row.input_ids[len(ids)]],
        max_new_tokens=len(answer),
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    log_p = torch.cat(generated.logits).log_softmax(-1)
    bits = sum(-float(log_p[i, token]) / math.log(2) for i, token in enumerate(answer) if sizes[token])
    assert measure_answer(model, row, sizes) == (pytest.approx(bits, rel=1e-4), len(b"Forty boats."), len(answer))


def test_suites_of_numbers_code_and_answers(demo_base: Path, tmp_path: Path) -> None:
    numbers = [{"question": f"Add {i} and 1.", "answer": f"It is {i + 1}.\n#### {i + 1}"} for i in range(3)]
    code = [{"question": "Square it.", "test_list": ["assert square(2) == 4"], "code": SQUARE}]
    texts = [{"instruction": f"Name a tree in {output}", "input": "", "output": output} for output in ("Birch", " ")]
    for name, rows in (("gsm8k", numbers), ("mbpp", code), ("alpaca", texts)):
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    spec = ",".join(f"{name}={tmp_path / name}.jsonl" for name in ("gsm8k", "mbpp", "alpaca"))
    sources = read_sources(spec)
    assert [rows.kind for rows in sources] == ["numbers", "code", "answers"]
    cascade = Cascade.from_pretrained(demo_base, dtype=torch.float32)
    results = Evaluation(cascade, sources, tmp_path / "run", settings=Settings(max_new_tokens=3)).run()
    scores = {name: {m for m, value in by["base"].items() if value["rows"]} for name, by in results["scores"].items()}
    both = {"bits_per_byte", "clean_stop"}
    assert scores == {
        "gsm8k": both | {"final_number", "marked_number"},
        "mbpp": both | {"parses", "defines", "same_code", "similarity"},
        "alpaca": {"bits_per_byte"},
    }
    assert results["suites"]["alpaca"]["dropped"] == {"empty turn": 1}
    assert results["suites"]["gsm8k"]["asked"] == 3
    changed = tmp_path / "changed.jsonl"
    changed.write_text((tmp_path / "gsm8k.jsonl").read_text().replace("#### 2", "#### 3"))
    before, after = (rows.rows[1][1] for rows in (sources[0], read_sources(f"gsm8k={changed}")[0]))
    assert before != after, "the reference is a part of what was asked"


def test_an_answer_that_does_not_fit_is_not_asked(demo_base: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"instruction": "Go on.", "output": "word " * 3000}))
    cascade = Cascade.from_pretrained(demo_base, dtype=torch.float32)
    with pytest.raises(DataError, match="longer than 2048 tokens with its answer"):
        Evaluation(cascade, read_sources(f"alpaca={tmp_path / 'rows.jsonl'}"), tmp_path / "run")
