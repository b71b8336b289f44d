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
    """One shape of an op's inputs, by the names of its sizes, and what is special about it."""

    name: str
    sizes: dict[str, int]
    options: dict[str, Any] = field(default_factory=dict)  # for the op's make_inputs
    torch_function: Callable[..., Tensor] | None = None  # timed instead of the spec's
    torch_threads: int | None = None  # timed with so many, to show what threads are worth
    # What errors are measured by, where the timed function computes something else.
    yardstick: Callable[..., Tensor] | None = None
    directions: tuple[Direction, ...] = DIRECTIONS
    compiled: bool = True  # whether torch.compile of PyTorch's function is timed, too
    quick: bool = True  # whether it takes so little time that `check --quick` times it


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call of an op, and the gradient its output receives."""

    arguments: tuple[Any, ...]
    differentiable: tuple[int, ...]  # positions in arguments
    output_gradient: Tensor
    keywords: dict[str, Any] = field(default_factory=dict)  # of our function
    torch_keywords: dict[str, Any] | None = None  # of PyTorch's, where they differ

    def for_torch(self) -> Inputs:
        """The same call as PyTorch's function takes it."""
        return self if self.torch_keywords is None else replace(self, keywords=self.torch_keywords)

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same call with every floating tensor in another dtype."""

        def convert(value: Any) -> Any:
            if isinstance(value, Tensor) and value.is_floating_point():
                return value.detach().to(dtype)
            return value

        return replace(
            self,
            arguments=tuple(map(convert, self.arguments)),
            keywords={name: convert(value) for name, value in self.keywords.items()},
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
    torch_function: Callable[..., Tensor]  # PyTorch's own, with Inputs.torch_keywords
    make_inputs: Callable[[Case, torch.dtype, str], Inputs]  # (case, dtype, device)
    gradient_names: tuple[str, ...]  # one for each differentiable argument
    dtypes: tuple[torch.dtype, ...]  # those the fused backends take
    accuracy_cases: tuple[Case, ...]
    speed_cases: tuple[Case, ...]
    # Memory traffic nobody can avoid; or the operations, for an op that is bound by them.
    least_bytes: Callable[[Case, torch.dtype, Direction], int] | None = None
    flops: Callable[[Case, Direction], int] | None = None
    # What errors are measured by, where PyTorch's function may run anything; a case's goes first.
    yardstick: Callable[..., Tensor] | None = None
    # The least accepted ratio of PyTorch's time to ours on a CPU with two threads.
    bars: dict[tuple[str, torch.dtype, Direction], float] = field(default_factory=dict)
    # The same for PyTorch's function under torch.compile.
    compile_bars: dict[tuple[str, torch.dtype, Direction], float] = field(default_factory=dict)
    # What is timed in the place of `function`, where that has to make one tensor of a result first.
    timed_function: Callable[..., Any] | None = None
    # Measures and prints what the tables of errors and times cannot show.
    report_more: Callable[[], None] | None = None


def load(op: str) -> Spec:
    spec: Spec = importlib.import_module(f"kernels.{op}.spec").SPEC
    return spec


def run(function: Callable[..., Tensor], inputs: Inputs) -> tuple[Tensor, ...]:
    """The output, followed by the gradient of every differentiable argument."""
    inputs = inputs.with_gradients()
    output = function(*inputs.arguments, **inputs.keywords)
    leaves = [inputs.arguments[position] for position in inputs.differentiable]
    if not leaves:
        return (output,)
    gradients = torch.autograd.grad(output, leaves, inputs.output_gradient)
    return (output.detach(), *gradients)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
