"""One model in a process of its own, which trains when told to: its time and memory are its own.

The parent sends (method, argument) over a pipe, the process answers with what the method yields.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import resource
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from kernels._errors import CommandError
from kernels.gpt import checkpoint, data
from kernels.gpt.checkpoint import Checkpoint
from kernels.gpt.config import GPTConfig
from kernels.gpt.layers import LAYERS
from kernels.gpt.model import GPT
from kernels.gpt.trainer import Trainer, TrainSettings

ANSWER_SECONDS = 600  # a process that says nothing for so long is given up


@dataclass(frozen=True)
class Job:
    """What one process trains."""

    layers: str  # a name in LAYERS
    config: GPTConfig
    settings: TrainSettings
    data_key: str
    threads: int


def peak_memory() -> int:
    """The most memory this process ever had resident, bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # ru_maxrss would start at the parent's size: Linux carries it over fork and exec.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class _Commands:
    """What the parent may ask for; every method yields its answers."""

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(job.threads)
        text = data.open_prepared(job.data_key)
        self.memory_before = peak_memory()
        model = GPT(job.config, LAYERS[job.layers], seed=job.settings.seed)
        self.trainer = Trainer(model, text, job.settings)

    def train(self, steps: int) -> Iterator[float]:
        """The loss of each of `steps` steps, then the seconds they took together."""
        begin = time.perf_counter()
        for _ in range(steps):
            yield self.trainer.train_step()
        yield time.perf_counter() - begin

    def validate(self, batches: int) -> Iterator[float]:
        """The validation loss."""
        yield self.trainer.validate(batches)

    def memory(self, _: None) -> Iterator[tuple[int, int]]:
        """Peak memory and what it was before there was a model, bytes."""
        yield peak_memory(), self.memory_before

    def save(self, path: Path) -> Iterator[None]:
        """Writes a checkpoint."""
        trainer = self.trainer
        config, vocabulary = trainer.model.config, trainer.data.vocabulary
        moment = Checkpoint(config, vocabulary, trainer.step, {}, trainer.state())
        checkpoint.save(path, moment)
        yield None


def _main(job: Job, connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    try:
        commands = _Commands(job)
        while True:
            method, argument = connection.recv()
            for answer in getattr(commands, method)(argument):
                connection.send(answer)
    except CommandError as error:
        connection.send(error)
    except (EOFError, BrokenPipeError):
        return  # the parent is done, or gone


class Worker:
    """The parent's end: a context manager that starts the process and surely ends it."""

    def __init__(self, job: Job) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = job.layers
        self.connection, child = context.Pipe()
        self.process = context.Process(target=_main, args=(job, child), daemon=True)
        self.process.start()
        child.close()  # so that the end of the process ends the pipe

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()
        self.process.join(timeout=1)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()

    def ask(self, method: str, argument: object) -> None:
        """Tells the process to run a method of `_Commands`."""
        try:
            self.connection.send((method, argument))
        except BrokenPipeError:
            raise self._ended() from None

    def answer(self) -> Any:
        """The next answer. Raises CommandError where the process failed, died or hangs."""
        if not self.connection.poll(ANSWER_SECONDS):
            raise CommandError(
                f"the {self.name} model's process gave no answer for {ANSWER_SECONDS} s"
            )
        try:
            answer = self.connection.recv()
        except (EOFError, ConnectionResetError):
            raise self._ended() from None
        if isinstance(answer, CommandError):
            raise CommandError(f"the {self.name} model failed: {answer}")
        return answer

    def _ended(self) -> CommandError:
        self.process.join(timeout=10)
        return CommandError(
            f"the {self.name} model's process ended early, exit code {self.process.exitcode} "
            "(-9: killed, perhaps for want of memory)"
        )
