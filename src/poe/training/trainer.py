"""Training a stage in four steps: prepare the data, grow the model, fit it, save the stage folder."""

import platform
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from poe.calls.conversation import Conversation
from poe.cascade import Cascade
from poe.data.drops import DropReport
from poe.data.given import Data, write_given
from poe.data.pipeline import TrainingData, prepare
from poe.data.render import Renderer, token_bytes
from poe.data.sizes import describe_sizes
from poe.data.templates import complete_template, note_unread_calls
from poe.decoding.prompt_center import KEY as CENTER
from poe.decoding.prompt_center import fit_prompt_center
from poe.errors import OutputError, TrainingError, explain_memory
from poe.loaders.outcome import describe_failure
from poe.loaders.repository import short_name
from poe.loaders.tokenizer import check_tokenizer
from poe.modeling.placement import quantization_of
from poe.modeling.stage import Stage
from poe.stages import Recipe, load_recipe
from poe.training.checks import check_frozen_below
from poe.training.engine import Engine
from poe.training.forward import recompute_activations
from poe.training.hidden_states.sources import stage_sources, whole_model_sources
from poe.training.interrupts import Interrupted, stop_signals_raise
from poe.training.parallel.distributed import SINGLE_PROCESS, World, count_rows_per_step
from poe.training.parallel.sharding import prefetch_layers
from poe.training.precision import check_not_fp16, choose_compile, stage_dtype
from poe.training.preflight import Preflight, Report
from poe.training.reporting.history import History, summarize_run
from poe.training.reporting.progress import Progress
from poe.training.reporting.report import (
    check_output,
    environment,
    note_data,
    outcome_record,
    run_folder,
    try_to_draw_report,
    write_training_json,
)
from poe.training.reporting.tracking import open_trackers
from poe.training.run import Callback, RunContext, RunRows, RunSettings, TrainedModel, check_callbacks
from poe.training.stage_setup import (
    answer_example,
    base_facts,
    delta_bytes,
    mask_unseen_tokens,
    prompt_format,
    report_copying_layers,
    shard_and_report,
)

# A function of the cascade, the stage's name and the held-out questions, called after training. training.json keeps its
# result under "evaluation".
Evaluate = Callable[[Cascade, str, dict[str, list[Conversation]]], dict[str, Any]]

CENTER_PROMPTS, CENTER_TOKENS = 40, 8192  # that the base reads to know where the training prompts lie


@dataclass(frozen=True)
class StageRun:
    """The result of a training run: the stage, its folder, the history, and the content of training.json."""

    stage: Stage
    folder: Path
    history: History
    record: dict[str, Any]

    @property
    def metrics(self) -> dict[str, float]:
        """The result in numbers: losses, validation before and after, size, time, and scores of the evaluation."""
        return summarize_run(self.record, self.history)

    @property
    def delta_bytes(self) -> int:
        return (self.folder / "delta.safetensors").stat().st_size


@dataclass(frozen=True)
class _Job:
    """The checked inputs that all four steps read."""

    cascade: Cascade
    plan: Recipe
    spec: str  # of the data
    folder: Path
    renderer: Renderer
    context: RunContext
    parent: str | None = None  # the stage on which a new stage stands


@dataclass(frozen=True)
class _Grown:
    """The base with the new stage on top of it."""

    model: Any
    stage: Stage
    quantization: str | None  # how the base is quantized
    is_sharded: bool


@dataclass(frozen=True)
class _Fitted:
    """The engine after training, with the best weights in the model."""

    engine: Engine
    history: History


