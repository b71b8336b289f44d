"""Runs functions in forked children of a warmed-up process: imports are paid for once."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

Key = TypeVar("Key")
WAITING = 20  # times the time of its processor that a process may take by the clock


@dataclass(frozen=True)
class Outcome:
    """`value` is what the function returned; else `failure` says how the child ended."""

    value: Any = None
    failure: str = ""  # "hang", "crash", or a traceback


def limit(seconds: int) -> None:
    """Ends this process, also in the midst of native code, after so much time of its processor.

    Not by the clock: what shares the machine or pauses the process must not look like a hang. A
    process that only waits is ended by the clock, much later.
    """
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.alarm(WAITING * seconds)


def _child(function: Callable[[], Any], answer: Path, seconds: int) -> None:
    limit(seconds)
    try:
        answer.write_text(json.dumps({"value": function()}))
    except BaseException:
        answer.write_text(json.dumps({"failure": traceback.format_exc()}))
    sys.stdout.flush()
    os._exit(0)


def _outcome(status: int, answer: Path) -> Outcome:
    if os.WIFSIGNALED(status):
        hang = os.WTERMSIG(status) in (signal.SIGPROF, signal.SIGALRM)
        return Outcome(failure="hang" if hang else "crash")
    text = answer.read_text() if answer.exists() else ""
    return Outcome(**json.loads(text)) if text else Outcome(failure="crash")


def run(
    tasks: Iterable[tuple[Key, Callable[[], Any], int]], jobs: int
) -> Iterator[tuple[Key, Outcome]]:
    """For each task (key, function, seconds it may take): the key and the outcome, as they end."""
    waiting = iter(tasks)
    running: dict[int, tuple[Key, Path]] = {}
    with tempfile.TemporaryDirectory() as folder:
        count = 0
        while True:
            while len(running) < jobs and (task := next(waiting, None)) is not None:
                key, function, seconds = task
                answer = Path(folder) / str(count)
                count += 1
                process = os.fork()
                if process == 0:
                    _child(function, answer, seconds)
                running[process] = key, answer
            if not running:
                return
            process, status = os.wait()
            if process in running:  # else: a child of somebody else's
                key, answer = running.pop(process)
                yield key, _outcome(status, answer)
                answer.unlink(missing_ok=True)
