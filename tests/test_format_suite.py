"""The same questions in several prompt formats: their mean, the worst, and the spread."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from poe import Cascade
from poe.data.render import Renderer
from poe.data.templates import complete_template
from poe.evaluation.call_metrics import Counts, summarize, summarize_differences
from poe.evaluation.format_suite import FormatSuite, draw_formats
from poe.evaluation.kinds import make_suite, read_sources
from poe.evaluation.suites import Settings
from test_suites import TOOL, talk


def test_more_formats_begin_with_those_of_fewer() -> None:
    formats = draw_formats(12, "hermes")
    assert formats[:5] == draw_formats(5, "hermes")
    assert formats[0] is None
    assert len({*formats}) == 12
    assert {form.calls for form in formats if form} == {"hermes"}


def test_the_worst_format_and_the_spread_are_those_of_the_shares() -> None:
    rows: list[Counts] = [
        {f"exact @ {form}": (float(i % 10 < right), 1.0) for form, right in ((1, 9), (2, 4), (3, 6))} for i in range(40)
    ]
    metrics = summarize(rows)
    assert [metrics[name].value for name in ("exact_worst", "exact_spread")] == [0.4, 0.5]
    assert metrics["exact_worst"].low == pytest.approx(metrics["exact @ 2"].low, abs=0.02)  # nearly always the worst
    better = [{**row, "exact @ 2": (1.0, 1.0)} for row in rows]
    differences = summarize_differences(rows, better)
    assert [differences[name].value for name in ("exact_worst", "exact_spread")] == [0.2, -0.1]


def test_each_question_is_asked_in_each_format(demo_base: Path, tmp_path: Path) -> None:
    rows = [{"messages": talk("Ping!"), "tools": [TOOL]}, {"messages": talk("Hello")[::3], "tools": []}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    cascade = Cascade.from_pretrained(demo_base, dtype=torch.float32)
    complete_template(cascade.tokenizer)
    renderer = Renderer(cascade.tokenizer, vocab_size=cascade.config.vocab_size)
    (read,) = read_sources(f"messages={tmp_path / 'rows.jsonl'}")
    suite = make_suite(read, cascade, renderer, Settings(max_new_tokens=3, formats=3))
    assert isinstance(suite, FormatSuite)
    assert [item.id.rpartition("#")[2] for item in suite.items] == [f"{t} @ {f}" for t in (1, 2) for f in (1, 2, 3)]
    assert len({item.fingerprint for item in suite.items}) == len({*map(str, (i.tokens for i in suite.items))}) == 6
    assert suite.dropped == {"no tools, so all formats are alike": 1}

    def answer(text: str) -> dict[str, Any]:
        return {"reply": text, "finish_reason": "stop", "teacher_forced": [0, 0]}

    call = '<tool_call>\n{"name": "ping", "arguments": {}}\n</tool_call>'
    counts = suite.count(suite.items, [*map(answer, (call, call, "No.", "Done", "Done", "Done"))])
    metrics = summarize(counts)
    assert metrics["exact"].value == pytest.approx(5 / 6, abs=1e-4)
    assert [metrics[f"exact @ {form}"].value for form in (1, 2, 3)] == [1, 1, 0.5]
    assert (metrics["exact_worst"].value, metrics["exact_spread"].value) == (0.5, 0.5)
