"""Which bytes of torch.empty's tensors nothing has written yet, while a session runs.

torch.empty and its relatives are replaced for the session's time, rather than watched by a torch
function mode: under one `layer_norm` would take the way of overriding subclasses.  Their memory is
filled with 0xff, which is NaN in every floating dtype.  A byte counts as written once a kernel has
written it or it is no longer 0xff, however that came about: by torch, by NumPy, by a C++ kernel.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

UNWRITTEN = 0xFF  # what each byte holds
_FUNCTIONS = ("empty", "empty_like", "empty_strided", "empty_permuted")
_METHODS = ("new_empty", "new_empty_strided")
_PRUNE_AT = 1000  # storages remembered, before those that are gone are looked for


class Written:
    """Byte flags of the storages that torch.empty made; of others every byte is written."""

    def __init__(self) -> None:
        # a weak reference keeps the number it is compared by from being used again
        self._flags: dict[StorageWeakRef, Tensor | None] = {}  # None: no kernel has seen it yet
        self._prune_at = _PRUNE_AT

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Replaces torch.empty and its relatives inside the `with` block."""
        functions = {name: getattr(torch, name) for name in _FUNCTIONS}
        methods = {name: getattr(Tensor, name) for name in _METHODS}
        try:
            for name, function in functions.items():
                setattr(torch, name, self._marking(function))
            for name, method in methods.items():
                setattr(Tensor, name, self._marking(method))
            yield
        finally:
            for name, function in functions.items():
                setattr(torch, name, function)
            for name in methods:
                if name in vars(Tensor):  # the original is the base class's
                    delattr(Tensor, name)

    def _marking(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(function)
        def marked(*arguments: Any, **keywords: Any) -> Tensor:
            tensor = function(*arguments, **keywords)
            if not torch.compiler.is_compiling() and "out" not in keywords:
                self._mark(tensor)
            return tensor

        return marked

    def _mark(self, tensor: Tensor) -> None:
        # Integers are left alone: -1, which is nothing but 0xff, is a value they often have.
        plain = type(tensor) is Tensor and tensor.is_cpu and tensor.layout == torch.strided
        if not plain or not tensor.is_floating_point():
            return
        storage = tensor.untyped_storage()
        ctypes.memset(storage.data_ptr(), UNWRITTEN, storage.nbytes())
        if len(self._flags) >= self._prune_at:
            self._flags = {ref: flags for ref, flags in self._flags.items() if not ref.expired()}
            self._prune_at = max(_PRUNE_AT, 2 * len(self._flags))
        self._flags[StorageWeakRef(storage)] = None

    def __contains__(self, storage: torch.UntypedStorage) -> bool:
        return StorageWeakRef(storage) in self._flags

    def flags(self, storage: torch.UntypedStorage) -> Tensor | None:
        """uint8 [bytes]: 1 where a byte holds data; None where all do."""
        reference = StorageWeakRef(storage)
        if reference not in self._flags:
            return None
        by_value = torch.frombuffer(_buffer(storage), dtype=torch.uint8) != UNWRITTEN
        flags = by_value.to(torch.uint8)
        by_kernels = self._flags[reference]
        return flags if by_kernels is None else flags | by_kernels

    def update(self, storage: torch.UntypedStorage, flags: Tensor) -> None:
        """Keeps what a kernel left behind for the next one."""
        self._flags[StorageWeakRef(storage)] = flags


def _buffer(storage: torch.UntypedStorage) -> Any:
    return (ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr())
