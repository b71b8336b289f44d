"""Continues a text: one token at a time, greedily or sampled."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kernels.attention import KeyValueCache
from kernels.gpt.model import GPT


@torch.inference_mode()
def next_token(
    model: GPT,
    tokens: torch.Tensor,
    cache: list[KeyValueCache],
    temperature: float,
    top_k: int | None,
    generator: torch.Generator,
) -> int:
    """The token chosen after `tokens` [T], of which the model sees the last block_size.

    `cache` holds the keys and values of the first of them.  Past block_size every token's position
    changes with each new one, so all are computed again.
    """
    if len(tokens) <= model.config.block_size:
        logits, _ = model(tokens[None, cache[0].length :], cache=cache)
    else:
        logits, _ = model(tokens[None, -model.config.block_size :])
    last = logits[0, -1].float()  # [V]
    if temperature == 0:
        return int(last.argmax())
    if top_k is not None and top_k < last.numel():
        last = last.masked_fill(last < last.topk(top_k).values[-1], float("-inf"))
    # Relative to the largest, so that nothing overflows however low the temperature.
    last = (last - last.max()) / max(temperature, torch.finfo(last.dtype).tiny)
    probabilities = torch.softmax(last, dim=-1).cpu()
    return int(torch.multinomial(probabilities, 1, generator=generator))


def generate(
    model: GPT,
    prompt: torch.Tensor,
    count: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
) -> Iterator[int]:
    """Yields `count` tokens that continue `prompt`, int64 [T] with T at least 1.

    `temperature` divides the logits, 0 takes the likeliest token; `top_k` samples among the k
    likeliest only. The same seed gives the same tokens. Dropout is off while a token is chosen.
    Raises ValueError on an argument out of range, before anything is generated.
    """
    if prompt.dim() != 1 or prompt.numel() == 0:
        raise ValueError(f"prompt must be [T] with T at least 1, got {list(prompt.shape)}")
    if not temperature >= 0:
        raise ValueError(f"temperature must be 0 or more, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be 1 or more, got {top_k}")
    return _tokens(model, prompt, count, temperature, top_k, seed)


def _tokens(
    model: GPT,
    prompt: torch.Tensor,
    count: int,
    temperature: float,
    top_k: int | None,
    seed: int,
) -> Iterator[int]:
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same draw on every device
    tokens = prompt.to(model.token_embedding.weight.device)
    cache = model.new_cache(1)
    kept = model.config.block_size + 1  # one more than is seen tells that the cache is of no use
    for _ in range(count):
        was_training = model.training
        model.eval()
        token = next_token(model, tokens, cache, temperature, top_k, generator)
        model.train(was_training)
        tokens = torch.cat((tokens, tokens.new_tensor([token])))[-kept:]
        yield token
