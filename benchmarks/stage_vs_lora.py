"""Training speed of a stage against its rivals: one process, rotating runs, medians, JSON and a table.

    pip install -c constraints.txt -e ".[bench]"
    python benchmarks/stage_vs_lora.py [--layers 12 --width 384 --vocab 16384 --batch 4 --length 512 --rounds 5]

Every arm takes the same steps on the same random tokens with a random qwen3-shaped model in fp32. The limit is
arithmetic: per token, a stage needs 2 N_base + 6 (N_stage + N_head) FLOPs, full fine-tuning 6 (N_base + N_head).
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from poe import Cascade, StageConfig
from poe.training.loss import cross_entropy_sum
from poe.training.optim import build_optimizer

Step = Callable[[torch.Tensor], None]


def make_base(args: argparse.Namespace) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=args.vocab,
            hidden_size=args.width,
            intermediate_size=3 * args.width,
            num_hidden_layers=args.layers,
            num_attention_heads=args.width // 64,
            num_key_value_heads=args.width // 64,
            head_dim=64,
            tie_word_embeddings=False,
        )
    )


def hugging_face_step(model: torch.nn.Module, lr: float) -> Step:
    """The step that a trainer takes: labels in, AdamW on what requires a gradient."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)

    def step(ids: torch.Tensor) -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def stage_step(cascade: Cascade, name: str) -> Step:
    stage = cascade.stages[name].requires_grad_(True)
    model = cascade.model(name).train()
    optimizer = build_optimizer(stage.named_parameters(), model.config.hidden_size)

    def step(ids: torch.Tensor) -> None:
        labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], 1)
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        (cross_entropy_sum(hidden, model.lm_head.weight, labels) / labels.numel()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def arms(args: argparse.Namespace) -> dict[str, tuple[Step, int]]:
    """Every arm's step and the number of parameters that it trains."""
    made: dict[str, tuple[Step, int]] = {}
    full = make_base(args)
    made["full fine-tune, AdamW"] = (hugging_face_step(full, 1e-4), sum(p.numel() for p in full.parameters()))
    try:
        from peft import LoraConfig, get_peft_model

        lora = get_peft_model(make_base(args), LoraConfig(r=16, target_modules="all-linear"))
        trained = sum(p.numel() for p in lora.parameters() if p.requires_grad)
        made["LoRA r16 all-linear, PEFT"] = (hugging_face_step(lora, 2e-4), trained)
    except ImportError:
        print("PEFT is not installed: its arm is left out (pip install -e '.[bench]')")
    for head in ("dense", "low_rank", "none"):
        cascade = Cascade(make_base(args)).add_stage(StageConfig("s", args.stage_layers, head=head))
        made[f"stage, {args.stage_layers} layers, head {head}"] = (
            stage_step(cascade, "s"),
            cascade.stages["s"].num_parameters(),
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"layers": 12, "width": 384, "vocab": 16384, "batch": 4, "length": 512, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--stage-layers", type=int, default=2)
    parser.add_argument("--json", type=Path, default=Path("runs/bench/stage_vs_lora.json"))
    args = parser.parse_args()
    ids = torch.randint(0, args.vocab, (args.batch, args.length), generator=torch.Generator().manual_seed(1))
    contestants = arms(args)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for round_number in range(args.rounds + 1):
        for name, (step, _) in contestants.items():
            gc.collect()
            started = time.perf_counter()
            step(ids)
            if round_number:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    medians = {name: args.batch * args.length / statistics.median(times) for name, times in seconds.items()}
    reference = medians.get("LoRA r16 all-linear, PEFT") or medians["full fine-tune, AdamW"]
    rows = [
        {
            "arm": name,
            "tokens_per_s": round(speed),
            "ratio": round(speed / reference, 2),
            "trained": contestants[name][1],
        }
        for name, speed in medians.items()
    ]
    args.json.parent.mkdir(parents=True, exist_ok=True)
    shape = {k: v for k, v in vars(args).items() if k != "json"}
    args.json.write_text(
        json.dumps({"shape": shape, "threads": torch.get_num_threads(), "seconds": seconds, "rows": rows}, indent=2)
        + "\n"
    )
    print("| arm | tokens/s (median) | ratio | parameters trained |\n|---|---:|---:|---:|")
    for row in rows:
        print(f"| {row['arm']} | {row['tokens_per_s']:,} | {row['ratio']} | {row['trained']:,} |")


if __name__ == "__main__":
    main()
