"""Training a PoE base, from scratch or from another base: tokenizer, packed text, training loop, base folder."""

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from poe.data.drops import DropReport
from poe.data.render import token_bytes
from poe.data.streamed import StreamedRows
from poe.data.text import is_generated
from poe.errors import DataError, RecipeError, explain_memory, suggest
from poe.loaders.base import save_base_folder
from poe.loaders.repository import locate
from poe.loaders.tokenizer import check_tokenizer, load_tokenizer
from poe.modeling.early import with_early_layers
from poe.modeling.modeling_poe import PoEConfig, PoEForCausalLM
from poe.stages.recipe import BaseRecipe
from poe.training.engine import Engine
from poe.training.forward import recompute_activations
from poe.training.hidden_states.sources import HiddenSources, StagePredictions, WholeModel
from poe.training.interrupts import Interrupted, stop_signals_raise
from poe.training.precision import choose_compile, choose_dtype
from poe.training.preflight import Preflight, Report
from poe.training.reporting.history import History
from poe.training.reporting.progress import Progress
from poe.training.reporting.report import (
    CHUNKS,
    check_output,
    environment,
    outcome_record,
    run_folder,
    try_to_draw_report,
    write_training_json,
)
from poe.training.reporting.tracking import open_trackers
from poe.training.run import RunContext, RunRows, RunSettings, TrainedModel
from poe.training.text_rows import make_rows, make_tokenizer

_SET_ELSEWHERE = {  # values of PoEConfig that a recipe has in fields of its own, or that the tokenizer decides
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "attention_logit_scale",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
}


def train_base(
    recipe: BaseRecipe, output_dir: str | Path, *, resume: bool = False, progress: Progress | None = None
) -> Path:
    """Train a base by `recipe` and write it, in bf16, as a folder that transformers and `Cascade` load.

    Raises `OutputError`, `DataError`, `RecipeError` or `TrainingError`; `Interrupted` after Ctrl-C, when a checkpoint
    is saved.
    """
    advice = "Choose a smaller network (hidden_size, num_layers, vocab_size), or give shorter texts."
    with stop_signals_raise(), run_folder(Path(output_dir), resume) as run, explain_memory("The base", advice):
        return _train(recipe, run, resume, progress or Progress(f"base {recipe.name}"))


def _train(recipe: BaseRecipe, run: Path, resume: bool, progress: Progress) -> Path:
    torch.manual_seed(recipe.seed)
    trackers = open_trackers(recipe.track, progress.note)
    started = time.time()
    tokenizer, model = _make_network(recipe)
    num_steps = recipe.max_steps or 1000
    report = DropReport(None if is_generated(recipe.data) else run / "dropped.jsonl")
    val, train = make_rows(recipe, tokenizer, num_steps, report, run / CHUNKS, resume)
    progress.note(f"{train.num_rows} rows of {recipe.seq_len} tokens, first rows after {time.time() - started:.0f} s")
    model = model.to(choose_dtype(recipe.dtype))
    _rehearse_save(model, tokenizer)
    engine = _build_engine(
        recipe, model, tokenizer, RunRows(train, val), run, num_steps, RunContext(progress, trackers)
    )
    with recompute_activations(model.model.layers if recipe.checkpoint_activations else ()):
        history = engine.run(resume)
    report.close()
    record = training_record(recipe, history, num_steps)
    if isinstance(train, StreamedRows):
        record["data"] = {"spec": recipe.data, "rows": report.as_dict(), "passes": train.passes}
    with engine.stop.catch_signals("after this save"):
        save_base_folder(model.to(torch.bfloat16).eval(), run, tokenizer)
        write_training_json(run, record)
        try_to_draw_report(run, progress.note, f"Base {recipe.name}, data {recipe.data}")
    engine.remove_checkpoints()
    (run / CHUNKS).unlink(missing_ok=True)
    if engine.stop:
        raise Interrupted(f"the base is saved in {run}")
    return run


def check_base_run(
    recipe: BaseRecipe,
    output_dir: str | Path,
    report: Report,
    *,
    resume: bool = False,
    progress: Progress | None = None,
) -> bool:
    """Do everything that `train_base` does before its first step, and return whether all checks passed.

    `report` gets every check. The estimate is shown, and nothing is written to `output_dir`.
    """
    preflight, progress, folder = Preflight(report), progress or Progress(f"base {recipe.name}"), Path(output_dir)
    preflight.check("output folder", lambda: check_output(folder, resume))
    trackers = preflight.check("trackers", lambda: open_trackers(recipe.track, progress.note))
    torch.manual_seed(recipe.seed)
    network = preflight.check("tokenizer and network", lambda: _make_network(recipe))
    if network is not None and trackers is not None:
        tokenizer, model = network
        preflight.check("files of the base", lambda: _rehearse_save(model, tokenizer))
        num_steps = recipe.max_steps or 1000
        rows = preflight.check("data", lambda: make_rows(recipe, tokenizer, num_steps))
        if rows is not None:
            context, run_rows = RunContext(progress, trackers), RunRows(rows[1], rows[0])
            model = model.to(choose_dtype(recipe.dtype))
            engine = _build_engine(recipe, model, tokenizer, run_rows, folder, num_steps, context)
            preflight.check("memory and disk", engine.report_estimate)
    return not preflight.failed


