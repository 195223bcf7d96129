"""Measure a base and a stage on suites: answers first, scores after.

Every batch of answers is appended to `answers.jsonl` before the next one begins. Batches are formed from all items of a
suite by their length, so an evaluation that was killed forms the same ones: replies do not depend on where it stopped.
"""

import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from poe import __version__
from poe.cascade import Cascade
from poe.data.cache import code_version
from poe.data.render import Renderer
from poe.data.templates import complete_template, note_unread_calls
from poe.evaluation.answers import AnswersFile, Key
from poe.evaluation.call_metrics import Counts, summarize, summarize_differences
from poe.evaluation.call_suite import find_call_threshold
from poe.evaluation.kinds import make_suite
from poe.evaluation.results import RESULTS, SCHEMA, SCORES, as_values, write_scores, write_table
from poe.evaluation.suites import Rows, Settings, Suite, fingerprint_items
from poe.evaluation.unchanged import hash_logits
from poe.files.output import locked_folder, write_file
from poe.loaders.tokenizer import check_tokenizer
from poe.modeling.fingerprint import fingerprint_tensors
from poe.modeling.placement import device_of
from poe.modeling.stage import Stage
from poe.training.reporting.progress import Progress

ANSWERS, TABLE = "answers.jsonl", "results.md"
BASE, STAGE = "base", "stage"