def train_stage(
    cascade: Cascade,
    recipe: str | Recipe = "tool-fork",
    data: Data | None = None,
    output_dir: str | Path | None = None,
    *,
    parent: str | None = None,
    eval_data: Data | None = None,
    resume: bool = False,
    evaluate: Evaluate | None = None,
    callbacks: Sequence[Callback] = (),
    progress: Progress | None = None,
    world: World = SINGLE_PROCESS,
    **fields: Any,
) -> StageRun:
    """Train a stage on the frozen base of `cascade` and write it to `output_dir` (default `runs/NAME`).

    `recipe` is a name or a `Recipe`, and `fields` override its fields, such as `name`. `data` (default: the recipe's)
    is a SPEC such as `glaive,xlam=file.json`, or rows with `messages` and `tools`: a list, an iterable, a
    `datasets.Dataset`, or a dict of them by split. `eval_data` likewise are the questions that `evaluate` answers after
    training, `poe.evaluation.calls.compare_with_base` for example; training rows like them are dropped.

    If the cascade already has a stage of that name, its training continues in its own dtype. Otherwise a stage is added
    on top of the stage `parent` (None: on the base), in the recipe's `dtype` ("auto": the base's). The run keeps the
    weights with the best validation, in `cascade` and on disk. Each of `callbacks` gets every line of metrics.jsonl as
    a dict: a step, or a validation. `resume` continues from the checkpoint in `output_dir`; the result has the same
    bytes as that of an uninterrupted run. The processes of `world` (see `join_world`) share the rows of every step. The
    main process writes, evaluates and reports, and all processes return its result.

    Raises `RecipeError`, `DataError`, `TokenizerError`, `TemplateError`, `OutputError`, `TrainingError`; `Interrupted`
    after Ctrl-C.
    """
    check_callbacks(callbacks)
    plan = (load_recipe(recipe) if isinstance(recipe, str) else recipe).replace(**fields)
    folder = Path(output_dir or f"runs/{plan.name}")
    preflight = Preflight()
    with ExitStack() as cleanup:
        cleanup.enter_context(stop_signals_raise())
        spec, eval_spec = write_given(data, eval_data)
        plan = plan.replace(eval_data=eval_spec or plan.eval_data)
        job = _check_inputs(cascade, plan, spec or plan.data, folder, resume, progress, world, preflight, cleanup)
        assert job is not None  # the first problem is raised
        context = replace(job.context, callbacks=tuple(callbacks) if world.is_main else ())
        job = replace(job, context=context, parent=parent)
        prepared = _prepare_data(job)
        job = replace(job, plan=prepared.recipe)
        advice = "Lower max_tokens_per_batch, seq_len or num_layers, or choose a smaller dtype."
        with explain_memory("The stage", advice):
            grown = _grow_model(job, prepared, cleanup)
            questions = _check_end(job, prepared, grown, preflight, evaluate is not None)
            fitted = _fit(job, prepared, grown, questions, resume)
        record = _save(job, prepared, grown, fitted, evaluate)
    return StageRun(cascade.stages[plan.name], job.folder, fitted.history, record)


def check_stage_run(
    cascade: Cascade,
    recipe: str | Recipe,
    data: str | None,
    output_dir: str | Path,
    report: Report,
    *,
    parent: str | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    has_questions: bool = True,
    **fields: Any,
) -> bool:
    """Do everything that `train_stage` does before its first step, and return whether all checks passed.

    `report` gets every check. The rows are prepared (and stay in the cache), the plan is shown, with the time for the
    held-out questions if it `has_questions`, and nothing is written to `output_dir`. The cascade has the stages that it
    had before.
    """
    plan = (load_recipe(recipe) if isinstance(recipe, str) else recipe).replace(**fields)
    is_new, active, preflight = plan.name not in cascade.stages, cascade.active, Preflight(report)
    folder = Path(output_dir)
    with ExitStack() as cleanup:
        checked = _check_inputs(
            cascade, plan, data or plan.data, folder, resume, progress, SINGLE_PROCESS, preflight, cleanup
        )
        if checked is None:
            return False
        prepared = preflight.check("data", lambda: _prepare_data(checked, keep_dropped=False))
        job = replace(checked, plan=prepared.recipe if prepared else plan, parent=parent)
        grown = prepared and preflight.check("stage", lambda: _grow_model(job, prepared, cleanup))
        if is_new and plan.name in cascade.stages:
            cleanup.callback(cascade.activate, active)
            cleanup.callback(cascade.remove_stage, plan.name)
        if prepared and grown:
            questions = _check_end(job, prepared, grown, preflight, has_questions)
            # the states of a cache are computed by the run itself
            uncached = replace(job, plan=job.plan.replace(cache_hidden=False))
            preflight.check(
                "memory and disk", lambda: _build_engine(uncached, prepared, grown, questions).report_estimate()
            )
    return not preflight.failed


