"""Try which families can be grown, with tiny models, and write the page about them.

`python tests/families_page.py` writes docs/reference/families.md; a test fails when that page is out of date.
"""

import functools
from pathlib import Path

import transformers
from transformers import T5Config, T5ForConditionalGeneration

from conftest import BASES, VOCABULARY, tiny_base, tiny_model
from poe.errors import FamilyError
from poe.modeling.families import FAMILIES, Family, Logits, logits_of
from poe.modeling.recognition import recognize_family

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "families.md"
INTRODUCTION = """\
# Families

Written by `python tests/families_page.py` with transformers {version}; do not edit.

A model can be a base if its decoder layers run one after the other. The tests check for each family:

- a new stage computes exactly what the model below it computes, and its first step is a small one;
- with the stage off, the base is unchanged; the logits are one matrix product with the folded head;
- greedy tokens do not depend on the cache or on left padding; documents packed into a row do not see each other;
- the loss of training is that of the model's own logits;
- saved files have the same bytes when they are loaded and saved again, alone and in a chain.

[Export](../how-to/export.md#families-that-agree) lists the families of which llama.cpp computes the same tokens.

## Declared

If a family has several types of layers (sliding windows, layers without rotary positions), new layers continue its
pattern: a new layer is of the type that the family gives to a layer of its index. New layers of a PoE base have full
attention. *Silent* are the modules that write nothing in a new layer: projections
that start at zero or, if a norm follows the projection, that norm.

hrm_text is recurrent: its layers run again in every cycle, and a stage's layers run once, after the last cycle.
A stage attaches on top only, and no ordinary checkpoint can hold it (`export_native` and `save_pretrained`
refuse). If its config has `prefix_lm`, training and `poe` let it read a prompt in both directions: the prompt
is what comes before the first learned token of each document. In your own call of `generate`, mark the prompt
with `token_type_ids` (1: prompt).

| model type | silent in a new layer | tested as |
|---|---|---|
"""
FOUND_BY_STRUCTURE = """
## Found by structure

A base of another family is taken apart and tested when it is opened: nine forward passes over two rows of six
tokens. It is accepted if a silent new layer leaves its logits equal to the last bit, a layer that is not silent
changes them, the key-value cache agrees, packed documents do not see each other, and the logits are the head's
output, scaled and capped as its config says. It is first built without values, before its weights are read; its
structure alone can be a reason to refuse it. These families were tested as tiny models. Others may pass too.

| model type | silent in a new layer | logits |
|---|---|---|
"""
DEEPER = {"num_hidden_layers": 3}
# Model type -> fields of a tiny config. These families are not declared, but the trial accepts them.
ACCEPTED: dict[str, dict] = {
    "apertus": {},
    "arcee": {},
    "cohere": {},
    "cohere2": {},
    "cwm": {},
    "ernie4_5": {},
    "exaone4": {},
    "gemma": {"head_dim": 8},
    "glm": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "gpt_neox": {},
    "helium": {"head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "nemotron": {},
    "olmo": {},
    "olmo3": {},
    "persimmon": {},
    "phi": {"num_key_value_heads": 4},
    "seed_oss": {"head_dim": 8},
    "stablelm": {},
    "starcoder2": {},
}
HYBRID = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
# Model type -> fields of a tiny config, and a part of the reason why the trial refuses it.
REFUSED: dict[str, tuple[dict, str]] = {
    "bloom": ({}, "do not take the hidden states first and return them alone"),
    "falcon": ({}, "do not take the hidden states first and return them alone"),
    "gpt2": ({}, "no nn.Linear that writes"),
    "gpt_oss": ({}, "write into the residual stream too"),
    "lfm2": ({"layer_types": ["conv", "full_attention", "conv"]}, "documents in one row see each other"),
    "mamba": ({}, "no key-value cache, as in a recurrent network"),
    "minicpm3": (
        {
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 8,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "num_key_value_heads": 4,
        },
        "does not read the backbone's last_hidden_state",
    ),
    "mixtral": ({}, "write into the residual stream too"),
    "opt": ({}, "holds 0 lists of 3 layers"),
    "qwen3_moe": ({}, "write into the residual stream too"),
    "qwen3_next": (HYBRID, "write into the residual stream too"),
    "t5": ({}, "it has an encoder"),
    "xglm": ({}, "documents in one row see each other"),
}


def exists(model_type: str) -> bool:
    """Return whether the installed transformers has this family."""
    return model_type in transformers.CONFIG_MAPPING


@functools.cache
def outcome(model_type: str) -> tuple[Family, Logits] | str:
    """Try a tiny model of an undeclared family; return its structure, or the reason why it is refused."""
    if model_type == "t5":
        config = T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
        model = T5ForConditionalGeneration(config)
    else:
        fields = ACCEPTED[model_type] if model_type in ACCEPTED else REFUSED[model_type][0]
        model = tiny_model(model_type, {**DEEPER, **fields})
    try:
        return recognize_family(model), logits_of(model.config)
    except FamilyError as error:
        return str(error)


def page() -> str:
    """Return docs/reference/families.md as it should be."""
    lines = INTRODUCTION.format(version=transformers.__version__).splitlines()
    for name, family in sorted(FAMILIES.items()):
        tested = ", ".join(base for base, (model_type, _) in BASES.items() if model_type == name)
        lines.append(f"| {name} | {_names(family)} | {tested} |")
    lines += FOUND_BY_STRUCTURE.splitlines()
    for name in ACCEPTED:
        found = outcome(name)
        assert not isinstance(found, str), found
        lines.append(f"| {name} | {_names(found[0])} | {_logits(found[1])} |")
    lines += ["", "## Refused", "", "| model type | why |", "|---|---|"]
    for name in REFUSED:
        reason = str(outcome(name)).partition("cannot be grown: ")[2].partition(". Expected one of")[0]
        lines.append(f"| {name} | {reason} |")
    return "\n".join(lines) + "\n"


def _names(family: Family) -> str:
    return ", ".join(f"`{name}`" for name in family.outputs)


def _logits(logits: Logits) -> str:
    parts = [f"scaled by {logits.scale:g}"] if logits.scale != 1.0 else []
    return ", ".join(parts + ([f"capped at {logits.softcap:g}"] if logits.softcap else [])) or "plain"


def declared_and_found(name: str) -> tuple[Family, Family]:
    """Return the declaration of a family, and what the trial finds when the family is not declared."""
    declared = FAMILIES.pop(BASES[name][0])
    try:
        return declared, recognize_family(tiny_base(name))
    finally:
        FAMILIES[declared.model_type] = declared


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
