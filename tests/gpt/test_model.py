"""The GPT itself: initialisation, causality, and both layer sets as one model."""

import math

import pytest
import torch

from kernels.gpt import FUSED, GPT, TORCH

VARIANTS = [
    {"norm": "pre", "activation": "gelu"},
    {"norm": "post", "activation": "relu", "qkv_bias": False, "tie_weights": False},
    {"bias": False},
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_seed_gives_equal_parameters_whatever_the_layers(make_config, variant):
    config = make_config(**variant)
    first, second = GPT(config, TORCH, seed=3).state_dict(), GPT(config, FUSED, seed=3).state_dict()
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = GPT(config, TORCH, seed=4).state_dict()
    assert not torch.equal(first["token_embedding.weight"], other["token_embedding.weight"])


def test_initial_standard_deviations_are_gpt2s(make_config):
    state = GPT(make_config(n_embd=128, n_layer=3)).state_dict()
    assert state["blocks.0.mlp.fc.weight"].std().item() == pytest.approx(0.02, rel=0.03)
    narrow = 0.02 / math.sqrt(6)
    for name in ("attention.proj", "mlp.proj"):
        assert state[f"blocks.1.{name}.weight"].std().item() == pytest.approx(narrow, rel=0.03)
        assert not state[f"blocks.1.{name}.bias"].any()
    assert torch.equal(state["blocks.2.norm1.weight"], torch.ones(128))


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_of_one_layer_set_give_the_same_logits_in_the_other(make_config, variant):
    config = make_config(**variant)
    source, target = GPT(config, TORCH, seed=1), GPT(config, FUSED, seed=2)
    target.load_state_dict(source.state_dict())
    idx = torch.randint(config.vocab_size, (3, 32), generator=torch.Generator().manual_seed(0))
    logits, loss = source(idx, idx)
    fused_logits, fused_loss = target(idx, idx)
    assert logits.shape == (3, 32, config.vocab_size)
    torch.testing.assert_close(fused_logits, logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fused_loss, loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_later_token_changes_no_earlier_logits(make_config, layers, norm):
    model = GPT(make_config(norm=norm), layers)
    idx = torch.zeros(1, 32, dtype=torch.int64)
    changed = idx.clone()
    changed[0, 20] = 5
    logits, other = model(idx)[0], model(changed)[0]
    torch.testing.assert_close(other[:, :20], logits[:, :20], rtol=0, atol=1e-6)
    assert ((other - logits)[:, 20:].abs().amax(-1) > 1e-5).all()


def test_first_loss_is_that_of_a_uniform_guess(make_config, layers):
    idx = torch.randint(17, (8, 32), generator=torch.Generator().manual_seed(0))
    loss = GPT(make_config(), layers)(idx, idx.roll(1, 1))[1]
    assert loss.item() == pytest.approx(math.log(17), abs=0.1)


def test_dropout_acts_in_training_only(make_config, layers):
    model = GPT(make_config(dropout=0.5), layers)
    idx = torch.zeros(1, 8, dtype=torch.int64)
    assert not torch.equal(model(idx)[0], model(idx)[0])
    model.eval()
    assert torch.equal(model(idx)[0], model(idx)[0])


def test_too_long_context_is_refused(make_config):
    with pytest.raises(ValueError, match="33 tokens, block_size is 32"):
        GPT(make_config())(torch.zeros(1, 33, dtype=torch.int64))
