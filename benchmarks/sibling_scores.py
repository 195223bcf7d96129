"""Four specialists on a real base: each alone, chained on the first, composed, and routed (`siblings.py --base`).

Every step leaves its result in the folder, so a run that was stopped goes on where it was:

    rows/       the test rows of each set, and other rows of it to train on
    stages/     a fork for each sibling, and a child of each on the first sibling
    bits-*      the bits and bytes of every test answer under every arm, and the log-probabilities of its prompt
    replies     the replies of the arms to the questions of sets that have a metric for them

The arms of bits per byte come from one pass: all experts share the base's lower layers, and a product is arithmetic on
their logits at the tokens of the answer.
"""

import argparse
import importlib
import json
import math
import random
import shutil
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import torch

from poe import Cascade
from poe.calls.conversation import Conversation
from poe.data.drops import DropReport
from poe.data.render import Renderer, token_bytes
from poe.data.sources import file_rows
from poe.data.spec import DataSource, parse_spec
from poe.data.templates import complete_template
from poe.decoding.products import combine
from poe.errors import DataError, RowError
from poe.evaluation.answer_suite import render_answer
from poe.evaluation.call_metrics import Counts, summarize, summarize_differences
from poe.evaluation.kinds import make_suite, read_sources
from poe.evaluation.results import as_values
from poe.evaluation.suites import ANSWERS, Settings
from poe.training.checkpoints.files import has_checkpoint
from poe.training.trainer import train_stage

BASE, NAMED, AUTO = "base", "named", "auto"
SHOWN = ("bits_per_byte", "exact", "call_f1", "final_number", "marked_number", "parses", "defines", "similarity")
Products = dict[str, tuple[str, dict[str, float]]]
"""The mode and the weights of products, by their name."""