def _build_engine(
    recipe: BaseRecipe, model: Any, tokenizer: Any, rows: RunRows, run: Path, num_steps: int, context: RunContext
) -> Engine:
    trained = TrainedModel(model, list(model.named_parameters()), _make_sources(model, recipe), token_bytes(tokenizer))
    return Engine(recipe, trained, rows, RunSettings(run, num_steps), context)


def _rehearse_save(model: Any, tokenizer: Any) -> None:
    """Write the tokenizer and the config to a temporary folder, so that what would raise after the run raises now."""
    with tempfile.TemporaryDirectory(prefix="poe-rehearsal-") as scratch:
        tokenizer.save_pretrained(scratch)
        model.config.save_pretrained(scratch)


def _make_network(recipe: BaseRecipe) -> tuple[Any, Any]:
    """Return the tokenizer and the network, new ones or those of `init`."""
    if recipe.init is not None:
        config = _load_from_init(recipe)
        known_tokenizer = load_tokenizer(locate(recipe.init))
        check_tokenizer(known_tokenizer, config.vocab_size, f"The base {recipe.init}")
        return known_tokenizer, _continue_network(recipe, config)
    base_config(recipe)  # raises for an impossible network before any text is read
    tokenizer: Any = make_tokenizer(recipe)
    if len(tokenizer) < recipe.vocab_size:
        raise DataError(f"The text gives a vocabulary of only {len(tokenizer)} tokens: lower vocab_size or add text.")
    return tokenizer, PoEForCausalLM(base_config(recipe, tokenizer))


def _make_sources(model: PoEForCausalLM, recipe: BaseRecipe) -> HiddenSources:
    stages = StagePredictions(model, recipe.learning == "local")
    compiled = not recipe.learns_locally and choose_compile(recipe.compile, model.device)
    return HiddenSources(WholeModel(model, compile=True) if compiled else stages, stages)


def _continue_network(recipe: BaseRecipe, config: PoEConfig) -> Any:
    """Return the network of `init` in the recipe's shape. If the recipe has more layers, new ones are added below."""
    shape = _shape_fields(recipe)
    num_layers = config.num_hidden_layers
    known = {name: value for name, value in config.to_dict().items() if name in PoEConfig.__annotations__}
    try:
        if recipe.num_layers == num_layers:
            # a new config, because PoEConfig checks its values only when it is created
            config = PoEConfig(**{**known, **shape})
        base = PoEForCausalLM.from_pretrained(locate(str(recipe.init)), config=config, local_files_only=True)
        if recipe.num_layers == num_layers:
            return base
        return with_early_layers(base, **shape, num_hidden_layers=recipe.num_layers)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise RecipeError(
            f"Recipe {recipe.name!r} does not match its init: {error}. num_layers is {recipe.num_layers}: set it to "
            f"{num_layers} to keep the shape of the base, or to more for an early stage below it."
        ) from error


def _load_from_init(recipe: BaseRecipe) -> PoEConfig:
    """Return the config in the folder `init`."""
    assert recipe.init is not None
    folder = locate(recipe.init)
    try:
        return PoEConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        missing = "there is no such folder. `poe-train base NAME --out FOLDER` writes one."
        reason = error if Path(folder).is_dir() else missing
        raise RecipeError(f"init: {recipe.init!r} is not the folder of a PoE base: {reason}") from error


def _shape_fields(recipe: BaseRecipe) -> dict[str, Any]:
    """Return the values of PoEConfig that a recipe sets for new and for continued bases."""
    own = {"stage_layers": recipe.stage_layers, "stage_heads": recipe.stage_heads, "combiner": recipe.combiner}
    known = set(PoEConfig.__annotations__) - {*own, *_SET_ELSEWHERE}
    for name in recipe.network:
        if name not in known:
            raise RecipeError(f"Recipe {recipe.name!r}: network has no {name!r}.{suggest(name, known)}")
    return {**own, **recipe.network}


def base_config(recipe: BaseRecipe, tokenizer: Any = None) -> PoEConfig:
    """Return the configuration of the network, with the special token ids if the tokenizer is given."""
    ids: dict[str, Any] = {
        name: getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    try:
        return PoEConfig(
            vocab_size=recipe.vocab_size,
            hidden_size=recipe.hidden_size,
            num_hidden_layers=recipe.num_layers,
            num_attention_heads=recipe.num_heads,
            num_key_value_heads=recipe.num_kv_heads,
            attention_logit_scale=recipe.attention_logit_scale,
            **ids,
            **_shape_fields(recipe),
        )
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise RecipeError(f"Recipe {recipe.name!r} does not describe a network: {error}") from error


def training_record(recipe: BaseRecipe, history: History, num_steps: int) -> dict[str, Any]:
    """Return the content of training.json."""
    return {
        "kind": "base",
        "recipe": recipe.as_dict(),
        "steps": num_steps,
        "tokens": history.tokens,
        "seconds": round(history.seconds, 1),
        "best_step": history.best_step,
        "val_bpb": history.best_bpb,
        **outcome_record(history),
        "trajectory": history.evals,
        "environment": environment(),
    }
