"""Tensor copies (TMA) of 1 to 5 dimensions against numpy indexing: swizzles, ragged boxes, fills,
reductions, maps made by the host and on the device, and what is refused."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from ptx.executor import Executor
from tests.ptx.assembly import Array, Program, clean, kernel, kinds

THREADS = 128
WIDTHS = [0, 32, 64, 128]  # bytes, by the number of the swizzle
SHARED, MBARRIER = 16384, 16384
U16, S32, F16, F32, BF16 = 1, 3, 6, 7, 9  # CUtensorMapDataType


def coordinates(dims: int) -> str:
    return "{" + ", ".join(f"%r{20 + i}" for i in range(dims)) + "}"


LOAD_COORDINATES = "".join(f"ld.global.b32 %r{20 + i}, [%rd1+{4 * i}];" for i in range(5))
# All threads copy %r10 bytes of shared memory to or from array 2, 4 bytes at a time.
COPY = """
mul.lo.u32 %r4, %r1, 4; cvt.u64.u32 %rd10, %r4; add.s64 %rd10, %rd2, %rd10; add.u32 %r5, %r3, %r4;
NEXT: setp.ge.u32 %p2, %r4, %r10; @%p2 bra COPIED;
{move}
add.s64 %rd10, %rd10, 512; add.u32 %r5, %r5, 512; add.u32 %r4, %r4, 512; bra NEXT;
COPIED:
"""
COPY_OUT = COPY.format(move="ld.shared.b32 %r6, [%r5]; st.global.b32 [%rd10], %r6;")
COPY_IN = COPY.format(move="ld.global.b32 %r6, [%rd10]; st.shared.b32 [%r5], %r6;")


def load_body(dims: int, tensor_map: str = "%rd31", fences: str = "") -> str:
    """Array 1: coordinates, the box's bytes; array 2: the box as it lies in shared memory."""
    return f"""
{LOAD_COORDINATES} ld.global.b32 %r10, [%rd1+20];
setp.eq.u32 %p1, %r1, 0; add.u32 %r11, %r3, {MBARRIER};
{fences}
@%p1 mbarrier.init.shared::cta.b64 [%r11], 1;
fence.proxy.async.shared::cta; bar.sync 0;
@!%p1 bra WAIT;
mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r11], %r10;
cp.async.bulk.tensor.{dims}d.shared::cluster.global.mbarrier::complete_tx::bytes
  [%r3], [{tensor_map}, {coordinates(dims)}], [%r11];
WAIT: mov.b32 %r12, 0;
LOOP: mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r11], %r12; @!%p3 bra LOOP;
{COPY_OUT}
"""


def store_body(dims: int, reduction: str = "", fence: str = "fence.proxy.async;") -> str:
    name = f"cp.reduce.async.bulk.tensor.{dims}d" if reduction else f"cp.async.bulk.tensor.{dims}d"
    operation = f"{name}.global.shared::cta{reduction}.bulk_group"
    return f"""
{LOAD_COORDINATES} ld.global.b32 %r10, [%rd1+20];
{COPY_IN}
{fence} bar.sync 0;
setp.eq.u32 %p1, %r1, 0;
@%p1 {operation} [%rd31, {coordinates(dims)}], [%r3];
@%p1 cp.async.bulk.commit_group; @%p1 cp.async.bulk.wait_group 0;
"""


