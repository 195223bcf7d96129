"""Train a stage with TRL's SFTTrainer, and check that the base did not change.

    pip install "poe-cascade[rl]"
    poe data export demo=600 runs/rows.jsonl
    python examples/train_with_trl.py runs/rows.jsonl runs/trl [--base demo] [--steps 40]

For TRL, `cascade.model("tool")` is an ordinary model in which some layers are trained. `SaveDelta` makes the trainer
save the stage (here `runs/trl/tool`) instead of the whole model. A row has `messages` and `tools`, with the arguments
of calls as JSON text.
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
    parser.add_argument("rows", help="a JSONL file of conversations")
    parser.add_argument("out", help="the folder of the run")
    parser.add_argument("--base", default="demo")
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()

    cascade = Cascade.from_pretrained(args.base, dtype="float32")
    cascade.add_stage(StageConfig("tool", num_layers=2, head="low_rank", head_rank=32))
    fingerprint = fingerprint_tensors(cascade.base.state_dict())

    trainer = SFTTrainer(
        model=cascade.model("tool"),
        args=SFTConfig(
            args.out,
            max_steps=args.steps,
            save_steps=args.steps // 2 or 1,
            per_device_train_batch_size=8,
            learning_rate=2e-3,
            lr_scheduler_type="cosine",
            warmup_steps=2,
            max_length=1024,
            assistant_only_loss=True,  # the chat template marks the assistant's tokens
            bf16=torch.cuda.is_available(),
            gradient_checkpointing=False,  # the base keeps no graph, so there is little memory to save
            logging_steps=5,
            report_to="none",
        ),
        train_dataset=Dataset.from_json(args.rows),
        processing_class=cascade.tokenizer,
        callbacks=[SaveDelta(cascade, "tool")],
    )
    trainer.train()

    unchanged = fingerprint_tensors(cascade.base.state_dict()) == fingerprint
    print(f"the base {'is unchanged, bit for bit' if unchanged else 'CHANGED'}")
    print(f"{args.out}/tool: {cascade.stages['tool'].num_parameters():,} parameters, those of the stage")


if __name__ == "__main__":
    main()
