"""Linear layers and embeddings whose weight is kept as int8: `Int8Linear`, `Int8Embedding`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from kernels.int8_matmul import checks, reference
from kernels.int8_matmul.calls import MODES, result_dtype
from kernels.int8_matmul.op import int8_linear
from kernels.int8_matmul.quantized import Quantized, dequantize
from kernels.int8_matmul.quantizing import quantize

OUTLIER_DTYPE = torch.bfloat16


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is a linear layer as transformers' GPT-2 has it: weight [K, N], called Conv1D."""
    weight = getattr(module, "weight", None)
    return type(module).__name__ == "Conv1D" and isinstance(weight, Tensor) and weight.dim() == 2


def is_linear(module: nn.Module) -> bool:
    """Whether calling `module` is a linear map with its weight, and nothing else.

    nn.MultiheadAttention reads the weight of its output layer without calling it.
    """
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return False
    return is_conv1d(module) or type(module).forward is nn.Linear.forward


def weight_of(linear: nn.Module) -> Tensor:
    """The weight [N, K] of an nn.Linear or a Conv1D."""
    weight: Tensor = linear.weight  # type: ignore[assignment]
    return weight.t() if is_conv1d(linear) else weight


class Int8Weight(nn.Module):
    """Buffers `weight`, int8, and `weight_scale`, which stays float32 whatever .to() says."""

    weight: Tensor
    weight_scale: Tensor
    SCALES: tuple[str, ...] = ("weight_scale",)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {name: self._buffers.get(name) for name in self.SCALES}
        super()._apply(fn, recurse)
        for name, scale in before.items():
            moved = self._buffers.get(name)
            if scale is not None and moved is not None and moved.dtype != scale.dtype:
                self._buffers[name] = scale.to(moved.device)
        return self

    @property
    def quantized_weight(self) -> Quantized:
        return Quantized(self.weight, self.weight_scale)

    def linear(self, x: Tensor) -> Tensor:
        """F.linear(x, weight), and what else the module adds to it."""
        raise NotImplementedError

    def dequantized_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return dequantize(self.quantized_weight, dtype)