# Array 3: 128 bytes for the map; array 4: the tensor; a map of u16, 2 dimensions, no swizzle.
REPLACE = "@%p1 tensormap.replace.tile.{}.shared::cta.b1024.{} [%rd20], {};"
FIELDS = [
    ("global_address", "b64", "%rd4"),
    ("rank", "b32", "1"),
    ("box_dim", "b32", "0, %r30"),
    ("box_dim", "b32", "1, %r31"),
    ("global_dim", "b32", "0, %r32"),
    ("global_dim", "b32", "1, %r33"),
    ("global_stride", "b64", "0, %rd21"),
    ("element_stride", "b32", "0, %r34"),
    ("element_stride", "b32", "1, %r34"),
    ("elemtype", "b32", "1"),
    ("interleave_layout", "b32", "0"),
    ("swizzle_mode", "b32", "0"),
    ("fill_mode", "b32", "0"),
]
MAKE_MAP = """
setp.lt.u32 %p4, %r1, 32; add.u32 %r13, %r3, 8192; mad.lo.u32 %r14, %r2, 4, %r13;
mov.b32 %r15, 0; @%p4 st.shared.b32 [%r14], %r15; bar.warp.sync -1; cvt.u64.u32 %rd20, %r13;
mov.b32 %r30, 16; mov.b32 %r31, 4; mov.b32 %r32, 40; mov.b32 %r33, 10; mov.b32 %r34, 1;
mov.b64 %rd21, 80;
{fields}
bar.warp.sync -1;
@%p4 tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned
  [%rd3], [%rd20], 128;
{acquire}
bar.sync 0;
"""
ACQUIRE = "@%p4 fence.proxy.tensormap::generic.acquire.gpu [%rd3], 128;"


def device_map(acquire: str = ACQUIRE, leave_out: str = "") -> str:
    chosen = [field for field in FIELDS if field[0] != leave_out]
    return MAKE_MAP.format(acquire=acquire, fields="\n".join(REPLACE.format(*f) for f in chosen))


@functools.cache
def program() -> Program:
    kernels = [kernel(f"load_{d}", load_body(d), 2, 1, SHARED + 8) for d in range(1, 6)]
    kernels += [kernel(f"store_{d}", store_body(d), 2, 1, SHARED + 8) for d in range(1, 6)]
    kernels += [
        kernel(f"reduce_{r}", store_body(2, f".{r}"), 2, 1, SHARED + 8)
        for r in ("add", "min", "max")
    ]
    device = {
        "device": device_map(),
        "device_without_acquire": device_map(acquire=""),
        "device_without_box": device_map(leave_out="box_dim"),
    }
    kernels += [
        kernel(name, load_body(2, "%rd3", fences), 4, 0, SHARED + 8)
        for name, fences in device.items()
    ]
    load_body(2).replace("[%r3], [%rd31", "[%r3+16], [%rd31")
    kernels += [
        kernel("store_without_fence", store_body(2, fence=""), 2, 1, SHARED + 8),
        kernel("wild_map", load_body(2, "%rd1"), 2, 0, SHARED + 8),
        kernel(
            "load_2_shifted",
            load_body(2).replace("[%r3], [%rd31", "[%r3+16], [%rd31"),
            2,
            1,
            SHARED + 8,
        ),
    ]
    return Program(*kernels)


def encode(tensor: Array, address: int, kind: int, box: Sequence[int], **given: int) -> bytes:
    """Of a C-contiguous tensor; `box` in its own order, so the contiguous dimension last."""
    return Executor.instance().tensor_map(
        element_type=kind,
        address=address,
        sizes=tensor.shape[::-1],
        strides=tensor.strides[:-1][::-1],
        box=box[::-1],
        swizzle=given.get("swizzle", 0),
        fill_nan=bool(given.get("fill_nan", 0)),
    )


