"""Attention by documents and answers gives what attention of the whole packed row with a mask gives."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import scramble, tiny_model
from poe import Cascade, StageConfig
from poe.data.packing import Batch
from poe.modeling.answer_boundary import AnswerBoundary
from poe.modeling.span_attention import NAME, attend_by_span, find_documents
from poe.training.forward import recompute_activations
from poe.training.hidden_states.sources import AnswerTokens, WholeModel

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
        if not by_span:
            boundary._layers_config = None
        read = boundary.below(ids, positions)
        hidden = boundary.above(read, ids, positions, active)
        hidden.square().sum().backward()
        results.append([*(x for x in read if x is not None), hidden, *(p.grad.clone() for p in stage.parameters())])
        stage.zero_grad()
    torch.testing.assert_close(results[0], results[1])
    assert cascade.base.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", FIELDS)
def test_what_is_computed_again_in_the_backward_pass_is_the_same(name: str) -> None:
    cascade = CASCADES[name]
    stage = cascade.stages["f"].requires_grad_(True)
    ids = torch.randint(3, 50, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[*range(18), *range(22)], [*range(40)]])
    batch = Batch(ids, torch.where(positions % 7 < 3, -100, ids), positions)
    model = cascade.model("f")
    boundary = AnswerBoundary(cascade.base, stage)
    sources = (WholeModel(model), AnswerTokens(model, boundary, lambda batch: boundary.below(ids, positions), False))
    for source in sources:
        gradients = []
        for layers in ((), stage.layers):
            stage.zero_grad()
            with recompute_activations(layers):
                source(batch).square().sum().backward()
            gradients.append([p.grad.clone() for p in stage.parameters()])
        for plain, again in zip(*gradients, strict=True):
            assert torch.equal(plain, again)


def test_documents_are_found_in_a_mask_that_has_nothing_else() -> None:
    document = torch.tensor([[0] * 3 + [1] * 4 + [2], [0] * 8])
    order = torch.arange(8)
    mask = (document[:, :, None] == document[:, None]) & (order[:, None] >= order)
    found = find_documents(mask[:, None])
    assert [[(span.start, span.stop) for span in row] for row in found] == [[(0, 3), (3, 7), (7, 8)], [(0, 8)]]
    for row, query, key in ((1, 5, 0), (0, 4, 0), (1, 2, 4)):  # a window, another document, and a later token
        other = mask.clone()
        other[row, query, key] ^= True
        assert find_documents(other[:, None]) is None


@pytest.mark.parametrize("count", [2, 15, 16, 40])
def test_nan_is_not_hidden(count: int) -> None:
    """torch's causal attention on a CPU turns it into zeros for fewer than 16 tokens, which fill a block here."""
    cascade = Cascade(tiny_model("llama"))
    cascade.base.model.layers[0].self_attn.q_proj.weight.data[0, 0] = float("nan")
    positions = torch.arange(count).repeat(2)[None]
    batch = Batch(torch.full_like(positions, 5), torch.full_like(positions, 5), positions)
    assert WholeModel(cascade.base)(batch).isnan().any()


def test_each_call_gets_the_keys_of_its_span_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two documents of 70 and 130 tokens, of which an answer of 5 ends each, in whole blocks of 64."""
    shapes: list[tuple[int, int]] = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def counted(query: torch.Tensor, key: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        shapes.append((query.shape[2], key.shape[2]))
        return plain(query, key, *args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    cascade = CASCADES["llama"]
    boundary = AnswerBoundary(cascade.base, cascade.stages["f"])
    ids = torch.arange(200)[None] % 50
    positions = torch.tensor([[*range(70), *range(130)]])
    active = positions >= torch.tensor([[65] * 70 + [125] * 130])
    read = boundary.below(ids, positions)
    assert shapes == [(128, 128), (192, 192)] * 2
    shapes.clear()
    boundary.above(read, ids, positions, active)
    assert shapes == [(64, 128), (64, 192)]
    shapes.clear()
    WholeModel(cascade.base)(Batch(ids, ids, positions))
    assert shapes == [(128, 128), (192, 192)] * 2


def test_the_attention_is_the_base_s_own_again_after_an_error() -> None:
    cascade = CASCADES["llama"]
    config, boundary = cascade.base.config, AnswerBoundary(cascade.base, cascade.stages["f"])
    with pytest.raises(IndexError):
        boundary.below(torch.tensor([[99]]), torch.tensor([[0]]))
    assert config._attn_implementation == "sdpa"
    with attend_by_span(config, torch.device("cpu")):
        assert config._attn_implementation == NAME
    config = Cascade(tiny_model("llama")).base.config
    config._attn_implementation = "eager"
    with attend_by_span(config, torch.device("cpu")):
        assert config._attn_implementation == "eager"
