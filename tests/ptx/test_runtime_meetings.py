"""How the lanes of a warp meet: masks, and lanes that come elsewhere or not at all."""

from __future__ import annotations

import pytest

from tests.ptx.assembly import kernel
from tests.ptx.runtime_support import Kernels, Outcome

BALLOT = "vote.sync.ballot.b32 %r9, 1, {};"


def by_half(name: str, low: str, high: str) -> str:
    """Lanes below 16 do one thing, the others another."""
    return kernel(
        name,
        f"setp.lt.u32 %p1, %r2, 16;\n@%p1 bra LOW;\n{high}\nbra END;\nLOW:\n{low}\nEND:",
    )


KERNELS = Kernels(
    "".join(
        [
            by_half("halves", BALLOT.format("0xffff"), BALLOT.format("0xffff0000")),
            by_half("mask_without_caller", BALLOT.format("0xffff0000"), ""),
            by_half("mask_of_absent", BALLOT.format("0xffffffff"), ""),
            by_half("two_instructions", BALLOT.format("-1"), BALLOT.format("-1")),
            by_half("two_operations", BALLOT.format("-1"), "bar.warp.sync -1;"),
            by_half("one_exits_first", "ret;", BALLOT.format("-1")),
            by_half("nested", BALLOT.format("0xffff"), "ret;"),
            by_half("half_syncwarps", "bar.warp.sync 0xffff;", "bar.warp.sync 0xffff0000;"),
            kernel("whole", BALLOT.format("-1")),
        ]
    )
)


def run(name: str, threads: int = 32, **options: int) -> Outcome:
    return KERNELS.run(name, threads=threads, **options)


@pytest.mark.parametrize("name", ["halves", "nested", "half_syncwarps", "whole"])
@pytest.mark.parametrize("schedule", [0, 1, 2, 3])
def test_meetings_that_are_right(name: str, schedule: int) -> None:
    assert run(name, threads=64, schedule=schedule).reports == []


BAD = [
    ("mask_without_caller", "bad-mask", "whose mask 0xffff0000 leaves it out"),
    ("mask_of_absent", "bad-mask", "has exited"),
    ("two_instructions", "divergent-warp-op", "met in different instructions"),
    ("two_operations", "divergent-warp-op", "met in different operations"),
    ("one_exits_first", "bad-mask", "has exited"),
]


@pytest.mark.parametrize(("name", "kind", "words"), BAD, ids=[case[0] for case in BAD])
@pytest.mark.parametrize("schedule", [0, 1, 2, 3])
def test_meetings_that_are_wrong(name: str, kind: str, words: str, schedule: int) -> None:
    """Whoever comes first, and whether a lane has left already or leaves later."""
    report = run(name, schedule=schedule).reports[0]
    assert report.kind == kind
    assert words in report.message


def test_a_mask_may_not_name_lanes_that_do_not_exist() -> None:
    report = run("whole", threads=40).reports[0]
    assert (report.kind, report.thread) == ("bad-mask", 32)
    assert "names lane 8, which does not exist" in report.message
