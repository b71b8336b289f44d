"""Which implementation of an op runs.  One rule, one file; every op uses it the same way.

Each op is a folder with one module per backend, and a call goes to the first backend that accepts
it, asked in the order of its device.  `use` or the environment variable KERNELS_BACKEND forces one:
a call it cannot take is then an error that carries the reason, never another backend.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

OPS = (
    *("layer_norm", "attention", "attention.decode", "cross_entropy"),
    *("int8_matmul", "int8_matmul.rows"),
)
BACKENDS = ("cuda", "triton", "cpu", "eager")
CPU_ORDER = ("cpu", "cuda", "triton", "eager")  # asking in vain costs a small call microseconds
FORCED_ONLY = ("reference",)  # plain torch formulas: the tests' oracle, never chosen by itself

_library = torch.library.Library("kernels", "FRAGMENT")

# Arguments whose memory, if any, a kernel may use directly.  Subclasses such as DTensor or
# FakeTensor hold none, and go through PyTorch's dispatcher.
_PLAIN = frozenset(
    {torch.Tensor, torch.nn.Parameter, type(None), tuple, list, float, int, bool, str, torch.dtype}
)


def _known_backend(name: str, source: str) -> str:
    if name not in BACKENDS + FORCED_ONLY:
        accepted = ", ".join(BACKENDS + FORCED_ONLY)
        raise ValueError(f"{source}: unknown backend {name!r} (accepted: {accepted})")
    return name


def _backend_from_environment() -> str | None:
    name = os.environ.get("KERNELS_BACKEND")
    return _known_backend(name, "KERNELS_BACKEND") if name else None


# Process-wide and not per thread: autograd runs backward on threads of its own.
_forced: str | None = _backend_from_environment()


@functools.cache
def load(op: str, backend: str) -> ModuleType | str:
    """The module `kernels.<op>.<backend>`, or the reason it cannot be imported."""
    try:
        return importlib.import_module(f"kernels.{op}.{backend}")
    except ImportError as error:
        return f"not importable ({error})"


def _refusal(op: str, backend: str, arguments: tuple[Any, ...]) -> str | None:
    module = load(op, backend)
    return module if isinstance(module, str) else module.unsupported(*arguments)


def _candidates(x: Any) -> tuple[str, ...]:
    """The backends to ask, in order, for a call whose first argument is `x`."""
    if _forced is not None:
        return (_forced,)
    return CPU_ORDER if x.is_cpu else BACKENDS


def select(op: str, *arguments: Any) -> ModuleType:
    """The backend module that runs this call: the forced one, or the first that accepts.

    Raises NotImplementedError with every backend's reason where none accepts.
    """
    candidates = _candidates(arguments[0])
    for backend in candidates:
        module = load(op, backend)
        if not isinstance(module, str) and module.unsupported(*arguments) is None:
            return module
    reasons = "; ".join(f"{name}: {_refusal(op, name, arguments)}" for name in candidates)
    forced = " (forced by use() or KERNELS_BACKEND)" if _forced else ""
    raise NotImplementedError(f"{op}: no backend takes this call{forced}: {reasons}")


@dataclass(frozen=True)
class Decision:
    """Which backend a call goes to and why not the others; `str()` prints it."""

    op: str
    backend: str | None  # None where no backend accepts
    refusals: dict[str, str | None]  # backend -> None where it accepts, else the reason
    forced: bool

    def __str__(self) -> str:
        how = "forced" if self.forced else "first that accepts"
        lines = [f"{self.op}: {self.backend or 'no backend'} ({how})"]
        for name, reason in self.refusals.items():
            chosen = "  <- runs" if name == self.backend else ""
            lines.append(f"  {name:9s} {reason or 'accepts'}{chosen}")
        return "\n".join(lines)


def explain(op: str, *arguments: Any, **keywords: Any) -> Decision:
    """What would run for this call of the op's public function, and why not the others.

    >>> print(explain("layer_norm", x, (1024,), weight))
    """
    if op not in OPS:
        raise ValueError(f"op: unknown op {op!r} (accepted: {', '.join(OPS)})")
    call = _backend_arguments(op, arguments, keywords)
    refusals = {name: _refusal(op, name, call) for name in _candidates(call[0])}
    chosen = next((name for name, reason in refusals.items() if reason is None), None)
    return Decision(op, chosen, refusals, forced=_forced is not None)


def _backend_arguments(
    op: str, arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[Any, ...]:
    """What backends are asked about: the public call, or what the op's `backend_arguments` says."""
    module = importlib.import_module(f"kernels.{op}.op")
    if hasattr(module, "backend_arguments"):
        brought: tuple[Any, ...] = module.backend_arguments(*arguments, **keywords)
        return brought
    call = inspect.signature(getattr(module, op)).bind(*arguments, **keywords)
    call.apply_defaults()
    return call.args


