"""Whole models: `quantize_model_` puts int8 layers in the place of linear layers and embeddings."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from kernels.int8_matmul import checks
from kernels.int8_matmul.calibration import calibrate
from kernels.int8_matmul.calls import MODES
from kernels.int8_matmul.linear import Int8Embedding, Int8Linear, Int8Weight, is_conv1d, is_linear

NAME = "quantize_model_"


def is_embedding(module: nn.Module) -> bool:
    return type(module) is nn.Embedding and module.max_norm is None


def quantize_model_(
    model: nn.Module,
    mode: str = "dynamic",
    skip: Sequence[str] = (),
    *,
    embeddings: bool = True,
    group_size: int | None = None,
    outlier_threshold: float | None = None,
    batches: Iterable[Any] | None = None,
) -> list[str]:
    """Puts Int8Linear in the place of every nn.Linear and Conv1D, Int8Embedding of nn.Embedding.

    Args:
        model: any module that is none of these itself.
        mode: of the Int8Linears: "dynamic", "static" or "weight_only".
        skip: names, or patterns as of fnmatch, of what stays as it is: a module's full name, that
            of a module around it, or the last part of its name.
        embeddings: False leaves embeddings as they are.
        group_size, outlier_threshold: as for Int8Linear.from_linear.
        batches: what `calibrate` runs the model on, for "static" and outlier_threshold.

    Returns:
        The names of what was replaced, in the model's order.

    A weight that several of these modules share is quantised once and stays shared.

    Raises:
        TypeError, ValueError: before anything is replaced; among them a weight shared with a module
            that stays as it is, a module with hooks, and a name in `skip` that nothing has.
    """
    _check(model, mode, skip, batches, outlier_threshold)
    chosen = dict(_chosen(model, skip, embeddings))
    _check_ties(model, chosen)
    _check_hooks(chosen)
    absmax: Mapping[str, Tensor] = {}
    if mode == "static" or outlier_threshold is not None:
        assert batches is not None
        absmax = calibrate(model, batches)
    made: dict[nn.Module, Int8Weight] = {}
    quantized: dict[Any, Int8Weight] = {}  # by the float weight, and how it was quantised
    for name, module in chosen.items():
        if module in made:
            continue
        if isinstance(module, nn.Embedding):
            made[module] = Int8Embedding.from_embedding(module, mode)
        else:
            if absmax and name not in absmax:
                raise ValueError(f"{NAME}: {name!r} was given no input by `batches`")
            made[module] = Int8Linear.from_linear(
                module,
                mode,
                group_size=group_size,
                outlier_threshold=outlier_threshold,
                input_absmax=absmax.get(name),
            )
        key = id(_weight(module)), *_form(module, made[module])
        first = quantized.setdefault(key, made[module])
        made[module].weight, made[module].weight_scale = first.weight, first.weight_scale
    for name, module in chosen.items():
        parent, _, child = name.rpartition(".")
        _replace(model.get_submodule(parent), child, made[module])
    return list(chosen)


def _weight(module: nn.Module) -> Tensor:
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight


def _check(model: Any, mode: Any, skip: Any, batches: Any, outlier_threshold: float | None) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{NAME}: model must be an nn.Module, not {type(model).__name__}")
    checks.check_mode(NAME, mode, MODES)
    if is_linear(model) or is_embedding(model):
        raise TypeError(
            f"{NAME}: model is itself a {type(model).__name__}, which cannot be replaced within "
            "itself; use Int8Linear.from_linear or Int8Embedding.from_embedding"
        )
    if isinstance(skip, str):
        raise TypeError(f"{NAME}: skip must be a list of names, not the string {skip!r}")
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    for pattern in skip:
        if not any(_matches(name, pattern) for name in names):
            raise ValueError(f"{NAME}: skip names {pattern!r}, but no module is called so")
    needed = mode == "static" or outlier_threshold is not None
    if needed != (batches is not None):
        raise ValueError(
            f"{NAME}: batches go with mode='static' or outlier_threshold, and are needed there"
        )


def _matches(name: str, pattern: str) -> bool:
    """Whether `pattern` is the module's name, its last part, or names a module around it."""
    parts = name.split(".")
    around = (".".join(parts[:count]) for count in range(1, len(parts) + 1))
    return any(fnmatch.fnmatchcase(part, pattern) for part in (*around, parts[-1]))


def _chosen(
    model: nn.Module, skip: Sequence[str], embeddings: bool
) -> Iterator[tuple[str, nn.Module]]:
    """What is to be replaced, under each of its names."""
    for name, module in model.named_modules(remove_duplicate=False):
        if not (is_linear(module) or (embeddings and is_embedding(module))):
            continue
        if not any(_matches(name, pattern) for pattern in skip):
            yield name, module


def _check_ties(model: nn.Module, chosen: Mapping[str, nn.Module]) -> None:
    """That no weight to be replaced is a weight of something that stays."""
    replaced = {id(_weight(module)): name for name, module in chosen.items()}
    leaving = {id(module) for module in chosen.values()}
    for owner, module in model.named_modules():
        if id(module) in leaving:
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in replaced:
                raise ValueError(
                    f"{NAME}: {replaced[id(parameter)]}.weight is {owner}.{name}, too, which stays "
                    "as it is: skip both, or neither"
                )


HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def _check_hooks(chosen: Mapping[str, nn.Module]) -> None:
    """That nothing hangs on a module to be replaced: hooks may be made for its class alone."""
    for name, module in chosen.items():
        for hooks in HOOKS:
            if getattr(module, hooks):
                raise ValueError(
                    f"{NAME}: {name} has {hooks.strip('_').replace('_', ' ')}, which its "
                    "replacement would not run: remove them before, or name it in skip"
                )


def _form(module: nn.Module, made: Int8Weight) -> tuple[object, ...]:
    """What two layers of one weight must agree in to share its int8 values."""
    if isinstance(made, Int8Linear):
        outliers = made.outlier_columns
        own = () if outliers is None else tuple(outliers.tolist())
        return is_conv1d(module), made.group_size, own
    return False, None, ()


def _replace(parent: nn.Module, child: str, module: Int8Weight) -> None:
    setattr(parent, child, module)
    if isinstance(parent, nn.TransformerEncoderLayer):
        parent.activation_relu_or_gelu = 0  # no longer the fused path, which reads float weights
