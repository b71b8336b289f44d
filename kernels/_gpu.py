"""What the GPU backends ask about a tensor's device: may it run there, on which stream, how wide.

The only place that knows what "a GPU" is, so that an executor of GPU code can stand in for one:
it sets `stand_in`, and the `cuda` and `triton` backends then accept CPU tensors and run there.
"""

from __future__ import annotations

import functools
from typing import Protocol

import torch


class StandIn(Protocol):
    """What an executor of GPU code on the CPU must offer to take a GPU's place."""

    multiprocessors: int

    def address(self, tensor: torch.Tensor) -> int: ...


stand_in: StandIn | None = None


def unsupported(x: torch.Tensor) -> str | None:
    """None where GPU kernels can run on `x`, else one sentence saying why not."""
    if x.is_cuda or (stand_in is not None and x.device.type == "cpu"):
        return None
    return f"input is on {x.device.type}, not on a GPU"


@functools.cache
def _device_multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(x: torch.Tensor) -> int:
    """Streaming multiprocessors of the device of `x`: persistent kernels size their grid by it."""
    if stand_in is not None:
        return stand_in.multiprocessors
    return _device_multiprocessors(x.device.index)


def stream(x: torch.Tensor) -> int:
    """The handle of torch's current stream on the device of `x`; 0 on a stand-in."""
    if stand_in is not None:
        return 0
    return torch._C._cuda_getCurrentRawStream(x.device.index)


def device_index(x: torch.Tensor) -> int:
    """The CUDA device number a native launch must select; 0 on a stand-in."""
    return 0 if stand_in is not None else x.device.index


def address(tensor: torch.Tensor | None) -> int:
    """Where a kernel finds the first element of `tensor`; 0 for None."""
    if tensor is None:
        return 0
    return tensor.data_ptr() if stand_in is None else stand_in.address(tensor)
