"""Forced tokens skip the model, and the reply stays that of the ordinary loop."""

from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any, Literal

import pytest
import torch
from transformers import PreTrainedModel, StoppingCriteriaList
from transformers.cache_utils import LinearAttentionLayer

from chat_families import family
from conftest import BASES, demo_tokenizer, mostly_slow, scramble, tiny_model
from decoding_models import MODELS
from poe import Cascade, StageConfig
from poe.calls.forms.call_forms import CALL_FORMS
from poe.calls.tools import read_tools
from poe.chat import RawReply, generate_replies, plan_reply
from poe.data.render import Renderer
from poe.decoding.forced import has_plain_layers, supports_options

FAMILIES = [*MODELS, "hrm", "hrm-tied", "mistral", "smollm3-tied", "phi3-sliding", "cohere-tied", "granite"]
QUESTION = [{"role": "user", "content": "What is the weather in Lisbon?"}]


def get_weather(city: str, days: int = 1) -> str:
    """Get the weather.

    Args:
        city: The city.
        days: Number of days.
    """
    return city * days


def get_tide(city: Literal["Lisbon", "Lima", "Oslo"], days: Literal[1, 2, 10]) -> str:
    """Get the tide.

    Args:
        city: The city.
        days: Number of days.
    """
    return city * days


TOOLS, SHORT = read_tools([get_weather]), read_tools([get_tide])  # random models end short calls by themselves


@cache
def tokenizer_of(kind: str = "demo") -> Any:
    """Return one tokenizer for all tests, so that its vocabulary is read once."""
    return demo_tokenizer() if kind == "demo" else family(kind)


def make_base(name: str, vocab_size: int = 600) -> PreTrainedModel:
    model_type, fields = MODELS[name] if name in MODELS else BASES[name]
    depth = {"num_hidden_layers": 4} if name in MODELS else {}
    size = {"vocab_size": vocab_size, "max_position_embeddings": 1024, "eos_token_id": 1}
    return tiny_model(model_type, {**fields, **depth, **size}, seed=3)