class Siblings:
    """The siblings of one benchmark folder. `sources` are the data of each, by its name; the first carries chains."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.folder = args, args.out
        self.sources: dict[str, DataSource] = {}
        for text in args.sibling:
            name, _, spec = text.partition("=")
            (self.sources[name],) = parse_spec(spec)
        self.first, *self.others = self.sources
        self.chains = {f"{self.first}-{name}": name for name in self.others}
        self.cascade = Cascade.from_pretrained(args.base, dtype=torch.bfloat16)
        complete_template(self.cascade.tokenizer)
        self.renderer = Renderer(self.cascade.tokenizer, vocab_size=self.cascade.config.vocab_size)
        self.token_bytes = token_bytes(self.cascade.tokenizer, self.cascade.config.vocab_size)

    def rows(self, name: str, part: str) -> Path:
        return self.folder / "rows" / f"{name}-{part}.jsonl"

    def stage_folder(self, name: str) -> Path:
        return self.folder / "stages" / name

    def suite_spec(self, name: str) -> str:
        return f"{self.sources[name].name}={self.rows(name, 'test')}"

    def split(self, name: str) -> None:
        """Write test rows, which fit into a row of training with their answer, and other rows to train on."""
        if self.rows(name, "train").exists():
            return
        source, report = self.sources[name], DropReport()
        reader = importlib.import_module(f"poe.data.readers.{source.name}")
        rows = list(file_rows(str(source.path), source.name, report))
        random.Random(self.args.seed).shuffle(rows)
        test, train = [], []
        for row_id, row in rows:
            conversation = next(reader.read([(row_id, row)], report), None)
            if conversation is None or not self._fits(conversation):
                continue
            part = test if len(test) < self.args.test_rows else train
            part.append(row)
            if len(train) == self.args.train_rows:
                break
        self.rows(name, "test").parent.mkdir(parents=True, exist_ok=True)
        for part, written in (("test", test), ("train", train)):  # the last file marks that both are there
            text = "".join(f"{json.dumps(row)}\n" for row in written)
            self.rows(name, part).write_text(text, encoding="utf-8")

    def _fits(self, conversation: Conversation) -> bool:
        try:
            return len(render_answer(self.renderer, conversation).input_ids) <= self.args.seq_len
        except (DataError, RowError):
            return False

    def train(self, name: str, data: str, parent: str | None = None) -> None:
        """Train a fork on the rows of `data`, on the base or on the stage `parent`; continue one that was stopped."""
        folder = self.stage_folder(name)
        if (folder / "training.json").exists():
            return
        if not has_checkpoint(folder):
            shutil.rmtree(folder, ignore_errors=True)
        opened = self.args.base if parent is None else self.stage_folder(parent)
        cascade = Cascade.from_pretrained(opened, dtype=torch.bfloat16)
        reader = self.sources[data].name
        train_stage(
            cascade,
            f"{data}-fork",
            f"{reader}={self.rows(data, 'train')}",
            folder,
            parent=cascade.active,
            eval_data=f"{reader}={self.rows(data, 'test')}",
            resume=has_checkpoint(folder),
            name=name,
            seed=self.args.seed,
            seq_len=self.args.seq_len,
            tokens_per_step=self.args.tokens_per_step,
            max_steps=self.args.steps,
            validation_every=self.args.steps,
            validation_ratio=0.02,
            checkpoint_every=30.0,
            active="all",  # each stage reads the prompt, too
        )

    def load(self, names: Sequence[str]) -> Cascade:
        """Return the base with some of the stages."""
        cascade = Cascade.from_pretrained(self.args.base, dtype=torch.bfloat16)
        complete_template(cascade.tokenizer)
        for name in names:
            cascade.load_stage(self.stage_folder(name), name=name)
        return cascade

    def products(self) -> Products:
        """Return the mode and the weights of each product."""
        both = {f"{self.first} x {name}": {self.first: 0.5, name: 0.5} for name in self.others}
        every = dict.fromkeys(self.sources, 1 / len(self.sources))
        return {
            **{name: ("log_op", weights) for name, weights in both.items()},
            "product of all": ("log_op", every),
            "sum of all changes": ("delta", dict.fromkeys(self.sources, 1.0)),
        }

    def measure_bits(self) -> list[dict[str, Any]]:
        """Return a record of each test row: bits and bytes under every arm, and the scores of its prompt."""
        rows = [(name, item) for name in self.sources for item in self.make_suite(name, self.cascade).items]
        alone = self._measure_part("siblings", rows, [BASE, *self.sources], self.products())
        chained = self._measure_part("chains", rows, list(self.chains), {})
        return [
            {**record, "arms": record["arms"] | other["arms"]} for record, other in zip(alone, chained, strict=True)
        ]

    def _measure_part(
        self, part: str, rows: list[tuple[str, Any]], names: list[str], products: Products
    ) -> list[dict[str, Any]]:
        """Return a record of each row: its arms, and if the base is one of the experts `names` its prompt's scores."""
        path = self.folder / f"bits-{part}.jsonl"
        known = {(record["set"], record["row"]): record for record in read_lines(path)}
        if any((name, item.id) not in known for name, item in rows):
            stages = [name for name in names if name != BASE]
            cascade = self.load(stages)
            model = cascade.compose([None if name == BASE else name for name in names])
        for name, item in rows:
            if (name, item.id) in known:
                continue
            arms = self._measure_row(model, names, products, render_answer(self.renderer, item.content))
            record = {"set": name, "row": item.id, "arms": arms}
            if BASE in names:
                (scores,) = cascade.route(torch.tensor([item.tokens])).scores
                record["prompt"] = {str(stage or BASE): score for stage, score in scores.items()}
            known[name, item.id] = record
            append_lines(path, [record])
        return [known[name, item.id] for name, item in rows]

    @torch.no_grad()
    def _measure_row(self, model: Any, names: list[str], products: Products, row: Any) -> dict[str, list[float]]:
        """Return the bits and bytes of one answer under each expert of `model`, and under products of them."""
        ids, mask = torch.tensor([row.input_ids]), torch.tensor(row.loss_mask)
        targets = ids[0, 1:][mask[1:]]
        with model.acting_on_labels(ids.masked_fill(~mask, -100)):
            states, _ = model.expert_states(ids, use_cache=False)
        logits = {
            name: model.expert_logits(number, state[0, :-1][mask[1:]]).float()
            for number, (name, state) in enumerate(zip(names, states, strict=True))
        }
        log_p = {name: values.log_softmax(-1) for name, values in logits.items()}
        for name, (mode, weights) in products.items():
            factors = {BASE: 1 - sum(weights.values()), **weights} if mode == "delta" else weights
            log_p[name] = combine([logits[each] for each in factors], list(factors.values()))
        num_bytes = self.token_bytes[targets]
        counted = num_bytes > 0
        nats = {name: -values.gather(1, targets[:, None])[counted].double().sum() for name, values in log_p.items()}
        return {name: [float(value) / math.log(2), int(num_bytes.sum())] for name, value in nats.items()}

    def make_suite(self, name: str, cascade: Any, rows: int | None = None) -> Any:
        """Return the suite of the test rows of a sibling, all of them or a sample."""
        (source,) = read_sources(self.suite_spec(name))
        settings = Settings(constrain=False, max_new_tokens=self.args.max_new_tokens, rows=rows, seed=self.args.seed)
        return make_suite(source, cascade, self.renderer, settings)

    def measure_replies(self, records: list[dict[str, Any]]) -> dict[str, dict[str, list[Counts]]]:
        """Return what the replies add to the own metrics of each set, by set and arm."""
        models = Models(self.load([*self.sources, *self.chains]), self.products())
        path = self.folder / "replies.jsonl"
        answers = {(a["set"], a["arm"], a["row"]): a["answer"] for a in read_lines(path)}
        chosen = {(r["set"], r["row"]): choose(r["prompt"]) for r in records}
        counts: dict[str, dict[str, list[Counts]]] = {}
        for name in self.sources:
            suite = self.make_suite(name, models, self.args.asked)
            if suite.rows.kind == ANSWERS:
                continue  # bits per byte are its own metric
            chained = [f"{self.first}-{name}", f"{self.first} x {name}"] if name in self.others else [*self.chains]
            for arm in [BASE, name, *chained, "product of all", AUTO]:
                stages = {item.id: chosen[name, item.id] if arm == AUTO else arm for item in suite.items}
                for stage in dict.fromkeys(stages.values()):
                    items = [item for item in suite.items if stages[item.id] == stage]
                    left = [item for item in items if (name, stage, item.id) not in answers]
                    replies = suite.answer(None if stage == BASE else stage, left) if left else []
                    answers |= {(name, stage, item.id): reply for item, reply in zip(left, replies, strict=True)}
                    new = [{"set": name, "arm": stage, "row": i.id, "answer": answers[name, stage, i.id]} for i in left]
                    append_lines(path, new)
                found = [answers[name, stages[item.id], item.id] for item in suite.items]
                counts.setdefault(name, {})[arm] = suite.count(suite.items, found)
        return counts


