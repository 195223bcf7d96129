"""Write what the engines are tried with: exports of a stage on a base of each family, and what transformers computes.

    python tests/engines/exports.py FOLDER NAME ...

Each base has three layers and its stage five, so that the export crosses every layer pattern. FOLDER/expected.json has
for each export some prompts, their greedy continuations in fp32, and the distance of the two best logits.
"""

import json
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "engines"), str(TESTS.parent / "benchmarks")]

import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from models import ADAPTERS, FAMILIES, NO_HEAD, REAL, SENTENCEPIECE  # noqa: E402
from smollm2 import make_smollm2  # noqa: E402

from conftest import scramble, tiny_model  # noqa: E402
from poe import Cascade, StageConfig  # noqa: E402

DEPTH, NEW_LAYERS, NEW_TOKENS, PROMPT_LENGTHS = 3, 5, 16, (5, 29)


def main(folder: Path, names: list[str]) -> None:
    """Write the exports and expected.json."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    real = make_smollm2()
    expected = {}
    for name in names:
        on_real = name in (*REAL, *ADAPTERS)
        cascade = Cascade.from_pretrained(real) if on_real else Cascade(tiny_base(name))
        add_stage(cascade, name)
        if name in ADAPTERS:
            adapter = cascade.export_peft("t", folder / name)
            base = transformers.AutoModelForCausalLM.from_pretrained(real, dtype=torch.float32)
            expected[name] = continue_prompts(peft.PeftModel.from_pretrained(base, adapter))
            continue
        export = cascade.export_native("t", folder / name, all_tokens=True)
        if not on_real:
            write_tokenizer(name, real, export)
        # Other implementations of attention leave out the soft cap of Gemma 2.
        options = {"dtype": torch.float32, "attn_implementation": "eager"}
        model = transformers.AutoModelForCausalLM.from_pretrained(export, **options)
        expected[name] = continue_prompts(model)
    (folder / "expected.json").write_text(json.dumps(expected))


def add_stage(cascade: Cascade, name: str) -> None:
    """Add a stage with random weights that change every prediction."""
    if name in ("smollm2-fork", *ADAPTERS):
        cascade.add_stage(StageConfig("t", head="none", layers="fork", attach_at=20, rank=8, active="answer"))
    else:
        cascade.add_stage(StageConfig("t", NEW_LAYERS, "none" if name in NO_HEAD else "low_rank", 8))
    seed = 2 if name == ADAPTERS[1] else 1
    scramble(cascade.stages["t"], seed, scale=0.02 if name in (*REAL, *ADAPTERS) else 0.2)


def tiny_base(name: str) -> transformers.PreTrainedModel:
    """Return a base with random weights in sizes that llama.cpp takes."""
    vocabulary = 512 if name in SENTENCEPIECE else 49152
    sizes = {"vocab_size": vocabulary, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": DEPTH}
    return tiny_model(name, {**sizes, **FAMILIES[name]})


def write_tokenizer(name: str, real: Path, folder: Path) -> None:
    """Write a tokenizer that the converter takes; the exports of the real base carry their own."""
    if name in SENTENCEPIECE:
        write_sentencepiece(folder)
        return
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / file).write_bytes((real / file).read_bytes())


def write_sentencepiece(folder: Path) -> None:
    """Write a SentencePiece tokenizer of the README's words."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter((TESTS.parent / "README.md").read_text(encoding="utf-8").splitlines()),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=512,
        model_type="bpe",
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    settings = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **settings}))


@torch.no_grad()
def continue_prompts(model: Any) -> list[dict[str, Any]]:
    """Return prompts, a model's greedy continuations, and the distances of the two best logits."""
    generator = torch.Generator().manual_seed(0)
    answers = []
    for length in PROMPT_LENGTHS:
        prompt = torch.randint(3, min(500, model.config.vocab_size), (1, length), generator=generator)
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "output_logits": True}
        output = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW_TOKENS,
            return_dict_in_generate=True,
            **options,
        )
        best = torch.cat(output.logits).topk(2).values
        tokens = output.sequences[0, length:].tolist()
        answers.append({"prompt": prompt[0].tolist(), "tokens": tokens, "gaps": (best[:, 0] - best[:, 1]).tolist()})
    return answers


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
