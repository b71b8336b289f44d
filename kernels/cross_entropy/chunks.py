"""Linear + cross-entropy over chunks of rows: the logits of one chunk exist at a time.

A chunk's logits come from PyTorch's matmul, its losses and, written over the logits, their gradient
from the row kernels while they are in cache, and two more matmuls carry that gradient on.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.cross_entropy.rows import Options, select_backend

LOGITS_BYTES = 32 << 20  # of a chunk: smaller ones slow the matmuls down, larger ones gain nothing
LEAST_ROWS = 128  # with fewer the matmuls wait for memory
CLASSES_PER_PART = 4096  # of what is widened to float32, so that it stays in cache


class Problem(NamedTuple):
    """One call: everything but the gradients that come and go."""

    input: Tensor  # [N, K]
    linear_weight: Tensor  # [C, K]
    linear_bias: Tensor | None  # [C]
    target: Tensor  # [N], or probabilities [N, C]
    weight: Tensor | None  # [C]
    options: Options
    chunk_rows: int | None  # None: by size


class Losses(NamedTuple):
    """As a backend's forward returns them."""

    losses: Tensor
    lse: Tensor
    log_prob: Tensor | None
    best: Tensor | None


class Gradients(NamedTuple):
    """Of input, linear_weight and linear_bias; None where not asked for."""

    dinput: Tensor | None
    dlinear_weight: Tensor | None
    dlinear_bias: Tensor | None


def _multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for products of a 16-bit dtype, as far as that is known."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return True
    if dtype == torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


# Without such instructions PyTorch's matmul takes four times as long as in float32 (Xeon with
# AVX-512 but no BF16, torch 2.13).  So there the products are float32's, some classes at a time.
WIDENED = frozenset(x for x in (torch.bfloat16, torch.float16) if not _multiplies(x))


def in_parts(x: Tensor) -> bool:
    return x.is_cpu and x.dtype in WIDENED


def parts(size: int, most: int) -> list[slice]:
    """Of at most `most` each."""
    return [slice(begin, min(begin + most, size)) for begin in range(0, size, most)]


