"""What a model's linear layers are given: `calibrate`, and with it SmoothQuant, `smooth_`.

Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language
Models", 2022 (arXiv:2211.10438).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from kernels.int8_matmul.linear import is_linear, weight_of

LEAST, MOST = 1e-5, 1e5  # of a factor of smooth_


class Smoothing(NamedTuple):
    """What `smooth_` did: linear layers by their layer norm, and why the others were left alone."""

    folded: dict[str, list[str]]
    skipped: dict[str, str]


def calibrate(model: nn.Module, batches: Iterable[Any]) -> dict[str, Tensor]:
    """The largest |x| of every input feature of each linear layer, float32 [K] by its name.

    Runs `model`, in eval mode and without gradients, on every batch: a Tensor, a tuple or list of
    arguments, or a mapping of keywords.  Layers that were not called are left out.

    Raises ValueError where there is no batch.
    """
    return {name: seen.absmax for name, seen in _watch(model, batches)[0].items()}


def smooth_(model: nn.Module, batches: Iterable[Any], alpha: float = 0.5) -> Smoothing:
    """SmoothQuant: moves outliers of activations into the weights, by a factor for each feature.

    Where the output of a layer norm goes to linear layers and nowhere else, its weight and bias are
    divided and the columns of theirs multiplied by

        s[k] = max |x[:, k]| ** alpha / max |weight[:, k]| ** (1 - alpha)

    which leaves the model's function as it is and makes int8 activations more exact.  Layer norms
    are nn.LayerNorm and nn.RMSNorm with a weight; linear layers nn.Linear and Conv1D.  Everything
    else is left alone and reported: nothing is inserted before a layer without a layer norm.

    Args:
        model: a float model; changed in place.
        batches: as for `calibrate`.
        alpha: 0 to 1: how much of the difficulty moves to the weights.

    Raises:
        ValueError: alpha is out of range, or there is no batch; TypeError for no module.
    """
    if not isinstance(alpha, int | float) or not 0 <= alpha <= 1:
        raise ValueError(f"smooth_: alpha must be between 0 and 1, but is {alpha!r}")
    seen, uses = _watch(model, batches)
    names = {module: name for name, module in model.named_modules()}
    owners = _owners(model)
    linears = {name: module for name, module in model.named_modules() if is_linear(module)}
    folded: dict[str, list[str]] = {}
    skipped = {name: "it was not called" for name in linears if name not in seen}
    followers: dict[nn.Module, list[str]] = {}
    for name, watched in seen.items():
        if name not in linears:
            continue  # another name of a module
        if len(watched.sources) != 1 or None in watched.sources:
            skipped[name] = "its input does not come from one layer norm alone"
        else:
            (norm,) = watched.sources
            assert norm is not None
            followers.setdefault(norm, []).append(name)
    for norm, following in followers.items():
        modules = [linears[name] for name in following]
        every = [f for f, watched in seen.items() if norm in watched.sources]
        reason = _why_not(norm, modules, uses.others.get(norm), owners)
        if reason is None and any(name in skipped for name in every):
            reason = "it goes to a layer with other inputs, too"
        if reason is not None:
            skipped |= dict.fromkeys(following, f"{names[norm]}: {reason}")
            continue
        _fold(norm, modules, seen[following[0]].absmax, alpha)
        folded[names[norm]] = following
    return Smoothing(folded, skipped)


class _Watched:
    """What one linear layer was given: the largest values, and which layer norms they came from."""

    def __init__(self) -> None:
        self.absmax = torch.zeros(0)
        self.sources: set[nn.Module | None] = set()

    def add(self, x: Tensor, source: nn.Module | None) -> None:
        absmax = x.detach().float().abs().reshape(-1, x.shape[-1])
        if absmax.shape[0]:
            largest = absmax.amax(0)
            self.absmax = torch.maximum(self.absmax, largest) if len(self.absmax) else largest
        self.sources.add(source)


class _Uses(TorchFunctionMode):
    """Notes which functions are given the output of a layer norm, outside of linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: dict[int, tuple[Tensor, nn.Module]] = {}  # kept alive: an id is used once
        self.others: dict[nn.Module, str] = {}
        self.within = 0  # linear layers

    def source(self, x: Any) -> nn.Module | None:
        return self.outputs.get(id(x), (None, None))[1]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.outputs and not self.within:
            self._note(func, (args, kwargs), result)
        return result

    def _note(self, func: Any, arguments: Any, result: Any) -> None:
        tensors = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        for x in tree_leaves(arguments):
            norm = self.source(x)
            if norm is None:
                continue
            name = getattr(func, "__name__", str(func))
            changes = name.endswith("_") and not name.endswith("__")
            # Sizes and the like are no use of the values, nor is dropout that does nothing.
            if changes or any(tensor is not x for tensor in tensors):
                self.others[norm] = name


