"""Cross-entropy as a citizen of PyTorch: errors, autograd, compile, autocast, transforms."""

from __future__ import annotations

import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kernels import _native, dispatch
from kernels.cross_entropy import CrossEntropyLoss, cross_entropy, shift_labels
from kernels.cross_entropy.rows import Options

X = torch.randn(4, 8)
T = torch.tensor([1, 0, 7, 2])

REFUSED = {
    "input not a tensor": (([1.0], T), {}, "input must be a Tensor"),
    "input integer": ((X.long(), T), {}, "input is torch.int64"),
    "input scalar": ((torch.tensor(1.0), torch.tensor(1.0)), {}, "input must have"),
    "target not a tensor": ((X, [1]), {}, "target must be a Tensor"),
    "target rows": ((X, T[:3]), {}, r"batch_size \(4\) to match target batch_size \(3\)"),
    "target dimensions": ((X, torch.zeros(4, 1).long()), {}, "target must have shape"),
    "target places": ((X[..., None], torch.zeros(4, 2).long()), {}, "target must have shape"),
    "target of one row": ((X[0], torch.zeros(2).long()), {}, "must have one element"),
    "target int32": ((X, T.int()), {}, "got torch.int32"),
    "target float": ((X, T.float()), {}, "got torch.float32"),
    "probabilities integer": ((X, X.long()), {}, "floating point dtype is expected"),
    "probabilities with ignore_index": ((X, X), {"ignore_index": 3}, "ignore_index=3"),
    "weight size": ((X, T, torch.ones(7)), {}, "weight must have one element"),
    "weight shape": ((X, T, torch.ones(8, 1)), {}, "weight must have one element"),
    "weight not a tensor": ((X, T, [1.0] * 8), {}, "weight must be a Tensor"),
    "reduction": ((X, T), {"reduction": "average"}, "'average' is not a valid value"),
    "ignore_index text": ((X, T), {"ignore_index": "a"}, "ignore_index must be an int, not str"),
    "ignore_index bool": ((X, T), {"ignore_index": True}, "ignore_index must be an int, not bool"),
    "smoothing text": ((X, T), {"label_smoothing": "a"}, "label_smoothing must be a float"),
    "smoothing above 1": ((X, T), {"label_smoothing": 1.5}, "label_smoothing must be between"),
    "target too large": ((X, torch.tensor([1, 8, 0, 9])), {}, "target 8 at position 1 is out"),
    "target negative": ((X, torch.tensor([1, 2, 0, -1])), {}, "target -1 at position 3 is out"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_errors_are_pytorchs_and_name_the_argument(name):
    arguments, keywords, message = REFUSED[name]
    with pytest.raises(Exception, match=r".") as theirs:
        F.cross_entropy(*arguments, **keywords)
    for backend in ("eager", "cpu"):
        if backend == "cpu" and isinstance(_native.cpu, str):
            continue
        with dispatch.use(backend), pytest.raises(theirs.type, match=message):
            cross_entropy(*arguments, **keywords)


@pytest.mark.parametrize(
    "keywords",
    [
        {"softcap": 0.0},
        {"softcap": -1.0},
        {"z_loss": float("nan")},
        {"logit_scale": 1e999},
        {"ignore_index": 2**70},
    ],
    ids=str,
)
def test_extensions_are_checked(keywords):
    with pytest.raises(ValueError, match=next(iter(keywords))):
        cross_entropy(X, T, **keywords)
    with pytest.raises(RuntimeError, match="label_smoothing"):  # PyTorch takes it for 0
        cross_entropy(X, T, label_smoothing=-0.5)
    for name in ("z_loss", "softcap", "logit_scale"):
        with pytest.raises(TypeError, match=f"{name} must be a float, not str"):
            cross_entropy(X, T, **{name: "a"})


def test_nothing_is_written_when_a_target_is_wrong():
    x = X.clone().requires_grad_()
    with pytest.raises(IndexError):
        cross_entropy(x, T + 7)
    assert torch.equal(x, X)


def test_unsigned_bytes_are_indices():
    torch.testing.assert_close(cross_entropy(X, T.byte()), F.cross_entropy(X, T))


def test_dtype_of_the_result():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for probabilities in (torch.float32, torch.bfloat16, torch.float64):
            q = X.softmax(1).to(probabilities)
            want = F.cross_entropy(X.to(dtype), q)
            got = cross_entropy(X.to(dtype), q)
            assert got.dtype == want.dtype
            torch.testing.assert_close(got, want, rtol=0.03, atol=0)
        assert cross_entropy(X.to(dtype), T).dtype == F.cross_entropy(X.to(dtype), T).dtype


def test_autocast_gives_float32_from_logits_as_they_are():
    x = X.bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = cross_entropy(x, T), F.cross_entropy(x, T)
        assert ours.dtype == theirs.dtype == torch.float32
        assert cross_entropy(X.half(), X.half()).dtype == torch.float32
    torch.testing.assert_close(ours, theirs)
    (got,), (want,) = torch.autograd.grad(ours, x), torch.autograd.grad(theirs, x)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("keywords", [{}, {"softcap": 2.0, "z_loss": 0.1, "logit_scale": -0.7}])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_first_and_second_derivatives(keywords, reduction):
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    q = torch.rand(4, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(6, dtype=torch.float64)
    target = torch.tensor([1, -100, 5, 0])
    keywords |= {"label_smoothing": 0.1, "reduction": reduction}

    def of_indices(x):
        loss, stats = cross_entropy(x, target, weight, return_stats=True, **keywords)
        return loss, stats.lse

    def of_probabilities(x, q):
        return cross_entropy(x, q, weight, **keywords)

    for function, inputs in ((of_indices, (x,)), (of_probabilities, (x, q))):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.skipif(isinstance(_native.cpu, str), reason="needs kernels._cpu")
def test_second_derivative_of_a_fused_forward():
    x = X.clone().requires_grad_()

    def second(function):
        (first,) = torch.autograd.grad(function(x, T), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    torch.testing.assert_close(second(cross_entropy), second(F.cross_entropy))


@pytest.mark.skipif(isinstance(_native.cpu, str), reason="needs kernels._cpu")
def test_inplace_backward_reuses_the_logits_and_is_noticed():
    base = X.clone().requires_grad_()
    logits = base * 1.0
    squares = (logits * logits).sum()
    loss = cross_entropy(logits, T, inplace_backward=True)
    (want,) = torch.autograd.grad(F.cross_entropy(base, T), base)
    (got,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert got.data_ptr() == logits.data_ptr()
    torch.testing.assert_close(got, want)
    for late in (loss, squares):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            late.backward(retain_graph=True)
    wide = X.repeat(1, 2).requires_grad_()  # rows apart: what lies between them stays
    view = (wide * 1.0)[:, :8]
    (got,) = torch.autograd.grad(cross_entropy(view, T, inplace_backward=True), view)
    torch.testing.assert_close(got, want)
    row = torch.randn(1, 8, requires_grad=True)  # rows in the same memory: not written over
    both = row.expand(4, 8)
    (got,) = torch.autograd.grad(cross_entropy(both, T, inplace_backward=True), row)
    torch.testing.assert_close(got, torch.autograd.grad(F.cross_entropy(both, T), row)[0])


def test_the_input_is_never_modified():
    x = X.clone().requires_grad_()
    version = x._version
    cross_entropy(x, T, return_stats=True)[0].backward()
    assert x._version == version
    assert torch.equal(x, X)


@pytest.mark.parametrize(("probabilities", "dynamic"), [(False, True), (True, None)])
def test_compiles_to_one_graph(probabilities, dynamic):
    def function(x, target):
        loss, stats = cross_entropy(
            x.view(-1, 8) * 2, target, label_smoothing=0.1, softcap=5.0, return_stats=True
        )
        return loss + stats.lse.mean()

    target = X.softmax(1) if probabilities else T
    x = X.clone().requires_grad_()
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic)
    got, want = compiled(x, target), function(x, target)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, x), torch.autograd.grad(want, x))


@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("probabilities", [False, True])
def test_registered_ops_pass_opcheck(stats, probabilities):
    target = X.softmax(1) if probabilities else T
    options = Options(-100, 0.1, 0.01, 5.0, 1.0, stats)
    arguments = (X, target, torch.ones(8), *options)
    torch.library.opcheck(torch.ops.kernels.cross_entropy_forward.default, arguments)
    lse = torch.ops.kernels.cross_entropy_forward(*arguments)[1]
    backward = (torch.ones(4), torch.ones(4), *arguments, lse, [True, False], False)
    torch.library.opcheck(torch.ops.kernels.cross_entropy_backward.default, backward)


def test_transforms_run_pytorchs_ops():
    def ours(x):
        return cross_entropy(x, T, label_smoothing=0.1)

    def theirs(x):
        return F.cross_entropy(x, T, label_smoothing=0.1)

    torch.testing.assert_close(torch.func.grad(ours)(X), torch.func.grad(theirs)(X))
    torch.testing.assert_close(torch.func.hessian(ours)(X), torch.func.hessian(theirs)(X))
    batch = torch.randn(3, 4, 8)
    torch.testing.assert_close(torch.vmap(ours)(batch), torch.vmap(theirs)(batch))
    tangent = torch.randn_like(X)
    got, want = (torch.func.jvp(f, (X,), (tangent,)) for f in (ours, theirs))
    torch.testing.assert_close(got, want)


def test_subclasses_see_the_call():
    class Logged(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function is cross_entropy:
                return "seen"
            return super().__torch_function__(function, types, args, kwargs or {})

    assert cross_entropy(X.as_subclass(Logged), T) == "seen"


def test_module_is_pytorchs():
    weight = torch.rand(8)
    ours = CrossEntropyLoss(weight, ignore_index=0, label_smoothing=0.1)
    theirs = nn.CrossEntropyLoss(weight, ignore_index=0, label_smoothing=0.1)
    assert isinstance(ours, nn.CrossEntropyLoss)
    torch.testing.assert_close(ours(X, T), theirs(X, T))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert repr(ours) == repr(theirs)
    copied = pickle.loads(pickle.dumps(CrossEntropyLoss(softcap=3.0, reduction="sum")))
    torch.testing.assert_close(copied(X, T), cross_entropy(X, T, softcap=3.0, reduction="sum"))


def test_shift_labels():
    labels = torch.tensor([[5, 6, 7], [1, 2, 3]])
    assert shift_labels(labels).tolist() == [[6, 7, -100], [2, 3, -100]]
    assert shift_labels(labels[0], -1).tolist() == [6, 7, -1]


@pytest.mark.skipif(isinstance(_native.cpu, str), reason="needs kernels._cpu")
def test_explain_and_forced_backends():
    decision = dispatch.explain("cross_entropy", X.expand(2, 4, 8).mT, T.expand(2, 4))
    assert decision.backend == "cpu"
    assert dispatch.explain("cross_entropy", X.double(), T).backend == "eager"
    q = X.softmax(1).requires_grad_()
    assert "target requires a gradient" in dispatch.explain("cross_entropy", X, q).refusals["cpu"]
    with dispatch.use("cpu"), pytest.raises(NotImplementedError, match="float64"):
        cross_entropy(X.double(), T)
