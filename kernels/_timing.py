"""Timing that can be compared: candidates take turns in one process, on the same inputs."""

from __future__ import annotations

import ctypes
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_TURN_SECONDS = 1e-3  # short calls are repeated to fill a turn, so that the clock is no part of it
_LEAST_TURNS = 9


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median turn, and the turns at 20 % and 80 %."""

    median: float
    p20: float
    p80: float


def keep_freed_memory() -> None:
    """Lets glibc keep what is freed, for the rest of this process.

    By default blocks of megabytes go back to the system or not depending on what lies behind them
    in the heap, and one candidate pays thousands of page faults that the other happens not to.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
        mallopt(trim_threshold, 1 << 30)
        mallopt(mmap_threshold, 32 << 20)  # the most it takes


def _turn(function: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def interleaved(candidates: dict[str, Callable[[], object]], seconds: float) -> dict[str, Timing]:
    """Times the candidates in turns for about `seconds` in all, each after a warm-up.

    Every round runs all of them, shuffled: whatever else the machine does meanwhile, and the caches
    and the heap as another candidate leaves them, fall on all alike, so their ratios hold where
    their times do not.  A fixed order moved ratios of calls of 70 µs by 5 %.
    """
    keep_freed_memory()
    names = list(candidates)
    calls = {}
    for name, function in candidates.items():
        _turn(function, 3)  # first calls compile, allocate and fault pages in
        calls[name] = max(1, int(_TURN_SECONDS / _turn(function, 3)))
    turns: dict[str, list[float]] = {name: [] for name in names}
    shuffled = random.Random(0)
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < _LEAST_TURNS or time.perf_counter() < end:
        for name in shuffled.sample(names, len(names)):
            turns[name].append(_turn(candidates[name], calls[name]))
        rounds += 1
    return {name: _summary(times) for name, times in turns.items()}


def _summary(times: list[float]) -> Timing:
    fifths = statistics.quantiles(times, n=5)
    return Timing(statistics.median(times), fifths[0], fifths[3])


def multiplying(size: int, dtype: torch.dtype) -> Callable[[], object]:
    """A product of square matrices, 2 size^3 operations: what arithmetic allows an op."""
    a, b = (torch.randn(size, size).to(dtype) for _ in "ab")
    return lambda: a @ b


def copying(elements: int, dtype: torch.dtype) -> Callable[[], object]:
    """A call that reads and writes `elements` once: what memory allows an op of that traffic."""
    source = torch.ones(elements, dtype=dtype)
    destination = torch.zeros_like(source)
    return lambda: destination.copy_(source)