class Evaluation:
    """The evaluation of a cascade on suites in a folder, with the answers that are there already.

    `sources` are the rows of its suites (`read_sources`). `stage` is measured beside the base; None: the base alone.
    Raises `DataError` for suites that cannot be asked.
    """

    def __init__(
        self,
        cascade: Cascade,
        sources: Sequence[Rows],
        folder: Path,
        *,
        stage: str | None = None,
        settings: Settings | None = None,
    ) -> None:
        self.settings = settings or Settings()
        self.cascade, self.folder = cascade, folder.expanduser()
        self.models: dict[str, str | None] = {BASE: None} if stage is None else {BASE: None, STAGE: stage}
        check_tokenizer(cascade.tokenizer, cascade.config.vocab_size)
        complete_template(cascade.tokenizer)
        self.notes = list(filter(None, [note_unread_calls(cascade.tokenizer)]))
        self._renderer = Renderer(cascade.tokenizer, vocab_size=cascade.config.vocab_size)
        self.suites: dict[str, Suite] = {
            rows.name: make_suite(rows, cascade, self._renderer, self.settings) for rows in sources
        }

    @property
    def num_answers(self) -> int:
        """The number of answers of the whole evaluation."""
        return len(self.models) * sum(len(suite.items) for suite in self.suites.values())

    def run(self, base_alone: str | None = None, progress: Progress | None = None) -> dict[str, Any]:
        """Answer what is not answered yet, write the results, and return them.

        `base_alone` is the `hash_base_alone` of the stage, to be compared with the base of this cascade. Raises
        `EvaluationError` for answers of another evaluation, `OutputError` if the folder cannot be written.
        """
        with locked_folder(self.folder) as folder:
            file = AnswersFile(folder / ANSWERS, self._header())
            self._answer(file, progress or Progress("eval", quiet=True))
            results = self._score(file.answers, folder)
            if base_alone is not None:
                off = hash_logits(self.cascade)
                results["base_unchanged"] = {"is_equal": off == base_alone, "stage_off": off, "base_alone": base_alone}
            write_file(folder / RESULTS, json.dumps(results, indent=1) + "\n")
            write_file(folder / TABLE, write_table(results))
        return results

    def _answer(self, file: AnswersFile, progress: Progress) -> None:
        for label, stage in self.models.items():
            for name, suite in self.suites.items():
                progress.begin(f"{label}, {name}, {len(suite.items)} rows")
                items, size = sorted(suite.items, key=lambda item: len(item.tokens)), suite.batch_size
                for start in range(0, len(items), size):
                    batch = items[start : start + size]
                    if all((label, name, item.fingerprint) in file.answers for item in batch):
                        continue
                    answers = suite.answer(stage, batch)
                    keys = [{"model": label, "suite": name, "id": i.id, "question": i.fingerprint} for i in batch]
                    file.add([key | answer for key, answer in zip(keys, answers, strict=True)])
                    progress.show_share((start + len(batch)) / len(items))

    def _score(self, answers: dict[Key, dict[str, Any]], folder: Path) -> dict[str, Any]:
        scores: dict[str, Any] = {}
        suites: dict[str, Any] = {}
        lines: list[dict[str, Any]] = []
        for name, suite in self.suites.items():
            rows = suite.rows
            counts: dict[str, list[Counts]] = {}
            replies = {}
            for label in self.models:
                found = [answers[label, name, item.fingerprint] for item in suite.items]
                counts[label], replies[label] = suite.count(suite.items, found), _count_replies(found)
                lines += [
                    {"model": label, "suite": name, "id": item.id, "question": item.fingerprint, "counts": count}
                    for item, count in zip(suite.items, counts[label], strict=True)
                ]
            scores[name] = {label: as_values(summarize(c, seed=self.settings.seed)) for label, c in counts.items()}
            if STAGE in counts:
                differences = summarize_differences(counts[BASE], counts[STAGE], seed=self.settings.seed)
                scores[name]["difference"] = as_values(differences)
            suites[name] = {
                "source": rows.source,
                "license": rows.license,
                "fingerprint": fingerprint_items(suite.items),
                "read": rows.read,
                "asked": len(suite.items),
                "dropped": dict(suite.dropped.most_common()),
                "replies": replies,
            }
        stage = self.models.get(STAGE)
        source = self.cascade.base_source
        return {
            "schema": SCHEMA,
            "base": {"repo": source.repo, "revision": source.revision, "fingerprint": source.fingerprint},
            "stage": None if stage is None else {"name": stage, "fingerprint": self._fingerprints()[STAGE]},
            "settings": self._header()["settings"],
            "prompt": self._renderer.fingerprint(),
            "versions": _versions(),
            "suites": suites,
            "scores": scores,
            "scores_sha256": write_scores(folder / SCORES, lines),
        }

    def _fingerprints(self) -> dict[str, str]:
        fingerprints = {BASE: self.cascade.base_source.fingerprint}
        if (name := self.models.get(STAGE)) is not None:
            fingerprints[STAGE] = " on ".join(map(_fingerprint, reversed(self.cascade.stages[name].chain)))
        return fingerprints

    def _header(self) -> dict[str, Any]:
        base = self.cascade.base
        settings = {
            **asdict(self.settings),
            "dtype": str(base.dtype).removeprefix("torch."),
            "device": device_of(base.get_input_embeddings()).type,
            "call_threshold": find_call_threshold(self.cascade, self.models.get(STAGE)),
        }
        return {
            "models": self._fingerprints(),
            "suites": {name: fingerprint_items(suite.items) for name, suite in self.suites.items()},
            "prompt": self._renderer.fingerprint(),
            "settings": settings,
            "versions": {**_versions(), "code": code_version()},
        }


def _fingerprint(stage: Stage) -> str:
    return str(stage.source["fingerprint"]) if stage.source else fingerprint_tensors(stage.delta_state_dict())


def _versions() -> dict[str, str]:
    names = ("torch", "transformers", "tokenizers", "llguidance")
    return {"poe-cascade": __version__, **{name: importlib.metadata.version(name) for name in names}}


def _count_replies(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the tokens and the seconds of answers; of replies also how many were not constrained."""
    totals = {name: round(sum(answer[name] for answer in answers), 2) for name in ("tokens", "seconds")}
    free = sum(not answer.get("is_constrained", True) for answer in answers)
    return totals | ({"free_replies": free} if "is_constrained" in answers[0] else {})
