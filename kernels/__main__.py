"""The command line: python -m kernels info | check | train | generate | quantize | demo."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from kernels import _check, _info
from kernels._errors import CommandError
from kernels.gpt import commands


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; 2 is the exit code of whatever the user can put right."""
    parser = argparse.ArgumentParser(
        prog="python -m kernels", description="Fused kernels for PyTorch, and a GPT that uses them."
    )
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (_info, _check, commands):
        module.register(subparsers)
    options = parser.parse_args(arguments)
    try:
        exit_code: int = options.run(options)
    except CommandError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
