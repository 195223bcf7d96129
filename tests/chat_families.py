"""Tokenizers with chat templates in the styles of public model families, written in our own words after their rules.

Each family has a tokenizer of its own kind (byte-level BPE, BPE or Unigram with space marks) with the family's control
tokens. `FAMILIES` maps a name to a function that makes the tokenizer.
"""

import functools
import json
from collections.abc import Callable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AddedToken, PreTrainedTokenizerFast

CORPUS = [
    "the user asks the assistant a question and the system answers it\n\nthe tool returns a result",
    'system user assistant tool {"name": "find_fox", "arguments": {"word": "a b c"}} [1, 2] <x> </x> | ; = # ~',
    "words of a user, words of an assistant; é ü ß 日本 🙂   two  spaces\n\n",
]

QWEN3 = """\
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}
{%- if m.role == 'user' and not (m.content.startswith('<tool_response>') and m.content.endswith('</tool_response>')) %}
{%- set ns.last = loop.index0 %}
{%- endif %}
{%- endfor %}
{%- set first = messages[0].content if messages[0].role == 'system' else '' %}
{%- if tools %}
{{- '<|im_start|>system\\n' + (first + '\\n\\n' if first else '') }}
{{- '# Tools\\n\\nFunctions within <tools></tools>:\\n<tools>' }}
{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
{{- '\\n</tools>\\n\\nAnswer calls within <tool_call></tool_call> as JSON.<|im_end|>\\n' }}
{%- elif first %}{{- '<|im_start|>system\\n' + first + '<|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}
{%- set content = m.content if m.content is string else '' %}
{%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
{{- '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' }}
{%- elif m.role == 'assistant' %}
{%- set thought = '' %}
{%- if '</think>' in content %}
{%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '<|im_start|>assistant\\n' }}
{%- if loop.index0 > ns.last %}{{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}{%- endif %}
{{- content }}
{%- for call in m.tool_calls or [] %}
{%- if content or not loop.first %}{{- '\\n' }}{%- endif %}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

QWEN25 = """\
{%- set first = messages[0].content if messages[0].role == 'system' else 'You are a helpful assistant.' %}
{{- '<|im_start|>system\\n' + first }}
{%- if tools %}{{- '\\n\\n# Tools\\n<tools>' }}
{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}{{- '\\n</tools>' }}{%- endif %}
{{- '<|im_end|>\\n' }}
{%- for m in messages %}
{%- if m.role == 'user' or (m.role == 'system' and not loop.first) or (m.role == 'assistant' and not m.tool_calls) %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}
{%- elif m.role == 'assistant' %}
{{- '<|im_start|>' + m.role }}
{%- if m.content %}{{- '\\n' + m.content }}{%- endif %}
{%- for call in m.tool_calls %}
{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) }}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}
{%- if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

# Tools stand in the first user message, results have the role ipython, one call per turn.
LLAMA31 = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}{%- set first = messages[0].content | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set first = '' %}{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{%- if tools %}{{- 'Environment: ipython\\n' }}{%- endif %}
{{- first + '<|eot_id|>' }}
{%- if tools %}
{%- set question = messages[0].content | trim %}{%- set messages = messages[1:] %}
{{- '<|start_header_id|>user<|end_header_id|>\\n\\nUse JSON for one of these functions.\\n\\n' }}
{%- for tool in tools %}{{- tool | tojson(indent=4) + '\\n\\n' }}{%- endfor %}
{{- question + '<|eot_id|>' }}
{%- endif %}
{%- for m in messages %}
{%- if m.role == 'tool' or m.role == 'ipython' %}
{{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + (m.content if m.content is string else m.content | tojson) }}
{{- '<|eot_id|>' }}
{%- elif m.tool_calls %}
{%- if m.tool_calls | length != 1 %}{{- raise_exception('one call at a time') }}{%- endif %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + m.tool_calls[0].function.name + '", ' }}
{{- '"parameters": ' + (m.tool_calls[0].function.arguments | tojson) + '}<|eot_id|>' }}
{%- else %}{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""

LLAMA2 = """\
{%- if messages[0].role == 'system' %}{%- set first = messages[0].content %}{%- set messages = messages[1:] %}
{%- else %}{%- set first = '' %}{%- endif %}
{%- for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('roles must alternate') }}{%- endif %}
{%- set content = '<<SYS>>\\n' + first + '\\n<</SYS>>\\n\\n' + m.content if loop.first and first else m.content %}
{%- if m.role == 'user' %}{{- bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{%- else %}{{- ' ' + content.strip() + ' ' + eos_token }}{%- endif %}
{%- endfor %}
"""

# The system text stands before the last question; ids have nine letters and digits; roles take turns.
MISTRAL3 = """\
{%- if messages[0].role == 'system' %}{%- set first = messages[0].content %}{%- set rest = messages[1:] %}
{%- else %}{%- set first = '' %}{%- set rest = messages %}{%- endif %}
{%- set ns = namespace(index=0, last=0) %}
{%- for m in rest %}
{%- if not (m.role == 'tool' or m.tool_calls) %}
{%- if (m.role == 'user') != (ns.index % 2 == 0) %}{{- raise_exception('user and assistant take turns') }}{%- endif %}
{%- set ns.index = ns.index + 1 %}
{%- endif %}
{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for m in rest %}
{%- if m.role == 'user' %}
{%- if tools and loop.index0 == ns.last %}
{{- '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}
{%- endif %}
{{- '[INST] ' + (first + '\\n\\n' if first and loop.index0 == ns.last else '') + m.content + '[/INST]' }}
{%- elif m.tool_calls %}
{{- '[TOOL_CALLS] [' }}
{%- for call in m.tool_calls %}
{%- if call.id is not defined or call.id | length != 9 %}{{- raise_exception('an id has nine characters') }}{%- endif %}
{{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' + (', ' if not loop.last else ']' + eos_token) }}
{%- endfor %}
{%- elif m.role == 'assistant' %}{{- ' ' + m.content | trim + eos_token }}
{%- elif m.role == 'tool' %}
{%- if m.tool_call_id is not defined or m.tool_call_id | length != 9 %}
{{- raise_exception('an id has nine characters') }}
{%- endif %}
{{- '[TOOL_RESULTS] {"content": ' + m.content | tojson + ', "call_id": "' + m.tool_call_id + '"}[/TOOL_RESULTS]' }}
{%- else %}{{- raise_exception('unknown role') }}{%- endif %}
{%- endfor %}
"""

GEMMA = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{- raise_exception('System role not supported') }}{%- endif %}
{%- for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('roles must alternate') }}{%- endif %}
{%- set role = 'model' if m.role == 'assistant' else m.role %}
{{- '<start_of_turn>' + role + '\\n' + m.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}
"""

CHATML = """\
{%- for m in messages %}{{- '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

SMOLLM2 = """\
{%- for m in messages %}
{%- if loop.first and m.role != 'system' %}{{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{%- endif %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

PHI3 = """\
{%- for m in messages %}
{{- '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- else %}{{- eos_token }}{%- endif %}
"""

ZEPHYR = """\
{%- for m in messages %}
{{- '<|' + m.role + '|>\\n' + m.content + eos_token + '\\n' }}
{%- if loop.last and add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}
{%- endfor %}
"""

# Arguments are text, a call has a content that may be none, earlier thinking is removed.
DEEPSEEK = """\
{%- set ns = namespace(system='', output=false) %}
{%- for m in messages if m.role == 'system' %}{%- set ns.system = ns.system + m.content %}{%- endfor %}
{{- bos_token + ns.system }}
{%- if tools %}{{- '\\n\\n## Tools\\n' + (tools | tojson) }}{%- endif %}
{%- for m in messages %}
{%- if m.role == 'user' %}{{- '<｜User｜>' + m.content }}{%- set ns.output = false %}
{%- elif m.role == 'assistant' and m.tool_calls %}
{%- if not ns.output %}{{- '<｜Assistant｜>' }}{%- endif %}
{{- (m['content'] if m['content'] is not none else '') + '<｜tool▁calls▁begin｜>' }}
{%- for call in m.tool_calls %}
{{- '<｜tool▁call▁begin｜>' + call.type + '<｜tool▁sep｜>' + call.function.name + '\\n```json\\n' }}
{{- call.function.arguments + '\\n```<｜tool▁call▁end｜>' }}
{%- endfor %}
{{- '<｜tool▁calls▁end｜><｜end▁of▁sentence｜>' }}
{%- elif m.role == 'assistant' %}
{%- set content = m.content.split('</think>')[-1] if '</think>' in m.content else m.content %}
{{- ('' if ns.output else '<｜Assistant｜>') + content + '<｜end▁of▁sentence｜>' }}{%- set ns.output = false %}
{%- elif m.role == 'tool' %}
{{- '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' }}{%- set ns.output = true %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt and not ns.output %}{{- '<｜Assistant｜>' }}{%- endif %}
"""

# Schemas are written as XML elements named by their keys.
HERMES = """\
{%- macro write(value) %}
{%- if value is mapping %}
{%- for key, member in value.items() %}{{- '<' + key + '>' }}{{- write(member) }}{{- '</' + key + '>' }}{%- endfor %}
{%- elif value is string %}{{- value }}
{%- else %}{{- value | tojson }}{%- endif %}
{%- endmacro %}
{{- bos_token + '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content }}{%- set messages = messages[1:] %}{%- endif %}
{%- if tools %}
{{- '<tools>' }}{%- for tool in tools %}{{- write(tool.function) }}{%- endfor %}{{- '</tools>' }}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'tool' %}{{- '<tool_response>' + m.content + '</tool_response>' }}
{%- else %}{{- m.content or '' }}{%- endif %}
{%- for call in m.tool_calls or [] %}
{{- '<tool_call><function=' + call.function.name + '>' }}{{- write(call.function.arguments) }}
{{- '</function></tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TOOL_MARKS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
DEEPSEEK_MARKS = (
    *("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>"),
    *("<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"),
    *("<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"),
)
LLAMA_MARKS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
               "<|python_tag|>")  # fmt: skip
MISTRAL_MARKS = ("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]",
                 "[/TOOL_RESULTS]")  # fmt: skip
PHI_MARKS = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|tool|>")
OTHER_MARKS = ("<s>", "</s>", "<unk>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
ALL_MARKS = (*IM, *TOOL_MARKS, *DEEPSEEK_MARKS, *LLAMA_MARKS, *MISTRAL_MARKS, *PHI_MARKS, *OTHER_MARKS)


def _finish(inner: Tokenizer, template: str, bos: str | None, eos: str, special, added=(), rstrip=()):
    inner.add_special_tokens([AddedToken(t, special=True, normalized=False, rstrip=t in rstrip) for t in special])
    inner.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=bos,
        eos_token=eos,
        extra_special_tokens=[token for token in special if token not in (bos, eos)],
        chat_template=template,
    )


def byte_level(template, special, *, bos=None, eos, added=(), rstrip=(), normalizer=None):
    """Return byte-level BPE, as of Qwen, Llama 3 and DeepSeek."""
    inner = Tokenizer(models.BPE())
    inner.normalizer = normalizer
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        CORPUS * 3, trainers.BpeTrainer(vocab_size=380, initial_alphabet=alphabet, show_progress=False)
    )
    if bos is not None:
        inner.add_special_tokens([bos])
        inner.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, inner.token_to_id(bos))]
        )
    return _finish(inner, template, bos, eos, special, added, rstrip)


def space_marked(template, special, *, bos="<s>", eos="</s>", added=(), rstrip=(), scheme="first"):
    """Return BPE with space marks and bytes for unknown letters, as of Llama 2, Mistral and Gemma."""
    inner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        if scheme == "first"
        else [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    first = ["<unk>", bos, eos, *(f"<0x{i:02X}>" for i in range(256))]
    words = [space + word for text in CORPUS for word in text.split(" ") for space in ("", " ")]
    inner.train_from_iterator(words, trainers.BpeTrainer(vocab_size=420, special_tokens=first, show_progress=False))
    content = json.loads(inner.to_str())
    content["added_tokens"] = content["added_tokens"][:3]  # the bytes are ordinary entries
    inner = Tokenizer.from_str(json.dumps(content))
    return _finish(inner, template, bos, eos, special, added, rstrip)


def unigram(template, special, *, bos="<s>", eos="</s>"):
    """Return a Unigram tokenizer. Its control tokens are entries of the vocabulary that text could match."""
    pieces = [("<unk>", 0.0), (bos, 0.0), (eos, 0.0), *((token, 0.0) for token in special)]
    letters = sorted({letter for text in CORPUS for letter in text.replace(" ", "▁")} | set("<>/|_[]xyzq'\\\t"))
    pieces += [(letter, -9.0) for letter in letters] + [("▁the", -4.0), ("▁user", -5.0), ("▁a", -4.0)]
    pieces += [(f"<0x{i:02X}>", -12.0) for i in range(256)]
    inner = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _finish(inner, template, bos, eos, ["<unk>", bos, eos, *special])


FAMILIES: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "qwen3": lambda: byte_level(QWEN3, IM, eos="<|im_end|>", added=TOOL_MARKS, normalizer=normalizers.NFC()),
    "qwen2.5": lambda: byte_level(QWEN25, IM, eos="<|im_end|>", added=TOOL_MARKS[:4]),
    "llama-3.1": lambda: byte_level(LLAMA31, LLAMA_MARKS, bos="<|begin_of_text|>", eos="<|eot_id|>"),
    "llama-2": lambda: space_marked(LLAMA2, ()),
    "mistral-v3": lambda: space_marked(MISTRAL3, MISTRAL_MARKS),
    "gemma": lambda: space_marked(
        GEMMA, ("<start_of_turn>", "<end_of_turn>"), bos="<bos>", eos="<eos>", added=("<table>",), scheme="never"
    ),
    "chatml": lambda: byte_level(CHATML, IM, eos="<|im_end|>"),
    "smollm2": lambda: byte_level(SMOLLM2, IM, eos="<|im_end|>"),
    "phi-3": lambda: space_marked(PHI3, PHI_MARKS, eos="<|endoftext|>", scheme="never"),
    "zephyr": lambda: space_marked(ZEPHYR, ()),
    "deepseek": lambda: byte_level(
        DEEPSEEK, DEEPSEEK_MARKS, bos="<｜begin▁of▁sentence｜>", eos="<｜end▁of▁sentence｜>", added=TOOL_MARKS[4:]
    ),
    "hermes": lambda: byte_level(HERMES, IM, bos="<|endoftext|>", eos="<|im_end|>", added=TOOL_MARKS),
    "chatml, unigram": lambda: unigram(CHATML, ("<|im_start|>", "<|im_end|>")),
    "no template": lambda: byte_level(None, (), bos="<s>", eos="</s>"),
}


@functools.cache
def family(name: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a family, with a template that shows tools. Do not change it."""
    from poe.data.templates import complete_template

    tokenizer = FAMILIES[name]()
    complete_template(tokenizer)
    return tokenizer