class Compared:
    """The replies of both loops to one question, the logits where the model chose, and its number of passes.

    `logits` and `expected` map the length of the sequence to the logits (V) of the next token.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        form: str | None = None,
        limit: int = 160,
        tools: Any = SHORT,
        **options: Any,
    ) -> None:
        renderer = Renderer(tokenizer, vocab_size=model.config.vocab_size)
        prompt, stops = renderer.prompt_ids(QUESTION), renderer.stop_token_ids
        choice = {"tool_choice": "required", "parallel_tool_calls": False}
        plan = plan_reply(tokenizer, model.config.vocab_size, stops, tools, form=form, **choice)
        self.passes = 0

        def count(*_: Any) -> None:
            self.passes += 1

        def reply(seen: dict[int, torch.Tensor], **more: Any) -> RawReply:
            def note(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
                seen[ids.shape[1]] = scores[0]
                return scores

            settings = {**options, **more, "max_new_tokens": limit, "logits_processor": [note]}
            constraints = [plan.make_constraint(limit)]
            return generate_replies(model, tokenizer, [prompt], stops, constraints=constraints, **settings)[0]

        self.expected: dict[int, torch.Tensor] = {}
        self.logits: dict[int, torch.Tensor] = {}
        self.ordinary = reply(self.expected, generate=model.generate)
        hook = model.register_forward_hook(count)
        self.reply = reply(self.logits)
        hook.remove()

    def check(self) -> None:
        assert self.reply == self.ordinary
        assert self.logits.keys() <= self.expected.keys()
        for length, logits in self.logits.items():
            torch.testing.assert_close(logits, self.expected[length], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "form"),
    mostly_slow(product(("demo", "qwen3"), CALL_FORMS), [("demo", "hermes")]),
)
def test_the_reply_is_that_of_the_ordinary_loop(kind: str, form: str) -> None:
    tokenizer = tokenizer_of(kind)
    compared = Compared(make_base("llama", len(tokenizer)), tokenizer, form)
    compared.check()
    assert compared.passes < compared.reply.num_tokens


@pytest.mark.parametrize(
    "name",
    mostly_slow(FAMILIES, ["poe with everything"]),
)
def test_a_pass_of_several_tokens_gives_the_logits_of_every_family(name: str) -> None:
    compared = Compared(make_base(name), tokenizer_of())
    compared.check()
    assert compared.passes < compared.reply.num_tokens


@pytest.mark.parametrize("attach_at", mostly_slow([0, 1], [1]))
def test_a_fork_that_is_active_on_the_answer_reads_forced_tokens_as_answer(attach_at: int) -> None:
    cascade = Cascade(make_base("qwen3-sliding"), tokenizer_of())
    cascade.add_stage(StageConfig("f", layers="fork", attach_at=attach_at, rank=2, active="answer", head="none"))
    scramble(cascade.stages["f"], 2)
    compared = Compared(cascade.model("f"), cascade.tokenizer)
    compared.check()
    assert compared.passes < compared.reply.num_tokens


def test_states_that_are_no_keys_take_one_token_at_a_time() -> None:
    model = make_base("llama")
    cache = model(torch.ones(1, 3, dtype=torch.long), use_cache=True).past_key_values
    assert has_plain_layers(cache)
    cache.layers[1] = LinearAttentionLayer()
    assert not has_plain_layers(cache)
    assert not has_plain_layers(None)


@pytest.mark.slow
def test_a_base_with_linear_attention_keeps_the_ordinary_loop() -> None:
    types = {"layer_types": ["linear_attention", "full_attention"], "num_experts": 0}
    heads = {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }
    size = {"vocab_size": 600, "max_position_embeddings": 1024, "eos_token_id": 1, "head_dim": 8}
    compared = Compared(tiny_model("qwen3_next", {**types, **heads, **size}), tokenizer_of())
    compared.check()
    assert compared.passes == compared.reply.num_tokens + 1  # the stop token


@pytest.fixture(scope="module")
def cascade() -> Cascade:
    return Cascade(make_base("llama"), tokenizer_of())


@pytest.mark.parametrize("limit", mostly_slow([31, 33, 40], [33]))
def test_a_reply_is_closed_before_the_limit(cascade: Cascade, limit: int) -> None:
    compared = Compared(cascade.base, cascade.tokenizer, limit=limit, tools=TOOLS)
    compared.check()
    assert compared.reply.num_tokens < limit


def count_calls(limit: int) -> Callable[..., torch.Tensor]:
    calls: list[int] = []

    def criterion(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        calls.append(ids.shape[1])
        return torch.full((len(ids),), len(calls) >= limit)

    return criterion


@pytest.mark.parametrize("limit", [1, 12])
def test_stopping_criteria_are_asked_after_each_token(cascade: Cascade, limit: int) -> None:
    replies = []
    for generate in (None, cascade.base.generate):
        criteria = StoppingCriteriaList([count_calls(limit)])
        options = {"tool_choice": "required", "max_new_tokens": 48, "stopping_criteria": criteria}
        replies.append(cascade.chat(QUESTION, TOOLS, generate=generate, **options))
    assert replies[0] == replies[1]
    assert replies[0].finish_reason == "length"


def test_max_time_ends_the_reply(cascade: Cascade) -> None:
    answer = cascade.chat(QUESTION, TOOLS, tool_choice="required", max_new_tokens=48, max_time=0.0)
    assert answer.finish_reason == "length"
    assert len(cascade.tokenizer(answer.raw).input_ids) <= 2


def test_a_stream_has_the_pieces_of_the_ordinary_loop(cascade: Cascade) -> None:
    options = {"tool_choice": "required", "max_new_tokens": 160, "parallel_tool_calls": False, "stream": True}
    pieces = [list(cascade.chat(QUESTION, SHORT, generate=g, **options)) for g in (None, cascade.base.generate)]
    assert pieces[0] == pieces[1]
    assert len(pieces[0]) > 9


def test_sampled_replies_are_valid_and_skip_the_model(cascade: Cascade) -> None:
    torch.manual_seed(0)
    passes = []
    hook = cascade.base.register_forward_hook(lambda *_: passes.append(1))
    answer = cascade.chat(QUESTION, SHORT, tool_choice="required", max_new_tokens=160, do_sample=True, temperature=0.7)
    hook.remove()
    assert not answer.problems
    assert len(passes) < len(cascade.tokenizer(answer.raw).input_ids)


def test_other_options_keep_the_ordinary_loop() -> None:
    assert supports_options(["do_sample", "streamer"])
    for option in ("num_beams", "stop_strings", "assistant_model", "return_dict_in_generate", "past_key_values"):
        assert not supports_options(["do_sample", option])
