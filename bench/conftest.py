"""Prints the interleaved comparison under pytest-benchmark's own table."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tabulate import tabulate

from kernels import _check, _spec

_ROWS = pytest.StashKey[dict[str, list[list[Any]]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_ROWS] = {}


@pytest.fixture
def comparison(pytestconfig: pytest.Config) -> dict[str, list[list[Any]]]:
    """op -> lines of the final table, in _check.speed_columns."""
    return pytestconfig.stash[_ROWS]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    for op, rows in config.stash[_ROWS].items():
        columns = _check.speed_columns(_spec.load(op))
        terminalreporter.section(f"{op} beside PyTorch: taking turns in one process")
        terminalreporter.write_line(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
        terminalreporter.write_line(
            tabulate(rows, headers=columns, tablefmt="simple", disable_numparse=True)
        )
