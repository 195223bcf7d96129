"""The baseline kit: stages, forks and their rivals, trained and measured on the same rows, with several seeds.

    pip install -c constraints.txt -e ".[bench]"
    python benchmarks/baselines.py --base FOLDER --data xlam=FILE --suites xlam=FILE,sealtools=FILE,text=FILE
    python benchmarks/baselines.py ... --methods lora fork --rates lora=3e-3 --seeds 0 1 2 --equal-seconds fork=lora

All methods have the same packed rows in the same order, the same tokens, schedule, gradient clipping and evaluation.
With the first seed a method runs once for each of its rates (`baseline_methods.py`, or `--rates`); the rate with the
most right calls on the validation rows, held out from the data, is that of the other seeds. `--equal-seconds A=B`
trains A once more, with as many steps as fit into the time of B's; steps beyond the first ones read new rows. No
training row shares a question or a call with a row of the suites, and no row of the suites has a question of the data.
`--test-rows N` sets N questions of each source of the data aside and makes them suites. `--train-rows N` trains on N
packed rows, so that more steps read them again, `--augment NAME=SHARE` changes rows as a recipe does, and `--rows 0`
asks for no replies: answers are only predicted.

A run is a method with a rate, a number of steps and a seed. Training, validating (where rates compete) and measuring
it are processes of their own, one after the other. The runs are folders in OUT/runs: `training.json` (seconds, peak
memory, bytes), `weights`, `validation.json` and `measured`. A command that was killed continues at the first run, or
the first replies, that are not there yet, so weights can be measured later (`--train`, then `--measure`). At the end
the tables are printed; OUT/results.json has the same for each run, in the form of docs/results.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import random
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TRAINING, WEIGHTS, VALIDATION, MEASURED = "training.json", "weights", "validation.json", "measured/results.json"
COSTS = {  # name in training.json -> title, the unit of the title, digits
    "trained": ("trained, M", 1e6, 1),
    "cpu_seconds": ("CPU s", 1, 0),
    "seconds": ("wall s", 1, 0),
    "peak_bytes": ("peak MiB", 2**20, 0),
    "artifact_bytes": ("file, MB", 1e6, 1),
}
QUALITIES = {  # metric -> title, digits
    "forced_nats": ("nats", 3),
    "forced_calls": ("calls right", 3),
    "forced_answers": ("answers right", 3),
    "exact": ("exact", 3),
    "exact_calls": ("exact, where a call is right", 3),
    "abstention_recall": ("exact, where no call is right", 3),
    "call_f1": ("names and arguments, F1", 3),
    "valid": ("valid", 3),
    "bits_per_byte": ("bits per byte", 4),
}


@dataclass(frozen=True)
class Run:
    """One training. `of` is what its number of steps was made equal to in time, if anything."""

    method: str
    rate: float
    steps: int
    seed: int
    of: str | None = None

    @property
    def name(self) -> str:
        return f"{self.method}-{self.rate:g}-{self.steps}-{self.seed}"

    @property
    def label(self) -> str:
        """What its row in a table is called: equal for all seeds."""
        return f"{self.method}, {self.rate:g}, {self.steps} steps" + (f" ({self.of}'s time)" if self.of else "")


class Kit:
    """The runs of a folder, in the order in which they are made."""

    def __init__(self, args: argparse.Namespace, options: dict[str, Any]) -> None:
        self.out, self.options = args.out, options
        self.methods, self.seeds, self.steps = args.methods, args.seeds, args.steps
        self.rates, self.equal_seconds = dict(args.rates), args.equal_seconds
        file = self.out / "options.json"
        if file.exists() and (known := json.loads(file.read_text())) != options:
            different = [name for name in options if known.get(name) != options[name]]
            raise SystemExit(f"{file} has other options ({', '.join(different)}). Choose another folder with --out.")
        self.out.mkdir(parents=True, exist_ok=True)
        write_json(file, options)

    def folder(self, run: Run) -> Path:
        return Path(self.out) / "runs" / run.name

    def read(self, run: Run | None, name: str) -> Any:
        """Return what a task of a run gave (`TRAINING`, `VALIDATION`, `MEASURED`), None before."""
        file = None if run is None else self.folder(run) / name
        return json.loads(file.read_text()) if file and file.exists() else None

    def sweep(self, method: str) -> list[Run]:
        """Return the runs of a method with the first seed, one for each rate."""
        if method == "base":
            return [Run(method, 0.0, 0, 0)]
        return [Run(method, rate, self.steps, self.seeds[0]) for rate in self.rates[method]]

    def best(self, method: str) -> Run | None:
        """Return the run with the best rate; None while one of them is missing."""
        runs = self.sweep(method)
        if len(runs) == 1:
            return runs[0]
        scores = [self.read(run, VALIDATION) for run in runs]
        if None in scores:
            return None
        return max(zip(runs, scores, strict=True), key=lambda x: (x[1]["forced_calls"] or 0, -x[1]["forced_nats"]))[0]

    def runs(self, seed: int) -> Iterator[Run]:
        """Yield the runs of a seed; those of other seeds, and of equal time, once the first seed's are trained."""
        for method in self.methods:
            if seed == self.seeds[0]:
                yield from self.sweep(method)
            elif method != "base" and (best := self.best(method)):
                yield Run(method, best.rate, best.steps, seed)
        for method, reference in self.equal_seconds:
            best = self.best(method)
            own, other = self.read(best, TRAINING), self.read(self.best(reference), TRAINING)
            if best and own and other:
                steps = max(1, round(self.steps * other["step_seconds"] / own["step_seconds"]))
                yield Run(method, best.rate, steps, seed, reference)

    def tasks(self, seed: int, train: bool, measure: bool) -> Iterator[tuple[str, Run]]:
        """Yield what is left to do for a seed: first to train, and to validate where rates compete, then to measure."""
        for run in self.runs(seed) if train else ():
            if self.read(run, TRAINING) is None:
                yield "train", run
            sweep = self.sweep(run.method)
            if len(sweep) > 1 and run in sweep and self.read(run, VALIDATION) is None:
                yield "validate", run
        for run in self.kept(seed) if measure else ():
            if self.read(run, MEASURED) is None:
                yield "measure", run

    def kept(self, seed: int) -> list[Run]:
        """Return the trained runs of a seed at the best rates: those that are measured."""
        runs = [run for run in self.runs(seed) if self.read(run, TRAINING)]
        return [run for run in runs if (best := self.best(run.method)) and run.rate == best.rate]

    def start(self, task: str, run: Run) -> bool:
        """Do a task of a run in a process of its own; return whether it ended well."""
        print(f"{task}: {run.label}, seed {run.seed}", file=sys.stderr, flush=True)
        content = [task, asdict(run), self.options, str(self.folder(run))]
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, __file__, "--child", json.dumps(content)]
        return subprocess.run(command, env=environment, check=False).returncode == 0


