"""A layer of few tokens without the host: misses take named slots, their bytes come from RAM, rows are reduced.

`assign` is the rule of policy/victims.py in one program. `gather` copies what `assign` placed. `down_reduced` follows
`decode.gate_up_rows` and adds up the weighted rows of a token's experts, in router order and in float32.

Moves: the bytes of missed experts from mapped RAM to slots, and per layer a few hundred bytes of log to the host.
Bound: the link for `gather`, the device's memory bandwidth for `down_reduced`, latency for `assign`.
Must never: let a row of an expert that has no place pass for a row of that expert. It becomes NaN.
"""

import triton
import triton.language as tl

from offmoe.compute.kernels.triton.decode import down_block, place_of


@triton.jit
def is_routed(ids, experts, PAIRS: tl.constexpr):
    """Whether each of `experts` is among the ids int64 [PAIRS]."""
    found = experts != experts  # none yet
    for pair in range(PAIRS):
        found = found | (experts == tl.load(ids + pair))
    return found


@triton.jit
def log_access(entry, ids, layer, verdict, misses, PAIRS: tl.constexpr, EXPERTS: tl.constexpr):
    """Write an entry int32 [3 + PAIRS] of the ring: (layer, verdict, misses, ids); -1 for an id that is no expert's."""
    tl.store(entry, layer)
    tl.store(entry + 1, verdict)
    tl.store(entry + 2, misses)
    for pair in range(PAIRS):
        routed = tl.load(ids + pair)
        known = (routed >= 0) & (routed < EXPERTS)  # others may not fit in 32 bits
        tl.store(entry + 3 + pair, tl.where(known, routed, -1).to(tl.int32))


@triton.jit
def assign(
    ids,
    places,
    named,
    sources,
    moves,
    count,
    ring,
    progress,
    layer,
    PAIRS: tl.constexpr,
    EXPERTS: tl.constexpr,
    ENTRIES: tl.constexpr,
    E: tl.constexpr,
    V: tl.constexpr,
):
    """Give every missed expert the next named slot whose holder is not demanded, in ascending expert id. grid: (1, 1).

    ids int64 [PAIRS], as routed. places int32 [EXPERTS]: where an expert's slot starts, in units of 256 bytes; -1: it
    has none. named int32 [V, 2]: (place, expert that holds it or -1), in order; place -1 ends the list. sources int64
    [EXPERTS]: the address of an expert in mapped RAM; 0: it is not there. moves int32 [PAIRS, 2]: (expert, place) of
    each miss, `count` int32 [1] of them. E, V: powers of two that hold all experts and all of the list.

    In mapped RAM: ring int32 [ENTRIES, 3 + PAIRS], an entry of `log_access` per access; progress int32 [2], the entries
    written, and those that the host has read.

    The verdicts are those of `offmoe.compute.kernels.routed.Verdict`. Unless it is 0, nothing is assigned.
    """
    expert, turn = tl.arange(0, E), tl.arange(0, V)
    inside = expert < EXPERTS
    place = tl.load(places + expert, mask=inside, other=0)
    slot, holder = tl.load(named + 2 * turn), tl.load(named + 2 * turn + 1)
    demanded, needed = is_routed(ids, expert, PAIRS), is_routed(ids, holder, PAIRS) & (holder >= 0)
    missing = (demanded & inside & (place < 0)).to(tl.int32)
    left = ((slot >= 0) & (needed == 0)).to(tl.int32)
    misses = tl.sum(missing, axis=0)
    source = tl.load(sources + expert, mask=missing != 0, other=1)
    elsewhere = tl.sum((source == 0).to(tl.int32), axis=0)
    written = tl.load(progress)
    full = written - tl.load(progress + 1, volatile=True) >= ENTRIES
    verdict = tl.where(elsewhere > 0, 2, 0)
    verdict = tl.where(tl.sum(left, axis=0) < misses, 1, verdict)
    verdict = tl.where(full, 3, verdict)
    rank_missing, rank_left = tl.cumsum(missing, axis=0) - 1, tl.cumsum(left, axis=0) - 1
    pairs = (rank_missing[:, None] == rank_left[None, :]) & (missing[:, None] != 0) & (left[None, :] != 0)
    new = tl.sum(tl.where(pairs, slot[None, :], 0), axis=1)  # [E]
    assigns = (verdict == 0).to(tl.int32)
    placed = missing * assigns != 0  # [E]
    evicts = left * (rank_left < misses).to(tl.int32) * (holder >= 0).to(tl.int32) * assigns != 0  # [V]
    tl.store(places + holder, tl.full([V], -1, tl.int32), mask=evicts)
    tl.store(places + expert, new, mask=placed)
    tl.store(moves + 2 * rank_missing, expert, mask=placed)
    tl.store(moves + 2 * rank_missing + 1, new, mask=placed)
    tl.store(count, tl.where(verdict == 0, misses, 0))
    if full == 0:
        entry = ring + (written % ENTRIES) * (3 + PAIRS)
        log_access(entry, ids, layer, verdict, misses, PAIRS, EXPERTS)
        tl.debug_barrier()
        tl.atomic_xchg(progress, written + 1, sem="release", scope="sys")


@triton.jit
def gather(
    moves,
    count,
    sources,
    slab,
    pieces,
    PIECES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy every placed expert from mapped RAM into its slot. grid: (most moves, programs per move).

    pieces int64 [PIECES, 3]: the parts of an expert: (offset from its source, offset in its slot, words of 4 bytes).
    """
    move = tl.program_id(0)
    if move < tl.load(count):
        source = tl.load(sources + tl.load(moves + 2 * move))
        start = slab + tl.load(moves + 2 * move + 1).to(tl.int64) * 256
        for piece in range(PIECES):
            from_ = (source + tl.load(pieces + 3 * piece)).to(tl.pointer_type(tl.int32), bitcast=True)
            to = (start + tl.load(pieces + 3 * piece + 1)).to(tl.pointer_type(tl.int32), bitcast=True)
            words = tl.load(pieces + 3 * piece + 2)
            for first in range(tl.program_id(1) * BLOCK, words, tl.num_programs(1) * BLOCK):
                at = first + tl.arange(0, BLOCK)
                tl.store(to + at, tl.load(from_ + at, mask=at < words), mask=at < words)


@triton.jit
def down_reduced(
    slab,
    places,
    ids,
    weights,
    h,
    out,
    DOWN: tl.constexpr,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
):
    """out [T, H] = the sum over a token's experts of weight * (h [pairs, I] times down). grid: (T, blocks of BN rows).

    places, ids: as `assign` takes them. weights [T, TOP_K]. An id that is no expert's adds nothing; the row of an
    expert without a place is NaN.
    """
    token, block = tl.program_id(0), tl.program_id(1)
    total = tl.zeros([BN], dtype=tl.float32)
    for choice in range(TOP_K):
        pair = token * TOP_K + choice
        place = place_of(places, ids, pair, EXPERTS)
        slot = slab + tl.maximum(place, 0).to(tl.int64) * 256
        value = down_block(slot, h + pair.to(tl.int64) * DOWN.cols, block, DOWN, BN, BW)
        value *= tl.load(weights + pair).to(tl.float32)
        value = tl.where(place == -1, float("nan"), value)
        total += tl.where(place == -2, 0.0, value)
    row = block * BN + tl.arange(0, BN)
    tl.store(out + token.to(tl.int64) * DOWN.rows + row, total.to(out.dtype.element_ty), mask=row < DOWN.rows)
