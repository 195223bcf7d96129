"""Byte-level BPE tokenizers, with a chat template that shows tools and marks what is learned."""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BOS = "<|bos|>"
SPECIAL_TOKENS = (
    BOS,
    "<|assistant_end|>",
    "<|assistant_start|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|system_start|>",
    "<|system_end|>",
    "<|output_start|>",
    "<|output_end|>",
    "<tool_call>",
    "</tool_call>",
)

# Letters, single digits, and everything between are separate pieces: a word is the same tokens after a space, a quote
# or a bracket, so copying it is copying token ids, and `": {"` is one token.
COPYING = r"\p{L}+|\p{N}|[^\p{L}\p{N}]+"

# The pieces of GPT-4's tokenizer, save that digits stand alone and marks belong to their letters: a word takes the
# space before it along. A sixth fewer tokens for the same text.
PROSE = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Prefix-preserving: rendering more messages never changes what is before them. The stop token is inside the
# generation marks, because a stop token that is not trained is not emitted.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- if messages and messages[0].role == "system" -%}
    {%- set system = messages[0].content -%}
{%- endif -%}
{%- if system or tools -%}
    {{- "<|system_start|>" -}}
    {%- if system -%}{{- system -}}{%- endif -%}
    {%- if system and tools -%}{{- "\\n" -}}{%- endif -%}
    {%- if tools -%}
        {%- for tool in tools -%}
            {{- (tool.function if tool.function is defined else tool) | tojson -}}
            {%- if not loop.last -%}{{- "\\n" -}}{%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- "<|system_end|>" -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role == "user" -%}
        {{- "<|user_start|>" + message.content + "<|user_end|>" -}}
    {%- elif message.role == "tool" -%}
        {{- "<|output_start|>" + message.content + "<|output_end|>" -}}
    {%- elif message.role == "assistant" -%}
        {{- "<|assistant_start|>" -}}
        {%- generation -%}
            {%- if message.content -%}{{- message.content -}}{%- endif -%}
            {%- if message.tool_calls -%}
                {%- for call in message.tool_calls -%}
                    {{- '<tool_call>{"name": ' + (call.function.name | tojson) + ', "arguments": ' -}}
                    {%- set arguments = call.function.arguments -%}
                    {{- arguments if arguments is string else arguments | tojson -}}
                    {{- "}</tool_call>" -}}
                {%- endfor -%}
            {%- endif -%}
            {{- "<|assistant_end|>" -}}
        {%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|assistant_start|>" -}}{%- endif -%}
"""


def train_tokenizer(texts: Iterable[str], vocab_size: int, pieces: str = COPYING) -> PreTrainedTokenizerFast:
    """Train byte-level BPE on `texts`; deterministic. `pieces` is what a text is cut into first, `COPYING` or `PROSE`.

    Every text is encoded, none to an unknown token, and decodes to itself, but for a special token spelled out in it.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pieces), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token="<|assistant_end|>",
        pad_token="<|assistant_end|>",
        additional_special_tokens=list(SPECIAL_TOKENS[2:]),
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
