"""The loss mask covers exactly the assistant's text and stop token, in every template. Decoding proves it."""

import dataclasses
import json
import unicodedata
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from conftest import render_one
from poe.calls.conversation import Conversation, PromptForm
from poe.data.render import Renderer, token_bytes
from poe.errors import DataError, TemplateError

# ChatML like Qwen2.5: a default system text, tools in the system turn, tool results in user turns, no marks.
CHATML = """\
{%- if tools %}
{{- '<|im_start|>system\\n' + (messages[0].content if messages[0].role == 'system' else 'Help.') + '\\n<tools>' }}
{%- for tool in tools %}{{- '\\n' + tool | tojson }}{%- endfor %}
{{- '\\n</tools><|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>system\\n' + (messages[0].content if messages[0].role == 'system' else 'Help.') + '<|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}
{%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- elif m.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' }}
{%- if m.content %}{{- m.content }}{%- endif %}
{%- for call in m.tool_calls or [] %}
{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson }}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

# Like Qwen3: answers after the last question begin with a think block, earlier answers do not; thinking can be off.
REWRITING = """\
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' }}
{%- if loop.index0 > ns.last %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{{- m.content + '<|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""

MARKED = """\
{{- bos_token }}
{%- if tools %}{{- '<|im_start|>tools' + tools | tojson + '<|im_end|>' }}{%- endif %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{{- '<|assistant|>' }}
{%- generation %}
{%- if m.content %}{{- m.content }}{%- endif %}
{%- for call in m.tool_calls or [] %}{{- '<tool_call>' + call.function | tojson + '</tool_call>' }}{%- endfor %}
{{- '<|im_end|>' }}
{%- endgeneration %}
{%- else %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}
"""

# Like SmolLM3: the marks include the header and the newline after the stop token.
WIDELY_MARKED = """\
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- generation %}{{- '<|im_start|>assistant\\n' + m.content + '<|im_end|>\\n' }}{%- endgeneration %}
{%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

LLAMA3 = """\
{{- bos_token }}
{%- for m in messages %}
{%- if m.role == 'oracle' %}{{- raise_exception('unknown role ' + m.role) }}{%- endif %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' }}
{%- if m.tool_calls %}
{{- '{"name": "' + m.tool_calls[0].function.name + '", "parameters": ' + m.tool_calls[0].function.arguments | tojson }}
{{- '}' }}
{%- else %}{{- m.content | trim }}{%- endif %}
{{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|assistant|>", "<|start_header_id|>", "<|end_header_id|>",
           "<|eot_id|>"]  # fmt: skip
CORPUS = [
    "the quick brown fox\n\njumps over  the lazy dog",
    'user assistant\nsystem {"name": "f"}',
    "é ü 日本 🙂 \n\n\n",
]
CALL = {"id": "1", "type": "function", "function": {"name": "get_time", "arguments": {"city": "Köln"}}}
TOOLS = [{"type": "function", "function": {"name": "get_time", "description": "t", "parameters": {"type": "object"}}}]


def byte_level(template, *, trim_offsets=False, nfc=False, template_special=()):
    tokenizer = Tokenizer(models.BPE())
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    tokenizer.add_tokens(["<tool_call>", "</tool_call>", "<think>", "</think>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        additional_special_tokens=SPECIAL[1:],
        chat_template=template,
    )


TOKENIZERS = {
    "chatml": byte_level(CHATML),
    "chatml, trimmed offsets": byte_level(CHATML, trim_offsets=True),
    "chatml, nfc": byte_level(CHATML, nfc=True),
    "rewriting": byte_level(REWRITING),
    "marked": byte_level(MARKED),
    "widely marked": byte_level(WIDELY_MARKED),
    "llama3": byte_level(LLAMA3, trim_offsets=True),
}
STOP = {"llama3": "<|eot_id|>"}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, *calls):
    return {"role": "assistant", "content": text, **({"tool_calls": list(calls)} if calls else {})}


def trained(renderer, row):
    """Return the text of each run of trained tokens."""
    runs, previous = [], False
    for token, on in zip(row.input_ids, row.loss_mask, strict=True):
        if on and not previous:
            runs.append([])
        if on:
            runs[-1].append(token)
        previous = on
    return [renderer.tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs]


@pytest.mark.parametrize(
    "name", ["chatml", "chatml, trimmed offsets", "chatml, nfc", "marked", "widely marked", "llama3"]
)
def test_the_mask_covers_every_assistant_turn_and_nothing_else(name):
    renderer = Renderer(TOKENIZERS[name])
    stop = STOP.get(name, "<|im_end|>")
    messages = [{"role": "system", "content": "Be brief."}, user("the fox?"), assistant("jumps  over 🙂"), user("and?"),
                assistant('the "lazy"\n\ndog {}')]  # fmt: skip
    row = render_one(renderer, Conversation(messages))
    assert trained(renderer, row) == [f"jumps  over 🙂{stop}", f'the "lazy"\n\ndog {{}}{stop}']
    assert renderer.tokenizer.decode(row.input_ids) == row.text
    assert len(row.input_ids) == len(row.loss_mask)
    assert row.text.startswith(renderer.prompt(messages[:4]))
    if name != "llama3":  # its pre-tokenizer splits "\n\n" before a word, but not at the end of a prompt
        prompt = renderer.prompt_ids(messages[:4])
        assert row.input_ids[: len(prompt)] == prompt


def test_calls_are_trained_and_tool_results_are_not():
    messages = [user("time?"), assistant(None, CALL), {"role": "tool", "content": "12:00", "name": "get_time"},
                {"role": "tool", "content": "more"}, assistant("noon")]  # fmt: skip
    conversation = Conversation(messages, TOOLS)
    call = '<tool_call>\n{"name": "get_time", "arguments": {"city": "Köln"}}\n</tool_call><|im_end|>'
    renderer = Renderer(TOKENIZERS["chatml"])
    row = render_one(renderer, conversation)
    assert row.text.count("<|im_start|>user") == 2
    assert "<tools>" in row.text
    # The newline before the call belongs to the header's "\n\n" or to the answer, depending on the tokenizer.
    assert [text.lstrip("\n") for text in trained(renderer, row)] == [call, "noon<|im_end|>"]

    renderer = Renderer(TOKENIZERS["marked"])
    call = '<tool_call>{"name": "get_time", "arguments": {"city": "Köln"}}</tool_call><|im_end|>'
    row = render_one(renderer, conversation)
    assert trained(renderer, row) == [call, "noon<|im_end|>"]
    assert "<|im_start|>tools" in renderer.prompt(messages[:1], TOOLS)
    assert "<|im_start|>tools" not in renderer.prompt(messages[:1])

    renderer = Renderer(TOKENIZERS["llama3"])
    call = '{"name": "get_time", "parameters": {"city": "Köln"}}<|eot_id|>'
    assert trained(renderer, render_one(renderer, conversation)) == [call, "noon<|eot_id|>"]


@pytest.mark.parametrize("name", ["chatml", "marked", "llama3"])
def test_training_can_cover_calls_only(name):
    messages = [user("time?"), assistant(None, CALL), {"role": "tool", "content": "12:00", "name": "get_time"},
                assistant("noon"), user("again"), assistant("said", CALL)]  # fmt: skip
    all_turns = Renderer(TOKENIZERS[name])
    calls = Renderer(TOKENIZERS[name], calls_only=True)
    row = Conversation(messages, TOOLS)
    first, words, last = trained(all_turns, render_one(all_turns, row))
    assert "noon" in words
    assert trained(calls, render_one(calls, row)) == [first, last]
    row_with_form = dataclasses.replace(row, form=PromptForm(calls="xlam"))
    first, _, last = trained(all_turns, render_one(all_turns, row_with_form))
    assert trained(calls, render_one(calls, row_with_form)) == [first, last]
    assert trained(calls, render_one(calls, Conversation([user("hi"), assistant("hello")]))) == []
    assert calls.fingerprint() != all_turns.fingerprint()


def test_training_on_calls_only_with_a_template_that_rewrites_turns():
    renderer = Renderer(TOKENIZERS["rewriting"], calls_only=True)
    form = PromptForm(calls="hermes", place="user")
    messages = [user("a"), assistant("no"), user("time?"), assistant(None, CALL), user("b"), assistant("bye")]
    rows = renderer.render(Conversation(messages, TOOLS, form=form))
    trained_texts = [text for row in rows for text in trained(renderer, row)]
    assert len(trained_texts) == 1
    assert "get_time" in trained_texts[0]


def test_the_marks_agree_with_transformers():
    tokenizer = TOKENIZERS["marked"]
    messages = [user("a 🙂"), assistant("b é"), user("c"), assistant("d", CALL), user("e")]
    theirs = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    row = render_one(Renderer(tokenizer), Conversation(messages))
    assert row.input_ids == theirs["input_ids"]
    assert row.loss_mask == [bool(m) for m in theirs["assistant_masks"]]


content = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
    st.text(st.sampled_from(" \n\t\"'\\{}<>|🙂é日e\u0301"), max_size=12),
)


def expected(name, text):
    return (text.strip() if name == "llama3" else text) + STOP.get(name, "<|im_end|>")


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name != "rewriting"])
@given(texts=st.lists(content, min_size=2, max_size=6))
@settings(max_examples=40, deadline=None)
def test_any_text_is_trained_exactly(name, texts):
    renderer = Renderer(TOKENIZERS[name])
    messages = [user(t) if i % 2 == 0 else assistant(t) for i, t in enumerate(texts)]
    row = render_one(renderer, Conversation(messages))
    normalize = partial(unicodedata.normalize, "NFC") if "nfc" in name else str  # the text after tokenization
    assert renderer.tokenizer.decode(row.input_ids, clean_up_tokenization_spaces=False) == normalize(row.text)
    answers = [normalize(expected(name, t)) for t in texts[1::2]]
    got = trained(renderer, row)
    assert len(got) == len(answers)
    for run, answer in zip(got, answers, strict=True):
        # A token that begins in the header, such as "\n\n", is not trained: this can only lose white space.
        assert answer.endswith(run)
        assert not answer.removesuffix(run).strip()
        if name == "marked" or not answer[0].isspace():
            assert run == answer


@given(texts=st.lists(content, min_size=2, max_size=6))
@settings(max_examples=40, deadline=None)
def test_a_template_that_rewrites_takes_a_row_per_history(texts):
    renderer = Renderer(TOKENIZERS["rewriting"])
    messages = [user(t) if i % 2 == 0 else assistant(t) for i, t in enumerate(texts)]
    rows = renderer.render(Conversation(messages))
    turns = range(1, len(texts), 2)
    assert [trained(renderer, row) for row in rows] == [[f"<think>\n\n</think>\n\n{texts[i]}<|im_end|>"] for i in turns]
    for i, row in zip(turns, rows, strict=True):
        assert row.text.startswith(renderer.prompt(messages[:i]))


def test_turns_that_are_not_rewritten_share_a_row():
    renderer = Renderer(TOKENIZERS["rewriting"])
    messages = [user("a"), assistant("b"), user("c"), assistant("d"), {"role": "tool", "content": "e"}, assistant("f")]
    think = "<think>\n\n</think>\n\n"
    rows = renderer.render(Conversation(messages))
    assert [trained(renderer, r) for r in rows] == [
        [f"{think}b<|im_end|>"],
        [f"{think}d<|im_end|>", f"{think}f<|im_end|>"],
    ]


def test_template_options_reach_prompts_and_rows():
    renderer = Renderer(TOKENIZERS["rewriting"], template_options={"enable_thinking": False})
    rows = renderer.render(Conversation([user("a"), assistant("b"), user("c"), assistant("d")]))
    assert [trained(renderer, r) for r in rows] == [["b<|im_end|>"], ["d<|im_end|>"]]


def test_a_row_without_an_assistant_trains_nothing():
    for name in ("chatml", "marked"):
        row = render_one(Renderer(TOKENIZERS[name]), Conversation([user("hello")]))
        assert row.input_ids
        assert not any(row.loss_mask)


def test_empty_answers_train_the_stop_token():
    for name in ("chatml", "marked", "llama3"):
        renderer = Renderer(TOKENIZERS[name])
        row = render_one(renderer, Conversation([user("hello"), assistant("")]))
        assert trained(renderer, row) == [STOP.get(name, "<|im_end|>")]


def test_stop_tokens():
    chatml, llama = Renderer(TOKENIZERS["chatml"]), Renderer(TOKENIZERS["llama3"], stop_token_ids=[6, 77])
    names = chatml.tokenizer.convert_ids_to_tokens(chatml.stop_token_ids)
    assert names == ["<|endoftext|>", "<|im_end|>"]
    assert llama.stop_token_ids == (0, 6, 77)
    assert llama.tokenizer.convert_tokens_to_ids("<|eot_id|>") == 6


STOPLESS = "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '\\n' }}{%- endfor %}" + (
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
UNTRAINED_STOP = MARKED.replace("{{- '<|im_end|>' }}\n{%- endgeneration %}", "{%- endgeneration %}{{- '<|im_end|>' }}")
HIDDEN_ANSWER = CHATML.replace("{{- '<|im_start|>assistant\\n' }}{%- endif %}", "{{- '<|assistant|>' }}{%- endif %}")


@pytest.mark.parametrize(
    ("template", "message"),
    [(STOPLESS, "stop token"), (UNTRAINED_STOP, "generation"), (HIDDEN_ANSWER, "message 1 after its own generation")],
)
def test_templates_that_cannot_be_trained_are_rejected(template, message):
    renderer = Renderer(byte_level(template))
    with pytest.raises(TemplateError, match=message):
        render_one(renderer, Conversation([user("hello"), assistant("you")]))


def test_a_stop_token_in_the_text_does_not_end_the_turn():
    renderer = Renderer(TOKENIZERS["chatml"])
    row = render_one(renderer, Conversation([user("x"), assistant("a<|im_end|>b")]))
    assert trained(renderer, row) == ["a<|im_end|>b<|im_end|>"]
    with pytest.raises(TemplateError, match="must end in a stop token"):
        render_one(Renderer(byte_level(STOPLESS)), Conversation([user("x"), assistant("a<|endoftext|>b")]))


def test_unusable_tokenizers():
    with pytest.raises(TemplateError, match="Expected a tokenizer with a chat template"):
        Renderer(byte_level(None))
    with pytest.raises(TemplateError, match="not valid Jinja"):
        Renderer(byte_level("{% if %}"))

    class Slow:
        chat_template, is_fast, name_or_path = "x", False, "a/slow-one"

    with pytest.raises(TemplateError, match=r"fast tokenizer.*Slow.*a/slow-one"):
        Renderer(Slow())


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "oracle", "content": "x"}, assistant("y")], "unknown role oracle"),
        ([user("x"), {"role": "assistant", "tool_calls": [{"function": {}}]}], "cannot render"),
        ([], "without messages"),
        ([assistant("hello")], "begins with the assistant"),
    ],
)
def test_unusual_rows_raise_data_errors(messages, message):
    with pytest.raises(DataError, match=message):
        render_one(Renderer(TOKENIZERS["llama3"]), Conversation(messages))


