"""Attention by documents and answers gives what attention of the whole packed row with a mask gives."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import scramble, tiny_model
from poe import Cascade, StageConfig
from poe.modeling.answer_boundary import AnswerBoundary
from poe.modeling.span_attention import NAME, attend_by_span

LENGTH = 40
FIELDS = {
    "llama": {},
    "gemma3_text": {
        "num_hidden_layers": 3,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "poe": {"num_hidden_layers": 3},
}


def forked(model_type: str) -> Cascade:
    cascade = Cascade(tiny_model(model_type, FIELDS[model_type], torch.float64))
    assert cascade.base.config._attn_implementation == "sdpa"
    cascade.add_stage(StageConfig("f", layers="fork", attach_at=1, rank=4, active="answer", head="none"))
    scramble(cascade.stages["f"], seed=1)
    return cascade


CASCADES = {name: forked(name) for name in FIELDS}


@st.composite
def packed_rows(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ids, positions and active tokens (B, T) of rows of one to four documents with any number of turns."""
    positions, active = [], []
    for _ in range(draw(st.integers(1, 3))):
        cuts = sorted(draw(st.sets(st.integers(1, LENGTH - 1), max_size=3)))
        positions.append([x for a, b in zip([0, *cuts], [*cuts, LENGTH], strict=True) for x in range(b - a)])
        active.append(draw(st.lists(st.booleans(), min_size=LENGTH, max_size=LENGTH)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    ids = torch.randint(3, 50, (len(positions), LENGTH), generator=generator)
    return ids, torch.tensor(positions), torch.tensor(active)


@settings(max_examples=25, deadline=None)
@given(rows=packed_rows())
@pytest.mark.parametrize("name", FIELDS)
def test_spans_give_what_a_mask_gives(name: str, rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    cascade = CASCADES[name]
    stage, results = cascade.stages["f"].requires_grad_(True), []
    ids, positions, active = rows
    for by_span in (True, False):
        boundary = AnswerBoundary(cascade.base, stage)
        with pytest.MonkeyPatch.context() as patch:
            if not by_span:
                patch.setattr(AnswerBoundary, "_by_span", lambda self, ids: False)
            read = boundary.below(ids, positions)
            hidden = boundary.above(read, ids, positions, active)
        hidden.square().sum().backward()
        results.append([*(x for x in read if x is not None), hidden, *(p.grad.clone() for p in stage.parameters())])
        stage.zero_grad()
    torch.testing.assert_close(results[0], results[1])
    assert cascade.base.config._attn_implementation == "sdpa"


def test_each_call_gets_the_keys_of_its_span_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two documents of 10 and 30 tokens, of which an answer of 5 ends each."""
    shapes: list[tuple[int, int]] = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def counted(query: torch.Tensor, key: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        shapes.append((query.shape[2], key.shape[2]))
        return plain(query, key, *args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    cascade = CASCADES["llama"]
    boundary = AnswerBoundary(cascade.base, cascade.stages["f"])
    ids = torch.arange(LENGTH)[None]
    positions = torch.tensor([[*range(10), *range(30)]])
    active = positions >= torch.tensor([[5] * 10 + [25] * 30])
    read = boundary.below(ids, positions)
    assert shapes == [(10, 10), (30, 30)] * 2
    shapes.clear()
    boundary.above(read, ids, positions, active)
    assert shapes == [(5, 10), (5, 30)]


def test_the_attention_is_the_base_s_own_again_after_an_error() -> None:
    cascade = CASCADES["llama"]
    config, boundary = cascade.base.config, AnswerBoundary(cascade.base, cascade.stages["f"])
    with pytest.raises(IndexError):
        boundary.below(torch.tensor([[99]]), torch.tensor([[0]]))
    assert config._attn_implementation == "sdpa"
    with attend_by_span(config):
        assert config._attn_implementation == NAME
    config = Cascade(tiny_model("llama")).base.config
    config._attn_implementation = "eager"
    with attend_by_span(config):
        assert config._attn_implementation == "eager"
