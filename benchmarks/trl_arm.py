"""An arm that trains PEFT's LoRA with the SFTTrainer of TRL, with its own loop, loss and settings."""

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from arms import Cost, MakeBase, Settings, lora_config
from datasets import Dataset
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer

from poe.data.packing import Batch


class Watch(TrainerCallback):
    """A callback that calls `begin()` before and `end()` after every optimizer step."""

    def __init__(self, begin: Callable[[], Any], end: Callable[[], Any]) -> None:
        self.begin, self.end = begin, end

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begin()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.end()


def trl_lora(make_base: MakeBase, ids: torch.Tensor, s: Settings, steps: int, watch: Watch) -> dict[str, Any]:
    """Train for `steps` steps, each on all rows of `ids` (B, T); return the sizes of the arm."""
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
    return _train(make_base, rows, len(ids), s, steps, watch, {"lr_scheduler_type": "constant"})[0]


def trl_lora_on_rows(
    make_base: MakeBase, rows: Batch, rows_per_step: int, s: Settings, steps: int, watch: Watch
) -> tuple[dict[str, Any], Any]:
    """Train on packed rows (N, T) in their order; return the sizes of the arm and the trained model.

    The rates rise for a twentieth of the steps and fall to zero, as those of the other arms do.
    """
    # transformers shifts the labels by itself
    labels = torch.nn.functional.pad(rows.labels[:, :-1], (1, 0), value=-100)
    columns = {"input_ids": rows.input_ids, "labels": labels, "seq_lengths": rows.position_ids}
    table = Dataset.from_dict({name: column.tolist() for name, column in columns.items()})
    schedule = {"lr_scheduler_type": "linear", "warmup_steps": 0.05, "train_sampling_strategy": "sequential"}
    return _train(make_base, table, rows_per_step, s, steps, watch, schedule, _collate)


def _collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Return a batch of packed rows; the trainer passes on only columns that it knows, so one has a borrowed name."""
    names = {"input_ids": "input_ids", "labels": "labels", "seq_lengths": "position_ids"}
    return {name: torch.tensor([row[column] for row in rows]) for column, name in names.items()}


def _train(
    make_base: MakeBase,
    rows: Dataset,
    rows_per_step: int,
    s: Settings,
    steps: int,
    watch: Watch,
    schedule: dict[str, Any],
    collate: Callable[..., Any] | None = None,
) -> tuple[dict[str, Any], Any]:
    base = make_base()
    base = base.to(s.device, torch.bfloat16) if s.bf16 else base.to(s.device)
    flops = Cost(base, len(rows[0]["input_ids"]))
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=base,
            args=SFTConfig(
                folder,
                max_steps=steps,
                per_device_train_batch_size=rows_per_step,
                learning_rate=s.lr,
                **schedule,
                max_grad_norm=s.max_grad_norm or 0.0,
                max_length=None,
                gradient_checkpointing=s.checkpointing,
                torch_compile=s.compile is not None,
                torch_compile_backend=s.compile,
                bf16=s.bf16,
                use_cpu=s.device == "cpu",
                dataloader_pin_memory=s.device != "cpu",
                logging_steps=1_000_000,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=rows,
            data_collator=collate,
            processing_class=_tokenizer(),
            peft_config=lora_config(),
            callbacks=[watch],
        )
        trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        trainer.train()
    return {"trained": trained, "published": trained, "flops_per_token": flops.lora(trained)}, trainer.model


def _tokenizer() -> PreTrainedTokenizerFast:
    """Return a placeholder tokenizer: SFTTrainer requires one, although the rows are token ids."""
    from tokenizers import Tokenizer, models

    words = {"<pad>": 0, "<eos>": 1}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "<pad>")), pad_token="<pad>", eos_token="<eos>"
    )