def sentence_piece_like():
    """Return a BPE tokenizer with space marks and byte fallback, and a prompt that ends in a space."""
    template = (
        "{%- for m in messages %}{{- m.role + ': ' }}{%- if m.role == 'assistant' %}{{- m.content + eos_token }}"
        "{%- else %}{{- m.content + '\n' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- 'assistant: ' }}{%- endif %}"
    )
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()],
    )
    special = ["<unk>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(["assistant: the fox user: the fox system: the fox over"] * 9, trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][:2]  # the bytes are normal entries
    tokenizer = Tokenizer.from_str(json.dumps(content))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", chat_template=template
    )


def test_a_space_at_the_end_of_the_prompt_is_not_trained():
    renderer = Renderer(sentence_piece_like())
    row = render_one(renderer, Conversation([user("fox"), assistant("thefox over")]))
    assert renderer.tokenizer.decode(row.input_ids) == row.text
    assert "▁the" in renderer.tokenizer.convert_ids_to_tokens(row.input_ids)
    assert trained(renderer, row) == ["fox over</s>"]

    trimmed = byte_level(
        "{%- for m in messages %}{{- m.role + ': ' + m.content + eos_token }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- 'assistant: ' }}{%- endif %}",
        trim_offsets=True,
    )
    renderer = Renderer(trimmed)
    row = render_one(renderer, Conversation([user("fox"), assistant("the the")]))
    assert trained(renderer, row) == [" the<|endoftext|>"]


