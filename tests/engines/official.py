"""Let tools of others score answers, from packages on PyPI: `make test-engines`.

    python tests/engines/official.py

The reference answers of BFCL must score what the official checker gives them, and the answers of other rows must be
right or wrong by bfcl-eval's command line as they are by our rules. A task of lm-eval from a YAML file must choose what
the logits of the base and of a stage choose. Packages are kept in ~/.cache/poe-tests. Where no package index can be
reached, one line says so.
"""

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "src"), str(HERE.parents[1] / "benchmarks")]
from smollm2 import cache_folder  # noqa: E402

from poe import Cascade  # noqa: E402
from poe.calls.conversation import Call  # noqa: E402
from poe.calls.forms.call_forms import call_form  # noqa: E402
from poe.data.render import Renderer  # noqa: E402
from poe.data.templates import complete_template, reply_form  # noqa: E402
from poe.errors import EvaluationError  # noqa: E402
from poe.evaluation.bfcl import NO_CALL, PYTHON  # noqa: E402
from poe.evaluation.call_metrics import split_question  # noqa: E402
from poe.evaluation.kinds import make_suite, read_sources  # noqa: E402
from poe.evaluation.suites import Settings  # noqa: E402

# Right reference answers, of how many rows. BFCL's checker refuses the first acceptable answers of the others.
GOLD = {"simple_python": (400, 400), "multiple": (200, 200), "parallel": (200, 200), "parallel_multiple": (198, 200)}


def main() -> int:
    """Score the reference answers and answers of other rows, print a table, run the task; return the exit status."""
    os.environ.setdefault("POE_CACHE", str(cache_folder() / "engines"))
    start = time.monotonic()
    try:
        sources = read_sources("bfcl=" + "+".join((*PYTHON, *NO_CALL)))
    except EvaluationError as error:
        print(f"skipped: {error}")
        return 0
    cascade = Cascade.from_pretrained("demo")
    cascade.config.max_position_embeddings = 10**6  # only the prompts are written
    complete_template(cascade.tokenizer)
    form = call_form(reply_form(cascade.tokenizer))
    renderer = Renderer(cascade.tokenizer, vocab_size=cascade.config.vocab_size)
    good = True
    print(f"packages and questions after {time.monotonic() - start:.0f} s\n")
    print(
        "| category | rows | right by bfcl-eval | answers of the next row: right | agree |\n|---|---:|---:|---:|---:|"
    )
    with tempfile.TemporaryDirectory() as folder:
        for rows in sources:
            suite: Any = make_suite(rows, cascade, renderer, Settings())
            calls = [[Call(*call) for call in split_question(item.content)[1]] for item in suite.items]
            texts = [form.write(each) if each else "No call." for each in calls]
            if rows.name.endswith("irrelevance"):
                texts[::2] = ['<tool_call>\n{"name": "x", "arguments": {}}\n</tool_call>'] * len(texts[::2])
            line = []
            for each in (texts, texts[1:] + texts[:1]):
                answers = [{"reply": text, "finish_reason": "stop"} for text in each]
                scores = suite.score_officially(suite.items, answers, Path(folder))
                right = int(sum(count["bfcl"][0] for count in scores.counts))
                good &= scores.agreed == scores.compared == len(answers)
                line += [right, scores.agreed]
            category = rows.name.removeprefix("bfcl: ")
            good &= GOLD.get(category, (line[0], len(texts))) == (line[0], len(texts))
            print(f"| {category} | {len(texts)} | {line[0]} | {line[2]} | {line[3]} |", flush=True)
    print(f"\n{'as expected' if good else 'NOT as expected'}, {time.monotonic() - start:.0f} s")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
