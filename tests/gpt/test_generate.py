"""Generation: greedy and sampled, deterministic, over the last block_size tokens."""

import pytest
import torch

from kernels.gpt import GPT
from kernels.gpt.generate import generate

PROMPT = torch.tensor([1, 2, 3])


@pytest.fixture
def model(make_config, layers):
    # Wide initial weights, so that the tokens' probabilities differ clearly.
    model = GPT(make_config(dropout=0.3), layers)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)
    return model


def test_greedy_takes_the_likeliest_and_crops_the_context(model):
    model.eval()
    tokens = PROMPT
    for token in generate(model, PROMPT, 40, temperature=0):  # passes block_size = 32
        logits = model(tokens[None, -32:])[0]
        assert token == logits[0, -1].argmax()
        tokens = torch.cat((tokens, torch.tensor([token])))
    assert len(tokens) == 43


def test_sampling_follows_the_seed(model):
    runs = [list(generate(model, PROMPT, 30, seed=seed)) for seed in (5, 5, 6)]
    assert runs[0] == runs[1] != runs[2]


def test_top_k(model):
    greedy = list(generate(model, PROMPT, 10, temperature=0))
    assert list(generate(model, PROMPT, 10, top_k=1)) == greedy
    everything = list(generate(model, PROMPT, 10, top_k=999))
    assert everything == list(generate(model, PROMPT, 10))
    model.eval()
    likeliest = set(model(PROMPT[None])[0][0, -1].topk(3).indices.tolist())
    firsts = {next(generate(model, PROMPT, 1, 5.0, top_k=3, seed=seed)) for seed in range(60)}
    assert firsts == likeliest


def test_low_temperature_is_almost_greedy(model):
    greedy = list(generate(model, PROMPT, 20, temperature=0))
    for temperature in (1e-6, 1e-38, 1e-320):  # the last two overflow, or are 0, in float32
        assert list(generate(model, PROMPT, 20, temperature)) == greedy


def test_training_mode_is_kept(model):
    model.train()
    list(generate(model, PROMPT, 2))
    assert model.training


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": torch.tensor([], dtype=torch.int64)}, "prompt"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k"),
    ],
)
def test_bad_arguments_are_named(make_config, changes, message):
    with pytest.raises(ValueError, match=message):
        generate(GPT(make_config()), **{"prompt": PROMPT, "count": 1} | changes)
