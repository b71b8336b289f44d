"""The description every op gives of itself; tests, bench and the command line are built from it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

Direction = Literal["forward", "forward+backward"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "forward+backward")


@dataclass(frozen=True)
class Case:
    """One shape of an op's inputs, by the names of its sizes."""

    name: str
    sizes: dict[str, int]


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call of an op, and the gradient its output receives."""

    arguments: tuple[Any, ...]
    differentiable: tuple[int, ...]  # positions in arguments
    output_gradient: Tensor

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same call with every floating tensor in another dtype."""

        def convert(value: Any) -> Any:
            if isinstance(value, Tensor) and value.is_floating_point():
                return value.detach().to(dtype)
            return value

        return replace(
            self,
            arguments=tuple(map(convert, self.arguments)),
            output_gradient=convert(self.output_gradient),
        )

    def with_gradients(self) -> Inputs:
        """The same call with leaves that require gradients where the op is differentiable."""
        arguments = list(self.arguments)
        for position in self.differentiable:
            arguments[position] = arguments[position].detach().requires_grad_()
        return replace(self, arguments=tuple(arguments))


@dataclass(frozen=True)
class Spec:
    """What tests, bench and the command line need to know of an op."""

    op: str
    function: Callable[..., Tensor]
    torch_function: Callable[..., Tensor]  # PyTorch's own, with the same arguments
    make_inputs: Callable[[Case, torch.dtype, str], Inputs]  # (case, dtype, device)
    gradient_names: tuple[str, ...]  # one for each differentiable argument
    dtypes: tuple[torch.dtype, ...]  # those the fused backends take
    accuracy_cases: tuple[Case, ...]
    speed_cases: tuple[Case, ...]
    least_bytes: Callable[[Case, torch.dtype, Direction], int]  # memory traffic nobody can avoid
    # The least accepted ratio of PyTorch's time to ours on a CPU with two threads.
    bars: dict[tuple[str, torch.dtype, Direction], float] = field(default_factory=dict)


def load(op: str) -> Spec:
    spec: Spec = importlib.import_module(f"kernels.{op}.spec").SPEC
    return spec


def run(function: Callable[..., Tensor], inputs: Inputs) -> tuple[Tensor, ...]:
    """The output, followed by the gradient of every differentiable argument."""
    inputs = inputs.with_gradients()
    output = function(*inputs.arguments)
    leaves = [inputs.arguments[position] for position in inputs.differentiable]
    gradients = torch.autograd.grad(output, leaves, inputs.output_gradient)
    return (output.detach(), *gradients)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
