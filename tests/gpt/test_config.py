"""GPTConfig refuses what no model can be built from and names the field."""

from dataclasses import asdict, replace

import pytest

from kernels.gpt import GPT, PRESETS, GPTConfig


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 0),
        ("block_size", -1),
        ("n_layer", 1.5),
        ("n_head", True),
        ("n_embd", 33),  # no multiple of n_head
        ("dropout", 1.0),
        ("dropout", float("nan")),
        ("dropout", "0.1"),
        ("bias", 1),
        ("norm", "middle"),
        ("activation", "tanh"),
    ],
)
def test_bad_value_is_named(make_config, field, value):
    with pytest.raises(ValueError, match=rf"{field}.*(must|multiple)"):
        make_config(**{field: value})


def test_dictionary_round_trip(make_config):
    config = make_config(norm="post", dropout=0.25)
    assert GPTConfig.from_dict(asdict(config)) == config
    with pytest.raises(ValueError, match="heads"):
        GPTConfig.from_dict(asdict(config) | {"heads": 2})


def test_char_preset_is_the_original_transformer():
    model = PRESETS["char"].model
    assert (model.n_layer, model.n_head, model.n_embd, model.block_size) == (8, 8, 512, 128)
    assert (model.norm, model.activation, model.dropout) == ("post", "relu", 0.14)
    names = dict(GPT(replace(model, n_layer=1)).named_parameters())
    assert "blocks.0.attention.qkv.bias" not in names
    assert "blocks.0.attention.proj.bias" in names
    assert "position_embedding.weight" in names


def test_gpt2_preset_has_gpt2_smalls_parameters():
    model = GPT(replace(PRESETS["gpt2"].model, n_layer=1))
    block = sum(parameter.numel() for parameter in model.blocks[0].parameters())
    rest = sum(parameter.numel() for parameter in model.parameters()) - block
    assert rest + 12 * block == 124_439_808  # Radford et al. (2019), the released weights