@given(text=content)
@settings(max_examples=60, deadline=None)
def test_token_bytes_add_up_to_the_text(text):
    tokenizer = TOKENIZERS["chatml"]
    counts = BYTE_LEVEL_COUNTS
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert int(counts[ids].sum()) == len(text.encode())


BYTE_LEVEL_COUNTS = token_bytes(TOKENIZERS["chatml"])


def test_token_bytes_of_special_added_and_padded_tokens():
    tokenizer = TOKENIZERS["chatml"]
    counts = BYTE_LEVEL_COUNTS
    assert counts.dtype == torch.int64
    assert counts.shape == (len(tokenizer),)
    assert all(counts[i] == 0 for i in tokenizer.all_special_ids)
    assert counts[tokenizer.convert_tokens_to_ids("<tool_call>")] == len("<tool_call>")
    assert int((counts == 0).sum()) == len(SPECIAL)
    padded = token_bytes(tokenizer, 400)
    assert padded.shape == (400,)
    assert torch.equal(padded[: len(tokenizer)], counts)
    assert not padded[len(tokenizer) :].any()
    assert token_bytes(tokenizer, 10).shape == (10,)


@given(text=st.text(st.sampled_from("the fox over: é日🙂\n"), max_size=20))
@settings(max_examples=40, deadline=None)
def test_token_bytes_with_byte_fallback(text):
    ids = FALLBACK(text, add_special_tokens=False)["input_ids"]
    assert FALLBACK.unk_token_id not in ids
    assert int(FALLBACK_COUNTS[ids].sum()) == len(text.encode())


FALLBACK = sentence_piece_like()
FALLBACK_COUNTS = token_bytes(FALLBACK)


def test_token_bytes_of_other_tokenizers_decode():
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "über": 1, "a": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    assert token_bytes(fast).tolist() == [0, 5, 1]
