"""Slots in a few allocations, so that some of the memory can be given back while the other slots stay where they are.

Moves: nothing. Which slot of the new division is where, and which bytes must move, is worked out here in numbers alone.
Bound: one block more than the larger of the two divisions is allocated at once.
Must never: move a slot whose block stays.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

BLOCK_BYTES = 256 << 20
"""Bytes of a block, unless one slot is larger. An allocator of devices rounds up to 2 MiB: less than 1 % of a block."""


MOST_SMALL = 4
"""Blocks below half of BLOCK_BYTES that stay. More are joined into new ones: else every change would leave pieces."""


class Place(NamedTuple):
    """Where a slot is: number of a block, and which of the block's slots it is."""

    block: int
    position: int


class Rearrangement(NamedTuple):
    """How to get from one division into slots to another.

    Args:
        kept: numbers of the old blocks that stay. They come first in the new numbering, in this order.
        new: blocks to allocate, each as the bytes of its slots. They follow those that are kept.
        places: by new slot, its place in the new numbering.
        moves: (place in the old numbering, place in the new one) of slots whose bytes must be copied.
    """

    kept: tuple[int, ...]
    new: tuple[tuple[int, ...], ...]
    places: tuple[Place, ...]
    moves: tuple[tuple[Place, Place], ...]


def rearrange(
    blocks: Sequence[Sequence[int]], places: Sequence[Place], wanted: Sequence[int], keep: Mapping[int, int]
) -> Rearrangement:
    """Divide memory anew.

    Args:
        blocks: the old blocks, each as the bytes of its slots.
        places: by old slot, its place.
        wanted: by new slot, its bytes.
        keep: by new slot, the old slot whose bytes it is to hold; both have one size.
    """
    kept = _blocks_to_keep(blocks, wanted, Counter(places[old].block for old in keep.values()))
    missing = Counter(wanted) - Counter(size for block in kept for size in blocks[block])
    new = _new_blocks({size: missing[size] for size in dict.fromkeys(wanted) if missing[size]})
    number = {block: i for i, block in enumerate(kept)}
    free: defaultdict[int, list[Place]] = defaultdict(list)
    for i, sizes in enumerate([*(blocks[block] for block in kept), *new]):
        index = 0
        for size, same in groupby(sizes):
            end = index + sum(1 for _ in same)
            free[size] += [Place(i, position) for position in range(index, end)]
            index = end
    found: dict[int, Place] = {}
    for slot, old in keep.items():
        before = places[old]
        if before.block in number:
            found[slot] = Place(number[before.block], before.position)
    staying = set(found.values())
    for each in free.values():
        each.reverse()
    unused: Mapping[int, list[Place]] = free
    if staying:
        unused = {size: [place for place in each if place not in staying] for size, each in free.items()}
    moves = []
    for slot, old in keep.items():
        if slot not in found:
            found[slot] = unused[wanted[slot]].pop()
            moves.append((places[old], found[slot]))
    order = [found.get(slot) or unused[size].pop() for slot, size in enumerate(wanted)]
    return Rearrangement(kept, new, tuple(order), tuple(moves))


def _blocks_to_keep(blocks: Sequence[Sequence[int]], wanted: Sequence[int], used: Mapping[int, int]) -> tuple[int, ...]:
    """As many blocks as are wanted whole, those first whose slots are kept."""
    room, kept, num_small = Counter(wanted), [], 0
    for block in sorted(range(len(blocks)), key=lambda block: -used.get(block, 0) / max(1, len(blocks[block]))):
        sizes = Counter(blocks[block])
        small = sum(blocks[block]) < BLOCK_BYTES // 2
        if all(room[size] >= count for size, count in sizes.items()) and num_small + small <= MOST_SMALL:
            num_small += small
            room -= sizes
            kept.append(block)
    return tuple(sorted(kept))


def _new_blocks(counts: Mapping[int, int]) -> tuple[tuple[int, ...], ...]:
    """Consecutive slots in blocks. counts: by bytes of a slot, how many there are."""
    blocks: list[list[int]] = []
    room = 0
    for size, count in counts.items():
        left = count
        while left:
            if not blocks or size > room:
                blocks.append([])
                room = BLOCK_BYTES
            fit = min(left, max(1, room // max(1, size)))
            blocks[-1] += [size] * fit
            room -= fit * size
            left -= fit
    return tuple(map(tuple, blocks))
