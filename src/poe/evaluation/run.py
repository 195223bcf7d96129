"""Measure a base and a stage on suites: answers first, scores after.

Every batch of answers is appended to `answers.jsonl` before the next one begins. Batches are formed from all items of a
suite by their length, so an evaluation that was killed forms the same ones: replies do not depend on where it stopped,
and not on the number of processes, of which each answers every n-th batch.
"""

import importlib.metadata
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from poe import __version__
from poe.cascade import Cascade
from poe.data.cache import code_version
from poe.data.render import Renderer
from poe.data.templates import complete_template, note_unread_calls
from poe.evaluation.answers import AnswersFile, Key
from poe.evaluation.call_metrics import Counts, add_by_row, summarize, summarize_differences
from poe.evaluation.call_suite import find_call_threshold
from poe.evaluation.kinds import make_suite
from poe.evaluation.results import (
    BASE,
    DIFFERENCE,
    FREE,
    RESULTS,
    SCHEMA,
    SCORES,
    STAGE,
    as_values,
    draw_results,
    write_scores,
    write_table,
)
from poe.evaluation.samples import add_samples
from poe.evaluation.suites import Item, OfficialScores, OfficialSuite, Rows, Settings, Suite, fingerprint_items
from poe.evaluation.unchanged import hash_logits
from poe.files.output import locked_folder, write_file
from poe.loaders.tokenizer import check_tokenizer
from poe.modeling.fingerprint import fingerprint_tensors
from poe.modeling.placement import device_of
from poe.modeling.stage import Stage
from poe.training.parallel.distributed import SINGLE_PROCESS, World
from poe.training.reporting.progress import Progress

ANSWERS, TABLE, CHART = "answers.jsonl", "results.md", "results.svg"


@dataclass(frozen=True)
class Series:
    """The answers of one model to one suite. `stage` is None for the base, `samples` are those of each question."""

    label: str
    stage: str | None
    name: str
    suite: Suite
    samples: int

    def items(self) -> list[Item]:
        """Return the items in the order of the suite, each as often as there are samples."""
        return [replace(item, sample=sample) for item in self.suite.items for sample in range(self.samples)]

    def batches(self) -> list[list[Item]]:
        """Return the items in batches of similar length."""
        items, size = sorted(self.items(), key=lambda item: len(item.tokens)), self.suite.batch_size
        return [items[start : start + size] for start in range(0, len(items), size)]

    def key(self, item: Item) -> Key:
        """Return which answer it is in the file."""
        return self.label, self.name, item.fingerprint, item.sample


