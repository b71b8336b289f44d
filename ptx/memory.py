"""Copies of torch storages in the executor's memory, for the time of one call of host code.

A storage is copied whole, so that its views stay one allocation, between guard zones and 512-byte
aligned as torch's CUDA allocator would place it; only its own address modulo 16 is kept, since
kernels and Triton choose vector widths by it.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ptx.executor import Executor, Footprint, Refused
from ptx.written import Written

ALIGN = 512  # bytes
KEPT_ALIGN = 16  # bytes: the widest access

_libc = ctypes.CDLL(None)
_libc.memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


@dataclass
class Copy:
    """One storage and its place in the executor's memory."""

    storage: torch.UntypedStorage  # kept alive with it
    name: str
    allocation: int  # address; `skipped` bytes before the copy of the storage's first byte
    skipped: int
    views: list[Tensor] = field(default_factory=list)  # that were asked for

    @property
    def base(self) -> int:
        return self.allocation + self.skipped

    @property
    def host(self) -> int:
        return self.storage.data_ptr()

    @property
    def size(self) -> int:
        return self.storage.nbytes()

    def is_viewed_whole(self) -> bool:
        return any(view.nbytes == self.size and view.is_contiguous() for view in self.views)


class Memory:
    """The storages that the next call of host code may use, and how they get there and back."""

    def __init__(self, executor: Executor, written: Written, bounds: str) -> None:
        self._executor, self._written, self._bounds = executor, written, bounds
        self._copies: dict[int, Copy] = {}  # by the storage's address

    def address(self, tensor: Tensor, name: str) -> int:
        """Where a kernel finds `tensor`; 0 for one without elements, as its data_ptr() is."""
        if tensor.device.type != "cpu":
            raise Refused(f"{name} is on {tensor.device}; the executor runs on CPU tensors")
        if not tensor.numel():
            return 0
        copy = self._copy(tensor.untyped_storage(), name)
        copy.views.append(tensor.detach())
        return copy.base + tensor.data_ptr() - copy.host

    def _copy(self, storage: torch.UntypedStorage, name: str) -> Copy:
        begin, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        for other in self._copies.values():
            if begin == other.host and end == other.host + other.size:
                return other
            if begin < other.host + other.size and other.host < end:
                raise Refused(
                    f"{name} lies in memory that overlaps that of {other.name} and is another "
                    "storage: they would be copied apart"
                )
        taken = {copy.name for copy in self._copies.values()}
        if name in taken:
            numbered = (f"{name}#{number}" for number in itertools.count(2))
            name = next(other for other in numbered if other not in taken)
        skipped = begin % KEPT_ALIGN
        allocation = self._executor.alloc(storage.nbytes() + skipped, name, ALIGN)
        self._copies[begin] = Copy(storage, name, allocation, skipped)
        return self._copies[begin]

    def holds(self, address: int) -> bool:
        return any(copy.base <= address <= copy.base + copy.size for copy in self._copies.values())

    def copy_in(self) -> None:
        """Fills the copies, and says which bytes hold data and which a kernel may touch."""
        for copy in self._copies.values():
            ctypes.memmove(copy.base, copy.host, copy.size)
            flags = self._written.flags(copy.storage)
            if flags is not None:
                self._executor.set_written(copy.base, copy.size, flags.data_ptr())
            whole = self._bounds == "storage" or copy.is_viewed_whole()
            if copy.skipped or not whole:
                accessible = _accessible(copy, whole)
                size = copy.skipped + copy.size
                self._executor.set_accessible(copy.allocation, size, accessible.data_ptr())

    def copy_out(self) -> None:
        """Brings back what changed, and forgets all copies.

        Storages that did not change are not touched: they may be read-only mappings.
        """
        for copy in self._copies.values():
            if _libc.memcmp(copy.base, copy.host, copy.size):
                ctypes.memmove(copy.host, copy.base, copy.size)
            if copy.storage in self._written:
                flags = torch.zeros(copy.size, dtype=torch.uint8)
                self._executor.get_written(copy.base, copy.size, flags.data_ptr())
                self._written.update(copy.storage, flags)
            self._executor.free(copy.allocation)
        self._copies.clear()

    def contents(self) -> list[bytes]:
        """The bytes of every copy, as kernels left them."""
        return [ctypes.string_at(copy.base, copy.size) for copy in self._copies.values()]

    def footprints(self) -> Iterator[tuple[str, Footprint]]:
        """(name, what the last launch did to it) of every storage."""
        for copy in self._copies.values():
            yield copy.name, self._executor.footprint(copy.base, copy.size)


def _accessible(copy: Copy, whole: bool) -> Tensor:
    """uint8 [skipped + size]: 1 for the bytes of the views, or of the whole storage."""
    flags = torch.zeros(copy.skipped + copy.size, dtype=torch.uint8)
    if whole:
        flags[copy.skipped :] = 1
        return flags
    for view in copy.views:
        size = view.element_size()
        strides = [*(stride * size for stride in view.stride()), 1]
        offset = copy.skipped + view.data_ptr() - copy.host
        flags.as_strided([*view.shape, size], strides, offset).fill_(1)
    return flags
