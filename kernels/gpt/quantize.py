"""A trained GPT with int8 weights, as a checkpoint of its own."""

from __future__ import annotations

from dataclasses import replace

from kernels._errors import CommandError
from kernels.gpt.checkpoint import Checkpoint
from kernels.gpt.layers import FUSED
from kernels.int8_matmul import quantize_model_


def quantize(stored: Checkpoint, mode: str) -> tuple[Checkpoint, list[str]]:
    """`stored` with int8 weights and without what training needs; the names of what became int8.

    Raises CommandError where the weights are int8 already, or do not fit the checkpoint's sizes.
    """
    if stored.quantization is not None:
        raise CommandError(f"the checkpoint is quantised already, with mode {stored.quantization}")
    model = stored.model(FUSED)
    converted = quantize_model_(model, mode)
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    return replace(stored, tensors=tensors, quantization=mode), converted


def weight_bytes(stored: Checkpoint) -> int:
    """Bytes of the model's tensors."""
    return sum(tensor.nbytes for tensor in stored.part("model").values())