def read_rows(tokenizer: Any, vocab_size: int, options: dict[str, Any]) -> Any:
    """Return the packed rows to train on and to validate with, without what the suites ask."""
    from baseline_rows import ASKED, read_test

    from poe.data.pipeline import prepare
    from poe.data.render import Renderer
    from poe.data.templates import complete_template
    from poe.stages import Recipe

    complete_template(tokenizer)
    suites = read_test(options["suites"], options["data"])
    recipe = Recipe(
        name="baselines",
        data=options["data"],
        eval_data=",".join(dict.fromkeys(rows.source for rows in suites if rows.kind in ASKED)),
        eval_rows=0,
        augment=dict(options["augment"]),
        seq_len=options["seq_len"],
        tokens_per_step=options["seq_len"],
        validation_ratio=options["held_out"],
    )
    return prepare(recipe, Renderer(tokenizer, vocab_size=vocab_size))


def train_child(run: Run, options: dict[str, Any], folder: Path) -> None:
    """Train a run and write its weights; then write training.json, which says that it is finished."""
    import arms
    import torch
    from baseline_methods import METHODS, STAGE_LAYERS, open_base, save, train

    from poe.data.packing import Batch

    method, device = METHODS[run.method], options["device"]
    torch.manual_seed(run.seed)
    record: dict[str, Any] = {**asdict(run), "trained": 0, "cpu_seconds": 0.0, "seconds": 0.0, "artifact_bytes": 0}
    if run.method == "base":
        write_json(folder / TRAINING, {**record, "peak_bytes": 0})
        return
    shutil.rmtree(folder / WEIGHTS, ignore_errors=True)
    cascade = open_base(method, options["base"], options["dtype"], device)
    data = read_rows(cascade.tokenizer, cascade.config.vocab_size, options)
    number = min(options["train_rows"] or data.train.num_rows, data.train.num_rows)
    order = random.Random(run.seed).sample(range(data.train.num_rows), number)
    rows_per_step = options["rows_per_step"]
    seen = [0, 0]  # tokens and labels

    def batch(step: int) -> Batch:
        numbers = [order[i % len(order)] for i in range(step * rows_per_step, (step + 1) * rows_per_step)]
        rows = [data.train.batch(number, 1) for number in numbers]
        whole = Batch(*(torch.cat(parts) for parts in zip(*rows, strict=True)))
        labels = whole.labels != -100
        seen[0] += sum(int(row.nonzero().max()) + 1 for row in labels if row.any())
        seen[1] += int(labels.sum())
        return Batch(*(part.to(device) for part in whole))

    settings = arms.Settings(
        stage_layers=STAGE_LAYERS,
        last_layers=STAGE_LAYERS,
        attach_at=options["attach_at"],
        chunked=True,
        lr=run.rate,
        matrix_lr=run.rate,
        head_lr=run.rate / 10,
        max_grad_norm=1.0,
        device=device,
        bf16=options["dtype"] == "bfloat16",
        rows_per_pass=options["rows_per_pass"],
        cut_padding=True,
        seed=run.seed,
    )
    arm, cpu_seconds, seconds = train(method, cascade, settings, options["seq_len"], run.steps, batch)
    on_gpu = device == "cuda"
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    record |= {
        "trained": sum(stage.num_parameters() for stage in cascade.stages.values()) or arm.trained,
        "tokens": seen[0],
        "labels": seen[1],
        "training_rows": number,
        "cpu_seconds": sum(cpu_seconds),
        "seconds": sum(seconds),
        "step_seconds": statistics.median(seconds if on_gpu else cpu_seconds),
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else resident,
        "artifact_bytes": save(method, cascade, arm, folder / WEIGHTS),
    }
    write_json(folder / TRAINING, record)


