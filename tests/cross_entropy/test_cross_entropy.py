"""Cross-entropy against float64: every implementation, every argument, sizes at every switch."""

from __future__ import annotations

import math
import mmap

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import _native, dispatch
from kernels.cross_entropy import cpu as cpu_backend
from kernels.cross_entropy import cross_entropy, reference
from tests.tolerance import assert_as_exact_as_torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("loss", "dinput", "dtarget")
CHUNK = 32768  # classes of csrc/cross_entropy/cpu.cpp: longer rows are cut


def run(function, input, target, *arguments, dtype=None, gradient=None, **keywords):
    """The loss and its gradients in input and in probabilities, all tensors cast to `dtype`."""
    cast = (lambda x: x.to(dtype)) if dtype else (lambda x: x)
    input = cast(input).detach().requires_grad_()
    leaves = [input]
    if target.is_floating_point():
        target = cast(target).detach().requires_grad_(target.requires_grad)
        leaves += [target] if target.requires_grad else []
    arguments = [cast(x) if isinstance(x, torch.Tensor) else x for x in arguments]
    loss = function(input, target, *arguments, **keywords)
    gradient = torch.ones_like(loss) if gradient is None else gradient.to(loss.dtype)
    return loss.detach(), *torch.autograd.grad(loss, leaves, gradient)


