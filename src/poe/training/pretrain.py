"""Training a PoE base from scratch: tokenizer, packed text, the shared engine, a base folder."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from poe.data.conversation import Text
from poe.data.demo.conversations import make_conversation
from poe.data.demo.tokenizer import train_tokenizer
from poe.data.demo.words import NOUNS
from poe.data.packing import Batch, LongPolicy, PackedRows, pack
from poe.data.render import token_bytes
from poe.data.text import documents, is_generated
from poe.errors import DataError, RecipeError
from poe.loaders.base_folder import save_base_folder
from poe.loaders.places import place
from poe.modeling.modeling_poe import PoEConfig, PoEForCausalLM
from poe.stages.recipe import BaseRecipe
from poe.training.engine import Engine
from poe.training.hidden import Hidden, Whole
from poe.training.history import History
from poe.training.local import Stagewise
from poe.training.precision import choose_dtype
from poe.training.progress import Progress
from poe.training.recompute import recomputed
from poe.training.report import draw_report, environment, outcome, prepare_output, write_training_json
from poe.training.tracking import open_trackers

TOKENIZER_CHARACTERS = 20_000_000
VALIDATION_ROWS = 48
EASY_SHARE = 0.1  # of the steps: the demo world begins with copying and looking up
CHUNK = 4096  # documents tokenised at a time


@dataclass
class Chained:
    """The rows of `first`, then those of `second`."""

    first: PackedRows
    second: PackedRows

    @property
    def num_rows(self) -> int:
        return self.first.num_rows + self.second.num_rows

    def batch(self, step: int, rows_per_step: int) -> Batch:
        steps = self.first.num_rows // rows_per_step
        return self.first.batch(step, rows_per_step) if step < steps else self.second.batch(step - steps, rows_per_step)


def train_base(
    recipe: BaseRecipe, output_dir: str | Path, *, resume: bool = False, progress: Progress | None = None
) -> Path:
    """Train a base by `recipe` and write it, in bf16, as a folder that transformers and `Cascade` load.

    Raises `OutputError`, `DataError`, `RecipeError` or `TrainingError`; `Interrupted` after Ctrl-C, when a checkpoint
    is saved.
    """
    run = prepare_output(Path(output_dir), resume)
    progress = progress or Progress(f"base {recipe.name}")
    torch.manual_seed(recipe.seed)
    trackers = open_trackers(recipe.track, progress.note)
    started = time.time()
    if recipe.init is None:
        tokenizer: Any = train_tokenizer(_tokenizer_texts(recipe), recipe.vocab_size)
    else:
        tokenizer = _continued(recipe, AutoTokenizer)
    if recipe.init is None and len(tokenizer) < recipe.vocab_size:
        raise DataError(f"The text gives a vocabulary of only {len(tokenizer)} tokens: lower vocab_size or add text.")
    num_steps = recipe.max_steps or 1000
    val, train = _rows(recipe, tokenizer, num_steps)
    progress.note(f"{train.num_rows} rows of {recipe.seq_len} tokens, prepared in {time.time() - started:.0f} s")
    model: Any = (
        PoEForCausalLM(base_config(recipe, tokenizer))
        if recipe.init is None
        else _continued(
            recipe,
            PoEForCausalLM,
            stage_layers=recipe.stage_layers,
            stage_heads=recipe.stage_heads,
            combiner=recipe.combiner,
        )
    )
    model = model.to(choose_dtype(recipe.dtype))
    engine = Engine(
        model,
        model.named_parameters(),
        recipe,
        train,
        val,
        token_bytes(tokenizer),
        run,
        num_steps,
        progress,
        hidden=_hidden(model, recipe),
        trackers=trackers,
    )
    with recomputed(model.model.layers if recipe.checkpoint_activations else ()):
        history = engine.run(resume)
    save_base_folder(model.to(torch.bfloat16).eval(), run, tokenizer)
    write_training_json(run, training_record(recipe, history, num_steps))
    draw_report(run)
    engine.clean_up()
    return run


def _hidden(model: PoEForCausalLM, recipe: BaseRecipe) -> tuple[Hidden, Hidden]:
    """Return the sources of hidden states for training and for validation."""
    stagewise = Stagewise(model, recipe.learning == "local")
    return Whole(model, compile=True) if recipe.compile else stagewise, stagewise


def _continued(recipe: BaseRecipe, kind: Any, **options: Any) -> Any:
    """Return the tokenizer or the model of the base that the recipe continues; `options` change its config."""
    assert recipe.init is not None
    folder = place(recipe.init)
    try:
        return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        raise RecipeError(f"init: {recipe.init!r} is not the folder of a PoE base: {error}") from error


def base_config(recipe: BaseRecipe, tokenizer: Any) -> PoEConfig:
    """Return the network's configuration as the recipe shapes it."""
    return PoEConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_kv_heads,
        stage_layers=recipe.stage_layers,
        stage_heads=recipe.stage_heads,
        combiner=recipe.combiner,
        attention_logit_scale=recipe.attention_logit_scale,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def training_record(recipe: BaseRecipe, history: History, num_steps: int) -> dict[str, Any]:
    """Return what training.json says about the run."""
    return {
        "kind": "base",
        "recipe": recipe.as_dict(),
        "steps": num_steps,
        "tokens": history.tokens,
        "seconds": round(history.seconds, 1),
        "best_step": history.best_step,
        "val_bpb": history.best_bpb,
        **outcome(history),
        "trajectory": history.evals,
        "environment": environment(),
    }


