"""Train a stage on a frozen base, with the whole training loop in view.

    python examples/train_stage.py [--steps 60] [--out runs/example]

It shows the steps of `poe.train_stage`: open a base, read the data, add a stage, train it, save it, and load it again
in a process that cannot import `poe`. It runs offline and takes about a minute on two CPU cores. That is enough for a
first call of a new tool; `make demo` trains for more than ten times as many tokens. `poe.train_stage` adds validation,
checkpoints, resuming, caches, several processes and reports.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers

from poe import Cascade
from poe.data.packing import IGNORED, Batch
from poe.data.pipeline import TrainingData, prepare
from poe.data.render import Renderer
from poe.stages import Recipe, load_recipe
from poe.training.loss import cross_entropy_sum
from poe.training.optim import MuonAdamW, build_optimizer
from poe.training.schedule import apply_lr, lr_factor

EXAMPLES = Path(__file__).parent
QUESTION = "Please cancel the gondola with the code QX-4417."  # no training row has a gondola, or this code
TOOLS = json.loads((EXAMPLES / "tools.json").read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("runs/example"))
    args = parser.parse_args()
    torch.manual_seed(0)
    transformers.logging.disable_progress_bar()

    # 1. Open the base. It stays frozen, bit for bit.
    cascade = Cascade.from_pretrained("demo")
    print(f"base:   {cascade.base.num_parameters():,} parameters, {cascade.base.dtype}")
    print(f"before: {answer(cascade, None)!r}")

    # 2. Read the data: conversations, rendered with the chat template, packed into rows of 512 tokens.
    recipe = load_recipe("demo", data="demo=1500", max_steps=args.steps, tokens_per_step=4096)
    data = prepare(recipe, Renderer(cascade.tokenizer))
    print(f"data:   {data.train.num_rows} rows of {recipe.seq_len} tokens, {data.summary['fill']:.0%} full")

    # 3. Add a stage: two new layers on top of the base, and a delta for its head. Both start as no change at all.
    cascade.add_stage(recipe)
    print(f"stage:  {cascade.stages['demo'].num_parameters():,} parameters")

    # 4. Train it.
    train(cascade, recipe, data)
    print(f"after:  {answer(cascade, 'demo')!r}")

    # 5. Save the stage: a small file with its weights, and the code that loads it with transformers.
    cascade.save_stage("demo", args.out)
    print(f"saved:  {args.out}/delta.safetensors, {(args.out / 'delta.safetensors').stat().st_size / 2**20:.1f} MiB")

    # 6. Load it in a process that cannot import poe, and ask again.
    print("without poe:", flush=True)
    subprocess.run([sys.executable, EXAMPLES / "load_without_poe.py", args.out, QUESTION], check=False)


def train(cascade: Cascade, recipe: Recipe, data: TrainingData) -> None:
    """Train the stage of the recipe's name on `data`. Only its parameters require gradients."""
    stage = cascade.stages[recipe.name].requires_grad_(True)
    model = cascade.model(recipe.name).train()
    optimizer = build_optimizer(
        stage.named_parameters(),
        model.config.hidden_size,
        matrix_lr=recipe.matrix_lr,  # Muon, for the matrices of the layers
        head_lr=recipe.head_lr,  # AdamW, for the head delta
        weight_decay=recipe.weight_decay,
    )
    rows_per_step = recipe.tokens_per_step // recipe.seq_len
    num_steps = recipe.max_steps or data.train.num_steps(rows_per_step)
    started = time.monotonic()
    for step in range(num_steps):
        factor = lr_factor(
            step,
            num_steps,
            initial_lr_factor=recipe.initial_lr_factor,
            warmup_ratio=recipe.warmup_ratio,
            warmdown_ratio=recipe.warmdown_ratio,
        )
        apply_lr(optimizer, factor)
        loss = take_step(model, optimizer, data.train.batch(step, rows_per_step))
        if step % 10 == 0 or step == num_steps - 1:
            tokens_per_s = (step + 1) * recipe.tokens_per_step / (time.monotonic() - started)
            print(f"step {step + 1:3}/{num_steps}  loss {loss:.3f}  {tokens_per_s:,.0f} tokens/s", flush=True)
    stage.requires_grad_(False)
    model.eval()


def take_step(model: torch.nn.Module, optimizer: MuonAdamW, batch: Batch) -> float:
    """Take one optimizer step on rows of (B, T) tokens, and return the mean loss in nats per label."""
    # The base below the stage builds no graph: the stage detaches its input. Positions restart with every document.
    hidden = model.model(  # (B, T, D)
        input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
    ).last_hidden_state
    # The head is one matmul: the base's weight plus the stage's delta, folded. Only labeled positions go through it.
    head = model.get_output_embeddings()
    num_labels = int((batch.labels != IGNORED).sum())
    loss = cross_entropy_sum(hidden, head.weight, batch.labels) / num_labels
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def answer(cascade: Cascade, stage: str | None) -> str:
    """Return the reply to the question, from a stage or from the base (None)."""
    inputs = cascade.tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}],
        tools=TOOLS,
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = cascade.generate(**inputs, stage=stage, max_new_tokens=60, do_sample=False)
    return cascade.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])


if __name__ == "__main__":
    main()
