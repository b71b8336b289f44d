"""int8 matmul in Triton: rows are quantised by one kernel, the product and all after it by another.

The kernels are in triton_rows.py and triton_product.py, their tiles in triton_plan.py.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from kernels import _triton
from kernels.int8_matmul import triton_plan
from kernels.int8_matmul.triton_product import combine_kernel, product_kernel
from kernels.int8_matmul.triton_rows import quantize_rows

__all__ = ["backward", "forward", "unsupported"]

backward = None


def unsupported(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor | None,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    activation: str,
    mode: str,
    out_dtype: torch.dtype,
) -> str | None:
    """None where these kernels accept the call, else one sentence saying why not."""
    accepted = (torch.int8,) if mode in ("int8", "raw") else _triton.DTYPES
    reason = _triton.unsupported(product_kernel, x, bias, dtypes=accepted)
    if reason is not None or mode == "raw":
        return reason
    if bias is not None and bias.dtype not in _triton.DTYPES:
        return f"bias is {bias.dtype}, not one of float32, bfloat16, float16"
    if out_dtype not in _triton.DTYPES:
        return f"out_dtype {out_dtype} is not one of float32, bfloat16, float16"
    if out_dtype == torch.bfloat16 and _triton.interpreted(product_kernel):
        return "Triton's interpreter rounds bfloat16 wrongly"
    return None


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
    """(y [M, N],) of x [M, K] and weight [N, K]: README.md says what each mode computes."""
    if mode in ("dynamic", "static"):
        width = triton_plan.padded_width(x.shape[0], weight.shape[1])
        x, x_scale = quantize_rows(x, x_scale if mode == "static" else None, width=width)
    x, weight = triton_plan.prepared(x, weight)
    out_dtype = torch.int32 if mode == "raw" else out_dtype
    y = torch.empty(x.shape[0], weight.shape[0], dtype=out_dtype, device=x.device)
    with _triton.device_of(x):
        _multiply(x, weight, (x_scale, weight_scale, bias), activation, y)
    return (y,)


def _multiply(
    x: Tensor,
    weight: Tensor,
    factors: tuple[Tensor | None, Tensor | None, Tensor | None],  # both scales and the bias
    activation: str,
    y: Tensor,
) -> None:
    (rows, depth), cols = x.shape, weight.shape[0]
    layout = triton_plan.layout(x, weight)
    plan = triton_plan.plan(x, weight, layout, activation)
    tile, shared = plan.tile, plan.parts > 1
    out = y
    if shared:
        sums = torch.float32 if x.is_floating_point() else torch.int32
        out = torch.empty(plan.parts, rows, cols, dtype=sums, device=x.device)
    strides = tuple(int(scale is not None and scale.numel() > 1) for scale in factors[:2])
    vectors_n = cols // layout.vec_n
    product_kernel[(plan.tiles, plan.parts)](
        x,
        weight,
        *((None,) * 3 if shared else factors),
        out,
        rows,
        vectors_n,
        depth // layout.vec_k,
        layout.stride_a,
        layout.stride_b,
        *strides,
        plan.part_blocks,
        VEC_K=layout.vec_k,
        VEC_N=layout.vec_n,
        ALONG_K=layout.along_k,
        WHOLE_K=depth % tile["BLOCK_K"] == 0,
        WHOLE_N=cols % tile["BLOCK_N"] == 0,
        SPLIT=x.dtype == torch.float32 and not _triton.interpreted(product_kernel),
        ACTIVATION="none" if shared else activation,
        **tile,
        **_triton.LAUNCH,
    )
    if shared:
        blocks = triton.cdiv(cols, triton_plan.COMBINE_BLOCK)
        flags = {"VEC_N": layout.vec_n, "ACTIVATION": activation, **_triton.LAUNCH}
        flags |= {"BLOCK_N": triton_plan.COMBINE_BLOCK, "num_warps": triton_plan.COMBINE_WARPS}
        combine_kernel[(rows, blocks)](
            out, *factors, y, rows, vectors_n, *strides, plan.parts, **flags
        )