class Int8Linear(Int8Weight):
    """``torch.nn.Linear`` with an int8 weight, for inference; made by `from_linear`.

    Buffers: weight int8 [N, K], weight_scale float32 [N, 1] (with groups [N, K / g]), bias [N] or
    None, x_scale float32 [1] in mode "static", and, with outlier columns, outlier_columns int64 [C]
    and outlier_weight bfloat16 [N, C].  ``.to(dtype)`` casts the bias alone.

    `activation` (None, "relu", "gelu", "gelu_tanh") is applied to the result in the same kernel.

    Differentiable in x, as `int8_linear` is; nothing in it is trained.
    """

    SCALES = ("weight_scale", "x_scale")
    bias: Tensor | None
    x_scale: Tensor | None
    outlier_columns: Tensor | None
    outlier_weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        mode: str = "dynamic",
        activation: str | None = None,
        *,
        group_size: int | None = None,
        outliers: int = 0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Zeros of these sizes, to load a state_dict into; `dtype` is the bias's."""
        super().__init__()
        checks.check_mode("Int8Linear", mode, MODES)
        checks.activation_name("Int8Linear", activation)
        if group_size is not None and (mode != "weight_only" or in_features % group_size):
            raise ValueError(
                "Int8Linear: group_size needs mode='weight_only' and must divide in_features, but "
                f"is {group_size} with mode={mode!r} and in_features={in_features}"
            )
        self.in_features, self.out_features = in_features, out_features
        self.mode, self.activation, self.group_size = mode, activation, group_size
        scales = in_features // group_size if group_size else 1

        def buffer(name: str, wanted: bool, size: tuple[int, ...], dtype: Any, fill: int) -> None:
            tensor = torch.full(size, fill, dtype=dtype, device=device) if wanted else None
            self.register_buffer(name, tensor)

        buffer("weight", True, (out_features, in_features), torch.int8, 0)
        buffer("weight_scale", True, (out_features, scales), torch.float32, 1)
        buffer("bias", bias, (out_features,), dtype or torch.get_default_dtype(), 0)
        buffer("x_scale", mode == "static", (1,), torch.float32, 1)
        buffer("outlier_columns", outliers > 0, (outliers,), torch.int64, 0)
        buffer("outlier_weight", outliers > 0, (out_features, outliers), OUTLIER_DTYPE, 0)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        mode: str = "dynamic",
        activation: str | None = None,
        *,
        x_scale: Tensor | float | None = None,
        group_size: int | None = None,
        outlier_columns: Sequence[int] | Tensor | None = None,
        outlier_threshold: float | None = None,
        input_absmax: Tensor | None = None,
    ) -> Int8Linear:
        """The int8 counterpart of an nn.Linear, or of transformers' Conv1D, whose values it copies.

        Args:
            linear: an nn.Linear, or a module of a class named Conv1D with weight [K, N].
            mode: "dynamic", "static" or "weight_only", as for `int8_linear`.
            x_scale: for "static"; where it is None, max(input_absmax) / 127.
            group_size: for "weight_only": a scale for every so many values of a row.
            outlier_columns: input features whose part of the product is computed in bfloat16 and
                left out of the quantisation (as LLM.int8 does, arXiv:2208.07339).
            outlier_threshold: the columns k with input_absmax[k] above it are outlier columns.
            input_absmax: [K], the largest |x| each input feature is expected to have, from
                `calibrate`.

        Raises:
            TypeError, ValueError.
        """
        if not (isinstance(linear, nn.Linear) or is_conv1d(linear)):
            raise TypeError(
                "Int8Linear.from_linear: linear must be an nn.Linear or a Conv1D, not "
                f"{type(linear).__name__}"
            )
        weight = weight_of(linear).detach()
        checks.check_float("Int8Linear.from_linear", "linear.weight", weight)
        if input_absmax is not None and input_absmax.shape != weight.shape[1:]:
            raise ValueError(
                f"Int8Linear.from_linear: input_absmax must have shape {list(weight.shape[1:])}, "
                f"but has shape {list(input_absmax.shape)}"
            )
        columns = _outliers(weight, outlier_columns, outlier_threshold, input_absmax)
        bias: Tensor | None = getattr(linear, "bias", None)
        made = cls(
            weight.shape[1],
            weight.shape[0],
            bias is not None,
            mode,
            activation,
            group_size=group_size,
            outliers=0 if columns is None else columns.numel(),
            device="meta",
        )
        if columns is not None:
            made.outlier_columns, made.outlier_weight = (
                columns,
                weight[:, columns].to(OUTLIER_DTYPE),
            )
            weight = weight.index_fill(1, columns, 0.0)
        made.weight, made.weight_scale, _ = quantize(weight, group_size=group_size)
        if bias is not None:
            made.bias = bias.detach().clone()
        if mode == "static":
            made.x_scale = _static_scale(x_scale, input_absmax, columns, weight.device)
        elif x_scale is not None:
            raise ValueError(f"Int8Linear.from_linear: x_scale needs mode='static', not {mode!r}")
        made.train(linear.training)
        return made

    def forward(self, x: Tensor | Quantized) -> Any:
        buffers = self._buffers  # each attribute of a module costs a small call half a microsecond
        if buffers["outlier_columns"] is not None:
            return self._with_outliers(x)
        weight: Any = Quantized(buffers["weight"], buffers["weight_scale"])  # type: ignore[arg-type]
        return int8_linear(
            x, weight, buffers["bias"], self.mode, self.activation, x_scale=buffers["x_scale"]
        )

    def linear(self, x: Tensor) -> Tensor:
        y: Tensor = self(x)
        return y

    def _with_outliers(self, x: Tensor | Quantized) -> Tensor:
        """The outlier columns' part in bfloat16 added to that of all others."""
        if not isinstance(x, Tensor):
            raise TypeError("Int8Linear: with outlier columns x must be a Tensor, not a Quantized")
        columns, weight = self.outlier_columns, self.outlier_weight
        assert columns is not None
        assert weight is not None
        checks.check_float("Int8Linear", "x", x)
        wide = torch.promote_types(x.dtype, torch.float32)
        others = x.index_fill(-1, columns, 0.0)
        y = int8_linear(
            others,
            self.quantized_weight,
            self.bias,
            self.mode,
            x_scale=self.x_scale,
            out_dtype=wide,
        )
        outliers = x.index_select(-1, columns).to(weight.dtype)
        y = y + F.linear(outliers, weight).to(wide)
        activation = checks.activation_name("Int8Linear", self.activation)
        return reference.activate(y, activation).to(result_dtype(x))

    def extra_repr(self) -> str:
        parts = [f"in_features={self.in_features}, out_features={self.out_features}"]
        parts.append(f"bias={self.bias is not None}, mode={self.mode!r}")
        if self.activation is not None:
            parts.append(f"activation={self.activation!r}")
        if self.group_size is not None:
            parts.append(f"group_size={self.group_size}")
        if self.outlier_columns is not None:
            parts.append(f"outliers={self.outlier_columns.numel()}")
        return ", ".join(parts)


