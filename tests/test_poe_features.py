"""Features that nanochat added to its network: each one, all together, and under a stage."""

import itertools

import pytest
import torch

from conftest import scramble
from poe import Cascade, StageConfig
from poe.decoding import Exit
from poe.errors import FamilyError, StageError
from poe.modeling.modeling_poe import PoEConfig, PoEForCausalLM

FEATURES = {
    "scalars": {"layer_scalars": True},
    "value embeddings": {"value_embedding_layers": [1, 3], "value_gate_channels": 8},
    "windows": {"layer_types": ["sliding_attention"] * 3 + ["full_attention"], "sliding_window": 4},
    "smear": {"smear_channels": 8},
    "backout": {"backout_layer": 2},
    "stage heads": {"stage_layers": [2, 1, 1], "stage_heads": True},
    "vote": {"stage_layers": [2, 1, 1], "combiner": "log_op"},
}
COMBINATIONS = [(name,) for name in FEATURES] + [tuple(FEATURES)]
IDS = torch.tensor([[1, 5, 9, 13, 17, 21, 7, 8], [1, 8, 12, 3, 40, 41, 42, 43]])


def make(features: tuple[str, ...], **more) -> PoEForCausalLM:
    torch.manual_seed(0)
    chosen = dict(itertools.chain.from_iterable(FEATURES[name].items() for name in features))
    shape = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = PoEForCausalLM(PoEConfig(**shape, num_key_value_heads=2, bos_token_id=1, eos_token_id=2, **chosen, **more))
    scramble(model)
    return model.eval()


@pytest.fixture(params=COMBINATIONS, ids=" + ".join)
def features(request) -> tuple[str, ...]:
    return request.param


@torch.no_grad()
def test_a_feature_changes_the_logits(features) -> None:
    plain, model = make(()), make(features)
    model.load_state_dict(plain.state_dict(), strict=False)
    assert not torch.allclose(plain(IDS).logits, model(IDS).logits)


@torch.no_grad()
def test_one_token_at_a_time_gives_the_same_logits(features) -> None:
    model = make(features)
    whole = model(IDS).logits
    cache = None
    for position in range(IDS.shape[1]):
        step = model(IDS[:, position : position + 1], past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        torch.testing.assert_close(step.logits[:, 0], whole[:, position])


@torch.no_grad()
def test_left_padding_and_packing_do_not_leak(features) -> None:
    model = make(features)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    alone = model.generate(IDS[:1], attention_mask=torch.ones(1, 8), **options)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), IDS], 1)
    together = model.generate(padded, attention_mask=(torch.arange(11) > 2).long().expand(2, -1), **options)
    assert torch.equal(together[:1, 3:], alone)
    packed = model(IDS.reshape(1, -1), position_ids=torch.arange(8).repeat(2)[None], use_cache=False).logits
    torch.testing.assert_close(packed.reshape(2, 8, -1), model(IDS).logits)


@torch.no_grad()
def test_a_new_stage_equals_the_base_and_does_not_change_it(features) -> None:
    base = make(features)
    before = base(IDS).logits
    cascade = Cascade(base).add_stage(StageConfig("t", 2))
    top = cascade(IDS, stage=None, strategy=Exit(4)).logits  # the last stage's prediction, without the others' votes
    assert torch.equal(top, before) == (base.config.combiner == "last")
    assert torch.equal(cascade(IDS).logits, top)
    scramble(cascade.stages["t"])
    assert not torch.allclose(cascade(IDS).logits, top)
    assert torch.equal(cascade(IDS, stage=None).logits, before)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(IDS)
    cached, uncached = (cascade.generate(input_ids=IDS, use_cache=cache, **options) for cache in (True, False))
    assert torch.equal(cached, uncached)


def test_a_saved_base_loads_the_same(features, tmp_path) -> None:
    model = make(features)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(PoEForCausalLM.from_pretrained(tmp_path)(IDS).logits, model(IDS).logits)