def _prepare_data(job: _Job, keep_dropped: bool = True) -> TrainingData:
    """Step 1: read, render and pack the rows, and choose the sizes of the run. All processes must get the same."""
    plan, world, started = job.plan, job.context.world, time.time()
    dropped_file = job.folder / "dropped.jsonl" if world.is_main and keep_dropped else None
    advice = "Prepare it with fewer processes (POE_WORKERS=1), or give fewer or shorter rows."
    with explain_memory("The data", advice), world.main_process_first(), DropReport(dropped_file) as report:
        prepared = prepare(
            plan.replace(data=job.spec),
            job.renderer,
            report,
            max_positions=getattr(job.cascade.config, "max_position_embeddings", None),
            num_processes=world.size,
        )
    prepared.recipe = prepared.recipe.replace(data=plan.data)
    count_rows_per_step(prepared.recipe, world)
    rows = prepared.train
    world.check_equal({**prepared.recipe.as_dict(), "rows": rows.num_rows, "trained_tokens": rows.trained_tokens})
    note_data(prepared.summary, time.time() - started, job.context.progress)
    if sizes := describe_sizes(plan, prepared.recipe, prepared.size):
        job.context.progress.note(sizes)
    return prepared


def _grow_model(job: _Job, prepared: TrainingData, cleanup: ExitStack) -> _Grown:
    """Step 2: add the stage to the frozen base, and check that nothing below it builds a graph."""
    cascade, plan, world = job.cascade, job.plan, job.context.world
    quantization = quantization_of(cascade.base)
    is_sharded = plan.shard_base and world.size > 1
    if plan.shard_base:
        shard_and_report(cascade, world, job.context.progress)
    if plan.name not in cascade.stages:
        dtype = stage_dtype(plan.dtype, cascade.base)
        cascade.add_stage(plan, seed=plan.seed, dtype=dtype, **({"parent": job.parent} if job.parent else {}))
    stage = cascade.stages[plan.name].requires_grad_(True)
    model = cascade.model(plan.name)
    report_copying_layers(cascade, stage, plan.attach_at == "auto", job.context.progress)
    if is_sharded:
        prefetch_layers(model, world)
    check_frozen_below(model, stage)
    cleanup.enter_context(recompute_activations(stage.layers if plan.checkpoint_activations else ()))
    cleanup.callback(mask_unseen_tokens(stage, prepared.train.target_ids))
    return _Grown(model, stage, quantization, is_sharded)


def _check_end(
    job: _Job, prepared: TrainingData, grown: _Grown, preflight: Preflight, has_questions: bool
) -> dict[str, list[int]]:
    """Check that what follows the training will work: the files of the stage can be written.

    Returns the number of tokens of each question, by split.
    """
    questions = _count_prompt_tokens(job.renderer, prepared.held_out) if has_questions else {}
    if not job.context.world.is_main:
        return questions
    record = _training_record(job, prepared, grown, History(evals=[{"step": 0, "val_bpb": 0.0}], best_bpb=0.0), 0)
    cascade = job.cascade
    prompt = prompt_format(cascade.tokenizer, job.renderer)
    preflight.check("files of the stage", lambda: cascade.rehearse_save(job.plan.name, training=record, prompt=prompt))
    return questions


def _fit(job: _Job, prepared: TrainingData, grown: _Grown, questions: dict[str, list[int]], resume: bool) -> _Fitted:
    """Step 3: train the stage to the end of its plan."""
    _read_prompts(job, prepared, grown)
    engine = _build_engine(job, prepared, grown, questions)
    history = engine.run(resume)
    grown.stage.requires_grad_(False)
    grown.model.eval()
    return _Fitted(engine, history)