def _tokenizer_texts(recipe: BaseRecipe) -> Iterator[str]:
    """Text for the tokenizer: the data; of the demo world also its nouns and some calls, to make them cheap."""
    seen = 0
    for document in islice(documents(recipe.data, seed=recipe.seed), 12_000):
        yield document.text
        seen += len(document.text)
        if seen > TOKENIZER_CHARACTERS:
            break
    if is_generated(recipe.data):
        for index in range(1000):
            yield " ".join(NOUNS)
            for message in make_conversation(index).messages:
                yield message["content"] or str(message.get("tool_calls"))


def _rows(recipe: BaseRecipe, tokenizer: Any, num_steps: int) -> tuple[PackedRows, PackedRows | Chained]:
    """Return validation and training rows; the two share no document."""
    rows_per_step = recipe.tokens_per_step // recipe.seq_len
    needed = num_steps * recipe.tokens_per_step
    generated = is_generated(recipe.data)

    def tokenised(texts: Iterator[Text], tokens: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        while tokens > 0 and (chunk := list(islice(texts, CHUNK))):
            encoded = tokenizer([t.text for t in chunk], verbose=False, return_offsets_mapping=True)
            for text, ids, offsets in zip(chunk, encoded["input_ids"], encoded["offset_mapping"], strict=True):
                # all documents are held until they are shuffled: as lists they would take eight times as much
                yield np.asarray(ids, dtype=np.int32), np.asarray(_learnt(text, offsets), dtype=bool)
                tokens -= len(ids)
                if tokens <= 0:
                    return

    def packed(texts: Iterator[Text], tokens: int) -> PackedRows:
        long: LongPolicy = "drop" if generated else "split"
        return pack(
            tokenised(texts, tokens), recipe.seq_len, long=long, seed=recipe.seed, pad_id=tokenizer.pad_token_id
        )

    if generated:
        val = packed(documents(recipe.data, seed=recipe.seed + 1), VALIDATION_ROWS * recipe.seq_len)
        easy = round(num_steps * EASY_SHARE) * rows_per_step if recipe.init is None else 0
        rows = packed(documents(recipe.data, seed=recipe.seed + 3), needed)
        if not easy:
            return val, rows
        first = packed(documents(recipe.data, seed=recipe.seed + 2, easy=0.8), int(easy * recipe.seq_len * 1.01))
        return val, Chained(first, rows)
    texts = documents(recipe.data, seed=recipe.seed)
    val = packed(texts, VALIDATION_ROWS * recipe.seq_len)
    return val, packed(texts, needed)


def _learnt(text: Text, offsets: list[tuple[int, int]]) -> list[bool]:
    """For each token, by its characters, whether the loss counts it: all, or those that touch an answer."""
    if text.answers is None:
        return [True] * len(offsets)
    return [any(a < end and b > start for start, end in text.answers) for a, b in offsets]