class Models:
    """A cascade in which a product is the model of its name, as suites take it."""

    def __init__(self, cascade: Cascade, products: Products) -> None:
        self._cascade = cascade
        self._products = {name: cascade.compose(weights, mode) for name, (mode, weights) in products.items()}
        self.stages = {**cascade.stages, **{name: SimpleNamespace(prompt=None) for name in products}}

    def model(self, name: str | None) -> Any:
        return self._products[name] if name in self._products else self._cascade.model(name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cascade, name)


def choose(scores: dict[str, float]) -> str:
    """Return the most likely stage of a prompt; the base, which comes first, wins a tie."""
    return max(scores, key=lambda name: scores[name])


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file, without a line that was cut off while it was written."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if text and not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
        path.write_text(text, encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def append_lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Append records to a file."""
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(f"{json.dumps(record)}\n" for record in records))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Do what is not done yet, and return all scores."""
    siblings = Siblings(args)
    for name in siblings.sources:
        siblings.split(name)
        siblings.train(name, name)
    for chain, data in siblings.chains.items():
        siblings.train(chain, data, siblings.first)
    records = siblings.measure_bits()
    sets: dict[str, dict[str, list[Counts]]] = {}
    routed: dict[str, Counter[str]] = {}
    for record in records:
        bits = record["arms"] | {NAMED: record["arms"][record["set"]], AUTO: record["arms"][choose(record["prompt"])]}
        for arm, (above, below) in bits.items():
            sets.setdefault(record["set"], {}).setdefault(arm, []).append({"bits_per_byte": (above, below)})
        routed.setdefault(record["set"], Counter())[choose(record["prompt"])] += 1
    scores = {name: {arm: as_values(summarize(rows)) for arm, rows in arms.items()} for name, arms in sets.items()}
    arms = next(iter(scores.values()))
    scores["mixed"] = {
        arm: {"bits_per_byte": {"value": fmean(scores[name][arm]["bits_per_byte"]["value"] for name in sets)}}
        for arm in arms
    }
    differences = {
        name: {arm: as_values(summarize_differences(arms[name], rows)) for arm, rows in arms.items() if arm != name}
        for name, arms in sets.items()
    }
    for name, arms in siblings.measure_replies(records).items() if args.asked else ():
        for arm, rows in arms.items():
            scores[name][arm] |= {m: v for m, v in as_values(summarize(rows)).items() if m != "bits_per_byte"}
    counts = {name: dict(count.most_common()) for name, count in routed.items()}
    accuracy = sum(count[name] for name, count in routed.items()) / len(records)
    return {
        "scores": scores,
        "differences_from_own_stage": differences,
        "routed": counts,
        "routing_accuracy": round(accuracy, 4),
    }


def write_tables(results: dict[str, Any]) -> str:
    """Return the scores as Markdown: bits per byte of every arm on every set, own metrics, and the routes.

    The column `mixed` is the mean of the sets.
    """
    scores = results["scores"]
    arms = list(next(iter(scores.values())))
    lines = [f"| arm | {' | '.join(scores)} |", "|---|" + "---:|" * len(scores)]
    for arm in arms:
        cells = [f"{scores[name][arm]['bits_per_byte']['value']:.4f}" for name in scores]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    for name, by_arm in scores.items():
        metrics = [metric for metric in next(iter(by_arm.values())) if metric != "bits_per_byte"]
        if metrics:
            lines += ["", f"| {name} | {' | '.join(metrics)} |", "|---|" + "---:|" * len(metrics)]
        for arm, values in by_arm.items() if metrics else ():
            cells = [values.get(metric, {}).get("value") for metric in metrics]
            if any(cell is not None for cell in cells):
                lines.append(f"| {arm} | {' | '.join('-' if cell is None else f'{cell:.3f}' for cell in cells)} |")
    names = list(dict.fromkeys(stage for count in results["routed"].values() for stage in count))
    lines += ["", f"| prompts of | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    for name, count in results["routed"].items():
        lines.append(f"| {name} | {' | '.join(str(count.get(stage, 0)) for stage in names)} |")
    return "\n".join(lines) + "\n"


def make_result(results: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Return the scores in the form of docs/results, without the texts that only their author can write."""
    sizes = ("steps", "tokens_per_step", "seq_len", "train_rows", "test_rows", "asked", "max_new_tokens", "seed")
    siblings = " ".join(f"--sibling {text.rpartition('=')[0]}=FILE" for text in args.sibling)
    options = " ".join(f"--{name.replace('_', '-')} {getattr(args, name)}" for name in sizes)
    metrics: dict[str, Any] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, arms in results["scores"].items():
        for arm, values in arms.items():
            for metric, value in values.items():
                if metric not in SHOWN or value["value"] is None:
                    continue
                is_bits = metric == "bits_per_byte"
                better = {"better": "lower" if is_bits else "higher"}
                title = f"{name}: {metric.replace('_', ' ')}"
                metrics[f"{name}_{metric}"] = {"title": title, "digits": 3 if is_bits else 2, **better}
                bounds = [value["value"], value["low"], value["high"]] if "low" in value else value["value"]
                rows.setdefault(arm, {})[f"{name}_{metric}"] = bounds
    rows[AUTO]["routing_accuracy"] = results["routing_accuracy"]
    metrics["routing_accuracy"] = {"title": "prompts routed to their own stage", "digits": 2, "better": "higher"}
    return {
        "title": "Siblings on a real base",
        "about": "",
        "order": 90,
        "date": "",
        "machine": "",
        "versions": {name: version(name) for name in ("poe-cascade", "torch", "transformers")},
        "commands": [f"python benchmarks/siblings.py --base FOLDER {siblings} {options}"],
        "log": "log/siblings.md",
        "metrics": metrics,
        "rows": [{"method": arm, "seed": args.seed, "metrics": values} for arm, values in rows.items()],
    }
