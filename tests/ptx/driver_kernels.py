"""Small Triton kernels for test_triton_driver.py; lines marked BUG are looked for in reports."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    x = tl.load(x_ptr + offs, mask=mask)
    tl.store(out_ptr + offs, x + tl.load(y_ptr + offs, mask=mask), mask=mask)


@triton.jit
def add_without_mask(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)  # BUG unmasked
    tl.store(out_ptr + offs, x, mask=offs < n)


@triton.jit
def sum_in_one_place(x_ptr, out_ptr, BLOCK: tl.constexpr):
    total = tl.sum(tl.load(x_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)))
    before = tl.load(out_ptr)  # BUG race
    tl.store(out_ptr, before + total)


@triton.jit
def sum_by_atomics(x_ptr, out_ptr, BLOCK: tl.constexpr):
    total = tl.sum(tl.load(x_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)))
    tl.atomic_add(out_ptr, total)


@triton.jit
def double_in_place(x_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)  # fewer than threads: several lanes work on one element
    x = tl.load(x_ptr + offs, mask=offs < n)
    tl.store(x_ptr + offs, 2 * x, mask=offs < n)


@triton.jit
def reverse_through_memory(x_ptr, scratch_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(scratch_ptr + offs, tl.load(x_ptr + offs))
    reversed = tl.load(scratch_ptr + (BLOCK - 1 - offs))  # BUG no barrier
    tl.store(out_ptr + offs, reversed)


@triton.jit
def through_a_wild_pointer(address_ptr, out_ptr):
    wild = tl.load(address_ptr).to(tl.pointer_type(tl.float32))
    tl.store(out_ptr, tl.load(wild))  # BUG wild


@triton.jit
def checked(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.device_assert(x >= 0, "negative")  # BUG assert
    tl.store(out_ptr + offs, x)


@triton.jit
def printed(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.device_print("x", x)
    tl.store(out_ptr + offs, x)


@triton.jit
def scalars(out_ptr, a, b, c: tl.float16, d: tl.bfloat16, e: tl.float64, f: tl.uint8, g: tl.int8):
    tl.store(out_ptr, a.to(tl.float64))
    tl.store(out_ptr + 1, b.to(tl.float64))
    tl.store(out_ptr + 2, c.to(tl.float64))
    tl.store(out_ptr + 3, d.to(tl.float64))
    tl.store(out_ptr + 4, e)
    tl.store(out_ptr + 5, f.to(tl.float64))
    tl.store(out_ptr + 6, g.to(tl.float64))


@triton.jit
def axpy(x_ptr, y_ptr, out_ptr, n, stride, a, negate, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    value = a * tl.load(x_ptr + offs * stride, mask=mask)
    if y_ptr is not None:
        value += tl.load(y_ptr + offs * stride, mask=mask)
    tl.store(out_ptr + offs, -value if negate else value, mask=mask)


@triton.jit
def from_a_tuple(inputs, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(inputs[0] + offs) * inputs[1] + tl.load(inputs[2][0] + offs))


@triton.jit
def row_sums(x_ptr, out_ptr, stride, cols, BLOCK: tl.constexpr):
    row, offs = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride + offs, mask=offs < cols, other=0.0)
    tl.store(out_ptr + row, tl.sum(x))


@triton.jit(noinline=True)
def twice_plus(a, b):
    return a * 2 + b


@triton.jit
def calls_a_function(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs) + twice_plus(tl.load(x_ptr), 1.0))


@triton.jit
def copy_by_descriptors(x_ptr, out_ptr, rows, cols, M: tl.constexpr, N: tl.constexpr):
    source = tl.make_tensor_descriptor(x_ptr, [rows, cols], [cols, 1], [M, N])
    target = tl.make_tensor_descriptor(out_ptr, [rows, cols], [cols, 1], [M, N])
    target.store([tl.program_id(0) * M, 0], source.load([tl.program_id(0) * M, 0]))


@triton.jit
def copy_of_descriptors(source, target, M: tl.constexpr):
    target.store([tl.program_id(0) * M, 0], source.load([tl.program_id(0) * M, 0]))


@triton.autotune([triton.Config({"BLOCK": block}) for block in (64, 128, 256)], key=["n"])
@triton.jit
def tuned_copy(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs, mask=offs < n), mask=offs < n)
