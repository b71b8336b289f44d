"""One run in one safetensors file: weights, optimiser, losses, and its metadata as JSON.

Tensors are named model.*, optimizer.* and history.*; the file is replaced in one step, so it always
holds one complete moment of the run.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from kernels._errors import CommandError
from kernels.gpt.config import GPTConfig
from kernels.gpt.files import replacing
from kernels.gpt.layers import Layers
from kernels.gpt.model import GPT
from kernels.gpt.vocabulary import Vocabulary
from kernels.int8_matmul import quantize_model_

METADATA = "kernels.gpt"  # the key of the JSON text in the safetensors header


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds. `run` is what a trainer needs to go on: settings and data source."""

    config: GPTConfig
    vocabulary: Vocabulary
    step: int  # steps done
    run: dict[str, Any]  # JSON values
    tensors: dict[str, torch.Tensor]
    quantization: str | None = None  # the mode of quantize_model_, where the weights are int8

    def part(self, prefix: str) -> dict[str, torch.Tensor]:
        """The tensors named `prefix`.*, without the prefix."""
        start = prefix + "."
        return {
            name.removeprefix(start): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(start)
        }

    def model(self, layers: Layers) -> GPT:
        """The model with the stored weights, on the CPU. Raises CommandError where they misfit."""
        model = GPT(self.config, layers)
        if self.quantization is not None:
            quantize_model_(model, self.quantization)
        try:
            model.load_state_dict(self.part("model"))
        except RuntimeError as error:
            raise CommandError(f"the checkpoint's weights do not fit its sizes: {error}") from error
        return model


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Writes `checkpoint` to `path` in one step. Raises CommandError where that is impossible."""
    tensors = {name: tensor.contiguous().cpu() for name, tensor in checkpoint.tensors.items()}
    metadata = {
        "config": asdict(checkpoint.config),
        "vocabulary": checkpoint.vocabulary.characters,
        "step": checkpoint.step,
        "run": checkpoint.run,
    }
    if checkpoint.quantization is not None:
        metadata["quantization"] = checkpoint.quantization
    metadata["checksum"] = _checksum(metadata, tensors)
    with replacing(path) as temporary:
        try:
            save_file(tensors, temporary, {METADATA: json.dumps(metadata)})
        except SafetensorError as error:  # what the library makes of a full disk
            raise CommandError(f"cannot write {path}: {error}") from error


def load(path: Path) -> Checkpoint:
    """The checkpoint at `path`, on the CPU.

    Raises CommandError where it is missing, truncated, damaged or not one of these files.
    """
    if not path.is_file():
        raise CommandError(f"no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CommandError(f"{path} is damaged or no checkpoint: {error}") from error
    if METADATA not in header:
        raise CommandError(f"{path} is not a checkpoint of `python -m kernels train`")
    try:
        metadata = json.loads(header[METADATA])
        if metadata.pop("checksum") != _checksum(metadata, tensors):
            raise ValueError("its content does not match its checksum")
        return Checkpoint(
            GPTConfig.from_dict(metadata["config"]),
            Vocabulary(metadata["vocabulary"]),
            metadata["step"],
            metadata["run"],
            tensors,
            metadata.get("quantization"),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CommandError(f"{path} is damaged: {error}") from error


def _checksum(metadata: dict[str, Any], tensors: dict[str, torch.Tensor]) -> int:
    """CRC-32 of the metadata and of all tensors' names and values."""
    checksum = zlib.crc32(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        checksum = zlib.crc32(name.encode(), checksum)
        checksum = zlib.crc32(
            tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes(), checksum
        )
    return checksum