def check(input, target, *arguments, ours=cross_entropy, **keywords):
    """`ours` as exact as F.cross_entropy in the same dtype, with a random incoming gradient."""
    keep = {"weight", "ignore_index", "reduction", "label_smoothing"}
    theirs = {name: value for name, value in keywords.items() if name in keep}
    shape = F.cross_entropy(
        input.double(), *_double(target, *arguments), **_double_all(theirs)
    ).shape
    gradient = torch.randn(shape).to(input.dtype)
    want = run(
        F.cross_entropy,
        input,
        target,
        *arguments,
        dtype=torch.double,
        gradient=gradient,
        **_double_all(theirs),
    )
    torch_got = run(F.cross_entropy, input, target, *arguments, gradient=gradient, **theirs)
    got = run(ours, input, target, *arguments, gradient=gradient, **keywords)
    for a, b in zip(got, torch_got, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
    assert_as_exact_as_torch(got, torch_got, want, NAMES[: len(got)])


def _double(*values):
    def convert(x):
        return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    return [convert(value) for value in values]


def _double_all(keywords):
    return dict(zip(keywords, _double(*keywords.values()), strict=True))


def make(rows, classes, dtype=torch.float32, offset=0.0):
    """Logits of unlike rows, targets with a few ignored."""
    input = (torch.randn(rows, classes) * (1 + torch.rand(rows, 1) * 3) + offset).to(dtype)
    target = torch.randint(0, classes, (rows,))
    target[1::5] = -100
    return input, target


# 1; below, at and above a vector and its unrolling; odd; the blocks of 1024; a chunk and past it
CLASSES = (1, 2, 15, 16, 17, 33, 96, 1001, 1023, 1025, 2048, CHUNK, CHUNK + 17)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", CLASSES)
def test_vocabulary_sizes(implementation, nan_filled_memory, classes, dtype):
    check(*make(3 if classes > 2000 else 7, classes, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 4, 6, 300])  # around a group of rows; many: large groups
def test_short_rows(implementation, nan_filled_memory, rows, dtype):
    """Rows done together: each is as if it were alone, whatever its neighbours hold."""
    input, target = make(rows, 96, dtype)
    target[5:40] = -100
    input[rows // 2, 7] = -math.inf
    weight = (0.1 + torch.rand(96)).to(dtype)
    check(input, target, weight=weight, reduction="none")
    if rows > 4:
        input[1], input[rows - 1, 3] = math.nan, math.inf  # 1 is ignored
    got = run(cross_entropy, input, target, weight=weight, reduction="none")
    for row in range(0, rows, 9):
        alone = input[row : row + 1], target[row : row + 1]
        for a, b in zip(
            got, run(cross_entropy, *alone, weight=weight, reduction="none"), strict=True
        ):
            torch.testing.assert_close(a[row : row + 1], b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("classes", [1, 1100, CHUNK + 5])
@pytest.mark.parametrize("probabilities", [False, True])
def test_equal_weights_of_classes_add_up_to_one(implementation, classes, probabilities):
    """A float that adds the same share up class by class is off by 4e-7 at 1100."""
    input, target = make(3, classes)
    if probabilities:
        target = torch.full((3, classes), 1 / classes)
    check(input, target, reduction="none", label_smoothing=1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("probabilities", [False, True])
def test_arguments(implementation, dtype, reduction, weighted, label_smoothing, probabilities):
    input, target = make(11, 67, dtype)
    if probabilities:
        target = torch.randn(11, 67).softmax(1).to(dtype)
        if not implementation.startswith("cpu"):
            target.requires_grad_()
    check(
        input,
        target,
        weight=(0.1 + torch.rand(67)).to(dtype) if weighted else None,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


@pytest.mark.parametrize("shape", [(7,), (3, 7, 4), (2, 5, 3, 2), (0, 4), (3, 4, 0), (1, 1)])
@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_shapes(implementation, shape, probabilities, reduction):
    class_dim = min(1, len(shape) - 1)
    positions = shape[:class_dim] + shape[class_dim + 1 :]
    target = torch.randint(0, shape[class_dim], positions)
    if probabilities:
        target = torch.rand(shape).softmax(class_dim)
    check(torch.randn(shape), target, reduction=reduction)


def test_far_from_zero(implementation):
    """A plain float lse of 1000 would be off by 3e-5, and so would every probability."""
    check(*make(9, 300, offset=1000.0), reduction="none", label_smoothing=0.1)
    check(*make(2, CHUNK + 5, offset=-1000.0), reduction="none")


def test_a_target_that_counts_no_more_than_any_class(implementation):
    """All gradients are small differences of 1 / 999 then, the target's like the others."""
    input, target = make(9, 999)
    check(input / 100, target, reduction="none", label_smoothing=1.0)


def test_rising_logits(implementation):
    """Every block of 1024 exceeds the ones before: the running reference moves each time."""
    input = torch.linspace(0, 200, 5000).repeat(3, 1) + torch.randn(3, 5000)
    check(input, torch.tensor([4999, 0, 2500]), reduction="none", label_smoothing=0.2)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("where", ["one", "target", "all"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("classes", [40, 3000])
def test_infinities_and_nan_are_torchs(implementation, value, where, label_smoothing, classes):
    input, target = torch.randn(4, classes), torch.tensor([3, 3, 0, classes - 1])
    if where == "all":
        input[1] = value
    else:
        input[1, 3 if where == "target" else classes - 1] = value
    check(input, target, reduction="none", label_smoothing=label_smoothing)


def test_blocks_of_minus_infinity(implementation):
    input = torch.full((2, 4000), -math.inf)
    input[0, 3000:] = torch.randn(1000)
    input[1, [5, 2500]] = 1.0
    check(input, torch.tensor([3001, 5]), reduction="none")


def test_all_ignored_and_ignored_class(implementation):
    input, target = make(6, 10)
    for reduction in ("mean", "sum", "none"):
        check(input, torch.full((6,), -100), reduction=reduction)
        check(input, target.clamp(0), ignore_index=0, reduction=reduction)


def test_an_ignored_row_receives_nothing_whatever_it_holds(implementation):
    input = torch.full((2, 5), math.nan)
    input[1] = torch.randn(5)
    _, gradient = run(cross_entropy, input, torch.tensor([-100, 2]))
    assert torch.equal(gradient[0], torch.zeros(5))
    assert gradient[1].isfinite().all()


def test_strides(implementation):
    base = torch.randn(8, 150)
    target = torch.randint(0, 50, (8,))
    check(base[:, 100:], target)  # rows apart
    check(base[::2, :50], target[::2])
    check(torch.randn(50, 8).t(), target)
    check(torch.randn(1, 50).expand(8, 50), target)
    check(torch.randn(50, 8)[:, ::2].t(), target[:4])
    check(base[:, :50], torch.randint(0, 50, (8, 2))[:, 1])


def test_rows_beyond_2_to_31_elements(implementation):
    """The rows lie 2 ** 30 elements apart in a mapping whose other pages are never touched."""
    if implementation in ("reference", "eager"):
        pytest.skip("PyTorch's own addressing")
    no_reserve = 0x4000  # MAP_NORESERVE of Linux
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    memory = mmap.mmap(-1, 13 << 30, flags=flags)
    far = torch.frombuffer(memory, dtype=torch.float32).as_strided((4, 100), (1 << 30, 1))
    far.copy_(torch.randn(4, 100))
    check(far, torch.tensor([1, 99, -100, 50]), reduction="none")


@pytest.mark.parametrize(
    "keywords",
    [
        {"z_loss": 0.01},
        {"softcap": 3.0},
        {"logit_scale": -0.5},
        {"logit_scale": 0.0},
        {"z_loss": 0.1, "softcap": 30.0, "logit_scale": 2.0, "label_smoothing": 0.2},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("probabilities", [False, True])
def test_extensions(implementation, keywords, dtype, probabilities):
    def plain(input, target, z_loss=0.0, softcap=None, logit_scale=1.0, label_smoothing=0.0):
        x = input * logit_scale
        x = x if softcap is None else softcap * torch.tanh(x / softcap)
        loss = F.cross_entropy(x, target, label_smoothing=label_smoothing, reduction="none")
        z = z_loss * torch.logsumexp(x, 1).square()
        return loss + (z if target.is_floating_point() else torch.where(target == -100, 0, z))

    def ours(*arguments, **options):
        return cross_entropy(*arguments, reduction="none", **options)

    input, target = make(64, 130, dtype)
    if probabilities:
        target = torch.rand(64, 130).softmax(1).to(dtype)
    want = run(plain, input, target, dtype=torch.double, **keywords)
    assert_as_exact_as_torch(
        run(ours, input, target, **keywords),
        run(plain, input, target, **keywords),
        want,
        NAMES[:2],
        terms=(0.0, 1.0),  # the gradient is a difference of terms of about 1
    )


@pytest.mark.parametrize("classes", [3, 1000, CHUNK + 9])
def test_stats(implementation, classes):
    input, target = make(8, classes)
    input[0, target[0]] = input[0].max() + 1  # surely right
    input[2, :2] = input[2].max() + 1  # equal: the first counts
    target[2] = 1
    _, stats = cross_entropy(input, target, return_stats=True)
    wide = input.double()
    lse = torch.logsumexp(wide, 1)
    torch.testing.assert_close(stats.lse.double(), lse, rtol=1e-6, atol=0)
    picked = wide.gather(1, target.clamp(0)[:, None])[:, 0] - lse
    torch.testing.assert_close(
        stats.log_prob.double(), torch.where(target == -100, 0, picked), rtol=1e-5, atol=1e-6
    )
    assert torch.equal(stats.correct, input.argmax(1) == target)
    assert stats.correct[0]
    assert not stats.correct[2]
    input[4, [classes - 1, classes - 2]] = math.nan
    target[4] = classes - 2
    assert cross_entropy(input, target, return_stats=True)[1].correct[4]


def test_gradient_of_lse(implementation):
    input, target = make(6, 70)
    input.requires_grad_()
    for smoothing in (0.0, 0.1):
        loss, stats = cross_entropy(input, target, label_smoothing=smoothing, return_stats=True)
        (got,) = torch.autograd.grad(loss + stats.lse.square().sum(), input)
        wide = input.detach().double().requires_grad_()
        plain = F.cross_entropy(wide, target, label_smoothing=smoothing)
        (want,) = torch.autograd.grad(plain + torch.logsumexp(wide, 1).square().sum(), wide)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
        loss, stats = cross_entropy(input, target, return_stats=True)
        (got,) = torch.autograd.grad(stats.lse.sum(), input)
        torch.testing.assert_close(got, input.softmax(1).detach())


@pytest.mark.skipif(isinstance(_native.cpu, str), reason="needs kernels._cpu")
@pytest.mark.parametrize("shape", [(3, 100_000), (700, 200), (40, 3000)])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_bits_do_not_depend_on_threads(shape, label_smoothing):
    input, target = make(*shape)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(
                run(cross_entropy, input, target, reduction="none", label_smoothing=label_smoothing)
            )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.skipif(isinstance(_native.cpu, str), reason="needs kernels._cpu")
def test_large_vocabulary_and_streamed_gradient():
    check(*make(2, 1 << 20))
    check(*make(100, 65536))  # a gradient of 24 MiB, written past the caches
    check(*make(300, 65536, torch.bfloat16))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 9),
    classes=st.integers(1, 200),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    label_smoothing=st.sampled_from([0.0, 0.3]),
    weighted=st.booleans(),
    probabilities=st.booleans(),
    ignore_index=st.sampled_from([-100, -1, 0, 1000]),
    seed=st.integers(0, 1000),
)
def test_any_call_is_torchs(
    rows, classes, reduction, label_smoothing, weighted, probabilities, ignore_index, seed
):
    torch.manual_seed(seed)
    for dtype in (torch.float32, torch.float64):
        input = torch.randn(rows, classes, dtype=dtype)
        target = torch.randint(0, classes, (rows,))
        if rows:
            target[torch.rand(rows) < 0.3] = ignore_index
        keywords = {"ignore_index": ignore_index}
        if probabilities:
            target, keywords = torch.rand(rows, classes, dtype=dtype).softmax(1), {}
        weight = torch.rand(classes, dtype=dtype) + 0.1 if weighted else None
        keywords |= {"reduction": reduction, "label_smoothing": label_smoothing, "weight": weight}
        want, got = (
            run(F.cross_entropy, input, target, **keywords),
            run(cross_entropy, input, target, **keywords),
        )
        tolerance = 2e-6 if dtype == torch.float32 else 1e-13
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def test_an_out_of_range_row_is_nan_in_the_reference():
    input = torch.randn(3, 5)
    target = torch.tensor([1, 5, -7])
    with dispatch.use("reference"):
        loss, gradient = run(cross_entropy, input, target, reduction="none")
    assert loss.isnan().tolist() == [False, True, True]
    assert gradient.isnan().all(1).tolist() == [False, True, True]


@pytest.mark.skipif(isinstance(_native.cpu, str), reason="needs kernels._cpu")
def test_lse_means_the_same_in_every_backend():
    input, target = make(5, 300, offset=500.0)
    options = (None, -100, 0.0, 0.0, 0.0, 1.0, False)
    want = reference.forward(input.double(), target, *options)[1].sum(0)
    for backend in (reference, cpu_backend):
        lse = backend.forward(input, target, *options)[1]
        assert (lse.double().sum(0) - want).abs().max() < 2e-6
        assert torch.equal(lse[0], lse[0] + lse[1])
