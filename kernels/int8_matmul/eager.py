"""Int8 matmul by PyTorch's own ops: torch._int_mm where it is right, else exact float32.

On GPUs torch._int_mm wants more than 16 rows and K and N that are multiples of 8; on CPUs without
VNNI it has been seen to saturate (https://github.com/huggingface/optimum-quanto/pull/309), and with
K = 1 it is wrong (torch 2.13).  There the product is summed in float32 over 1024 terms at a time:
no sum exceeds 2^24, so it is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.int8_matmul import reference

backward = None

EXACT_TERMS = 1024  # 1024 * 128 * 128 = 2^24, the last integer up to which float32 has them all


def unsupported(*_: object) -> str | None:
    return None


def _is_int_mm_right(x: Tensor, weight: Tensor) -> bool:
    if x.is_cuda:
        return x.shape[0] > 16 and x.shape[1] % 8 == 0 and weight.shape[0] % 8 == 0
    return x.is_cpu and x.shape[1] > 1 and torch.cpu._is_vnni_supported()


def _without_overlap(x: Tensor) -> Tensor:
    """`x`, copied where its rows share memory: torch._int_mm misreads it on CPUs (torch 2.13)."""
    inner = 1 if x.stride(1) == 1 else 0
    return x if x.stride(1 - inner) >= x.shape[inner] else x.contiguous()


def integer_product(x: Tensor, weight: Tensor) -> Tensor:
    """x [M, K] times the transpose of weight [N, K], both int8, as int32 [M, N]."""
    if _is_int_mm_right(x, weight):
        return torch._int_mm(_without_overlap(x), _without_overlap(weight).t())
    sums = x.new_zeros((x.shape[0], weight.shape[0]), dtype=torch.int32)
    for x_part, weight_part in zip(
        x.split(EXACT_TERMS, 1), weight.split(EXACT_TERMS, 1), strict=True
    ):
        sums += (x_part.float() @ weight_part.float().t()).int()
    return sums


def forward(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor | None,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    activation: str,
    mode: str,
    out_dtype: torch.dtype,
) -> tuple[Tensor]:
    call = x, weight, x_scale, weight_scale, bias, activation, mode, out_dtype
    return reference.run(*call, product=integer_product)
