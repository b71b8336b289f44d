"""What launches of fixed shapes move, counted by the executor: sectors, wavefronts, bytes.

The numbers are properties of the compiled code and of the shape, not times: nothing runs on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

import ptx
from bench import cases

ARCHITECTURES = {"cuda": ("sm_80", "sm_90a"), "triton": ("sm_80", "sm_90")}
SECTOR = 32  # bytes

Row = dict[str, float]


def _row(launches: Iterable[ptx.Launch], least: int) -> Row:
    """`least`: bytes of the operation's own inputs and outputs, each moved once."""
    launches = list(launches)
    sites = [site for launch in launches for site in launch.sites]
    in_global = [site for site in sites if site["space"] == "global"]
    loads = [site for site in in_global if site["access"] == "read"]
    wavefronts = sum(launch.counts["shared_wavefronts"] for launch in launches)
    ideal = sum(launch.counts["shared_ideal_wavefronts"] for launch in launches)
    moved = SECTOR * sum(launch.sectors_moved for launch in launches)

    def total(of: list[dict[str, Any]], column: str) -> int:
        return sum(site[column] for site in of)

    wide = [site for site in loads if site["bytes_per_lane"] >= 16]
    row = {
        "launches": len(launches),
        "sectors_per_load": total(loads, "sectors") / total(loads, "requests"),
        "wide_share": total(wide, "bytes") / total(loads, "bytes"),
        "sectors_over_ideal": SECTOR
        * total(in_global, "sectors")
        / total(in_global, "distinct_bytes"),
        "wavefronts_over_ideal": wavefronts / ideal if ideal else 1.0,
        "moved_over_least": moved / least,
        "moved_over_touched": moved / sum(launch.least_bytes for launch in launches),
        "reports": sum(len(launch.reports) for launch in launches),
    }
    return {name: round(value, 3) for name, value in row.items()}


def counted(kind: str) -> dict[str, dict[str, Row]]:
    """ "cuda counted sm_90a" -> "layer_norm forward 512x1024 bf16" -> row."""
    found: dict[str, dict[str, Row]] = {}
    for arch in ARCHITECTURES[kind]:
        rows = found[f"{kind} counted {arch}"] = {}
        for call in tqdm(cases.COUNTED, f"counting {kind} {arch}", leave=False):
            with ptx.run(arch, on_report="record") as session:
                done = 0
                for direction in cases.run(call, kind):
                    least = call.least_bytes(direction)
                    rows[f"{call.op} {direction} {call.shape}"] = _row(
                        session.launches[done:], least
                    )
                    done = len(session.launches)
    return found
