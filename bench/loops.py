"""The innermost loops of a kernel's machine code: natural loops of its control-flow graph.

A backward jump alone makes no loop: compilers place rare code behind a kernel's end and jump back.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str
    operands: str
    conditional: bool = False  # under a predicate

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        found = re.search(r"\b0x([0-9a-f]+)$", self.operands)
        return int(found[1], 16) if self.opcode.split(".")[0] == "BRA" and found else None

    @property
    def falls_through(self) -> bool:
        name = self.opcode.split(".")[0]
        if name == "BRA":  # BRA.U !UP0, 0x40 has its condition among the operands
            return self.conditional or "," in self.operands
        return name not in ("EXIT", "RET") or self.conditional


def _blocks(code: list[Instruction]) -> tuple[list[list[Instruction]], list[list[int]]]:
    """Basic blocks and the numbers of the blocks that may follow each."""
    starts = {code[0].address}
    starts |= {i.target for i in code if i.target is not None}
    starts |= {after.address for i, after in itertools.pairwise(code) if _ends_block(i)}
    blocks: list[list[Instruction]] = []
    for instruction in code:
        if instruction.address in starts:
            blocks.append([])
        blocks[-1].append(instruction)
    number = {block[0].address: n for n, block in enumerate(blocks)}
    followers = []
    for n, block in enumerate(blocks):
        last = block[-1]
        follow = [number[last.target]] if last.target in number else []
        if last.falls_through and n + 1 < len(blocks):
            follow.append(n + 1)
        followers.append(follow)
    return blocks, followers


def _ends_block(instruction: Instruction) -> bool:
    return instruction.target is not None or not instruction.falls_through


def _dominators(followers: list[list[int]]) -> list[int]:
    """Per block the set, as bits, of the blocks that every way to it passes."""
    everything = (1 << len(followers)) - 1
    dominators = [1] + [everything] * (len(followers) - 1)
    before: list[list[int]] = [[] for _ in followers]
    for block, follow in enumerate(followers):
        for next_block in follow:
            before[next_block].append(block)
    changed = True
    while changed:
        changed = False
        for block in range(1, len(followers)):
            common = everything
            for previous in before[block]:
                common &= dominators[previous]
            common |= 1 << block
            if common != dominators[block]:
                dominators[block], changed = common, True
    return dominators


def _body(header: int, tail: int, before: list[list[int]]) -> frozenset[int]:
    """The blocks from which `tail` is reached without passing `header`."""
    body, waiting = {header, tail}, [tail]
    while waiting:
        block = waiting.pop()
        if block == header:
            continue
        for previous in before[block]:
            if previous not in body:
                body.add(previous)
                waiting.append(previous)
    return frozenset(body)


def innermost_loops(code: list[Instruction]) -> list[list[Instruction]]:
    """Instructions of each loop that holds no other loop."""
    if not code:
        return []
    blocks, followers = _blocks(code)
    dominators = _dominators(followers)
    before: list[list[int]] = [[] for _ in followers]
    for block, follow in enumerate(followers):
        for next_block in follow:
            before[next_block].append(block)
    bodies: dict[int, frozenset[int]] = {}
    for tail, follow in enumerate(followers):
        for header in follow:
            # The branch to itself that pads the end of a kernel is no loop of the kernel's.
            padding = header == tail and len(blocks[tail]) == 1 and not blocks[tail][0].conditional
            if dominators[tail] >> header & 1 and not padding:
                bodies[header] = bodies.get(header, frozenset()) | _body(header, tail, before)
    inner = [
        body
        for header, body in sorted(bodies.items())
        if not any(other in body for other in bodies if other != header)
    ]
    return [[i for block in sorted(body) for i in blocks[block]] for body in inner]
