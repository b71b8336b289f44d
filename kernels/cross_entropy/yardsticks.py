"""What linear_cross_entropy is measured beside: the two ops one after the other, and PyTorch's own
function with its best options."""

from __future__ import annotations

import functools
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_then_cross_entropy(input: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(input, linear_weight), target)


def _choices() -> list[Any]:
    """torch.nn.LinearCrossEntropyOptions worth trying: its own choice, and chunks by policy."""
    make = torch.nn.LinearCrossEntropyOptions
    sizes = (256, 512, 1024)
    return [make()] + [
        make(batch_chunk_size=size, chunking_method=None, acc_policy=policy)
        for size in sizes
        for policy in ("accurate", "compact")
    ]


@functools.cache
def best_options(dtype: torch.dtype, rows: int, features: int, classes: int) -> Any:
    """The quickest of `_choices` here, each tried once after a warm-up of its first chunk."""
    x = torch.randn(rows, features).to(dtype).requires_grad_()
    linear_weight = (torch.randn(classes, features) / features**0.5).to(dtype).requires_grad_()
    target = torch.randint(0, classes, (rows,))

    def seconds(options: Any) -> float:
        start = time.perf_counter()
        F.linear_cross_entropy(x, linear_weight, target, options=options).backward()
        return time.perf_counter() - start

    linear_then_cross_entropy(x[:256], linear_weight, target[:256]).backward()
    return min(_choices(), key=seconds)


def torch_in_chunks(input: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
    """F.linear_cross_entropy (torch 2.13) with the options that are quickest on this machine."""
    if input.dtype == torch.float64:  # the oracle
        return linear_then_cross_entropy(input, linear_weight, target)
    options = best_options(input.dtype, *input.shape, linear_weight.shape[0])
    loss: Tensor = F.linear_cross_entropy(input, linear_weight, target, options=options)
    return loss
