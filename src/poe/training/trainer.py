"""Training a stage: data, the shared engine, evaluation, and the stage folder that comes out."""

import hashlib
import platform
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from poe.calls.conversation import Conversation
from poe.cascade import Cascade
from poe.data.drops import DropReport
from poe.data.pipeline import TrainingData, prepare
from poe.data.render import Renderer, token_bytes
from poe.data.templates import complete_template
from poe.errors import OutputError, TemplateError
from poe.modeling.delta_file import delta_size
from poe.modeling.placement import quantization_of
from poe.modeling.stage import Stage
from poe.stages import Recipe, load_recipe
from poe.training.engine import Engine
from poe.training.frozen import assert_frozen_below
from poe.training.hidden_states.sources import hidden_sources
from poe.training.parallel.distributed import ALONE, World, even_rows
from poe.training.parallel.sharding import gather_ahead, resident_bytes, shard_base
from poe.training.precision import refuse_fp16, stage_dtype
from poe.training.recompute import recomputed
from poe.training.reporting.history import History
from poe.training.reporting.progress import Progress
from poe.training.reporting.report import draw_report, environment, outcome, prepare_output, remove_if_unused
from poe.training.reporting.tracking import open_trackers

# Called when training is over, with the cascade, the stage's name and the held-out questions; what it returns is kept
# in training.json under "evaluation".
Evaluate = Callable[[Cascade, str, dict[str, list[Conversation]]], dict[str, Any]]


@dataclass(frozen=True)
class StageRun:
    """What a training run left: the stage folder, its history, and the record that training.json holds."""

    folder: Path
    history: History
    record: dict[str, Any]

    @property
    def delta_bytes(self) -> int:
        return (self.folder / "delta.safetensors").stat().st_size


def train_stage(
    cascade: Cascade,
    recipe: str | Recipe = "tool",
    data: str | None = None,
    output_dir: str | Path | None = None,
    *,
    resume: bool = False,
    evaluate: Evaluate | None = None,
    progress: Progress | None = None,
    world: World = ALONE,
    **fields: Any,
) -> StageRun:
    """Train a stage on the frozen base of `cascade` and write it to `output_dir` (default `runs/RECIPE`).

    `recipe` is a name or a `Recipe`, `fields` override its fields, `data` is a SPEC such as `glaive,xlam=rows.json*3`
    (default: the recipe's). A stage of that name which the cascade has is trained on, in its own dtype; else one is
    added, in the recipe's `dtype` ("auto": the base's). The weights of the best validation are the ones that are kept,
    active in `cascade` and on disk. `resume` continues from the checkpoint in `output_dir` and ends with the same bytes
    as a run that was never interrupted. The processes of `world` (see `joined_world`) share the rows of every step; the
    main one writes, evaluates and reports, and all of them return what it returns.

    Raises `RecipeError`, `DataError`, `TemplateError`, `OutputError`, `TrainingError`; `Interrupted` after Ctrl-C.
    """
    plan = (load_recipe(recipe) if isinstance(recipe, str) else recipe).replace(**fields)
    spec = data or plan.data
    run = Path(output_dir or f"runs/{plan.name}")
    if cascade.tokenizer is None:
        raise TemplateError("The base has no tokenizer: put its tokenizer files beside it.")
    refuse_fp16(cascade.base, *(stage for name, stage in cascade.stages.items() if name == plan.name))
    told = complete_template(cascade.tokenizer)
    # Refuses a tokenizer that it cannot use before anything is written.
    renderer = Renderer(cascade.tokenizer, calls_only=plan.train_on == "calls")
    progress = progress or Progress(f"stage {plan.name}", quiet=not world.is_main)
    trackers = open_trackers(plan.track if world.is_main else "", progress.note)
    rows_per_step = even_rows(plan, world)
    with world.in_order():
        run = prepare_output(run, resume) if world.is_main else _seen(run)
    with ExitStack() as stack:
        # until there is a checkpoint, a run that fails leaves its folder as empty as it found it
        if world.is_main:
            stack.callback(remove_if_unused, run)
        if told:
            progress.note(told)
        started = time.time()
        with world.in_order(), DropReport(run / "dropped.jsonl" if world.is_main else None) as report:
            prepared = prepare(plan.replace(data=spec), renderer, report)
        world.same({**plan.as_dict(), "rows": prepared.train.num_rows, "trained_tokens": prepared.train.trained_tokens})
        _describe_data(prepared, time.time() - started, progress)
        quantized = quantization_of(cascade.base)
        sharded = plan.shard_base and world.size > 1
        if plan.shard_base:
            _shard(cascade, world, progress)
        if plan.name not in cascade.stages:
            cascade.add_stage(plan, seed=plan.seed, dtype=stage_dtype(plan.dtype, cascade.base))
        stage = cascade.stages[plan.name]
        stage.requires_grad_(True)
        model = cascade.model(plan.name)
        if sharded:
            gather_ahead(model, world)
        assert_frozen_below(model, stage)
        stack.enter_context(recomputed(stage.layers if plan.checkpoint_activations else ()))
        stack.callback(_keep_unseen_tokens(stage, prepared.train.target_ids))
        torch.manual_seed(plan.seed + world.rank)
        num_steps = plan.max_steps or prepared.train.num_steps(rows_per_step)
        engine = Engine(
            model,
            stage.named_parameters(),
            plan,
            prepared.train,
            prepared.val,
            token_bytes(cascade.tokenizer, model.config.vocab_size),
            run,
            num_steps,
            progress,
            hidden=None
            if sharded
            else hidden_sources(cascade, plan, prepared.train, prepared.val, num_steps, progress),
            facts=_base_facts(cascade, stage),
            result_bytes=_delta_bytes(stage),
            trackers=trackers,
            world=world,
        )
        history = engine.run(resume)
        stage.requires_grad_(False)
        model.eval()
        record = _record(plan, spec, prepared, history, num_steps)
        if quantized:
            record["base_quantized_by"] = quantized
        if world.size > 1:
            record["processes"] = world.size
        if evaluate is not None and (world.is_main or sharded):  # a divided base answers in all processes at once
            record["evaluation"] = evaluate(cascade, plan.name, prepared.held_out)
        if world.is_main:
            draw_report(run)  # before the folder: the card shows it
            cascade.save_stage(plan.name, run, training=record, prompt=prompt_format(cascade.tokenizer, renderer))
            engine.clean_up()
        record = world.share(record)
    return StageRun(run, history, record)


