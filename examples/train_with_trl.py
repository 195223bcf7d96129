"""Train a stage with TRL's SFTTrainer, on rows that any trainer reads, and look at what moved.

    pip install "poe-cascade[rl]"
    poe data export demo=600 runs/rows.jsonl
    python examples/train_with_trl.py runs/rows.jsonl runs/trl [--base demo] [--steps 40]

To TRL the grown model is an ordinary one of which some layers train. `SaveDelta` makes it save the
stage (here `runs/trl/tool`) rather than a copy of the model. The rows are `messages`, with `tools` and the
arguments of calls as JSON text.
"""

import argparse

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from poe import Cascade, StageConfig
from poe.modeling.fingerprint import fingerprint_tensors
from poe.training.trl import SaveDelta


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows")
    parser.add_argument("out")
    parser.add_argument("--base", default="demo")
    parser.add_argument("--steps", type=int, default=40)
    given = parser.parse_args()

    cascade = Cascade.from_pretrained(given.base, dtype="float32")
    cascade.add_stage(StageConfig("tool", num_layers=2, head="low_rank", head_rank=32))
    before = fingerprint_tensors(cascade.base.state_dict())

    trainer = SFTTrainer(
        model=cascade.model("tool"),
        args=SFTConfig(
            given.out,
            max_steps=given.steps,
            save_steps=given.steps // 2 or 1,
            per_device_train_batch_size=8,
            learning_rate=2e-3,
            lr_scheduler_type="cosine",
            warmup_steps=2,
            max_length=1024,
            assistant_only_loss=True,  # the template marks what the assistant says
            bf16=torch.cuda.is_available(),
            gradient_checkpointing=False,  # there is no graph of the base to save memory on
            logging_steps=5,
            report_to="none",
        ),
        train_dataset=Dataset.from_json(given.rows),
        processing_class=cascade.tokenizer,
        callbacks=[SaveDelta(cascade, "tool")],
    )
    trainer.train()

    frozen = fingerprint_tensors(cascade.base.state_dict()) == before
    print(f"the base is {'bit for bit what it was' if frozen else 'CHANGED'}")
    print(f"{given.out}/tool: {cascade.stages['tool'].num_parameters():,} parameters of the stage, and no others")


if __name__ == "__main__":
    main()