def open_trained(run: Run, options: dict[str, Any], folder: Path) -> Any:
    """Open the weights of a trained run, or the base."""
    from baseline_methods import METHODS, TrainedMethod

    method = METHODS[run.method]
    weights = folder / WEIGHTS if method.rates else None
    return TrainedMethod(method, weights, options["base"], options["dtype"], options["device"])


def validate_child(run: Run, options: dict[str, Any], folder: Path) -> None:
    """Predict the answers of the validation rows."""
    from baseline_measures import validate

    trained = open_trained(run, options, folder)
    data = read_rows(trained.tokenizer, trained.config.vocab_size, options)
    write_json(folder / VALIDATION, validate(trained, data.val, options["val_rows"]))


def measure_child(run: Run, options: dict[str, Any], folder: Path) -> None:
    """Measure a trained run on the suites."""
    from baseline_measures import measure
    from baseline_rows import read_test

    sources = read_test(options["suites"], options["data"])
    measure(open_trained(run, options, folder), sources, (folder / MEASURED).parent, options)


def child(task: str, run: dict[str, Any], options: dict[str, Any], folder: str) -> None:
    from poe.files.output import locked_folder

    with locked_folder(Path(folder)) as path:
        tasks = {"train": train_child, "validate": validate_child, "measure": measure_child}
        tasks[task](Run(**run), options, path)