def _read_prompts(job: _Job, prepared: TrainingData, grown: _Grown) -> None:
    """Measure where the training prompts lie, so that `stage="auto"` finds the stage."""
    if grown.is_sharded:
        job.context.progress.note('the base is sharded: stage="auto" will not know the training prompts')
        return
    prompts = prepared.train.first_prompts(CENTER_PROMPTS, CENTER_TOKENS)
    job.context.progress.begin(f"reading {len(prompts)} training prompts, for routing")
    if fit_prompt_center(job.cascade.base, grown.stage, prompts) is None:
        job.context.progress.note(f'stage="auto" will not know the training prompts: {len(prompts)} were read')


def _build_engine(job: _Job, prepared: TrainingData, grown: _Grown, questions: dict[str, list[int]]) -> Engine:
    """Return the engine that trains the stage by its plan."""
    plan, context, model, stage = job.plan, job.context, grown.model, grown.stage
    torch.manual_seed(plan.seed + context.world.rank)
    train, val = prepared.train, prepared.val
    assert plan.max_steps is not None  # chosen with the other sizes
    num_steps = plan.max_steps
    if grown.is_sharded:
        sources = whole_model_sources(model, choose_compile(plan.compile, model.device))
    else:
        sources = stage_sources(job.cascade, plan, train, val, num_steps, context.progress)
    sizes = token_bytes(job.cascade.tokenizer, model.config.vocab_size)
    trained = TrainedModel(model, list(stage.named_parameters()), sources, sizes)
    settings = RunSettings(job.folder, num_steps, base_facts(job.cascade, stage), delta_bytes(stage), questions)
    return Engine(plan, trained, RunRows(train, val), settings, context)


def _save(
    job: _Job, prepared: TrainingData, grown: _Grown, fitted: _Fitted, evaluate: Evaluate | None
) -> dict[str, Any]:
    """Step 4: write the stage folder, answer the held-out questions, and remove the checkpoints.

    The stage is saved before it is evaluated. The last checkpoint stays until the evaluation is written too. A signal
    stops the run after a save or during the evaluation; `resume` does the rest.
    """
    cascade, name, engine, world = job.cascade, job.plan.name, fitted.engine, job.context.world
    record = _training_record(job, prepared, grown, fitted.history, engine.settings.num_steps)
    saved = f"the stage is saved in {job.folder}"
    without_evaluation = Interrupted(f"{saved}, and its evaluation is missing")
    if problem := describe_failure(record):
        job.context.progress.note(problem)
    _write_stage(job, record, engine)
    if world.is_main:
        record |= _outcome(job, fitted.history)
        write_training_json(job.folder, record)
    if evaluate is not None and (world.is_main or grown.is_sharded):  # a sharded base runs in all processes at once
        if engine.stop:
            raise without_evaluation
        started = time.perf_counter()
        try:
            record["evaluation"] = evaluate(cascade, name, prepared.held_out)
            record["example"] = answer_example(cascade, name)
            fitted.history.evaluation_seconds = time.perf_counter() - started
            if world.is_main:
                record |= _outcome(job, fitted.history)
            _write_stage(job, record, engine)
        except KeyboardInterrupt:
            raise without_evaluation from None
        except Exception as error:  # any kind: the run is over, and its result must not be lost
            raise TrainingError(
                f"The stage is trained and saved in {job.folder}, but its evaluation failed ({type(error).__name__}: "
                f"{str(error)[:500]}). --resume repeats the evaluation alone; --resume --no-eval leaves it out."
            ) from error
    elif engine.stop:
        raise Interrupted(saved)
    if world.is_main:
        engine.remove_checkpoints()
    if engine.stop:
        raise Interrupted(saved)
    return world.broadcast(record)


def _outcome(job: _Job, history: History) -> dict[str, Any]:
    """Return the estimate and the actual values of a stage that is written."""
    return outcome_record(history, result_bytes=(job.folder / "delta.safetensors").stat().st_size)


def _count_prompt_tokens(renderer: Renderer, held_out: dict[str, list[Conversation]]) -> dict[str, list[int]]:
    """Return the number of tokens of each held-out question, by split."""
    return {
        split: [len(renderer.prompt_ids(row.question, row.tools, row.form)) for row in rows]
        for split, rows in held_out.items()
    }


