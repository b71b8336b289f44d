"""The commands `train`, `generate`, `quantize` and `demo` of ``python -m kernels``."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kernels._errors import CommandError
from kernels.gpt import arguments, checkpoint, data
from kernels.gpt.config import PRESETS, GPTConfig
from kernels.gpt.demo import demo
from kernels.gpt.generate import generate
from kernels.gpt.layers import LAYERS
from kernels.gpt.quantize import quantize, weight_bytes
from kernels.gpt.train import CHECKPOINT, PLOT, Run, process_group, resume, start, train
from kernels.gpt.trainer import TrainSettings

VALIDATE_BATCHES = 20
SIGINT_EXIT_CODE = 130


def register(subparsers: Any) -> None:
    """Adds the commands to what ``argparse.ArgumentParser.add_subparsers()`` returned."""
    parser = subparsers.add_parser(
        "train",
        help="train a GPT on a text",
        description="Train a character-level GPT on a text. Writes "
        f"{CHECKPOINT} and {PLOT} to the folder --out after every validation. "
        "Under torchrun every process takes its own batches.",
    )
    arguments.add_train(parser)
    parser.set_defaults(run=run_train)

    parser = subparsers.add_parser(
        "generate",
        help="continue a text with a trained GPT",
        description="Continue a text with a trained GPT, one character per token. Characters it "
        "does not know are read and shown as U+FFFD.",
    )
    arguments.add_generate(parser)
    parser.set_defaults(run=run_generate)

    parser = subparsers.add_parser(
        "quantize",
        help="make a trained GPT's weights int8",
        description="Make the weights of a trained GPT int8, a scale for each row, and write them "
        "to a file of their own that `generate` reads.",
    )
    arguments.add_quantize(parser)
    parser.set_defaults(run=run_quantize)

    parser = subparsers.add_parser(
        "demo",
        help="train the same small GPT with PyTorch's and with fused layers, side by side",
        description="Train the same small GPT twice on the CPU, with PyTorch's layers and with the "
        "fused ones, in two processes that take turns; compare losses, speed and memory. Writes "
        "demo.png, demo.txt and demo.safetensors to the folder --out.",
    )
    arguments.add_demo(parser)
    parser.set_defaults(run=run_demo)


def run_train(args: argparse.Namespace) -> int:
    """`train`: 0 when the run is complete, 130 when Ctrl-C ended it."""
    if args.resume and args.force:
        raise CommandError("--resume goes on with a run and --force overwrites it: choose one")
    given = [name for name in arguments.RUN_OPTIONS if getattr(args, name) is not None]
    if args.resume and given:
        option = given[0].replace("_", "-")
        raise CommandError(f"--{option} cannot be given with --resume: the run has its own")
    _set_threads(args.threads)
    device = _device(args.device)
    with process_group(device):
        if args.resume:
            run, trainer = resume(args.out, device, args.steps)
        else:
            config, run = _new_run(args)
            trainer = start(config, run, device, args.out, args.force)
        try:
            train(trainer, run, args.out)
        except KeyboardInterrupt:
            print(f"\ninterrupted; checkpoints, if any, are in {args.out}", file=sys.stderr)
            return SIGINT_EXIT_CODE
    if trainer.rank == 0:
        print(f"weights: {args.out / CHECKPOINT}\nloss curves: {args.out / PLOT}")
    return 0


def run_generate(args: argparse.Namespace) -> int:
    """`generate`: prints the prompt and its continuation, each character as it comes."""
    stored = checkpoint.load(_checkpoint_path(args.checkpoint))
    _set_threads(args.threads)
    model = stored.model(LAYERS[args.layers]).to(_device(args.device))
    tokens = torch.from_numpy(stored.vocabulary.encode(args.prompt or "\n")).long()
    unknown = int((tokens == 0).sum())
    if unknown:
        print(f"{unknown} characters of the prompt are not in the vocabulary", file=sys.stderr)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal may lack U+FFFD and others
    print(stored.vocabulary.decode(tokens.tolist()), end="", flush=True)
    for token in generate(model, tokens, args.count, args.temperature, args.top_k, args.seed):
        print(stored.vocabulary.decode([token]), end="", flush=True)
    print()
    return 0


def run_quantize(args: argparse.Namespace) -> int:
    """`quantize`: 0 when the file is written."""
    source = _checkpoint_path(args.checkpoint)
    target = args.out or source.with_name(f"{source.stem}-int8.safetensors")
    stored = checkpoint.load(source)
    if target.resolve() == source.resolve():
        raise CommandError(f"--out is the checkpoint itself: {source}")
    if target.exists() and not args.force:
        raise CommandError(f"{target} exists; --force overwrites it")
    smaller, converted = quantize(stored, args.mode)
    checkpoint.save(target, smaller)
    before, after = weight_bytes(stored), weight_bytes(smaller)
    print(
        f"{len(converted)} layers to int8, mode {args.mode}: {before:,} bytes of weights became "
        f"{after:,} ({after / before:.1%})\nweights: {target}"
    )
    return 0


def _checkpoint_path(path: Path) -> Path:
    return path / CHECKPOINT if path.is_dir() else path


def run_demo(args: argparse.Namespace) -> int:
    """`demo`: 0 when both models were trained and compared."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    demo(_source(args), args.out, args.steps, args.threads or cores or 1, args.seed)
    return 0


def _new_run(args: argparse.Namespace) -> tuple[GPTConfig, Run]:
    """What the options ask for, on top of the preset."""
    preset = PRESETS[args.preset or "demo"]
    source = _source(args)
    key = data.prepare(source)
    changes = {name: getattr(args, name) for name in arguments.MODEL_OPTIONS}
    changes = {name: value for name, value in changes.items() if value is not None}
    vocab_size = len(data.open_prepared(key).vocabulary)
    try:
        config = replace(preset.model, vocab_size=vocab_size, **changes)
    except ValueError as error:
        raise CommandError(str(error)) from error
    steps = args.steps or preset.steps
    settings = TrainSettings(
        steps=steps,
        batch_size=args.batch_size or preset.batch_size,
        learning_rate=args.learning_rate or preset.learning_rate,
        warmup_steps=100 if args.warmup_steps is None else args.warmup_steps,
        bf16=bool(args.bf16),
        seed=args.seed or 0,
    )
    every = args.validate_every or max(1, steps // 10)
    batches = args.validate_batches or VALIDATE_BATCHES
    return config, Run(source, key, args.layers or "fused", settings, every, batches)


def _source(args: argparse.Namespace) -> data.Source:
    path = None if args.data is None else str(Path(args.data).absolute())
    return data.Source(path, args.suffixes or data.SUFFIXES, args.max_characters)


def _device(name: str | None) -> torch.device:
    """The device called `name`; under torchrun "cuda" is the GPU of this process's local rank."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.zeros(1, device=device).item()  # refused by the meta device, which has no values
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch built without CUDA
        raise CommandError(f"--device {name} cannot be used: {error}") from error
    return device


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