def collect(kit: Kit) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the metrics, and their values for each measured run, in the form of docs/results.

    A quality is [value, low, high], with the bounds of its interval.
    """
    metrics = {name: {"title": title, "digits": digits} for name, (title, _, digits) in COSTS.items()}
    rows, prompts = [], set()
    for run in dict.fromkeys(run for seed in kit.seeds for run in kit.kept(seed)):
        record, results = kit.read(run, TRAINING), kit.read(run, MEASURED)
        if record is None or results is None:
            continue
        prompts.add(results["prompt"])
        values: dict[str, Any] = {name: record[name] / unit for name, (_, unit, _) in COSTS.items()}
        for suite, scores in results["scores"].items():
            for name, (title, digits) in QUALITIES.items():
                metric = scores["base"].get(name, {"value": None})
                if metric["value"] is not None:
                    metrics[f"{suite}: {name}"] = {"title": f"{title} ({suite})", "digits": digits}
                    values[f"{suite}: {name}"] = [metric["value"], metric["low"], metric["high"]]
        rows.append({"method": run.label, "seed": run.seed, "metrics": values})
    if len(prompts) > 1:
        raise SystemExit("The runs were measured with different prompts, so they cannot be compared: measure again.")
    return metrics, rows


def tables(metrics: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table of the costs, and one for each suite: the mean over seeds, the least and the most."""
    parts = []
    for suite in dict.fromkeys(name.rpartition(": ")[0] for name in metrics):
        names = [name for name in metrics if name.rpartition(": ")[0] == suite]
        lines = [f"| method | seeds | {' | '.join(metrics[name]['title'] for name in names)} |"]
        lines.append("|---|" + "---:|" * (1 + len(names)))
        for method in dict.fromkeys(row["method"] for row in rows):
            own = [row["metrics"] for row in rows if row["method"] == method]
            cells = [_write_spread([row.get(name) for row in own], metrics[name]["digits"]) for name in names]
            lines.append(f"| {method} | {len(own)} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _write_spread(found: Sequence[Any], digits: int) -> str:
    values = [value[0] if isinstance(value, list) else value for value in found if value is not None]
    if not values:
        return "-"
    text = f"{statistics.mean(values):,.{digits}f}"
    return text if len(values) == 1 else f"{text} [{min(values):,.{digits}f}, {max(values):,.{digits}f}]"


def write_json(path: Path, content: Any) -> None:
    """Write a file of JSON under a temporary name, and rename it."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)


def read_pair(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    if not value:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    return name, value


def read_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    from baseline_methods import METHODS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="folder of a base")
    parser.add_argument("--data", required=True, help="training rows as a SPEC, such as glaive=FILE,xlam=FILE")
    parser.add_argument("--suites", required=True, help="what is asked, as a SPEC of poe eval")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--rates", nargs="+", type=read_pair, default=[], metavar="METHOD=RATE[,RATE]")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--equal-seconds", nargs="+", type=read_pair, default=[], metavar="METHOD=METHOD")
    parser.add_argument("--test-rows", type=int, default=0, help="questions of each source of the data to set aside")
    parser.add_argument("--train-rows", type=int, default=0, help="packed rows to train on; default: all")
    parser.add_argument("--augment", nargs="+", type=read_pair, default=[], metavar="NAME=SHARE")
    numbers = {"steps": 48, "rows_per_step": 3, "rows_per_pass": 1, "seq_len": 1024, "val_rows": 32, "rows": 50}
    for name, value in {**numbers, "forced_rows": 100, "max_new_tokens": 256}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--held-out", type=float, default=0.1, help="share of the questions for validation")
    parser.add_argument("--attach-at", type=int, help="first layer of forks; default: the lowest layer that copies")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--train", action="store_true", help="only train")
    parser.add_argument("--measure", action="store_true", help="only measure what is trained")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/baselines"))
    args = parser.parse_args(arguments)
    given = {name: tuple(float(rate) for rate in rates.split(",")) for name, rates in args.rates}
    args.rates = {name: given.get(name, method.rates) for name, method in METHODS.items()}
    for name in {*given, *(name for pair in args.equal_seconds for name in pair)} - {*args.methods}:
        parser.error(f"{name} is not one of --methods: {', '.join(args.methods)}")
    return args


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        child(*json.loads(sys.argv[2]))
        return 0
    args = read_arguments()
    import torch
    from baseline_rows import set_aside

    names = ("base", "data", "suites", "rows_per_step", "rows_per_pass", "seq_len", "val_rows", "rows", "forced_rows")
    more = ("test_rows", "train_rows", "max_new_tokens", "held_out", "dtype")
    options = {name: getattr(args, name) for name in (*names, *more)}
    options["augment"] = [[name, float(share)] for name, share in args.augment]
    options["attach_at"] = "auto" if args.attach_at is None else args.attach_at
    options["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    kit = Kit(args, options)
    if args.test_rows:
        train, test = set_aside(args.data, args.test_rows, args.out / "rows")
        kit.options = {**options, "data": train, "suites": f"{test},{args.suites}"}
    failed = []
    for seed in args.seeds:
        for task, run in kit.tasks(seed, train=not args.measure, measure=not args.train):
            if not kit.start(task, run):
                failed.append(f"{task} {run.name}")
    metrics, rows = collect(kit)
    on_cpu = f"{os.cpu_count()} CPU cores, {os.environ.get('OMP_NUM_THREADS', 'all')} of them used"
    base = Path(args.base).name
    result = {
        "title": f"Training methods on {base}",
        "about": f"{args.steps} steps of {args.rows_per_step} rows of at most {args.seq_len} tokens.",
        "order": 0,
        "date": datetime.date.today().isoformat(),
        "machine": torch.cuda.get_device_name() if options["device"] == "cuda" else on_cpu,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")},
        "commands": [shlex.join(["python", "benchmarks/baselines.py", *sys.argv[1:]])],
        "metrics": metrics,
        "rows": rows,
    }
    write_json(args.out / "results.json", result)
    print(tables(metrics, rows))
    for name in failed:
        print(f"failed: {name}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