@contextmanager
def use(backend: str) -> Iterator[None]:
    """Force `backend` for every call inside the `with` block, in all threads of the process."""
    global _forced
    previous, _forced = _forced, _known_backend(backend, "use()")
    try:
        yield
    finally:
        _forced = previous


def _checked_from_environment() -> bool:
    value = os.environ.get("KERNELS_CHECKED") or "0"
    if value not in ("0", "1"):
        raise ValueError(f"KERNELS_CHECKED: unknown value {value!r} (accepted: 0, 1)")
    return value == "1"


_checked: bool = _checked_from_environment()


@contextmanager
def checked(on: bool = True) -> Iterator[None]:
    """Inside, in all threads, values on a GPU are checked as those on the CPU are.

    Class indices of cross_entropy, cu_seqlens of varlen_attention, lengths and block_table of
    decode_attention: where they are wrong the call raises what it raises on the CPU.  It waits for
    the device, so it cannot be captured in a CUDA graph; traced programs are not checked.  The
    environment variable KERNELS_CHECKED=1 does it everywhere.
    """
    global _checked
    previous, _checked = _checked, on
    try:
        yield
    finally:
        _checked = previous


def is_checked() -> bool:
    return _checked


def is_readable(x: torch.Tensor) -> bool:
    """Whether a check may look at the values of `x`: in a traced program there are none yet, and on
    a GPU it would wait for the device, so only where `checked` asks for it."""
    return (x.is_cpu or _checked) and type(x) is torch.Tensor and not torch.compiler.is_compiling()


def offered_to_cpu_first() -> bool:
    """Whether a call on plain CPU tensors is offered to the `cpu` backend before any other.

    A caller that knows the backend to accept need not ask `choose`.
    """
    return (_forced is None or _forced == "cpu") and not torch._C._len_torch_dispatch_stack()


@dataclass(frozen=True)
class Operators:
    """The registered ops `torch.ops.kernels.<op>_forward` and `_backward`, in a backend's place."""

    forward: Callable[..., tuple[Any, ...]]
    backward: Callable[..., tuple[Any, ...]] | None


def define(op: str, forward: str, backward: str | None, gradients: int = 1) -> Callable[..., Any]:
    """Register `torch.ops.kernels.<op>_forward` and `_backward` with these schemas.

    `backward` is None for an op without one.  A dot in `op` is a folder within an op's.

    Returns `choose(*forward arguments)`: what runs a call and its backward, an object with
    `forward` and `backward`.  That is the selected backend's module for plain tensors, and the
    registered ops under torch.compile, dispatch modes and for tensor subclasses.

    The reference is the ops' shape rule under fake tensors, so the two cannot drift apart.  A
    backend returns None for an output that was not asked for; a registered op, whose outputs must
    be tensors, returns an empty one.  A backward takes (*the gradients of the outputs, as many as
    `gradients` says, *the forward's tensors, *what it saved); backends are asked about the
    forward's part.
    """
    operators = Operators(
        _register(op, "forward", forward, first_argument=0),
        None if backward is None else _register(op, "backward", backward, gradients),
    )

    compiling, modes = torch.compiler.is_compiling, torch._C._len_torch_dispatch_stack
    all_plain = _PLAIN.issuperset

    def choose(*arguments: Any) -> Any:
        if compiling() or modes() or not all_plain(map(type, arguments)):
            return operators
        return select(op, *arguments)

    return choose


def _register(
    op: str, direction: str, schema: str, first_argument: int
) -> Callable[..., tuple[Any, ...]]:
    name = f"{op.replace('.', '_')}_{direction}"

    def as_tensors(outputs: tuple[Any, ...], like: torch.Tensor) -> Any:
        tensors = tuple(like.new_empty(0) if output is None else output for output in outputs)
        return tensors if len(tensors) > 1 else tensors[0]  # a schema's only output is no tuple

    def run(*arguments: Any) -> Any:
        module = select(op, *arguments[first_argument:])
        return as_tensors(getattr(module, direction)(*arguments), arguments[0])

    def fake(*arguments: Any) -> Any:
        reference = importlib.import_module(f"kernels.{op}.reference")
        return as_tensors(getattr(reference, direction)(*arguments), arguments[0])

    _library.define(name + schema)
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"kernels::{name}", fake, lib=_library)
    operator = getattr(torch.ops.kernels, name)

    def call(*arguments: Any, **_: bool) -> tuple[Any, ...]:
        # Keywords say what the caller can do without; an op's outputs are always the same.
        outputs = operator(*arguments)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    return call
