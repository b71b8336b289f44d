"""A training run: started or resumed, with a progress bar, checkpoints and a plot of the losses."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from kernels._errors import CommandError
from kernels.gpt import checkpoint, data
from kernels.gpt.checkpoint import Checkpoint
from kernels.gpt.config import GPTConfig
from kernels.gpt.files import make_writable
from kernels.gpt.layers import LAYERS
from kernels.gpt.model import GPT
from kernels.gpt.plot import Curve, plot_losses
from kernels.gpt.trainer import Trainer, TrainSettings

CHECKPOINT = "checkpoint.safetensors"
PLOT = "losses.png"


@dataclass(frozen=True)
class Run:
    """All that a run needs besides the model's sizes; stored in its checkpoints."""

    source: data.Source
    data_key: str  # of the text that `source` held when the run began
    layers: str  # a name in LAYERS
    settings: TrainSettings
    validate_every: int  # steps; a checkpoint follows each validation
    validate_batches: int

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Run:
        """The run that ``dataclasses.asdict`` turned into `values`, read back from JSON."""
        source = values["source"] | {"suffixes": tuple(values["source"]["suffixes"])}
        settings = TrainSettings(**values["settings"])
        return cls(**values | {"source": data.Source(**source), "settings": settings})


def start(config: GPTConfig, run: Run, device: torch.device, out: Path, force: bool) -> Trainer:
    """A trainer at step 0. Raises CommandError where `out` holds a run, unless `force`."""
    if (out / CHECKPOINT).exists() and not force:
        raise CommandError(
            f"{out / CHECKPOINT} exists: --resume goes on with that run, --force overwrites it"
        )
    model = GPT(config, LAYERS[run.layers], seed=run.settings.seed).to(device)
    trainer = Trainer(model, data.open_prepared(run.data_key), run.settings)
    make_writable(out)
    return trainer


def resume(out: Path, device: torch.device, steps: int | None) -> tuple[Run, Trainer]:
    """The run whose checkpoint is in `out`, where it stopped; `steps` sets a new total.

    Raises CommandError where the checkpoint is unusable, the text changed or nothing is left to do.
    """
    stored = checkpoint.load(out / CHECKPOINT)
    if stored.quantization is not None:
        raise CommandError(f"{out / CHECKPOINT} is quantised: it can be used, but not trained")
    try:
        run = Run.from_dict(stored.run)
        layers = LAYERS[run.layers]
    except (KeyError, TypeError) as error:
        raise CommandError(f"{out / CHECKPOINT} does not describe a run: {error}") from error
    if steps is not None:
        run = replace(run, settings=replace(run.settings, steps=steps))
    if stored.step >= run.settings.steps:
        raise CommandError(
            f"the run in {out} has done {stored.step} of {run.settings.steps} steps; "
            "a larger --steps goes on"
        )
    if data.prepare(run.source) != run.data_key:
        where = run.source.path or "the standard library"
        raise CommandError(f"the text in {where} is not the one the run in {out} began with")
    model = stored.model(layers).to(device)
    trainer = Trainer(model, data.open_prepared(run.data_key), run.settings)
    trainer.load_state(stored.tensors)
    return run, trainer


def save(trainer: Trainer, run: Run, out: Path) -> None:
    """Writes the checkpoint, then the plot, into `out`."""
    moment = Checkpoint(
        trainer.model.config, trainer.data.vocabulary, trainer.step, asdict(run), trainer.state()
    )
    checkpoint.save(out / CHECKPOINT, moment)
    curve = Curve(run.layers, trainer.losses, trainer.validation)
    plot_losses([curve], out / PLOT, "GPT, loss per step")


def train(trainer: Trainer, run: Run, out: Path, until: int | None = None) -> None:
    """Trains until step `until` (default: the run's last), saving into `out` on the way.

    Under torch.distributed only rank 0 validates, saves and shows progress.
    """
    last = run.settings.steps if until is None else until
    leads = trainer.rank == 0
    world = dist.get_world_size() if trainer.distributed else 1
    tokens_per_step = run.settings.batch_size * trainer.model.config.block_size * world
    if leads and trainer.step == 0:
        trainer.validate(run.validate_batches)
    with tqdm(
        total=run.settings.steps, initial=trainer.step, unit="step", disable=not leads
    ) as bar:
        while trainer.step < last:
            loss = trainer.train_step()
            rate = (bar.format_dict["rate"] or 0.0) * tokens_per_step
            bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} tokens/s", refresh=False)
            bar.update()
            if leads and (trainer.step % run.validate_every == 0 or trainer.step == last):
                validation = trainer.validate(run.validate_batches)
                save(trainer, run, out)
                bar.write(f"step {trainer.step}: train {loss:.4f}, validation {validation:.4f}")


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Joins the other processes where torchrun started this one, and leaves them at the end."""
    if "RANK" not in os.environ:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()
