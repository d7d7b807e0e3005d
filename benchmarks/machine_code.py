"""What a disassembled kernel does in its loops: the compile gate's look at Triton's machine code (SASS)."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import NamedTuple

PRODUCT = r"HGMMA"  # a matrix product of a warpgroup
SPILT = r"LDL|STL"  # loads and stores of local memory, where registers are spilt to


class Block(NamedTuple):
    """Instructions of which the first is jumped to and the last may jump: [start, stop) of the whole list."""

    start: int
    stop: int
    next: tuple[int, ...]  # the blocks that may follow, by number


def local_accesses(sass: str) -> tuple[int, int]:
    """Loads and stores of local memory in the innermost loops of a disassembly, and all instructions there.

    Of all of it where there is no loop. Where loops hold matrix products of a warpgroup, these count: within them are
    others, in which a thread waits at a barrier, and what the compiler has moved away behind them.
    """
    code = [(int(at, 16), text) for at, text in re.findall(r"^\s*/\*([0-9a-f]+)\*/\s+(.*?;)", sass, re.MULTILINE)]
    texts = [text for _, text in code]
    blocks = _blocks([at for at, _ in code], texts)
    products = {i for i, block in enumerate(blocks) if _count(PRODUCT, texts, block)}
    inner = _innermost(blocks, set(range(len(blocks))), products) or _innermost(blocks, set(range(len(blocks))), None)
    repeated = set().union(*inner) if inner else set(range(len(blocks)))
    chosen = [blocks[i] for i in repeated]
    return sum(_count(SPILT, texts, block) for block in chosen), sum(block.stop - block.start for block in chosen)


def _count(pattern: str, texts: list[str], block: Block) -> int:
    return sum(bool(re.search(rf"\b({pattern})\b", text)) for text in texts[block.start : block.stop])


def _blocks(places: list[int], texts: list[str]) -> list[Block]:
    """The instructions cut where they jump and where they are jumped to. Where a register says where to, nothing does:
    such a jump begins a function or a warpgroup's work."""
    index = {at: i for i, at in enumerate(places)}
    meets: dict[str, set[int]] = {}  # barrier of a divergent branch -> where its threads go on together
    jumps: dict[int, set[int]] = {}
    for i, text in enumerate(texts):
        found = re.search(r"\b(BRA|BSSY)\b.*?\b0x([0-9a-f]+)", text)
        target = index.get(int(found[2], 16)) if found else None
        if found and found[1] == "BSSY" and target is not None:
            meets.setdefault(_barrier(text), set()).add(target)
        elif found and target is not None and not (target == i and not text.startswith("@")):
            jumps[i] = {target}  # The last instruction of all jumps to itself, for ever.
    for i, text in enumerate(texts):
        if re.search(r"\bBSYNC\b", text):
            jumps[i] = meets.get(_barrier(text), set())
    ends = {i for i, text in enumerate(texts) if re.search(r"\b(BRA|BRX|JMP|EXIT|RET)\b", text)}
    cuts = sorted({0, len(texts)} | {i + 1 for i in ends | set(jumps)} | set().union(*jumps.values()))
    number = {start: i for i, start in enumerate(cuts[:-1])}
    blocks = []
    for start, stop in pairwise(cuts):
        last = stop - 1
        conditional = texts[last].startswith("@") or re.search(r"\bBRA\b[^;]*,", texts[last])
        after = {number[i] for i in jumps.get(last, set())}
        if stop in number and (last not in ends or conditional):
            after.add(number[stop])
        blocks.append(Block(start, stop, tuple(sorted(after))))
    return blocks


def _barrier(text: str) -> str:
    return str(re.findall(r"\bB\d+\b", text)[0])


def _innermost(blocks: list[Block], within: set[int], wanted: set[int] | None) -> list[set[int]]:
    """The loops, as sets of blocks, that hold a wanted block (or any) and no smaller loop that does."""
    found = []
    for loop in _cycles(blocks, within):
        if wanted is not None and not loop & wanted:
            continue
        entered = {i for i in loop if any(i in blocks[j].next for j in range(len(blocks)) if j not in loop)}
        smaller = _innermost(blocks, loop - {min(entered or loop)}, wanted)
        found += smaller or [loop]
    return found


def _cycles(blocks: list[Block], within: set[int]) -> list[set[int]]:
    """Sets of blocks, as large as can be, of which each is reached from each (Kosaraju's two passes)."""
    before: dict[int, list[int]] = {i: [] for i in within}
    for i in within:
        for j in blocks[i].next:
            if j in within:
                before[j].append(i)
    order: list[int] = []
    seen: set[int] = set()
    for root in sorted(within):
        path = [] if root in seen else [(root, iter(blocks[root].next))]
        seen.add(root)
        while path:
            i, rest = path[-1]
            step = next((j for j in rest if j in within and j not in seen), None)
            if step is None:
                order.append(i)
                path.pop()
            else:
                seen.add(step)
                path.append((step, iter(blocks[step].next)))
    cycles, taken = [], set()
    for root in reversed(order):
        group, open_ends = set(), [root]
        while open_ends:
            i = open_ends.pop()
            if i not in taken:
                taken.add(i)
                group.add(i)
                open_ends += before[i]
        if len(group) > 1 or any(i in blocks[i].next for i in group):
            cycles.append(group)
    return cycles