@torch.no_grad()
def predictions(model: PoEForCausalLM, ids: torch.Tensor = IDS) -> list[torch.Tensor]:
    """The logits at every boundary, straight from the definition: the shared head plus the stage's own."""
    states = model.model.stages(ids, boundaries=model.config.boundaries)
    own = [head.weight for head in model.lm_head_stages] if model.config.stage_heads else [0.0] * 9
    cap = model.config.final_logit_softcapping
    return [cap * torch.tanh(h @ (model.lm_head.weight + w).T / cap) for h, w in zip(list(states), own, strict=False)]


@pytest.mark.parametrize("heads", [True, False])
@pytest.mark.parametrize("more", [(), ("backout", "windows", "value embeddings", "scalars", "smear")])
@torch.no_grad()
def test_every_boundary_is_an_exit(heads, more) -> None:
    model = make((*more, "stage heads")) if heads else make(more, stage_layers=[2, 1, 1])
    cascade, expected = Cascade(model), predictions(model)
    for depth, logits in zip([2, 3, 4], expected, strict=True):
        torch.testing.assert_close(cascade(IDS, strategy=Exit(depth)).logits, logits)
    assert torch.equal(cascade(IDS, strategy=Exit(4)).logits, model(IDS).logits)
    assert len({int(p.data_ptr()) for d in (2, 3, 4) for p in cascade.model(None, Exit(d)).model.parameters()}) == len(
        list(model.model.parameters())
    )
    with pytest.raises(FamilyError, match=r"exit is after 1 layers, but .* after its stages: expected 2, 3, 4"):
        cascade(IDS, strategy=Exit(1))


@torch.no_grad()
def test_log_op_is_the_normalized_mean_of_log_probabilities() -> None:
    model = make(("stage heads", "vote"))
    votes = torch.stack([logits.log_softmax(-1) for logits in predictions(model)]).mean(0)
    torch.testing.assert_close(model(IDS).logits, votes - votes.logsumexp(-1, keepdim=True))
    torch.testing.assert_close(model(IDS).logits.exp().sum(-1), torch.ones(IDS.shape))


@torch.no_grad()
def test_a_stage_at_a_boundary_starts_as_its_prediction() -> None:
    model = make(("stage heads", "backout", "scalars"))
    for depth, logits in zip([2, 3, 4], predictions(model), strict=True):
        cascade = Cascade(model).add_stage(StageConfig("low", 1, attach_at=depth))
        torch.testing.assert_close(cascade(IDS).logits, logits)
        assert torch.equal(cascade(IDS).logits, cascade(IDS, stage=None, strategy=Exit(depth)).logits)
    with pytest.raises(StageError, match=r"attach_at is 1, but .* expected 2, 3, 4"):
        Cascade(model).add_stage(StageConfig("low", 1, attach_at=1))


def test_stage_layers_that_do_not_sum_to_the_layers_are_refused() -> None:
    for wrong, said in (({"stage_layers": [2, 1]}, "sum to 4"), ({"combiner": "mean"}, "'log_op'")):
        with pytest.raises(ValueError, match=said):
            make((), **wrong)


def test_value_embeddings_need_the_tokens() -> None:
    with pytest.raises(ValueError, match="input_ids"):
        make(("value embeddings",))(inputs_embeds=torch.zeros(1, 3, 32))


def test_the_published_shape_has_the_published_size() -> None:
    """1,384 M parameters, 604 M of them value embeddings; a stage of four layers adds 163.6 M."""
    shape = {"vocab_size": 32768, "hidden_size": 1536, "num_hidden_layers": 24, "num_attention_heads": 12}
    with torch.device("meta"):
        model = PoEForCausalLM(PoEConfig(**shape, layer_scalars=True, value_embedding_layers=list(range(1, 24, 2))))
    count = {name: p.numel() for name, p in model.named_parameters()}
    assert round(sum(count.values()) / 1e6) == 1384
    assert round(sum(n for name, n in count.items() if "value_embed" in name) / 1e6) == 604
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    assert round((4 * layer + 32768 * 1536) / 1e6, 1) == 163.6
