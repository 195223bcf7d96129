"""Let tools of others score answers, from packages on PyPI: `make test-engines`.

    python tests/engines/official.py

The reference answers of BFCL must score what the official checker gives them, and the answers of other rows must be
right or wrong by bfcl-eval's command line as they are by our rules. A task of lm-eval from a YAML file must score its
choices with the likelihoods of the base, and of a stage. Packages are kept in ~/.cache/poe-tests. Where no package
index can be reached, one line says so.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "src"), str(HERE.parents[1] / "benchmarks")]
from llama_cpp import install  # noqa: E402
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
from poe.evaluation.run import Evaluation  # noqa: E402
from poe.evaluation.suites import Settings  # noqa: E402

# Right reference answers, of how many rows. BFCL's checker refuses the first acceptable answers of the others.
GOLD = {"simple_python": (400, 400), "multiple": (200, 200), "parallel": (200, 200), "parallel_multiple": (198, 200)}

LM_EVAL = (
    *("lm-eval==0.4.13", "absl-py==2.5.1", "colorama==0.4.6", "DataProperty==1.1.1", "evaluate==0.4.6"),
    *("joblib==1.6.0", "lxml==6.1.3", "mbstrdecoder==1.1.5", "more-itertools==11.2.1", "nltk==3.10.4"),
    *("pathvalidate==3.3.1", "portalocker==4.4.2", "pytablewriter==1.2.1", "pytz==2026.6", "rouge-score==0.1.2"),
    *("sacrebleu==2.6.0", "scikit-learn==1.9.1", "scipy==1.17.1", "six==1.17.0", "sqlitedict==2.1.0"),
    *("tabledata==1.3.5", "tabulate==0.10.0", "tcolorpy==0.1.7", "threadpoolctl==3.8.0", "typepy==2.0.0"),
    *("narwhals==2.29.0", "word2number==1.1"),
)
ROWS: list[dict[str, Any]] = [
    {
        "question": f"{person} rents a {thing} for",
        "choices": ["37 days", "the lake", "Marla", "boat"],
        "answer": i % 4,
    }
    for i, (person, thing) in enumerate((p, t) for p in ("Marla", "Otto", "Jonas") for t in ("boat", "gondola", "tent"))
]
TASK = """
task: boats
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


def main() -> int:
    """Score the reference answers and answers of other rows, print a table, run the task; return the exit status."""
    os.environ.setdefault("POE_CACHE", str(cache_folder() / "engines"))
    start = time.monotonic()
    try:
        sources = read_sources("bfcl=" + "+".join((*PYTHON, *NO_CALL)))
        sys.path.append(str(install(LM_EVAL, "lm-eval-0.4.13")))
    except (EvaluationError, subprocess.CalledProcessError) as error:
        print(f"skipped, because packages could not be installed: {error}")
        return 0
    good = compare_task_with_logits()
    cascade = Cascade.from_pretrained("demo")
    cascade.config.max_position_embeddings = 10**6  # only the prompts are written
    complete_template(cascade.tokenizer)
    form = call_form(reply_form(cascade.tokenizer))
    renderer = Renderer(cascade.tokenizer, vocab_size=cascade.config.vocab_size)
    print(f"packages, questions and the task of lm-eval after {time.monotonic() - start:.0f} s\n")
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


def compare_task_with_logits() -> bool:
    """Return whether lm-eval scores the choices of a task with the likelihoods of a base, and of its stage."""
    cascade = Cascade.from_pretrained("demo", dtype=torch.float32).add_stage(name="tool", num_layers=1)
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in cascade.stages["tool"].parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draws))
    before = [score_choices(cascade, "tool", row) for row in ROWS]
    with tempfile.TemporaryDirectory() as folder:
        data, task = Path(folder) / "boats.jsonl", Path(folder) / "boats.yaml"
        data.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
        task.write_text(TASK.format(data=data))
        evaluation = Evaluation(cascade, read_sources(f"lm-eval={task}"), Path(folder) / "run", stage="tool")
        scores = evaluation.run()["scores"]["lm-eval: boats"]
        _, *answers = map(json.loads, (Path(folder) / "run" / "answers.jsonl").read_text().splitlines())
    good, likelihoods = True, []
    for label, stage in (("base", None), ("stage", "tool")):
        expected = [score_choices(cascade, stage, row) for row in ROWS]
        found = [[score for score, _ in a["responses"]["none"]] for a in answers if a["model"] == label]
        largest = (torch.tensor(expected) - torch.tensor(found)).abs().max().item()
        right = sum(each.index(max(each)) == row["answer"] for each, row in zip(expected, ROWS, strict=True))
        accuracy = scores[label]["acc"]["value"]
        print(
            f"lm-eval, {label}: {right} of {len(ROWS)} right, accuracy {accuracy}; likelihoods differ by {largest:.1e}"
        )
        good &= largest < 1e-3 and accuracy == round(right / len(ROWS), 4)
        likelihoods.append(expected)
    return good and likelihoods[0] != likelihoods[1] == before


@torch.no_grad()
def score_choices(cascade: Cascade, stage: str | None, row: dict[str, Any]) -> list[float]:
    """Return the log-likelihood that a model gives each choice of a row after its question."""
    scores = []
    start = len(cascade.tokenizer(row["question"])["input_ids"])
    for choice in row["choices"]:
        ids = torch.tensor([cascade.tokenizer(f"{row['question']} {choice}")["input_ids"]])
        log_p = cascade.model(stage)(input_ids=ids).logits[0, start - 1 : -1].log_softmax(-1)
        scores.append(log_p.gather(1, ids[0, start:, None]).sum().item())
    return scores


if __name__ == "__main__":
    sys.exit(main())
