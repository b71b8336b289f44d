"""torch.compile's own Triton kernels on the executor: inductor compiles CPU tensors as for a GPU.

Inductor can generate Triton code for the CPU, for a Triton backend that exists elsewhere.  Here it
is told that the CPU is the session's GPU, so that it makes the kernels it would make there; their
launches then reach Triton's driver like any other (triton_driver.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch._inductor import compile_fx, config, graph, utils
from torch._inductor.runtime import hints, triton_helpers, triton_heuristics
from torch._subclasses import FakeTensor

from ptx.gpu import WARP, Gpu
from ptx.occupancy import REGISTERS, multiprocessor
from ptx.session import Session
from ptx.triton_driver import MAX_THREADS

VECTOR_BYTES = 16


@contextlib.contextmanager
def installed(session: Session) -> Iterator[None]:
    """Inside, `torch.compile`d functions of CPU tensors run on the executor, for session.gpu.

    Of several configurations of a generated kernel inductor takes the first, as nothing is timed.
    """
    options = {
        "cpu_backend": "triton",
        "compile_threads": 1,  # a process of its own would not know the session's driver
        "fx_graph_cache": False,  # its key does not tell the session's GPU from the CPU
        "use_static_cuda_launcher": False,  # it calls the CUDA driver itself
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(config.patch(options))
        _pretend_gpu(stack, session.gpu)
        # Inductor aligns the inputs of GPU kernels to 16 bytes, and gives that up on a CPU: all
        # loads would become single elements.
        for module in (compile_fx, graph, utils):
            stack.enter_context(patch.object(module, "should_assume_input_aligned", _is_aligned))
        torch._dynamo.reset()  # what was compiled for another architecture
        stack.callback(torch._dynamo.reset)
        yield


def _pretend_gpu(stack: contextlib.ExitStack, gpu: Gpu) -> None:
    properties = hints.DeviceProperties(
        type="cuda",
        index=0,
        multi_processor_count=gpu.multiprocessors,
        cc=gpu.arch,
        major=gpu.capability[0],
        regs_per_multiprocessor=REGISTERS,
        max_threads_per_multi_processor=multiprocessor(str(gpu.arch)).threads,
        max_threads_per_block=MAX_THREADS,
        warp_size=WARP,
    )
    interface = SimpleNamespace(
        exchange_device=lambda device: 0,
        maybe_exchange_device=lambda device: 0,
        synchronize=lambda *device: None,
        current_device=lambda: 0,
        set_device=lambda device: None,
        device=lambda device: contextlib.nullcontext(),
        get_raw_stream=lambda device: 0,
        get_compute_capability=lambda device=None: gpu.arch,
    )
    autotuner = triton_heuristics.CachingAutotuner
    replacements: list[tuple[Any, str, Any]] = [
        (hints.DeviceProperties, "create", staticmethod(lambda device: properties)),
        (autotuner, "get_device_interface", lambda self: interface),
        (autotuner, "bench", _first_is_best()),
        # Each would install the driver of a real device.
        (triton_helpers, "set_driver_to_gpu", lambda: None),
        (triton_helpers, "set_driver_to_cpu", lambda: None),
    ]
    for owner, name, replacement in replacements:
        stack.enter_context(patch.object(owner, name, replacement))


def _first_is_best() -> Any:
    """A stand-in for CachingAutotuner.bench: each configuration asked about is worse."""
    asked: list[Any] = []

    def bench(self: Any, launcher: Any, *arguments: Any, **options: Any) -> float:
        asked.append(launcher)
        return float(len(asked))

    return bench


def _is_aligned(example: torch.Tensor) -> bool:
    return isinstance(example, FakeTensor) or example.data_ptr() % VECTOR_BYTES == 0
