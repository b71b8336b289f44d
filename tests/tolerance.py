"""The assertion behind every numerical test: err <= 2 * err(torch, same dtype) + floor."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kernels import _accuracy


def assert_as_exact_as_torch(
    got: Sequence[Tensor | None],
    torch_got: Sequence[Tensor | None],
    want: Sequence[Tensor | None],
    names: Sequence[str],
    terms: Sequence[float] | None = None,
) -> None:
    """`want` is float64's result; the floor is a unit in the last place of each result's dtype.

    `terms` are the sizes of the terms each result is summed from (see _accuracy.error).
    """
    terms = terms or [0.0] * len(names)
    for ours, theirs, exact, name, size in zip(got, torch_got, want, names, terms, strict=True):
        assert (ours is None) == (exact is None), f"{name}: present {ours is not None}"
        if ours is None or exact is None or theirs is None:
            continue
        error = _accuracy.error(ours, exact, size)
        torch_error = _accuracy.error(theirs, exact, size)
        allowed = _accuracy.allowed(torch_error, ours.dtype)
        assert error <= allowed, (
            f"{name}: error {error:.2e}, torch's {torch_error:.2e}, allowed {allowed:.2e}"
        )