def _keep_unseen_tokens(stage: Stage, target_ids: np.ndarray) -> Callable[[], None]:
    """Let the head delta learn only the rows of tokens that the data asks for; returns what undoes it.

    Every other token is wrong at every step: its gradient is tiny but always of one sign, and Adam, which divides by
    the gradient's own size, would push it down at the full rate. A word that no training row uses would then be
    unspeakable, however clearly the question names it. With its row at zero its logit stays the base's.
    """
    rows = next((tensor for name, tensor in stage.head.named_parameters() if name in ("weight", "b")), None)
    if rows is None:
        return lambda: None
    seen = torch.zeros(rows.shape[0], 1, dtype=rows.dtype, device=rows.device)
    seen[torch.from_numpy(target_ids).long()] = 1
    return rows.register_hook(lambda gradient: gradient * seen).remove


def prompt_format(tokenizer: Any, renderer: Renderer) -> dict[str, Any]:
    """Return the name, version and stop strings of the prompt format: the chat template, known by its hash."""
    template = tokenizer.chat_template
    text = template if isinstance(template, str) else str(sorted(template.items()))
    stops = [tokenizer.convert_ids_to_tokens(token) for token in renderer.stop_token_ids]
    return {"name": "chat_template", "version": hashlib.sha256(text.encode()).hexdigest()[:12], "stop": stops}


def _base_facts(cascade: Cascade, stage: Stage) -> dict[str, str]:
    """What the stage stands on, by fingerprint: on anything else the run would end in other bytes."""
    ground = {"base": cascade.base_source.fingerprint[:12]}
    if stage.parent is not None:
        ground["parent"] = f"{stage.parent.name} {(stage.parent.source or {}).get('fingerprint')}"
    return ground


def _delta_bytes(stage: Stage) -> int:
    """The size of the delta.safetensors that the stage will be saved as."""
    return delta_size(
        stage.delta_state_dict(),
        stage=stage.name,
        attach_at=stage.below,
        has_parent=stage.parent is not None,
        dtype=stage.saved_dtype or torch.bfloat16,
    )


def _record(plan: Recipe, spec: str, data: TrainingData, history: History, num_steps: int) -> dict[str, Any]:
    return {
        "kind": "stage",
        "recipe": plan.as_dict(),
        "data": {**data.summary, "spec": spec},
        "steps": num_steps,
        "tokens": history.tokens,
        "seconds": round(history.seconds, 1),
        "tokens_per_s": round(history.tokens / max(history.seconds, 1e-9)),
        "best_step": history.best_step,
        "val_bpb": history.best_bpb,
        **outcome(history),
        "trajectory": history.evals,
        "environment": environment(),
    }


def _describe_data(data: TrainingData, seconds: float, progress: Progress) -> None:
    for source, counts in data.summary["rows"].items():
        dropped = ", ".join(f"{reason} {n}" for reason, n in counts["dropped"].items()) or "none"
        progress.note(f"{source}: {counts['read']} rows read, {counts['kept']} kept; dropped: {dropped}")
    s = data.summary
    progress.note(
        f"{s['packed_rows']} rows of {s['seq_len']} tokens, {s['fill']:.1%} full, {s['trained_tokens']:,} of "
        f"{s['tokens']:,} tokens trained, in {seconds:.0f} s"
    )


def _shard(cascade: Cascade, world: World, progress: Progress) -> None:
    if world.size == 1:
        progress.note("shard_base: there is one process, so the base stays whole")
        return
    whole = resident_bytes(cascade.base)
    shard_base(cascade, world)
    here = resident_bytes(cascade.base)
    progress.note(f"base divided among {world.size} processes: {here / 2**20:,.0f} of {whole / 2**20:,.0f} MiB in each")


def _seen(run: Path) -> Path:
    """Return the output folder that the main process has made; all must see it, for `resume` reads it in each."""
    run = run.expanduser()
    if not run.is_dir():
        raise OutputError(
            f"The output folder {run} is not there on {platform.node()}: with several nodes, --out must be a folder on "
            "a disk that all of them share."
        )
    return run