class Evaluation:
    """The evaluation of a cascade on suites in a folder, with the answers that are there already.

    `sources` are the rows of its suites (`read_sources`). `stage` is measured beside the base, or without it
    (`stage_only`); None: the base alone. With `both`, replies are constrained, and also free. Raises `DataError` for
    suites that cannot be asked.
    """

    def __init__(
        self,
        cascade: Cascade,
        sources: Sequence[Rows],
        folder: Path,
        *,
        stage: str | None = None,
        settings: Settings | None = None,
        both: bool = False,
        stage_only: bool = False,
    ) -> None:
        self.settings = settings or Settings()
        self.cascade, self.folder, self._both = cascade, folder.expanduser(), both
        self.models: dict[str, str | None] = {} if stage_only and stage is not None else {BASE: None}
        self.models |= {} if stage is None else {STAGE: stage}
        check_tokenizer(cascade.tokenizer, cascade.config.vocab_size)
        complete_template(cascade.tokenizer)
        self.notes = list(filter(None, [note_unread_calls(cascade.tokenizer)]))
        self._renderer = renderer = Renderer(cascade.tokenizer, vocab_size=cascade.config.vocab_size)
        self.suites = {rows.name: make_suite(rows, cascade, renderer, self.settings) for rows in sources}
        replied = [suite.rows for suite in self.suites.values() if suite.success] if both else []
        free = replace(self.settings, constrain=False)
        self._free = {rows.name: make_suite(rows, cascade, renderer, free) for rows in replied}

    @property
    def num_answers(self) -> int:
        """The number of answers of the whole evaluation."""
        return sum(len(series.items()) for series in self._series())

    def run(
        self, base_alone: str | None = None, progress: Progress | None = None, world: World = SINGLE_PROCESS
    ) -> dict[str, Any]:
        """Answer what is not answered yet, write the results, and return them.

        `base_alone` is the `hash_base_alone` of the stage, to be compared with the base of this cascade. The processes
        of `world` share the batches, and the main one writes. Raises `EvaluationError` for answers of another
        evaluation, `OutputError` if the folder cannot be written.
        """
        header = self._header()
        world.check_equal(header)
        progress = progress or Progress("eval", quiet=True)
        if not world.is_main:
            self._answer(None, progress, world)
            return world.broadcast({})
        with locked_folder(self.folder) as folder:
            file = AnswersFile(folder / ANSWERS, header)
            self._answer(file, progress, world)
            results = self._score(file.answers, folder)
            if base_alone is not None:
                off = hash_logits(self.cascade)
                results["base_unchanged"] = {"is_equal": off == base_alone, "stage_off": off, "base_alone": base_alone}
            write_file(folder / RESULTS, json.dumps(results, indent=1) + "\n")
            write_file(folder / TABLE, write_table(results))
            write_file(folder / CHART, draw_results(results))
        return world.broadcast(results)

    def _series(self) -> Iterator[Series]:
        for label, stage in self.models.items():
            for name, suite in self.suites.items():
                yield Series(label, stage, name, suite, self.settings.samples if suite.success else 1)
                if name in self._free:
                    yield Series(label + FREE, stage, name, self._free[name], self.settings.samples)

    def _answer(self, file: AnswersFile | None, progress: Progress, world: World) -> None:
        """Answer the batches with missing answers, each process its own; the main process has the file."""
        for series in self._series():
            batches = series.batches()
            missing: list[int] = []
            if file is not None:
                keys = [[series.key(item) for item in batch] for batch in batches]
                missing = [i for i, batch in enumerate(keys) if not all(key in file.answers for key in batch)]
            missing = world.broadcast(missing)
            progress.begin(f"{series.label}, {series.name}, {len(series.suite.items)} rows")
            for start in range(0, len(missing), world.size):
                own = [batches[i] for i in missing[start : start + world.size]][world.rank : world.rank + 1]
                records = [record for batch in own for record in _answer_batch(series, batch)]
                for answered in world.gather(records):
                    assert file is not None  # only the main process gets them
                    file.add(answered)
                progress.show_share(min(start + world.size, len(missing)) / len(missing))

    def _score(self, answers: dict[Key, dict[str, Any]], folder: Path) -> dict[str, Any]:
        scores: dict[str, Any] = {name: {} for name in self.suites}
        replies: dict[str, Any] = {name: {} for name in self.suites}
        counts: dict[tuple[str, str], list[Counts]] = {}
        official: dict[str, list[OfficialScores]] = {name: [] for name in self.suites}
        lines: list[dict[str, Any]] = []
        seed = self.settings.seed
        for series in self._series():
            name, suite, items = series.name, series.suite, series.items()
            found = [answers[series.key(item)] for item in items]
            single, size = suite.count(items, found), series.samples
            if isinstance(suite, OfficialSuite):
                place = folder / suite.rows.kind / series.label.replace(FREE, "-free")
                official[name].append(suite.score_officially(items, found, place))
                single = [theirs | own for theirs, own in zip(official[name][-1].counts, single, strict=True)]
            groups = [single[start : start + size] for start in range(0, len(single), size)]
            single = [add_samples(group, suite.success) for group in groups]
            lines += [
                {"model": series.label, "suite": name, **_name_item(item), "row": item.row, "counts": count}
                for item, count in zip(suite.items, single, strict=True)
            ]
            counts[name, series.label] = own = add_by_row(single, [item.row for item in suite.items])
            replies[name][series.label] = _count_replies(found)
            scores[name][series.label] = as_values(summarize(own, seed=seed))
            _, stage, decoding = series.label.partition(STAGE)
            if stage and BASE in self.models:
                base = counts[name, BASE + decoding]
                scores[name][DIFFERENCE + decoding] = as_values(summarize_differences(base, own, seed=seed))
        suites = {
            name: {
                "source": suite.rows.source,
                "license": suite.rows.license,
                "fingerprint": fingerprint_items(suite.items),
                "read": suite.rows.read,
                "rows": len({item.row for item in suite.items}),
                "asked": len(suite.items),
                "dropped": dict(suite.dropped.most_common()),
                "replies": replies[name],
                **_describe_official(official[name]),
            }
            for name, suite in self.suites.items()
        }
        chosen = self.models.get(STAGE)
        source = self.cascade.base_source
        return {
            "schema": SCHEMA,
            "base": {"repo": source.repo, "revision": source.revision, "fingerprint": source.fingerprint},
            "stage": None if chosen is None else {"name": chosen, "fingerprint": self._fingerprints()[STAGE]},
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
            "both": self._both,
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


def _name_item(item: Item) -> dict[str, str]:
    return {"id": item.id, "question": item.fingerprint}


def _fingerprint(stage: Stage) -> str:
    return str(stage.source["fingerprint"]) if stage.source else fingerprint_tensors(stage.delta_state_dict())


def _versions() -> dict[str, str]:
    names = ("torch", "transformers", "tokenizers", "llguidance")
    return {"poe-cascade": __version__, **{name: importlib.metadata.version(name) for name in names}}


def _answer_batch(series: Series, batch: list[Item]) -> list[dict[str, Any]]:
    """Return the answers to a batch as records of the answers file."""
    return [
        {"model": series.label, "suite": series.name, **_name_item(item), "sample": item.sample} | answer
        for item, answer in zip(batch, series.suite.answer(series.stage, batch), strict=True)
    ]


def _describe_official(scores: Sequence[OfficialScores]) -> dict[str, Any]:
    """Return which tool scored the answers of all models, and on how many of the compared ones our rules agree."""
    if not scores:
        return {}
    compared, agreed = sum(each.compared for each in scores), sum(each.agreed for each in scores)
    return {"official": {"tool": scores[0].tool, "compared": compared, "agreed": agreed}}


def _count_replies(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the tokens and the seconds of answers; of replies also how many were not constrained."""
    totals = {name: round(sum(answer[name] for answer in answers), 2) for name in ("tokens", "seconds")}
    free = sum(not answer.get("is_constrained", True) for answer in answers)
    return totals | ({"free_replies": free} if "is_constrained" in answers[0] else {})
