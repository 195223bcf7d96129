"""Byte-level BPE tokenizers with a chat template that shows tools and marks the assistant's tokens."""

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

# Letters, single digits, and all text between them are separate pieces. A word has the same tokens after a space, a
# quote or a bracket, so copying a word copies its token ids, and `": {"` is one token.
COPYING = r"\p{L}+|\p{N}|[^\p{L}\p{N}]+"

# The pieces of GPT-4's tokenizer, except that digits are single and combining marks belong to their letters. A word
# includes the space before it. This makes a sixth fewer tokens for the same text.
PROSE = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Prefix-preserving: more messages never change the text before them. The stop token is inside the generation marks,
# because the model does not emit a stop token that was not trained.
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
    """Train byte-level BPE on `texts`, deterministically. `pieces` is the pre-tokenization, `COPYING` or `PROSE`.

    Every text can be encoded without unknown tokens and decodes to itself, unless it contains a special token as text.
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