def swizzle_bytes(image: Array, swizzle: int) -> Array:
    """PTX ISA, "Swizzling modes": the 16-byte chunk c of 128-byte row r goes to c ^ (r % width)."""
    if swizzle == 0:
        return image
    chunks = image.reshape(-1, 16)
    index = np.arange(len(chunks))
    return chunks[index ^ (index // 8 % (WIDTHS[swizzle] // 16))].reshape(-1)


def words_of(at: Sequence[int], box_bytes: int) -> Array:
    """What the kernels read: coordinates, the contiguous dimension first, and the size."""
    words = np.zeros(6, np.int32)
    words[: len(at)] = at[::-1]
    words[5] = box_bytes
    return words


def box_of(tensor: Array, at: Sequence[int], box: Sequence[int], fill: float) -> Array:
    """Element by element, so that nothing is clever about the edges."""
    result = np.full(box, fill, tensor.dtype)
    for index in np.ndindex(*box):
        place = tuple(a + i for a, i in zip(at, index, strict=True))
        if all(0 <= p < size for p, size in zip(place, tensor.shape, strict=True)):
            result[index] = tensor[place]
    return result


SHAPES: list[tuple[int, ...]] = [(40,), (10, 40), (5, 6, 24), (3, 4, 5, 24), (2, 3, 4, 3, 24)]
OUTER: list[tuple[int, ...]] = [(), (8,), (3, 4), (2, 3, 3), (2, 2, 3, 2)]


def places(shape: Sequence[int], box: Sequence[int]) -> list[tuple[int, ...]]:
    """Inside; over the lower edges; over the upper edges; past the end of one dimension."""
    last = [size - length // 2 for size, length in zip(shape, box, strict=True)]
    return [
        (0,) * len(shape),
        tuple(1 for _ in shape),
        tuple(-(length // 2) for length in box),
        tuple(last),
        (shape[0], *last[1:]),
    ]


CASES = list(itertools.product(range(1, 6), range(4)))


def case_box(dims: int, swizzle: int) -> tuple[int, ...]:
    return (*OUTER[dims - 1], (WIDTHS[swizzle] or 32) // 2)


@pytest.mark.parametrize(("dims", "swizzle"), CASES)
def test_tensor_load(dims: int, swizzle: int) -> None:
    shape, box = SHAPES[dims - 1], case_box(dims, swizzle)
    tensor = np.random.default_rng(dims).integers(0, 2**16, shape).astype(np.uint16)
    size = 2 * int(np.prod(box))
    address = program().place(tensor, "tensor")
    for at in places(shape, box):
        out = np.zeros(size, np.uint8)
        launch = program().run(
            f"load_{dims}",
            words_of(at, size),
            out,
            maps=[encode(tensor, address, U16, box, swizzle=swizzle)],
            threads=THREADS,
        )
        clean(launch)
        expected = box_of(tensor, at, box, 0).reshape(-1).view(np.uint8)
        padded = np.zeros(-(-size // 1024) * 1024, np.uint8)
        padded[:size] = expected
        assert (out == swizzle_bytes(padded, swizzle)[:size]).all()
    program().fetch(address, tensor)


@pytest.mark.parametrize(("kind", "dtype"), [(F16, np.float16), (F32, np.float32)])
def test_fill_with_nan(kind: int, dtype: type) -> None:
    tensor = np.arange(160, dtype=dtype).reshape(10, 16)
    address = program().place(tensor, "tensor")
    box, at = (8, 16), (5, -3)
    size = 128 * tensor.itemsize
    out = np.zeros(box, dtype)
    tensor_map = encode(tensor, address, kind, box, fill_nan=1)
    clean(program().run("load_2", words_of(at, size), out, maps=[tensor_map], threads=THREADS))
    program().fetch(address, tensor)
    expected = box_of(tensor, at, box, np.nan)
    assert np.isnan(expected).any()
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize(("dims", "swizzle"), CASES)
def test_tensor_store(dims: int, swizzle: int) -> None:
    shape, box = SHAPES[dims - 1], case_box(dims, swizzle)
    size = 2 * int(np.prod(box))
    values = np.random.default_rng(dims).integers(0, 2**16, box).astype(np.uint16)
    image = np.zeros(-(-size // 1024) * 1024, np.uint8)
    image[:size] = values.reshape(-1).view(np.uint8)
    image = swizzle_bytes(image, swizzle)
    for at in places(shape, box):
        tensor = np.full(shape, 7, np.uint16)
        address = program().place(tensor, "tensor")
        launch = program().run(
            f"store_{dims}",
            words_of(at, size),
            image,
            maps=[encode(tensor, address, U16, box, swizzle=swizzle)],
            threads=THREADS,
        )
        clean(launch)
        program().fetch(address, tensor)
        expected = np.full(shape, 7, np.uint16)
        for index in np.ndindex(*box):
            place = tuple(a + i for a, i in zip(at, index, strict=True))
            if all(0 <= p < length for p, length in zip(place, shape, strict=True)):
                expected[place] = values[index]
        assert (tensor == expected).all()


UFUNCS = {"add": np.add, "min": np.minimum, "max": np.maximum}


@pytest.mark.parametrize(
    ("operation", "kind", "dtype"),
    [
        *itertools.product(UFUNCS, [S32], [np.int32]),
        *itertools.product(UFUNCS, [F16], [np.float16]),
        ("add", F32, np.float32),  # PTX has no min and max of f32 here
    ],
)
def test_tensor_reduce(operation: str, kind: int, dtype: type) -> None:
    generator = np.random.default_rng(1)
    tensor = (generator.standard_normal((10, 16)) * 50).astype(dtype)
    values = (generator.standard_normal((8, 16)) * 50).astype(dtype)
    before, at = tensor.copy(), (4, -2)
    address = program().place(tensor, "tensor")
    launch = program().run(
        f"reduce_{operation}",
        words_of(at, values.nbytes),
        values,
        maps=[encode(tensor, address, kind, (8, 16))],
        threads=THREADS,
    )
    clean(launch)
    program().fetch(address, tensor)
    expected = before.copy()
    expected[4:10, 0:14] = UFUNCS[operation](before[4:10, 0:14], values[0:6, 2:16])
    np.testing.assert_array_equal(tensor, expected)


# ---- maps made on the device


def run_device(name: str) -> tuple[Array, Array, set[str]]:
    tensor = np.arange(400, dtype=np.uint16).reshape(10, 40)
    at, box = (3, 30), (4, 16)
    out = np.zeros(box, np.uint16)
    space = np.zeros(128, np.uint8)
    launch = program().run(name, words_of(at, 128), out, space, tensor, threads=THREADS)
    return out, box_of(tensor, at, box, 0), kinds(launch)


def test_map_made_on_the_device() -> None:
    got, expected, found = run_device("device")
    assert not found
    assert (got == expected).all()


def test_map_made_on_the_device_needs_its_fence() -> None:
    assert "missing-proxy-fence" in run_device("device_without_acquire")[2]


def test_map_made_on_the_device_needs_all_fields() -> None:
    assert "wild-access" in run_device("device_without_box")[2]


# ---- refusals


def test_what_is_not_a_map_is_reported() -> None:
    out = np.zeros(256, np.uint16)
    space = np.zeros(64, np.int32)
    launch = program().run("wild_map", space, out, threads=THREADS)
    assert kinds(launch) == {"wild-access"}
    assert "not a tensor map" in launch.reports[0].message


def simple(name: str, at: Sequence[int] = (0, 0), **changed: int) -> set[str]:
    tensor = np.arange(400, dtype=np.uint16).reshape(10, 40)
    address = program().place(tensor, "tensor")
    tensor_map = encode(tensor, address, U16, (8, 32), **changed)
    image = np.zeros(512, np.uint8)
    launch = program().run(name, words_of(at, 512), image, maps=[tensor_map], threads=THREADS)
    program().fetch(address, tensor)
    return kinds(launch)


def test_misuse_is_reported() -> None:
    assert simple("load_2") == set()
    assert simple("load_3") == {"wild-access"}  # the map has 2 dimensions
    assert simple("load_2_shifted") == {"misaligned"}
    assert simple("store_without_fence") == {"missing-proxy-fence"}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"sizes": [0, 10]}, "size"),
        ({"strides": [84]}, "multiple of 16"),
        ({"strides": [2**40]}, "2^40"),
        ({"box": [257, 1]}, "256"),
        ({"box": [4, 1]}, "multiple of 16 bytes"),
        ({"box": [64, 1], "swizzle": 2}, "wider than the swizzle"),
        ({"swizzle": 4}, "swizzle"),
        ({"address": 8}, "16-byte aligned"),
        ({"element_type": 13}, "data type"),
        ({"fill_nan": True}, "floating-point"),
        ({"sizes": [8] * 6, "strides": [16] * 5, "box": [8] * 6}, "rank"),
    ],
)
def test_encoder_refuses(changed: dict[str, object], says: str) -> None:
    good = {
        "element_type": U16,
        "address": 4096,
        "sizes": [40, 10],
        "strides": [80],
        "box": [16, 4],
        "swizzle": 0,
        "fill_nan": False,
    }
    assert len(Executor.instance().tensor_map(**good)) == 128
    with pytest.raises(ValueError, match=says.replace("^", r"\^")):
        Executor.instance().tensor_map(**{**good, **changed})