def slices(problem: Problem) -> list[slice]:
    """Equal chunks of rows, but for the last."""
    rows, classes = problem.input.shape[0], problem.linear_weight.shape[0]
    limit = problem.chunk_rows or max(
        LEAST_ROWS, LOGITS_BYTES // (classes * problem.input.dtype.itemsize)
    )
    count = -(-rows // limit)
    size = -(-rows // count) if count else 0
    return parts(rows, size or 1)


def logits_of_chunks(problem: Problem) -> Iterator[tuple[slice, Tensor]]:
    """Every chunk and its logits, which the next chunk's will overwrite."""
    chunks = slices(problem)
    if not chunks:
        return
    x, matrix = problem.input, problem.linear_weight.t()
    buffer = x.new_empty(chunks[0].stop, matrix.shape[1])
    for chunk in chunks:
        logits = buffer[: chunk.stop - chunk.start]
        if in_parts(x):
            _logits_in_parts(problem, chunk, logits)
        elif problem.linear_bias is None:
            torch.mm(x[chunk], matrix, out=logits)
        else:
            torch.addmm(problem.linear_bias, x[chunk], matrix, out=logits)
        yield chunk, logits


def _logits_in_parts(problem: Problem, chunk: slice, logits: Tensor) -> None:
    with torch.autocast("cpu", enabled=False):  # which would take the products to 16 bits again
        x = problem.input[chunk].float()
        for part in parts(logits.shape[1], CLASSES_PER_PART):
            product = x @ problem.linear_weight[part].float().t()
            if problem.linear_bias is not None:
                product += problem.linear_bias[part]
            logits[:, part] = product


class GradientSums:
    """Gradients of all chunks, those of the linear map's parameters summed in float32."""

    def __init__(self, problem: Problem, mask: tuple[bool, ...]) -> None:
        x, matrix = problem.input, problem.linear_weight
        self.problem = problem
        self.chunks = len(slices(problem))
        self.wide = torch.promote_types(x.dtype, torch.float32)
        self.dinput = torch.empty_like(x) if mask[0] else None
        self.sums: Tensor | None = None
        if mask[1]:
            # One chunk needs no sum, and two of 16 bits are not rounded on the way.
            dtype = self.wide if self.chunks > 1 else x.dtype
            make = torch.empty if self.chunks else torch.zeros
            self.sums = make(matrix.shape, dtype=dtype, device=x.device)
        with_bias = mask[2] and problem.linear_bias is not None
        self.dbias = x.new_zeros(matrix.shape[0], dtype=self.wide) if with_bias else None

    def add(self, chunk: slice, dlogits: Tensor) -> None:
        x = self.problem.input[chunk]
        if in_parts(x):
            with torch.autocast("cpu", enabled=False):
                self._add_in_parts(chunk, dlogits)
            return
        if self.dinput is not None:
            torch.mm(dlogits, self.problem.linear_weight, out=self.dinput[chunk])
        if self.sums is not None:
            self._add_product(dlogits.t(), x, first=chunk.start == 0)
        self._add_bias(dlogits)

    def _add_bias(self, dlogits: Tensor) -> None:
        if self.dbias is not None:
            self.dbias += dlogits.sum(0, dtype=self.wide)

    def _add_in_parts(self, chunk: slice, dlogits: Tensor) -> None:
        x = self.problem.input[chunk].float()
        dx = torch.zeros_like(x)
        for part in parts(dlogits.shape[1], CLASSES_PER_PART):
            wide = dlogits[:, part].float()
            if self.dinput is not None:
                dx.addmm_(wide, self.problem.linear_weight[part].float())
            if self.sums is None:
                continue
            sums = self.sums[part]
            if chunk.start:
                sums.addmm_(wide.t(), x)
            elif sums.dtype == x.dtype:
                torch.mm(wide.t(), x, out=sums)
            else:
                sums.copy_(wide.t() @ x)
        if self.dinput is not None:
            self.dinput[chunk] = dx
        self._add_bias(dlogits)

    def _add_product(self, left: Tensor, right: Tensor, first: bool) -> None:
        """sums += left @ right."""
        sums = self.sums
        assert sums is not None
        if sums.dtype == right.dtype:
            if first:
                torch.mm(left, right, out=sums)
            else:
                sums.addmm_(left, right)
            return
        for part in parts(left.shape[0], CLASSES_PER_PART):
            product = torch.mm(left[part], right)
            if first:
                sums[part] = product
            else:
                sums[part] += product.float()

    def result(self) -> Gradients:
        problem = self.problem
        sums, dbias = self.sums, self.dbias
        return Gradients(
            self.dinput,
            None if sums is None else sums.to(problem.linear_weight.dtype),
            None
            if dbias is None or problem.linear_bias is None
            else dbias.to(problem.linear_bias.dtype),
        )


def forward(
    problem: Problem, dlosses: Tensor | None, mask: tuple[bool, ...]
) -> tuple[Losses, Gradients]:
    """Losses of all rows and, where `dlosses` (expanded to [N]) is given, the gradients."""
    sums = GradientSums(problem, mask if dlosses is not None else (False, False, False))
    parts: list[Losses] = []
    for chunk, logits in logits_of_chunks(problem):
        backend, arguments = _ask(problem, chunk, logits)
        losses = Losses(*backend.forward(*arguments))
        parts.append(losses)
        if dlosses is not None:
            sums.add(chunk, _dlogits(backend, dlosses[chunk], None, arguments, losses.lse))
    if not parts:
        empty = problem.input.new_empty
        none = empty(0, dtype=sums.wide)
        return Losses(none, none.new_empty(2, 0), none, empty(0, dtype=torch.long)), sums.result()
    joined = Losses(
        torch.cat([part.losses for part in parts]),
        torch.cat([part.lse for part in parts], 1),
        _cat([part.log_prob for part in parts]),
        _cat([part.best for part in parts]),
    )
    return joined, sums.result()


def backward(
    problem: Problem, dlosses: Tensor, dlse: Tensor | None, lse: Tensor, mask: tuple[bool, ...]
) -> Gradients:
    """The gradients, from logits computed once more."""
    sums = GradientSums(problem, mask)
    for chunk, logits in logits_of_chunks(problem):
        backend, arguments = _ask(problem, chunk, logits)
        part = None if dlse is None else dlse[chunk]
        kept = lse[:, chunk].contiguous()
        sums.add(chunk, _dlogits(backend, dlosses[chunk], part, arguments, kept))
    return sums.result()


def _ask(problem: Problem, chunk: slice, logits: Tensor) -> tuple[Any, tuple[Any, ...]]:
    """The backend of a chunk and the arguments of its forward."""
    arguments = logits, problem.target[chunk], problem.weight
    backend = select_backend(*arguments, problem.options)
    return backend, (*arguments, *problem.options)


def _dlogits(
    backend: Any, dlosses: Tensor, dlse: Tensor | None, arguments: tuple[Any, ...], lse: Tensor
) -> Tensor:
    """The gradient of a chunk's logits, written over them where the backend can."""
    inplace = not torch.compiler.is_compiling()
    dlogits: Tensor = backend.backward(dlosses, dlse, *arguments, lse, (True, False), inplace)[0]
    return dlogits


def _cat(parts: list[Tensor | None]) -> Tensor | None:
    tensors = [part for part in parts if part is not None]
    return torch.cat(tensors) if tensors else None
