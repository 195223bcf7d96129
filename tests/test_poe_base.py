"""The PoE base network: a transformers model in every way that users rely on."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from poe import Cascade  # noqa: F401  registers the classes with transformers
from poe.modeling.modeling_poe import PoEConfig, PoEForCausalLM


def tiny(**fields: object) -> PoEForCausalLM:
    shape = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = PoEForCausalLM(PoEConfig(**{**shape, "num_key_value_heads": 2, **fields})).eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def model() -> PoEForCausalLM:
    return tiny()


def test_generates_the_same_with_cache_without_and_padded(model: PoEForCausalLM) -> None:
    ids = torch.randint(2, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    greedy = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    cached = model.generate(ids, attention_mask=torch.ones_like(ids), **greedy)
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **greedy)
    padding = torch.zeros(2, 4, dtype=torch.long)
    mask = torch.cat([padding, torch.ones_like(ids)], 1)
    padded = model.generate(torch.cat([padding, ids], 1), attention_mask=mask, **greedy)
    assert torch.equal(cached, plain)
    assert torch.equal(cached[:, 9:], padded[:, 13:])
    assert len(set(cached[0, 9:].tolist())) > 2  # not a constant, which would be equal anyhow


def test_documents_packed_in_a_row_do_not_see_each_other(model: PoEForCausalLM) -> None:
    ids = torch.randint(2, 64, (2, 9), generator=torch.Generator().manual_seed(2))
    positions = torch.arange(9).repeat(2)[None]
    packed = model(ids.reshape(1, -1), position_ids=positions, use_cache=False).logits.reshape(2, 9, -1)
    assert torch.allclose(packed, model(ids).logits, atol=1e-5)


def test_saves_and_reloads_to_the_same_logits(model: PoEForCausalLM, tmp_path) -> None:
    model.save_pretrained(tmp_path)
    ids = torch.arange(12)[None]
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(reloaded) is PoEForCausalLM
    assert torch.equal(reloaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_implementations_agree(model: PoEForCausalLM, implementation: str) -> None:
    ids = torch.arange(20)[None]
    other = tiny()
    other.set_attn_implementation(implementation)
    assert torch.allclose(other(ids).logits, model(ids).logits, atol=1e-5)


def test_logits_stay_inside_the_soft_cap() -> None:
    capped = tiny(final_logit_softcapping=2.0)
    capped.lm_head.weight.data.mul_(100)
    assert capped(torch.arange(8)[None]).logits.abs().max() <= 2.0


def test_loss_is_the_shifted_cross_entropy(model: PoEForCausalLM) -> None:
    ids = torch.randint(2, 64, (2, 9))
    output = model(ids, labels=ids)
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert torch.allclose(output.loss, expected, atol=1e-5)


def test_a_layer_has_twelve_d_squared_weights_and_a_new_network_only_applies_its_head() -> None:
    config = PoEConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    model = PoEForCausalLM(config)
    assert sum(p.numel() for p in model.model.layers[0].parameters()) == 12 * 32**2
    assert not any(p.any() for n, p in model.named_parameters() if n.endswith(("o_proj.weight", "down_proj.weight")))


def test_golden_logits(model: PoEForCausalLM) -> None:
    """Numbers seen once: a change that claims to be neutral must leave them."""
    logits = model(torch.tensor([[3, 14, 15, 9, 26]])).logits[0, -1, :4]
    assert torch.allclose(logits, torch.tensor(GOLDEN), atol=1e-4)


GOLDEN = [-0.75885, -1.73063, -1.03083, -0.38962]