def _write_stage(job: _Job, record: dict[str, Any], engine: Engine) -> None:
    """Write the stage folder in the main process. A signal that comes meanwhile stops the run before the next step."""
    if not job.context.world.is_main:
        return
    with engine.stop.catch_signals("after this save"):
        title = f"Stage {job.plan.name} on {short_name(job.cascade.base_source.repo)}, data {job.spec}"
        try_to_draw_report(job.folder, job.context.progress.note, title)  # first: the model card shows the picture
        prompt = prompt_format(job.cascade.tokenizer, job.renderer)
        kept = job.cascade.stages[job.plan.name].prompt or {}  # what was fitted
        prompt |= {key: kept[key] for key in ("call_threshold", CENTER) if key in kept}
        job.cascade.save_stage(job.plan.name, job.folder, training=record, prompt=prompt)


def _check_inputs(
    cascade: Cascade,
    plan: Recipe,
    spec: str,
    folder: Path,
    resume: bool,
    progress: Progress | None,
    world: World,
    preflight: Preflight,
    cleanup: ExitStack,
) -> _Job | None:
    """Check everything that can be checked before the data is read, and lock the output folder unless it is a dry run.

    Returns None after a problem that `preflight` has reported.
    """
    tokenizer, vocab_size = cascade.tokenizer, cascade.config.vocab_size
    progress = progress or Progress(f"stage {plan.name}", quiet=not world.is_main)

    def check_base() -> None:
        cascade.check_unchanged(plan.name if plan.name in cascade.stages else None)
        check_not_fp16(cascade.base, *(stage for name, stage in cascade.stages.items() if name == plan.name))

    def make_renderer() -> Renderer:
        notes.extend(filter(None, (complete_template(tokenizer), note_unread_calls(tokenizer))))
        return Renderer(tokenizer, calls_only=plan.train_on == "calls", vocab_size=vocab_size)

    def open_folder() -> Path:
        if not world.is_main:
            return _find_shared_folder(folder)
        if preflight.is_dry_run:
            return check_output(folder, resume)
        return cleanup.enter_context(run_folder(folder, resume))

    notes: list[str] = []
    preflight.check("base", check_base)
    preflight.check("tokenizer", lambda: check_tokenizer(tokenizer, vocab_size))
    renderer = None if "tokenizer" in preflight.failed else preflight.check("chat template", make_renderer)
    preflight.check("rows per step", lambda: count_rows_per_step(plan, world))
    trackers = preflight.check("trackers", lambda: open_trackers(plan.track if world.is_main else "", progress.note))
    with world.main_process_first():
        run = preflight.check("output folder", open_folder)
    for note in notes:
        progress.note(note)
    if preflight.failed or renderer is None or trackers is None or run is None:
        return None
    return _Job(cascade, plan, spec, run, renderer, RunContext(progress, trackers, world))


def _find_shared_folder(folder: Path) -> Path:
    """Return the output folder that the main process made; `resume` reads it in every process."""
    folder = folder.expanduser()
    if not folder.is_dir():
        raise OutputError(
            f"The output folder {folder} does not exist on {platform.node()}: with several nodes, --out must be a "
            "folder on a disk that all of them share."
        )
    return folder


def _training_record(
    job: _Job, prepared: TrainingData, grown: _Grown, history: History, num_steps: int
) -> dict[str, Any]:
    """Return the content of training.json."""
    world = job.context.world
    record = {
        "kind": "stage",
        "recipe": job.plan.as_dict(),
        "data": {**prepared.summary, "spec": job.spec},
        "steps": num_steps,
        "tokens": history.tokens,
        "seconds": round(history.seconds, 1),
        "tokens_per_s": round(history.tokens / max(history.seconds, 1e-9)),
        "best_step": history.best_step,
        "val_bpb": history.best_bpb,
        **outcome_record(history),
        "trajectory": history.evals,
        "environment": environment(),
    }
    if grown.quantization:
        record["base_quantized_by"] = grown.quantization
    if world.size > 1:
        record["processes"] = world.size
    return record
