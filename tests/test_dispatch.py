"""Which backend runs: the order, every refusal, forcing, and what the caller is told."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import types

import pytest
import torch

from kernels import _gpu, _native, dispatch
from kernels.layer_norm import layer_norm, op

X = torch.randn(2, 4)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def backend(name: str, refusal: str | None, calls: list[str]) -> types.ModuleType:
    """A backend module that notes when it runs."""
    module = types.ModuleType(name)
    module.unsupported = lambda *_: refusal
    module.forward = lambda x, *_: calls.append(name) or (x, x, x)
    return module


@pytest.fixture
def fake_backends(monkeypatch):
    """Replaces the backends by the given refusals (a str, None: accepts, or an import error)."""

    def install(**refusals):
        calls: list[str] = []
        modules = {
            name: refusal if name == "triton" and refusal else backend(name, refusal, calls)
            for name, refusal in refusals.items()
        }
        monkeypatch.setattr(dispatch, "load", lambda op, name: modules[name])
        return calls

    return install


def test_the_first_backend_that_accepts_runs(fake_backends):
    calls = fake_backends(cuda="no GPU", triton="not importable", cpu=None, eager=None)
    dispatch.select("layer_norm", X).forward(X)
    assert calls == ["cpu"]


@pytest.mark.parametrize(
    ("on_cpu", "order"), [(True, dispatch.CPU_ORDER), (False, dispatch.BACKENDS)]
)
def test_order_of_backends(fake_backends, on_cpu, order):
    assert sorted(order) == sorted(dispatch.BACKENDS)
    x = types.SimpleNamespace(is_cpu=on_cpu)
    for position, expected in enumerate(order):
        refusals = dict.fromkeys(order, None) | dict.fromkeys(order[:position], "refused")
        calls = fake_backends(**refusals)
        dispatch.select("layer_norm", x).forward(x)
        assert calls == [expected]


def test_where_none_accepts_every_reason_is_given(fake_backends):
    fake_backends(cuda="reason A", triton="reason B", cpu="reason C", eager="reason D")
    with pytest.raises(NotImplementedError) as error:
        dispatch.select("layer_norm", X)
    for text in (
        "layer_norm",
        "cuda: reason A",
        "triton: reason B",
        "cpu: reason C",
        "eager: reason D",
    ):
        assert text in str(error.value)


def test_reference_is_never_chosen_by_itself():
    assert "reference" not in dispatch.BACKENDS
    assert "reference" not in dispatch.explain("layer_norm", X, (4,)).refusals


def test_forcing_a_backend_that_refuses_is_an_error_with_its_reason():
    with (
        dispatch.use("cuda"),
        pytest.raises(NotImplementedError, match=r"cuda: .*forced|forced.*cuda: "),
    ):
        layer_norm(X, (4,))
    with (
        dispatch.use("cpu"),
        pytest.raises(NotImplementedError, match=r"cpu: input is torch.float64"),
    ):
        layer_norm(X.double(), (4,))


REFUSALS = [
    ("cpu", X.double(), None, None, "input is torch.float64"),
    ("cpu", X, X[0].double(), None, "weight is torch.float64"),
    ("cpu", X, None, X[0].double(), "bias is torch.float64"),
    ("cpu", X.to("meta"), None, None, "input is on meta"),
    ("triton", X, None, None, "input is on cpu"),
]


@pytest.mark.skipif(isinstance(_native.cpu, str), reason="the C++ module is not built")
@pytest.mark.parametrize(("name", "x", "weight", "bias", "reason"), REFUSALS)
def test_each_refusal(name, x, weight, bias, reason):
    with dispatch.use(name):
        decision = dispatch.explain("layer_norm", x, (4,), weight, bias)
    assert decision.backend is None
    assert reason in decision.refusals[name]


def test_cuda_refuses_without_its_module_or_without_a_gpu(monkeypatch):
    with dispatch.use("cuda"):
        monkeypatch.setattr(_native, "cuda", "kernels._cuda is not built (no nvcc)")
        reason = dispatch.explain("layer_norm", X, (4,)).refusals["cuda"]
        assert reason == "kernels._cuda is not built (no nvcc)"
        monkeypatch.setattr(_native, "cuda", types.ModuleType("kernels._cuda"))
        assert "input is on cpu" in dispatch.explain("layer_norm", X, (4,)).refusals["cuda"]


def test_cpu_refuses_without_its_module(monkeypatch):
    monkeypatch.setattr(_native, "cpu", "kernels._cpu is not built")
    monkeypatch.setattr(op, "_rows", op._no_rows)  # what an import without the module gives
    decision = dispatch.explain("layer_norm", X, (4,))
    assert decision.backend == "eager"
    assert decision.refusals["cpu"] == "kernels._cpu is not built"
    torch.testing.assert_close(layer_norm(X, (4,)), torch.nn.functional.layer_norm(X, (4,)))


def test_a_stand_in_lets_gpu_backends_take_cpu_tensors(monkeypatch):
    monkeypatch.setattr(_gpu, "stand_in", types.SimpleNamespace(multiprocessors=4))
    assert _gpu.unsupported(X) is None
    assert _gpu.multiprocessors(X) == 4
    assert "meta" in _gpu.unsupported(X.to("meta"))


def test_a_backend_that_cannot_be_imported_says_why(monkeypatch):
    dispatch.load.cache_clear()
    monkeypatch.setitem(sys.modules, "triton", None)  # as if not installed
    for name in ("kernels.layer_norm.triton", "kernels._triton"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    try:
        decision = dispatch.explain("layer_norm", X, (4,))
        assert decision.refusals["triton"].startswith("not importable (")
        assert decision.backend in ("cpu", "eager")
    finally:
        dispatch.load.cache_clear()


def test_explain_prints_the_whole_decision():
    text = str(dispatch.explain("layer_norm", X, (4,), eps=1e-3))
    for name in dispatch.BACKENDS:
        assert name in text
    assert "<- runs" in text
    with dispatch.use("eager"):
        assert str(dispatch.explain("layer_norm", X, (4,))).startswith("layer_norm: eager (forced)")


def test_explain_refuses_unknown_ops_and_arguments():
    with pytest.raises(ValueError, match=r"unknown op 'batch_norm'.*accepted: layer_norm"):
        dispatch.explain("batch_norm", X)
    with pytest.raises(TypeError):
        dispatch.explain("layer_norm", X, (4,), momentum=0.1)


def test_use_is_restored_even_after_an_error_and_nests():
    def forced():
        return dispatch.explain("layer_norm", X, (4,)).forced

    with dispatch.use("eager"):
        with pytest.raises(ZeroDivisionError), dispatch.use("reference"):
            _ = 1 / 0
        assert dispatch.explain("layer_norm", X, (4,)).backend == "eager"
    assert not forced()


def test_use_refuses_unknown_backends():
    with pytest.raises(ValueError, match=r"unknown backend 'cutlass'.*accepted: cuda, triton, cpu"):
        dispatch.use("cutlass").__enter__()


def test_use_holds_in_other_threads():
    """Autograd runs backward on threads of its own."""
    seen = []
    with dispatch.use("reference"):
        thread = threading.Thread(
            target=lambda: seen.append(dispatch.explain("layer_norm", X, (4,)).backend)
        )
        thread.start()
        thread.join()
    assert seen == ["reference"]


def test_environment_forces_a_backend():
    code = (
        "import torch; from kernels.dispatch import explain;"
        "print(explain('layer_norm', torch.ones(2, 4), (4,)).backend)"
    )
    assert run_python(code, KERNELS_BACKEND="eager").stdout.strip() == "eager"
    refused = run_python(code, KERNELS_BACKEND="cutlass")
    assert refused.returncode != 0
    assert "KERNELS_BACKEND: unknown backend 'cutlass'" in refused.stderr


@pytest.mark.skipif(isinstance(_native.cpu, str), reason="the C++ module is not built")
def test_environment_forces_an_instruction_set():
    code = "from kernels import _native; print(_native.cpu.instruction_set())"
    least = _native.cpu.instruction_sets()[-1]
    assert run_python(code, KERNELS_CPU_ISA=least).stdout.strip() == least
    refused = run_python(code, KERNELS_CPU_ISA="avx9")
    assert refused.returncode != 0
    assert "KERNELS_CPU_ISA: instruction set 'avx9' is not available here" in refused.stderr
    assert "available: " in refused.stderr


def test_import_of_kernels_is_light():
    code = "import sys, kernels; sys.exit('torch' in sys.modules)"
    assert run_python(code).returncode == 0


def test_checked_mode_reads_values_on_a_device():
    """A tensor on the meta device stands for one on a GPU: not at hand unless asked for."""
    here, there = torch.zeros(1), torch.zeros(1, device="meta")
    assert dispatch.is_readable(here)
    assert not dispatch.is_readable(there)
    with dispatch.checked():
        assert dispatch.is_readable(there)
        with dispatch.checked(False):
            assert not dispatch.is_readable(there)
        assert not dispatch.is_readable(there.as_subclass(Wrapped))
    assert not dispatch.is_checked()


class Wrapped(torch.Tensor):
    pass


def test_checked_mode_from_the_environment():
    code = "from kernels import dispatch; print(dispatch.is_checked())"
    assert run_python(code, KERNELS_CHECKED="1").stdout.strip() == "True"
    refused = run_python(code, KERNELS_CHECKED="yes")
    assert "KERNELS_CHECKED: unknown value 'yes' (accepted: 0, 1)" in refused.stderr
