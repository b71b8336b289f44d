"""Loss curves as a PNG file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from kernels.gpt.files import replacing


@dataclass(frozen=True)
class Curve:
    """The losses of one run, in nats per token."""

    name: str
    train: Sequence[float]  # one per step, from step 1
    validation: Sequence[tuple[int, float]]  # (steps done, loss)


def plot_losses(curves: Sequence[Curve], path: Path, title: str) -> None:
    """Draws all `curves` into one PNG at `path`; later ones are dashed so that equal ones show."""
    figure = Figure(figsize=(8, 5), layout="constrained")  # no pyplot: needs no display
    axes = figure.add_subplot()
    for number, curve in enumerate(curves):
        style = "-" if number == 0 else "--"
        steps = range(1, len(curve.train) + 1)
        (line,) = axes.plot(steps, curve.train, style, linewidth=1.2, label=f"{curve.name}, train")
        if curve.validation:
            done, losses = zip(*curve.validation, strict=True)
            axes.plot(
                done,
                losses,
                "os"[number % 2],
                color=line.get_color(),
                fillstyle="none",
                markersize=6 + 3 * number,
                label=f"{curve.name}, validation",
            )
    axes.set(title=title, xlabel="step", ylabel="loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)
