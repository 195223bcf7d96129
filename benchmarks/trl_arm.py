"""An arm that trains PEFT's LoRA with the SFTTrainer of TRL, with its own loop, loss and settings."""

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from arms import Cost, MakeBase, Settings, lora_config
from datasets import Dataset
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer


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
    base = make_base()
    base = base.to(s.device, torch.bfloat16) if s.bf16 else base.to(s.device)
    flops = Cost(base, ids.shape[1])
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=base,
            args=SFTConfig(
                folder,
                max_steps=steps,
                per_device_train_batch_size=ids.shape[0],
                learning_rate=s.lr,
                lr_scheduler_type="constant",
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
            train_dataset=Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()}),
            processing_class=_tokenizer(),
            peft_config=lora_config(),
            callbacks=[watch],
        )
        trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        trainer.train()
    return {"trained": trained, "published": trained, "flops_per_token": flops.lora(trained)}


def _tokenizer() -> PreTrainedTokenizerFast:
    """Return a placeholder tokenizer: SFTTrainer requires one, although the rows are token ids."""
    from tokenizers import Tokenizer, models

    words = {"<pad>": 0, "<eos>": 1}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "<pad>")), pad_token="<pad>", eos_token="<eos>"
    )
