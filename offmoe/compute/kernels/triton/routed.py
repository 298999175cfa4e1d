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
def patience(aborted, spins, SPINS: tl.constexpr):
    """`spins` and one more; all of SPINS once the host or the device has given up."""
    return tl.where(tl.load(aborted, volatile=True) != 0, SPINS, spins + 1)


@triton.jit
def await_list(named, number, misses, aborted, spins, V: tl.constexpr, SPINS: tl.constexpr):
    """The words int64 [V] of the list for access `number`, once all of them are there if anything is missing."""
    position = tl.arange(0, V)
    words = tl.load(named + position, volatile=True)
    late = tl.sum(((words & 0xFFFF) != (number & 0xFFFF)).to(tl.int32), axis=0)
    while (spins < SPINS) & (misses > 0) & (late > 0):
        spins = patience(aborted, spins, SPINS)
        words = tl.load(named + position, volatile=True)
        late = tl.sum(((words & 0xFFFF) != (number & 0xFFFF)).to(tl.int32), axis=0)
    return words, spins


@triton.jit
def take_answer(places, settled, number, aborted, spins, EXPERTS: tl.constexpr, E: tl.constexpr, SPINS: tl.constexpr):
    """Wait until the host has said where every expert is from access `number` on, and write it to `places`."""
    expert = tl.arange(0, E)
    inside = expert < EXPERTS
    answer = tl.load(settled + expert, mask=inside, other=0, volatile=True)
    left = tl.sum((inside & ((answer & 0xFFFFFFFF) != number)).to(tl.int32), axis=0)
    while (spins < SPINS) & (left > 0):
        spins = patience(aborted, spins, SPINS)
        answer = tl.load(settled + expert, mask=inside, other=0, volatile=True)
        left = tl.sum((inside & ((answer & 0xFFFFFFFF) != number)).to(tl.int32), axis=0)
    if left == 0:
        tl.store(places + expert, (answer >> 32).to(tl.int32), mask=inside)
    else:
        tl.store(aborted, 1)


@triton.jit
def place_misses(places, moves, count, words, missing, expert, ids, verdict, PAIRS: tl.constexpr, V: tl.constexpr):
    """Give the missing experts [E] the places of `words` [V] that are left, in order, unless the verdict is another."""
    slot, holder = (words >> 32).to(tl.int32), ((words >> 16) & 0xFFFF).to(tl.int32) - 1
    needed = is_routed(ids, holder, PAIRS) & (holder >= 0)
    left = ((slot >= 0) & (needed == 0)).to(tl.int32)
    misses = tl.sum(missing, axis=0)
    verdict = tl.where((verdict != 3) & (tl.sum(left, axis=0) < misses), 1, verdict)
    rank_missing, rank_left = tl.cumsum(missing, axis=0) - 1, tl.cumsum(left, axis=0) - 1
    pairs = (rank_missing[:, None] == rank_left[None, :]) & (missing[:, None] != 0) & (left[None, :] != 0)
    new = tl.sum(tl.where(pairs, slot[None, :], 0), axis=1)  # [E]
    assigns = (verdict == 0).to(tl.int32)
    placed = missing * assigns != 0  # [E]
    evicts = left * (rank_left < misses).to(tl.int32) * (holder >= 0).to(tl.int32) * assigns != 0  # [V]
    tl.debug_barrier()  # all threads have read what is written from here on
    tl.store(places + holder, tl.full([V], -1, tl.int32), mask=evicts)
    tl.store(places + expert, new, mask=placed)
    tl.store(moves + 2 * rank_missing, expert, mask=placed)
    tl.store(moves + 2 * rank_missing + 1, new, mask=placed)
    tl.store(count, tl.where(verdict == 0, misses, 0))
    return verdict


