"""A launch's counts as a table: one line per kernel, or one per memory instruction."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from tabulate import tabulate

from ptx.executor import Launch

SECTOR = 32  # bytes: the unit in which global memory moves
MIX = 4  # opcodes named in a line


def moved_over_least(launches: Iterable[Launch]) -> float:
    """Bytes moved, in whole sectors, over the distinct bytes that the launches read and wrote."""
    launches = list(launches)
    moved = SECTOR * sum(launch.sectors_moved for launch in launches)
    return _ratio(moved, sum(launch.least_bytes for launch in launches))


def wavefronts_over_ideal(launches: Iterable[Launch]) -> float:
    """Passes through the banks of shared memory over those that no conflict would leave."""
    launches = list(launches)
    ideal = _sum(launches, "shared_ideal_wavefronts")
    return _ratio(_sum(launches, "shared_wavefronts"), ideal)


def table(launches: Sequence[Launch]) -> str:
    """One line per kernel, launches of one kernel added up, in the order of their first launch."""
    groups: dict[str, list[Launch]] = {}
    for launch in launches:
        groups.setdefault(launch.name, []).append(launch)
    return _tabulated([_row(name, group) for name, group in groups.items()])


def _tabulated(rows: list[dict[str, object]]) -> str:
    return tabulate(rows, headers="keys", disable_numparse=True, stralign="right")


def _row(name: str, launches: list[Launch]) -> dict[str, object]:
    loads, stores = _requests(launches, "load"), _requests(launches, "store")
    return {
        "kernel": re.sub(r"^(\w+::)+", "", name),
        "launches": len(launches),
        "blocks": _sum(launches, "blocks_run"),
        "reports": sum(len(launch.reports) for launch in launches),
        "loads (requests, bytes, sectors)": loads,
        "stores": stores,
        "atomics": _requests(launches, "atomic"),
        "moved / least": f"{moved_over_least(launches):.2f}",
        "shared": _sum(launches, "shared_requests"),
        "wavefronts / ideal": f"{wavefronts_over_ideal(launches):.2f}",
        "mma": _sum(launches, "mma"),
        "wgmma": _sum(launches, "wgmma"),
        "shuffles": _sum(launches, "shuffles"),
        "barriers": _sum(launches, "barriers"),
        "instructions": _sum(launches, "instructions"),
        "most frequent": _mix(launches),
    }


def _requests(launches: list[Launch], kind: str) -> str:
    return " ".join(
        str(_sum(launches, f"global_{kind}_{unit}")) for unit in ("requests", "bytes", "sectors")
    )


def _mix(launches: list[Launch]) -> str:
    total: dict[str, int] = {}
    for launch in launches:
        for opcode, count in launch.instructions.items():
            total[opcode] = total.get(opcode, 0) + count
    most = sorted(total, key=lambda opcode: -total[opcode])[:MIX]
    return ", ".join(f"{opcode} {total[opcode]}" for opcode in most)


def site_table(launch: Launch) -> str:
    """One line per memory instruction of a launch, those that move most first."""
    sites = sorted(launch.sites, key=lambda site: -(site["sectors"] + site["wavefronts"]))
    return _tabulated([_site_row(site) for site in sites])


def _site_row(site: dict[str, object]) -> dict[str, object]:
    shared = site["space"] == "shared"
    return {
        "source": site["source"],
        "instruction": site["opcode"],
        "requests": site["requests"],
        "lanes": site["lanes"],
        "bytes": site["bytes"],
        "distinct bytes": site["distinct_bytes"],
        "sectors": "" if shared else site["sectors"],
        "wavefronts": site["wavefronts"] if shared else "",
        "ideal": site["ideal_wavefronts"] if shared else "",
    }


def _sum(launches: Iterable[Launch], count: str) -> int:
    return sum(launch.counts[count] for launch in launches)


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 1.0
