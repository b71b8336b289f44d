"""The demo: one GPT trained twice, with PyTorch's layers and with the fused ones, side by side.

Two processes take turns of a few steps, so both meet the same state of the machine.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, median

import torch
from tabulate import tabulate
from tqdm import tqdm

from kernels.dispatch import explain
from kernels.gpt import checkpoint, data
from kernels.gpt.config import PRESETS
from kernels.gpt.files import make_writable, replacing
from kernels.gpt.generate import generate
from kernels.gpt.layers import FUSED
from kernels.gpt.plot import Curve, plot_losses
from kernels.gpt.trainer import TrainSettings
from kernels.gpt.worker import Job, Worker

TURN = 5  # steps per turn
VALIDATIONS = 5  # during the run, besides the one before it; fewer in a short run
VALIDATION_BATCHES = 20
EARLY = 100  # steps before rounding differences, which training amplifies, have grown
LAST = 50  # steps whose mean is the final training loss
PROMPT, SAMPLE_CHARACTERS, TEMPERATURE = "def ", 600, 0.8
MEBI = 1 << 20


@dataclass
class Side:
    """One of the two models, as the parent sees it."""

    name: str
    worker: Worker
    bar: tqdm
    losses: list[float] = field(default_factory=list)  # per step
    seconds: list[float] = field(default_factory=list)  # per step, one entry per turn
    validation: list[tuple[int, float]] = field(default_factory=list)
    memory: tuple[int, int] = (0, 0)  # peak, and before there was a model; bytes

    def take_turn(self, steps: int) -> None:
        """Trains `steps` steps."""
        self.worker.ask("train", steps)
        for _ in range(steps):
            self.losses.append(self.worker.answer())
            self.bar.set_postfix_str(f"loss {self.losses[-1]:.3f}", refresh=False)
            self.bar.update()
        self.seconds.append(self.worker.answer() / steps)

    def validate(self) -> None:
        """Measures the validation loss."""
        self.worker.ask("validate", VALIDATION_BATCHES)
        self.validation.append((len(self.losses), self.worker.answer()))


def train_both(sides: Sequence[Side], steps: int) -> None:
    """Lets the sides take turns until each has done `steps` steps."""
    every = max(5 * TURN, steps // VALIDATIONS)
    for side in sides:
        side.validate()
    done = 0
    while done < steps:
        turn = min(TURN, every - done % every, steps - done)
        for side in sides:
            side.take_turn(turn)
        done += turn
        sides = sides[::-1]  # neither is always the first after a pause
        if done % every == 0 or done == steps:
            for side in sides:
                side.validate()
    for side in sides:
        side.worker.ask("memory", None)
        side.memory = side.worker.answer()


def report(torch_side: Side, fused_side: Side, tokens_per_step: int) -> str:
    """The comparison, as text."""
    pairs = zip(torch_side.losses, fused_side.losses, strict=True)
    differences = [abs(first - second) for first, second in pairs]
    worst = max(range(len(differences)), key=differences.__getitem__)
    ratios = sorted(
        first / second for first, second in zip(torch_side.seconds, fused_side.seconds, strict=True)
    )
    measures: tuple[tuple[str, Callable[[Side], float], int], ...] = (
        (f"train loss, mean of the last {LAST} steps", lambda side: fmean(side.losses[-LAST:]), 4),
        ("validation loss", lambda side: side.validation[-1][1], 4),
        ("tokens/s, median of turns", lambda side: tokens_per_step / median(side.seconds), 0),
        ("peak memory, MiB", lambda side: side.memory[0] / MEBI, 0),
        ("  of it before there was a model", lambda side: side.memory[1] / MEBI, 0),
    )
    rows = []
    for title, measure, digits in measures:
        first, second = measure(torch_side), measure(fused_side)
        values = (f"{value:,.{digits}f}" for value in (first, second))
        rows.append((title, *values, f"{second / first:.3f}"))
    table = tabulate(
        rows,
        headers=("", torch_side.name, fused_side.name, "ratio"),
        colalign=("left", "right", "right", "right"),
        disable_numparse=True,
    )
    low, high = ratios[len(ratios) // 5], ratios[len(ratios) * 4 // 5]
    return (
        f"{table}\n\n"
        f"speed, fused / torch, median of {len(ratios)} pairs of turns: {median(ratios):.3f} "
        f"(p20 {low:.3f}, p80 {high:.3f})\n"
        f"largest difference of the two loss curves: {max(differences[:EARLY]):.1e} nats per token "
        f"in the first {min(EARLY, len(differences))} steps, {differences[worst]:.1e} overall, at "
        f"step {worst + 1} of {len(differences)}: rounding grows with every step\n"
    )


def backend(width: int) -> str:
    """Which backend the fused layer norm of this width runs on, as one line."""
    norm = FUSED.layer_norm(width)
    x = torch.empty(1, width)
    decision = explain("layer_norm", x, norm.normalized_shape, norm.weight, norm.bias)
    return f"fused layer norm runs on backend {decision.backend!r}"


def sample(path: Path, seed: int) -> str:
    """Text that the fused model in the checkpoint at `path` writes."""
    stored = checkpoint.load(path)
    prompt = torch.from_numpy(stored.vocabulary.encode(PROMPT)).long()
    model = stored.model(FUSED)
    tokens = generate(model, prompt, SAMPLE_CHARACTERS, temperature=TEMPERATURE, seed=seed)
    return PROMPT + stored.vocabulary.decode(list(tokens))


def demo(source: data.Source, out: Path, steps: int, threads: int, seed: int) -> None:
    """Runs the demo, prints its result and writes demo.png, demo.txt and demo.safetensors to `out`.

    Raises CommandError where the text is unusable, `out` unwritable or a process fails.
    """
    text = data.load(source)
    preset = PRESETS["demo"]
    config = replace(preset.model, vocab_size=len(text.vocabulary))
    text.check(config.block_size)
    make_writable(out)
    settings = TrainSettings(steps, preset.batch_size, preset.learning_rate, seed=seed)
    torch.set_num_threads(threads)
    with contextlib.ExitStack() as stack:
        sides = []
        for position, name in enumerate(("torch", "fused")):
            worker = stack.enter_context(Worker(Job(name, config, settings, text.key, threads)))
            bar = stack.enter_context(tqdm(total=steps, desc=name, unit="step", position=position))
            sides.append(Side(name, worker, bar))
        train_both(sides, steps)
        sides[1].worker.ask("save", out / "demo.safetensors")
        sides[1].worker.answer()
    print(f"\n{backend(config.n_embd)}\n")
    print(report(sides[0], sides[1], preset.batch_size * config.block_size))
    curves = [Curve(side.name, side.losses, side.validation) for side in sides]
    plot_losses(curves, out / "demo.png", "The same GPT with PyTorch's and with fused layers")
    written = sample(out / "demo.safetensors", seed)
    with replacing(out / "demo.txt") as temporary:
        temporary.write_text(written, encoding="utf-8")
    print(f"the fused model writes:\n\n{written}\n")
    for name, what in (("png", "loss curves"), ("txt", "sample"), ("safetensors", "fused model")):
        print(f"{what}: {out / f'demo.{name}'}")
