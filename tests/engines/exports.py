"""Write what the engines are tried with: exports of a stage on a base of each family, and what transformers computes.

    python tests/engines/exports.py FOLDER HEAD_DIM NAME ...

Most bases have three layers and their stages five, so that the export crosses every layer pattern. The attention heads
of the tiny bases have at least HEAD_DIM channels. FOLDER/expected.json has for each export some prompts, their greedy
continuations in fp32, and the distances of the two best logits; FOLDER/warnings.json what the export warned of.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "engines"), str(TESTS.parent / "benchmarks")]

import torch  # noqa: E402
import transformers  # noqa: E402
from models import ADAPTERS, DIFFERENT, FAMILIES, NO_HEAD, REAL, SENTENCEPIECE, UNKNOWN, family_of  # noqa: E402
from smollm2 import make_smollm2  # noqa: E402

from conftest import scramble, tiny_model  # noqa: E402
from poe import Cascade, StageConfig  # noqa: E402

DEPTH, NEW_LAYERS, NEW_TOKENS, PROMPTS, PROMPT_LENGTHS = 3, 5, 16, 3, (5, 29)
REAL_TOKENS, REAL_PROMPT_LENGTH = 32, 8
REAL_PROMPTS = (
    "The weather in Zurich tomorrow will be mostly",
    "To bake bread at home, first you need",
    "She opened the old wooden door and found",
    "def add(a, b):\n    return a + b\n\n",
    "Water boils at a lower temperature in the",
)


def main(folder: Path, head_dim: int, names: list[str]) -> None:
    """Write the exports and expected.json."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    real = make_smollm2()
    expected, caught = {}, {}
    for name in names:
        on_real = name in (*REAL, *ADAPTERS)
        dtype = torch.float32 if name in ADAPTERS else "auto"
        cascade = Cascade.from_pretrained(real, dtype=dtype) if on_real else Cascade(tiny_base(name, head_dim))
        add_stage(cascade, name)
        if name in ADAPTERS:
            cascade.export_peft("t", folder / name)
            model = cascade.model("t")
        else:
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                export = cascade.export_native("t", folder / name, all_tokens=True)
            caught[name] = [text for each in found if "llama.cpp" in (text := str(each.message))]
            if not on_real:
                write_tokenizer(name, real, export)
            # Other implementations of attention leave out the soft cap of Gemma 2.
            options = {"dtype": torch.float32, "attn_implementation": "eager"}
            model = transformers.AutoModelForCausalLM.from_pretrained(export, **options)
        prompts = real_prompts(cascade.tokenizer) if on_real else random_prompts(model.config.vocab_size)
        count = REAL_TOKENS if on_real else NEW_TOKENS
        expected[name] = [row for prompt in prompts for row in continue_prompts(model, prompt, count)]
        if on_real:
            alone = [row for prompt in prompts for row in continue_prompts(cascade.base, prompt, count)]
            check_changed(name, expected[name], alone)
    (folder / "expected.json").write_text(json.dumps(expected))
    (folder / "warnings.json").write_text(json.dumps(caught))


def check_changed(name: str, answers: list[dict[str, Any]], of_base: list[dict[str, Any]]) -> None:
    """End the program if the base alone gives the same tokens: an engine that ignored the stage would agree."""
    if all(ours["tokens"] == theirs["tokens"] for ours, theirs in zip(answers, of_base, strict=True)):
        raise SystemExit(f"{name} continues every prompt as its base does: expected a stage that changes the tokens.")


def add_stage(cascade: Cascade, name: str) -> None:
    """Add a stage with random weights that change every prediction."""
    if name in ("smollm2-fork", *ADAPTERS):
        active = "all" if name in ADAPTERS else "answer"
        cascade.add_stage(StageConfig("t", head="none", layers="fork", attach_at=20, rank=8, active=active))
    else:
        cascade.add_stage(StageConfig("t", NEW_LAYERS, "none" if name in NO_HEAD else "low_rank", 8))
    seed = 2 if name == ADAPTERS[1] else 1
    scramble(cascade.stages["t"], seed, scale=0.1 if name == "smollm2-new" else 0.2)


def tiny_base(name: str, head_dim: int) -> transformers.PreTrainedModel:
    """Return a base with random weights in sizes that the engine takes: four heads."""
    vocabulary = 512 if family_of(name) in SENTENCEPIECE else 49152
    sizes = {"vocab_size": vocabulary, "hidden_size": 4 * head_dim, "intermediate_size": 96, "num_hidden_layers": DEPTH}
    fields = {**sizes, **(FAMILIES | DIFFERENT | UNKNOWN)[name]}
    if "head_dim" in fields:
        fields["head_dim"] = max(fields["head_dim"], head_dim)
    return tiny_model(family_of(name), fields)


def write_tokenizer(name: str, real: Path, folder: Path) -> None:
    """Write a tokenizer and the words of the config that the converter takes; the real base has its own."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if family_of(name) == "cohere2":  # published bases have this field, which transformers 5 does not write
        config["rotary_pct"] = 1.0
    path.write_text(json.dumps(config))
    if family_of(name) in SENTENCEPIECE:
        write_sentencepiece(folder)
        return
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        text = (real / file).read_text(encoding="utf-8")
        if family_of(name) in ("glm", "glm4"):
            text = text.replace("<reponame>", "<|user|>")  # the converter looks for this token
        (folder / file).write_text(text, encoding="utf-8")


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
        control_symbols="<|endoftext|>",  # llama.cpp looks for it in a model with phi3 in its name
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    settings = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **settings}))


def random_prompts(vocabulary: int) -> list[torch.Tensor]:
    """Return batches of prompts (prompts, tokens), short ones and some that are longer than the windows."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, min(500, vocabulary), (PROMPTS, n), generator=generator) for n in PROMPT_LENGTHS]


def real_prompts(tokenizer: Any) -> list[torch.Tensor]:
    """Return one batch of prompts (prompts, tokens)."""
    return [torch.tensor([tokenizer(text).input_ids[:REAL_PROMPT_LENGTH] for text in REAL_PROMPTS])]


@torch.no_grad()
def continue_prompts(model: Any, prompts: torch.Tensor, count: int) -> list[dict[str, Any]]:
    """Return prompts, a model's greedy continuations of `count` tokens, and the distances of the two best logits."""
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "output_logits": True}
    output = model.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=count,
        return_dict_in_generate=True,
        **options,
    )
    best = torch.stack(output.logits, dim=1).topk(2).values  # (prompts, tokens, 2)
    gaps, tokens = (best[..., 0] - best[..., 1]).tolist(), output.sequences[:, prompts.shape[1] :].tolist()
    rows = zip(prompts.tolist(), tokens, gaps, strict=True)
    return [{"prompt": prompt, "tokens": added, "gaps": distances} for prompt, added, distances in rows]


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