def _outliers(
    weight: Tensor,
    columns: Sequence[int] | Tensor | None,
    threshold: float | None,
    absmax: Tensor | None,
) -> Tensor | None:
    """int64 [C], ascending, on weight's device; None for no columns."""
    name = "Int8Linear.from_linear"
    if columns is not None and threshold is not None:
        raise ValueError(f"{name}: give outlier_columns or outlier_threshold, not both")
    if threshold is not None:
        if absmax is None:
            raise ValueError(f"{name}: outlier_threshold needs input_absmax")
        chosen = (absmax > threshold).nonzero()[:, 0]
    elif columns is not None:
        chosen = torch.as_tensor(columns, dtype=torch.int64).unique()
    else:
        return None
    size = weight.shape[1]
    if chosen.numel() and (int(chosen[0]) < 0 or int(chosen[-1]) >= size):
        raise ValueError(
            f"{name}: outlier_columns must be between 0 and {size - 1}, but has {chosen.tolist()}"
        )
    return chosen.to(weight.device) if chosen.numel() else None


def _static_scale(
    x_scale: Tensor | float | None,
    absmax: Tensor | None,
    outliers: Tensor | None,
    device: torch.device,
) -> Tensor:
    name = "Int8Linear.from_linear"
    if x_scale is None:
        if absmax is None:
            raise ValueError(f"{name}: mode='static' needs x_scale or input_absmax")
        absmax = absmax.float().to(device)
        if outliers is not None:
            absmax = absmax.index_fill(0, outliers, 0.0)
        x_scale = absmax.amax() / 127 if absmax.numel() and absmax.amax() > 0 else 1.0
    scale = (
        torch.as_tensor(x_scale, dtype=torch.float32, device=device).detach().reshape(-1).clone()
    )
    if scale.numel() != 1 or not 0 < float(scale) < float("inf"):
        raise ValueError(f"{name}: x_scale must be one value above 0, but is {scale.tolist()}")
    return scale


class Int8Embedding(Int8Weight):
    """``torch.nn.Embedding`` with an int8 weight and a scale for each row, for inference.

    Buffers: weight int8 [V, C], weight_scale float32 [V, 1].  Rows are returned in `dtype`, which
    `.to()` changes.
    """

    def __init__(
        self, weight: Quantized, dtype: torch.dtype = torch.float32, mode: str = "dynamic"
    ) -> None:
        super().__init__()
        checks.check_mode("Int8Embedding", mode, MODES)
        self.register_buffer("weight", weight.values)
        self.register_buffer("weight_scale", weight.scale)
        self.dtype, self.mode = dtype, mode

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device)).dtype
        return super()._apply(fn, recurse)

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, mode: str = "dynamic") -> Int8Embedding:
        """The int8 counterpart of an nn.Embedding, whose values it copies."""
        made = cls(quantize(embedding.weight), embedding.weight.dtype, mode)
        return made.train(embedding.training)

    def forward(self, index: Tensor) -> Tensor:
        rows = F.embedding(index, self.weight).float()
        return (rows * F.embedding(index, self.weight_scale)).to(self.dtype)

    def linear(self, x: Tensor) -> Tensor:
        """The embedding as a language model's head, in `mode`; "static" counts as "dynamic"."""
        mode = "weight_only" if self.mode == "weight_only" else "dynamic"
        y: Tensor = int8_linear(x, self.quantized_weight, None, mode)
        return y

    def extra_repr(self) -> str:
        rows, size = self.weight.shape
        return f"{rows}, {size}, mode={self.mode!r}, dtype={self.dtype}"
