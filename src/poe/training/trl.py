"""Training a stage with the trainers of TRL or transformers.

`cascade.model(name)` is a native model in which only the stage requires gradients, so `SFTTrainer` and similar classes
can train it. By default they save the whole model; the callback `SaveDelta` makes them save the stage.
"""

import importlib.metadata
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_NAME

from poe.cascade import Cascade
from poe.data.render import Renderer
from poe.errors import TemplateError, TrainingError
from poe.training.reporting.report import environment
from poe.training.stage_setup import prompt_format

SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


class SaveDelta(TrainerCallback):
    """Makes a trainer save one stage of a cascade instead of the whole model.

        SFTTrainer(model=cascade.model("tool"), callbacks=[SaveDelta(cascade, "tool")], ...).train()

    A trainer writes weights only by the model's `save_pretrained`. After `on_init_end`, that method of
    `cascade.model(name)` writes the stage (`Cascade.save_stage`) into a folder named after it. The folder is separate
    because trainers leave pickles beside the weights, and a stage folder must hold none.

    - `output_dir/checkpoint-N/tool` is the stage at that step, for `Cascade.from_pretrained`. Beside it is
      `model.safetensors` with the trained tensors only, as they are in memory. The trainer reads it to
      resume, with its own optimizer state, and for `load_best_model_at_end`.
    - `output_dir/tool` is the stage at the end of training, and `trainer.save_model(folder)` writes `folder/tool`.
      `Cascade.export_native` writes an ordinary checkpoint of the whole model.

    The stage becomes trainable; everything below it stays frozen. Raises `TrainingError` for a trainer with another
    model than `cascade.model(name)`, for one that would push to the Hub (it uploads the files of whole models; use
    `Cascade.push_to_hub`), and for one that shards the model; `StageError` for an unknown stage.
    """

    def __init__(self, cascade: Cascade, name: str) -> None:
        self.cascade, self.name = cascade, name
        self.model = cascade.model(name)
        self.state = TrainerState()
        self.trainer = ""  # package, version and class, for training.json

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> None:
        if model is not self.model:
            raise TrainingError(
                f"SaveDelta saves the stage {self.name!r}, but the trainer has another model "
                f"({type(model).__name__}): expected model=cascade.model({self.name!r}), without a PEFT config."
            )
        if args.push_to_hub:
            raise TrainingError(
                "push_to_hub=True uploads the files of whole models: leave it out, and call "
                f"cascade.push_to_hub(repository, stage={self.name!r}) after training."
            )
        if AcceleratorState().distributed_type in SHARDED:
            raise TrainingError(
                f"The trainer shards the model ({AcceleratorState().distributed_type.value}), and SaveDelta needs a "
                "whole stage: use data parallelism (a stage is small), or `poe-train stage`."
            )
        package = type(args).__module__.partition(".")[0]
        self.trainer = f"{package} {importlib.metadata.version(package)}, {type(args).__name__}"
        self.cascade.stages[self.name].requires_grad_(True)
        self.model.save_pretrained = self._save  # type: ignore[assignment, method-assign]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.state = state  # the trainer updates this object, so every save reads the current step and log

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.should_save:
            self._save(str(args.output_dir))

    def _save(self, save_directory: str | Path, is_main_process: bool = True, **options: Any) -> None:
        """Replace `PreTrainedModel.save_pretrained`. Every process calls it, and the main process writes."""
        if not is_main_process:
            return
        folder = Path(save_directory)
        self.cascade.save_stage(self.name, folder / self.name, training=self._record(), prompt=self._prompt())
        if folder.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-"):
            trained = {n: p.detach().contiguous().cpu() for n, p in self.model.named_parameters() if p.requires_grad}
            save_file(trained, folder / SAFE_WEIGHTS_NAME, {"format": "pt"})

    def _record(self) -> dict[str, Any]:
        return {
            "kind": "stage",
            "trainer": self.trainer,
            "steps": self.state.global_step,
            "log": [dict(entry) for entry in self.state.log_history],
            "environment": environment(),
        }

    def _prompt(self) -> dict[str, Any] | None:
        tokenizer = self.cascade.tokenizer
        try:
            return None if tokenizer is None else prompt_format(tokenizer, Renderer(tokenizer))
        except TemplateError:  # the chat template cannot be used, as after training on plain text
            return None