def _watch(model: nn.Module, batches: Iterable[Any]) -> tuple[dict[str, _Watched], _Uses]:
    """Runs the batches; what each linear layer that was called was given, by all its names."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, not {type(model).__name__}")
    uses = _Uses()
    seen: dict[nn.Module, _Watched] = {}

    def before_linear(module: nn.Module, args: Any, kwargs: Any) -> None:
        x = next(iter((*args, *kwargs.values())))
        uses.within += 1
        seen.setdefault(module, _Watched()).add(x, uses.source(x))

    def after_linear(*_: Any) -> None:
        uses.within -= 1

    def after_norm(module: nn.Module, args: Any, output: Tensor) -> None:
        uses.outputs[id(output)] = output, module

    count = 0
    with contextlib.ExitStack() as stack, torch.no_grad():
        stack.enter_context(_evaluating(model))
        for module in model.modules():
            hooks: list[Any] = []
            if is_linear(module):
                hooks.append(module.register_forward_pre_hook(before_linear, with_kwargs=True))
                hooks.append(module.register_forward_hook(after_linear, always_call=True))
            elif _is_norm(module):
                hooks.append(module.register_forward_hook(after_norm))
            for hook in hooks:
                stack.callback(hook.remove)
        for batch in batches:
            with uses:
                result = _call(model, batch)
            for x in tree_leaves(result):
                norm = uses.source(x)
                if norm is not None:
                    uses.others[norm] = "the model's caller"
            uses.outputs.clear()
            count += 1
    if not count:
        raise ValueError("batches must hold at least one batch")
    by_name = {
        name: seen[module]
        for name, module in model.named_modules(remove_duplicate=False)
        if module in seen
    }
    return by_name, uses


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list):
        return model(*batch)
    raise TypeError(
        f"a batch must be a Tensor, a tuple, a list or a mapping, not {type(batch).__name__}"
    )


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """All modules in eval mode, each as it was afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm | nn.RMSNorm) and len(module.normalized_shape) == 1


def _owners(model: nn.Module) -> dict[int, int]:
    """In how many modules each parameter is, by its id."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return owners


def _why_not(
    norm: nn.Module, linears: list[nn.Module], other: str | None, owners: dict[int, int]
) -> str | None:
    """Why the factors cannot go into `norm` and `linears`, or None."""
    if other is not None:
        return f"its output goes to {other}, too"
    if norm.weight is None:
        return "it has no weight"
    changed = [norm.weight, getattr(norm, "bias", None), *(linear.weight for linear in linears)]
    if any(owners.get(id(parameter), 1) > 1 for parameter in changed):
        return "a parameter that would change belongs to another module, too"
    return None


def _fold(norm: nn.Module, linears: list[nn.Module], absmax: Tensor, alpha: float) -> None:
    """Divides the norm by the factors and multiplies the columns of the layers."""
    weights = [weight_of(linear).detach() for linear in linears]  # views [N, K]
    largest = torch.stack([weight.float().abs().amax(0) for weight in weights]).amax(0)  # [K]
    factors = absmax**alpha / largest ** (1 - alpha)
    usable = (absmax > 0) & (largest > 0) & factors.isfinite()
    factors = torch.where(usable, factors, 1.0).clamp(LEAST, MOST)
    with torch.no_grad():
        for parameter in (norm.weight, getattr(norm, "bias", None)):
            if isinstance(parameter, Tensor):
                parameter.copy_(parameter / factors)
        for weight in weights:
            weight.copy_(weight * factors)
