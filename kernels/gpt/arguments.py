"""The options of the commands; a bad value is refused here, before anything is loaded."""

from __future__ import annotations

import argparse
from pathlib import Path

from kernels.gpt import data
from kernels.gpt.config import PRESETS
from kernels.gpt.layers import LAYERS
from kernels.gpt.train import CHECKPOINT

# Options of `train` that belong to a run: with --resume they come from its checkpoint.
MODEL_OPTIONS = ("block_size", "n_layer", "n_head", "n_embd", "dropout", "norm", "activation")
RUN_OPTIONS = (
    *("preset", *MODEL_OPTIONS, "layers", "data", "suffixes", "max_characters"),
    *("batch_size", "learning_rate", "warmup_steps", "bf16", "seed"),
    *("validate_every", "validate_batches"),
)

QUANTIZATION_MODES = ("dynamic", "weight_only")

MAX_THREADS = 1024  # OpenMP ends the process where it cannot start as many as it is told to


def positive(text: str) -> int:
    """An integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 1")
    return int(text)


def natural(text: str) -> int:
    """An integer of at least 0 that fits 32 bits."""
    if not text.isdecimal() or int(text) >= 1 << 32:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from 0 to 2^32 - 1")
    return int(text)


def thread_count(text: str) -> int:
    """An integer from 1 to MAX_THREADS."""
    if not text.isdecimal() or not 1 <= int(text) <= MAX_THREADS:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from 1 to {MAX_THREADS}")
    return int(text)


def not_negative(text: str) -> float:
    """A finite number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return value


def above_zero(text: str) -> float:
    """A finite number above 0."""
    if not_negative(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return float(text)


def suffixes(text: str) -> tuple[str, ...]:
    """A list like .py,.txt"""
    names = tuple(text.split(","))
    if not all(name.startswith(".") and len(name) > 1 for name in names):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list like .py,.txt")
    return names


def add_train(parser: argparse.ArgumentParser) -> None:
    """The options of `train`."""
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/gpt"), help="folder (default: %(default)s)")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--force", action="store_true", help="overwrite the run in --out")
    add("--steps", type=positive, metavar="N", help="of the whole run (default: the preset's)")
    _add_device(parser)

    add = parser.add_argument_group(
        "model; not with --resume; defaults from the preset"
    ).add_argument
    add("--preset", choices=PRESETS, help="sizes and settings to begin with (default: demo)")
    add("--block-size", type=positive, metavar="N", help="context, tokens")
    add("--n-layer", type=positive, metavar="N", help="blocks")
    add("--n-head", type=positive, metavar="N", help="attention heads per block")
    add("--n-embd", type=positive, metavar="N", help="width, a multiple of --n-head")
    add("--dropout", type=not_negative, metavar="P", help="probability, below 1")
    add("--norm", choices=("pre", "post"), help="layer norm before or after each sub-layer")
    add("--activation", choices=("gelu", "relu"), help="of the MLP")
    add("--layers", choices=LAYERS, help="whose layers (default: fused)")

    _add_data(parser.add_argument_group("text; not with --resume"))

    add = parser.add_argument_group("training; not with --resume").add_argument
    add("--batch-size", type=positive, metavar="N", help="sequences per step and process")
    add("--learning-rate", type=above_zero, metavar="X", help="at its highest, after warm-up")
    add("--warmup-steps", type=natural, metavar="N", help="default: 100, at most --steps / 10")
    add("--bf16", action="store_true", default=None, help="autocast to bfloat16")
    add("--seed", type=natural, metavar="N", help="default: 0")
    add("--validate-every", type=positive, metavar="N", help="steps (default: a tenth of --steps)")
    add("--validate-batches", type=positive, metavar="N", help="per validation (default: 20)")


def add_generate(parser: argparse.ArgumentParser) -> None:
    """The options of `generate`."""
    add = parser.add_argument
    add("checkpoint", type=Path, help=f"a checkpoint, or a folder that holds {CHECKPOINT}")
    add("--prompt", default="\n", help="text to continue (default: a line break)")
    add("--count", type=positive, default=500, metavar="N", help="tokens (default: %(default)s)")
    add(
        "--temperature",
        type=not_negative,
        default=0.8,
        metavar="X",
        help="divides the logits; 0 takes the likeliest token (default: %(default)s)",
    )
    add("--top-k", type=positive, metavar="N", help="sample among the N likeliest (default: all)")
    add("--seed", type=natural, default=0, metavar="N", help="default: %(default)s")
    add("--layers", choices=LAYERS, default="fused", help="whose layers (default: %(default)s)")
    _add_device(parser)


def add_quantize(parser: argparse.ArgumentParser) -> None:
    """The options of `quantize`."""
    add = parser.add_argument
    add("checkpoint", type=Path, help=f"a checkpoint, or a folder that holds {CHECKPOINT}")
    add(
        "--mode",
        choices=QUANTIZATION_MODES,
        default="dynamic",
        help="dynamic: int8 products, activations quantised by row; weight_only: activations stay "
        "as they are (default: %(default)s)",
    )
    add(
        "--out",
        type=Path,
        metavar="FILE",
        help="default: *-int8.safetensors beside it",
    )
    add("--force", action="store_true", help="overwrite --out")


def add_demo(parser: argparse.ArgumentParser) -> None:
    """The options of `demo`."""
    add = parser.add_argument
    add("--out", type=Path, default=Path("demo"), help="folder (default: %(default)s)")
    add(
        "--steps",
        type=positive,
        default=PRESETS["demo"].steps,
        metavar="N",
        help="per model (default: %(default)s, about 100 seconds for both on two cores)",
    )
    add("--seed", type=natural, default=0, metavar="N", help="default: %(default)s")
    add("--threads", type=thread_count, metavar="N", help="CPU threads (default: all cores)")
    _add_data(parser)


def _add_data(parser: argparse._ActionsContainer) -> None:
    add = parser.add_argument
    add(
        "--data",
        metavar="PATH",
        help="a text file, or a folder searched recursively (default: the .py files of this "
        f"Python's standard library, the first {data.STDLIB_CHARACTERS:,} characters)",
    )
    add(
        "--suffixes",
        type=suffixes,
        metavar="LIST",
        help=f"how the names of a folder's text files end (default: {','.join(data.SUFFIXES)})",
    )
    add("--max-characters", type=positive, metavar="N", help="use the first N characters only")


def _add_device(parser: argparse._ActionsContainer) -> None:
    add = parser.add_argument
    add("--device", help="cpu, cuda, cuda:1, … (default: cuda where there is one)")
    add("--threads", type=thread_count, metavar="N", help="CPU threads (default: PyTorch's choice)")
