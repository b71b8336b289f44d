"""The .approx instructions: within the error that the PTX ISA documents, jittered or not."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from tests.ptx.assembly import kernel
from tests.ptx.runtime_support import Buffer, Kernels

THREADS = 256
OWN = "shl.b32 %r10, %r1, 2; cvt.u64.u32 %rd10, %r10; add.u64 %rd2, %rd1, %rd10;"

# instruction, function, domain, relative and absolute error (PTX ISA 8.7, section 9.7.3)
CASES = {
    "ex2": (np.exp2, (-20.0, 20.0), 2**-22, 0.0),
    "lg2": (np.log2, (0.51, 1.99), 0.0, 2**-22),
    "rsqrt": (lambda x: 1 / np.sqrt(x), (1e-3, 1e3), 2**-22.9, 0.0),
    "rcp": (lambda x: 1 / x, (1e-3, 1e3), 2**-23, 0.0),
    "sqrt": (np.sqrt, (1e-3, 1e3), 2**-23, 0.0),
    "sin": (np.sin, (-np.pi, np.pi), 0.0, 2**-20.5),
    "cos": (np.cos, (-np.pi, np.pi), 0.0, 2**-20.5),
    "tanh": (np.tanh, (-4.0, 4.0), 2**-11, 0.0),
}

KERNELS = Kernels(
    "".join(
        kernel(
            name,
            f"{OWN} ld.global.b32 %r5, [%rd2]; {name}.approx.f32 %r6, %r5;"
            "st.global.b32 [%rd2], %r6;",
            pointers=1,
        )
        for name in CASES
    )
)


def evaluate(name: str, x: np.ndarray, **options: int) -> np.ndarray:
    buffer = Buffer(x.nbytes, contents=x.tobytes())
    assert KERNELS.run(name, buffer, threads=THREADS, **options).reports == []
    return np.array(struct.unpack(f"{THREADS}f", buffer.contents))


@pytest.mark.parametrize("name", CASES)
def test_error_is_within_what_is_documented(name: str) -> None:
    function, domain, relative, absolute = CASES[name]
    x = np.random.default_rng(0).uniform(*domain, THREADS).astype(np.float32)
    exact = function(x.astype(np.float64))
    room = relative * np.abs(exact) + absolute
    plain = evaluate(name, x)
    jittered = [evaluate(name, x, jitter=1, seed=seed) for seed in (1, 2)]
    for result in (plain, *jittered):
        assert (np.abs(result - exact) <= room).all()
    # Jitter uses the room: it is a test of the tests' tolerances.
    assert (np.abs(jittered[0] - exact) / room).max() > 0.5
    assert (jittered[0] != jittered[1]).any()
    assert (evaluate(name, x, jitter=1, seed=1) == jittered[0]).all()


def test_jitter_is_a_function_of_the_value() -> None:
    """Threads that hold the same number must get the same result, as on hardware."""
    x = np.full(THREADS, 1.3, dtype=np.float32)
    assert len(set(evaluate("ex2", x, jitter=1, seed=5))) == 1