# On the device: ids int64 [PAIRS], as routed. places int32 [EXPERTS]: where an expert's slot starts, in units of 256
# bytes; -1: it has none. turn int32 [1]: the number of this access of the layer, from 0 on. moves int32 [PAIRS, 2]:
# (expert, place) of each miss, `count` int32 [1] of them. E, V: powers of two that hold all experts and all of a list.
#
# In mapped RAM, written by the host: named int64 [V], `routed.named_word` of each slot in order. settled int64
# [EXPERTS], `routed.settled_word` of each expert. Each of these words has the number of the access that it is for, so
# that no order of the host's stores matters. sources int64 [EXPERTS, STRIDE]: the first is 0 if the expert is not
# complete in mapped RAM. progress[1]: the entries that the host has read.
#
# In mapped RAM, written here: ring int32 [ENTRIES, WIDTH], an entry of `log_access` per access; progress[0], the
# entries written. aborted int32 [1], also by the host: nobody waits any more.
@triton.jit(do_not_specialize=["layer"])
def assign(
    ids,
    places,
    turn,
    named,
    settled,
    sources,
    moves,
    count,
    ring,
    progress,
    aborted,
    layer,
    PAIRS: tl.constexpr,
    EXPERTS: tl.constexpr,
    STRIDE: tl.constexpr,
    ENTRIES: tl.constexpr,
    WIDTH: tl.constexpr,
    E: tl.constexpr,
    V: tl.constexpr,
    SPINS: tl.constexpr,
):
    """Give every missed expert the next named slot whose holder is not demanded, in ascending expert id. grid: (1, 1).

    It waits for the host in three cases: the ring is full, there are misses and the list for this access is not there
    yet, or the verdict leaves the misses to the host, which answers with all places of the layer. After SPINS looks
    it gives up: nothing is assigned, and the misses have no place.

    The verdicts are those of `offmoe.compute.kernels.routed.Verdict`. Unless it is 0, nothing is assigned.
    """
    expert = tl.arange(0, E)
    inside = expert < EXPERTS
    number = tl.load(turn)
    place = tl.load(places + expert, mask=inside, other=0)
    missing = (is_routed(ids, expert, PAIRS) & inside & (place < 0)).to(tl.int32)
    misses = tl.sum(missing, axis=0)
    written = tl.load(progress)
    spins = 0
    while (spins < SPINS) & (written - tl.load(progress + 1, volatile=True) >= ENTRIES):
        spins = patience(aborted, spins, SPINS)
    words, spins = await_list(named, number, misses, aborted, spins, V, SPINS)
    source = tl.load(sources + expert * STRIDE, mask=missing != 0, other=1, volatile=True)
    verdict = tl.where(tl.sum((source == 0).to(tl.int32), axis=0) > 0, 2, 0)
    verdict = tl.where(spins < SPINS, verdict, 3)
    verdict = place_misses(places, moves, count, words, missing, expert, ids, verdict, PAIRS, V)
    tl.store(turn, (number + 1) & 0x7FFFFFFF)
    if verdict == 3:
        tl.store(aborted, 1)
    else:
        log_access(ring + (written % ENTRIES) * WIDTH, ids, layer, verdict, misses, PAIRS, EXPERTS)
        tl.debug_barrier()
        tl.atomic_xchg(progress, written + 1, sem="release", scope="sys")
    if (verdict == 1) | (verdict == 2):
        take_answer(places, settled, number, aborted, spins, EXPERTS, E, SPINS)


@triton.jit
def gather(
    moves,
    count,
    sources,
    slab,
    PIECES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy every placed expert from mapped RAM into its slot. grid: (most moves, programs per move).

    sources int64 [EXPERTS, PIECES, 3]: the parts of each expert: (address, offset in its slot, words of 4 bytes).
    """
    move = tl.program_id(0)
    if move < tl.load(count):
        parts = sources + tl.load(moves + 2 * move).to(tl.int64) * (3 * PIECES)
        start = slab + tl.load(moves + 2 * move + 1).to(tl.int64) * 256
        for piece in range(PIECES):
            from_ = tl.load(parts + 3 * piece).to(tl.pointer_type(tl.int32), bitcast=True)
            to = (start + tl.load(parts + 3 * piece + 1)).to(tl.pointer_type(tl.int32), bitcast=True)
            words = tl.load(parts + 3 * piece + 2)
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
