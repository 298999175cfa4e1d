"""The transfer engine on a device where no copy lands before its event is waited for, and without each of the waits."""

from __future__ import annotations

import errno
import os
import threading

import pytest
import torch
from safetensors.torch import save_file

import offmoe.storage.read_plan as read_plan
import offmoe.transfer.reader as reader_module
import offmoe.transfer.slot_writer as slot_writer_module
from offmoe.device.arena import SlotArena
from offmoe.device.backend import CpuBackend
from offmoe.errors import TransferError
from offmoe.storage.checkpoint import Checkpoint
from offmoe.storage.layout import Assembly, Destination, ExpertLayout, ExpertRecord
from offmoe.storage.store import ExpertStore
from offmoe.transfer.engine import TransferEngine
from offmoe.transfer.slot_writer import NewSlots, SlotWriter
from offmoe.transfer.staging import staging_plan
from offmoe.transfer.waits import WAITS
from offmoe.types import ExpertKey, Fetch, KeptSlots, Wave
from tests.doubles import DeferredBackend, Layer, PinningBackend, without

EXPERTS, ROWS, COLUMNS = 24, 16, 96
LAYOUT = ExpertLayout.of({"in": (torch.float32, (ROWS, COLUMNS)), "out": (torch.float32, (COLUMNS, ROWS))})


def weight(expert, name):
    return torch.full((ROWS, COLUMNS) if name == "in" else (COLUMNS, ROWS), expert + (0.25 if name == "in" else 0.5))


@pytest.fixture
def checkpoint(tmp_path):
    tensors = {f"{e}.{name}": weight(e, name) for e in range(EXPERTS) for name in ("in", "out")}
    save_file(tensors, tmp_path / "model.safetensors")
    return Checkpoint.open(tmp_path)


def cut(monkeypatch):
    """Make these small experts be read in parts of one page each."""
    monkeypatch.setattr(read_plan, "part_bytes", lambda nbytes: 4096)


@pytest.fixture(params=["whole", "in parts"])
def reading(request, monkeypatch):
    """Whether an expert is read by one reader, or in several parts by all of them."""
    if request.param == "in parts":
        cut(monkeypatch)
    return request.param


@pytest.fixture
def in_parts(monkeypatch):
    cut(monkeypatch)


def start_of(checkpoint, expert):
    return min(checkpoint.segment(f"{expert}.{name}").offset for name in ("in", "out"))


class GatedReads:
    """Reads that block until the test opens their gate; gates are numbered by the page at which a read begins."""

    def __init__(self):
        self.gates: dict[int, threading.Event] = {}
        self.started: dict[int, threading.Event] = {}
        self.offsets: list[int] = []

    def hold(self, offset):
        self.gates[offset // 4096] = threading.Event()
        self.started[offset // 4096] = threading.Event()

    def __call__(self, descriptor, buffer, offset):
        self.offsets.append(offset)
        gate = self.gates.get(offset // 4096)
        if gate is not None:
            self.started[offset // 4096].set()
            assert gate.wait(20)
        return os.preadv(descriptor, [buffer], offset)


class Rig:
    """Engine and slots; `use` computes with experts and checks that they are the right ones."""

    def __init__(self, checkpoint, waits=WAITS, backend=None, slots=8, read_at=None):
        self.checkpoint, self.backend = checkpoint, backend or DeferredBackend()
        self.records = {
            ExpertKey(0, e): ExpertRecord((checkpoint.segment(f"{e}.in"), checkpoint.segment(f"{e}.out")))
            for e in range(EXPERTS)
        }
        self.store = ExpertStore(checkpoint.shards, self.records, read_at=read_at)
        self.arena = SlotArena(self.backend.allocate, [LAYOUT] * slots)
        layer = Layer(LAYOUT, Assembly((Destination("in", 0, 0), Destination("out", 0, 0))))
        writer = SlotWriter(self.store, self.arena, self.backend, [layer])
        self.stalls = []
        self.engine = TransferEngine(writer, on_stall=lambda *a: self.stalls.append(a), waits=waits)
        if isinstance(self.backend, DeferredBackend):
            self.backend.guard(writer)

    def fetch(self, *pairs):
        self.engine.fetch([Fetch(ExpertKey(0, e), slot, None) for e, slot in pairs])

    def prefetch(self, *pairs):
        self.engine.prefetch([Fetch(ExpertKey(0, e), slot, None) for e, slot in pairs])

    def sees(self, expert, slot):
        """Whether the slot holds exactly this expert."""
        views = self.arena.views(slot, LAYOUT)
        return all(torch.equal(views[name], weight(expert, name)) for name in ("in", "out"))

    def use(self, *pairs):
        slots = [slot for _, slot in pairs]
        self.engine.demand(slots)
        for slot in slots:
            self.engine.ready(slot)
        right = all(self.sees(e, slot) for e, slot in pairs)
        self.engine.computed(slots)
        return right

    def close(self):
        self.engine.close()
        self.store.close()


def several_waves(rig):
    """More fetches than staging buffers, slots used again and again: needs W1, W2 and W3 (of transfer/waits.py)."""
    for start in range(0, EXPERTS, 12):
        wave = [(start + i, i) for i in range(12)]
        rig.fetch(*wave)
        for slot in range(12):
            rig.engine._tickets[slot].issued.wait(20)  # all issued before the first is waited for
        if not rig.use(*wave):
            return False
    return True


class HeldCopies(DeferredBackend):
    """The first copy blocks its reader until the test opens the gate."""

    def __init__(self):
        super().__init__()
        self.begun, self.gate = threading.Event(), threading.Event()
        copy = self.copies.copy

        def held(destination, source):
            if not self.begun.is_set():
                self.begun.set()
                assert self.gate.wait(20)
            copy(destination, source)

        self.copies.copy = held


def a_slot_given_away_while_it_is_copied_into(checkpoint, waits):
    """Expert 0 is on its way from staging into slot 3 when the slot is given to expert 9: needs W4."""
    backend = HeldCopies()
    rig = Rig(checkpoint, waits, backend)
    try:
        rig.prefetch((0, 3))
        assert backend.begun.wait(20)
        earlier = rig.engine._tickets[3]
        rig.fetch((9, 3))
        later = rig.engine._tickets[3]
        later.issued.wait(0.3)  # without W4 it is issued in this time, with W4 it cannot be
        backend.gate.set()
        assert earlier.issued.wait(20)
        assert later.issued.wait(20)
        return rig.use((9, 3))
    finally:
        backend.gate.set()
        rig.close()


def waves_through_one_slot(rig, patience=0.1):
    """Expert 0 is resident; 1, 2 and 3 pass through its slot one after the other, read before it is free: needs W5."""
    rig.fetch((0, 0))
    if not rig.use((0, 0)):
        return False
    waves = [Wave(((0, 0),), ())] + [Wave(((e, 0),), (Fetch(ExpertKey(0, e), 0, None),)) for e in (1, 2, 3)]
    rig.engine.stream(waves)
    coming = [rig.engine._tickets[0]]
    while coming[-1].next is not None:
        coming.append(coming[-1].next)
    assert len(coming) == 3
    right = True
    for wave in waves:
        for ticket in coming:
            ticket.issued.wait(patience)  # without W5 they are all copied in this time
        ((expert, slot),) = wave.experts
        rig.engine.ready(slot)
        right &= rig.sees(expert, slot)
        rig.engine.computed([slot])
    return right


@pytest.mark.parametrize("backend", [DeferredBackend, CpuBackend])
def test_every_wave_computes_with_its_own_experts(checkpoint, backend, reading):
    rig = Rig(checkpoint, backend=backend(), slots=12)
    try:
        assert several_waves(rig)
    finally:
        rig.close()


def test_a_slot_given_away_holds_the_later_expert(checkpoint, reading):
    assert a_slot_given_away_while_it_is_copied_into(checkpoint, WAITS)


@pytest.mark.parametrize("backend", [DeferredBackend, CpuBackend])
def test_experts_that_pass_through_one_slot_land_one_after_the_other(checkpoint, backend, reading):
    rig = Rig(checkpoint, backend=backend())
    try:
        assert waves_through_one_slot(rig)
    finally:
        rig.close()


@pytest.mark.parametrize("wait", ["slot_landed", "slot_last_read", "staging_copied"])
def test_without_the_wait_weights_are_wrong(checkpoint, wait, reading):
    rig = Rig(checkpoint, without(wait), slots=12)
    try:
        assert not several_waves(rig)
    finally:
        rig.close()


def test_without_w4_the_earlier_expert_lands_last(checkpoint, reading):
    assert not a_slot_given_away_while_it_is_copied_into(checkpoint, without("superseded_issued"))


def test_without_w5_an_expert_lands_on_one_that_is_still_needed(checkpoint, reading):
    rig = Rig(checkpoint, without("slot_turn"))
    try:
        assert not waves_through_one_slot(rig, patience=30)
    finally:
        rig.close()


def test_later_waves_are_read_while_their_slot_is_busy(checkpoint):
    reads = GatedReads()
    rig = Rig(checkpoint, read_at=reads)
    for expert in (1, 2, 3):
        reads.hold(start_of(checkpoint, expert))
        reads.gates[start_of(checkpoint, expert) // 4096].set()
    try:
        rig.engine.stream([Wave(((e, 0),), (Fetch(ExpertKey(0, e), 0, None),)) for e in (0, 1, 2, 3)])
        for started in reads.started.values():
            assert started.wait(20), "nothing has been computed so far"
        for expert in range(4):
            assert rig.use((expert, 0))
        assert not rig.engine._tickets
    finally:
        rig.close()


@pytest.mark.parametrize("end", ["forget", "close"])
def test_what_waits_for_its_turn_does_not_hold_up_the_end(checkpoint, end, reading):
    rig = Rig(checkpoint)
    try:
        rig.engine.stream([Wave(((e, 0),), (Fetch(ExpertKey(0, e), 0, None),)) for e in range(8)])
        rig.engine.ready(0)
        ending = threading.Thread(target=getattr(rig.engine, end), daemon=True)
        ending.start()
        ending.join(20)
        assert not ending.is_alive()
        if end == "forget":
            rig.fetch((9, 0))
            assert rig.use((9, 0))
    finally:
        rig.close()


def test_all_readers_share_one_expert(checkpoint, in_parts):
    together = threading.Barrier(4)

    def read(descriptor, buffer, offset):
        together.wait(20)  # broken, and the demand an error, unless four parts are read at once
        return os.preadv(descriptor, [buffer], offset)

    rig = Rig(checkpoint, read_at=read)
    try:
        assert rig.store.parts(ExpertKey(0, 2)) == 4
        for start in (rig.fetch, rig.prefetch):
            start((2, 0))
            assert rig.use((2, 0))
    finally:
        rig.close()


@pytest.mark.parametrize("start", [Rig.fetch, Rig.prefetch])
def test_what_is_demanded_lands_while_the_rest_is_read(checkpoint, in_parts, start):
    """A prefetch does not: its slot may still be given to another expert."""
    reads = GatedReads()
    last = start_of(checkpoint, 2) // 4096 + 3
    reads.hold(last * 4096)
    rig = Rig(checkpoint, backend=CpuBackend(), read_at=reads)
    slot = rig.arena.bytes(5)
    slot.zero_()
    try:
        start(rig, (2, 5))
        assert reads.started[last].wait(20)
        (shared,) = rig.engine._queue._shared
        with shared._changed:
            assert shared._changed.wait_for(lambda: shared._num_ended == 3, 20), "the parts before the last one"
        early = int((slot != 0).sum())
        reads.gates[last].set()
        assert rig.use((2, 5))
        assert (0 < early < int((slot != 0).sum())) if start is Rig.fetch else (early == 0)
    finally:
        reads.gates[last].set()
        rig.close()


def test_a_part_that_fails_ends_the_others(checkpoint, in_parts):
    """The demand raises the error, and the readers go on with the next tickets."""
    bad = start_of(checkpoint, 3) // 4096 * 4096 + 4096

    def read(descriptor, buffer, offset):
        if offset == bad:
            raise OSError(5, "Input/output error")
        return os.preadv(descriptor, [buffer], offset)

    rig = Rig(checkpoint, read_at=read)
    try:
        rig.fetch((3, 2))
        with pytest.raises(TransferError, match=r"expert 3 of MoE layer 0"):
            rig.engine.ready(2)
        rig.engine.forget()
        rig.fetch((9, 2))
        assert rig.use((9, 2))
    finally:
        rig.close()


def started_of(reads, checkpoint, *experts):
    return [reads.started[start_of(checkpoint, e) // 4096] for e in experts]


def test_a_demand_behind_thirty_prefetches_is_read_at_once(checkpoint):
    """Prefetches may occupy half of the readers, so the demand waits for none of them."""
    reads = GatedReads()
    for expert in (0, 1):
        reads.hold(start_of(checkpoint, expert))
    rig = Rig(checkpoint, read_at=reads, slots=31)
    try:
        rig.prefetch(*[(e % 22, e) for e in range(30)])
        for started in started_of(reads, checkpoint, 0, 1):
            assert started.wait(20)
        rig.fetch((23, 30))
        assert rig.use((23, 30)), "it must not wait for the two prefetches that are held"
        assert [o // 4096 for o in reads.offsets[2:]] == [start_of(checkpoint, 23) // 4096]
        for gate in reads.gates.values():
            gate.set()
        assert rig.use(*[(e % 22, e) for e in range(30)])
    finally:
        for gate in reads.gates.values():
            gate.set()
        rig.close()


def test_newer_prefetches_go_before_older_ones(checkpoint):
    reads = GatedReads()
    for expert in (0, 1):
        reads.hold(start_of(checkpoint, expert))
    rig = Rig(checkpoint, read_at=reads, slots=16)
    try:
        rig.prefetch(*[(e, e) for e in range(6)])
        for started in started_of(reads, checkpoint, 0, 1):
            assert started.wait(20)
        rig.prefetch((20, 10), (21, 11))
        reads.gates[start_of(checkpoint, 0) // 4096].set()  # one reader goes on, in the order of the queue
        for slot in (10, 11, 2, 3, 4, 5):
            assert rig.engine._tickets[slot].issued.wait(20)
        order = [o // 4096 for o in reads.offsets[2:]]
        assert order == [start_of(checkpoint, e) // 4096 for e in (20, 21, 2, 3, 4, 5)]
    finally:
        for gate in reads.gates.values():
            gate.set()
        rig.close()


def test_a_read_whose_slot_was_given_away_goes_nowhere(checkpoint, in_parts):
    """The rest of it is not read."""
    reads = GatedReads()
    for expert in (0, 1):
        reads.hold(start_of(checkpoint, expert))
    rig = Rig(checkpoint, read_at=reads)
    try:
        rig.prefetch((0, 0), (1, 1))
        for started in started_of(reads, checkpoint, 0, 1):
            assert started.wait(20)
        lost = [rig.engine._tickets[slot] for slot in (0, 1)]
        begun = len(reads.offsets)
        rig.fetch((5, 0), (6, 1))
        for gate in reads.gates.values():
            gate.set()
        assert rig.use((5, 0), (6, 1))
        assert all(ticket.issued.wait(20) for ticket in lost)
        assert rig.sees(5, 0)
        wasted = [o for o in reads.offsets[begun:] if o // 4096 in blocks_of(checkpoint, 0, 1)]
        assert not wasted, "both readers that prefetch were held in a part, and none begins another"
    finally:
        for gate in reads.gates.values():
            gate.set()
        rig.close()


def test_parts_that_have_landed_can_be_computed_with(checkpoint, in_parts):
    reads = GatedReads()
    first = start_of(checkpoint, 2) // 4096
    rig = Rig(checkpoint, backend=CpuBackend(), read_at=reads)
    parts = rig.store.parts(ExpertKey(0, 2))
    reads.hold((first + parts - 1) * 4096)
    try:
        rig.fetch((2, 5))
        arriving = rig.engine.arriving(5)
        nbytes = LAYOUT.params[0].nbytes
        arriving.wait("in", 0, nbytes)
        assert torch.equal(rig.arena.views(5, LAYOUT)["in"], weight(2, "in")), "the second weight has not landed"
        assert not rig.engine._tickets[5].issued.is_set()
        threading.Timer(0.1, reads.gates[first + parts - 1].set).start()
        arriving.wait("out", 0, nbytes)
        assert rig.use((2, 5))
        assert rig.stalls[0][1] >= 0.05, "the wait in `Arriving.wait` must count as a stall"
        assert rig.engine.arriving(5) is None
    finally:
        reads.gates[first + parts - 1].set()
        rig.close()


def test_a_wait_for_a_part_that_failed_ends_and_ready_raises(checkpoint, in_parts):
    first = start_of(checkpoint, 2) // 4096

    def read(descriptor, buffer, offset):
        if offset // 4096 == first + 1:
            raise OSError(errno.EIO, "injected")
        return os.preadv(descriptor, [buffer], offset)

    rig = Rig(checkpoint, backend=CpuBackend(), read_at=read)
    try:
        rig.fetch((2, 5))
        arriving = rig.engine.arriving(5)
        arriving.wait("out", 0, LAYOUT.params[1].nbytes)
        with pytest.raises(TransferError, match="reading failed"):
            rig.engine.ready(5)
    finally:
        rig.close()


def test_what_cannot_be_computed_with_while_it_arrives(checkpoint, monkeypatch):
    """An expert that is read in one part, and any expert on a device whose copies land later."""
    rig = Rig(checkpoint, backend=CpuBackend())
    rig.fetch((2, 5))
    assert rig.engine.arriving(5) is None
    assert rig.engine.arriving(4) is None, "nothing was fetched into it"
    rig.close()
    cut(monkeypatch)
    rig = Rig(checkpoint, backend=DeferredBackend())
    rig.fetch((2, 5))
    assert rig.engine.arriving(5) is None
    rig.close()


def test_a_cancelled_read_ahead_stops_within_a_part(checkpoint, monkeypatch):
    reads = GatedReads()
    first = start_of(checkpoint, 2) // 4096
    monkeypatch.setattr(reader_module, "AHEAD_BYTES", 4096)
    reads.hold((first + 1) * 4096)
    rig = Rig(checkpoint, read_at=reads)
    try:
        (ticket,) = read_ahead(rig, 2)
        assert reads.started[first + 1].wait(20)
        rig.engine.read_ahead(())
        reads.gates[first + 1].set()
        assert ticket.issued.wait(20)
        assert len(reads.offsets) == 2
    finally:
        reads.gates[first + 1].set()
        rig.close()


def blocks_of(checkpoint, *experts):
    """Pages at which reads of these experts begin, but for the last one, which each shares with the next expert."""
    return {start_of(checkpoint, e) // 4096 + i for e in experts for i in range(3)}


def read_ahead(rig, *experts):
    rig.engine.read_ahead([ExpertKey(0, e) for e in experts])
    return [rig.engine._read_aheads._tickets[ExpertKey(0, e)] for e in experts]


def fetch_it(rig, *pairs):
    rig.engine.fetch([Fetch(ExpertKey(0, e), slot, None, read_ahead=True) for e, slot in pairs])
    rig.engine.read_ahead(())


def in_staging(rig, *tickets):
    queue = rig.engine._queue
    with queue.lock:
        return queue.lock.wait_for(lambda: all(t in queue.in_staging for t in tickets), 20)


def every_buffer_is_free(rig, reads):
    """Whether as many experts as there are staging buffers have one each at the same time."""
    plan = staging_plan(rig.store.buffer_bytes)
    demanded = [(e, e - 15) for e in range(15, 15 + plan.buffers - plan.read_aheads)]
    for expert, _ in demanded:
        reads.hold(start_of(rig.checkpoint, expert))
    gates = [reads.gates[start_of(rig.checkpoint, expert) // 4096] for expert, _ in demanded]
    try:
        assert in_staging(rig, *read_ahead(rig, *range(plan.read_aheads)))
        rig.fetch(*demanded)
        have_one = all(started.wait(20) for started in started_of(reads, rig.checkpoint, *(e for e, _ in demanded)))
    finally:
        for gate in gates:
            gate.set()
    return have_one and rig.use(*demanded)


@pytest.mark.parametrize("backend", [DeferredBackend, CpuBackend])
def test_a_read_ahead_is_not_read_again(checkpoint, reading, backend):
    reads = GatedReads()
    rig = Rig(checkpoint, backend=backend(), read_at=reads)
    try:
        for _ in range(20):  # more times than there are buffers
            del reads.offsets[:]
            assert in_staging(rig, *read_ahead(rig, 3, 4))
            fetch_it(rig, (4, 1), (3, 0))
            assert rig.use((4, 1), (3, 0))
            assert len(reads.offsets) == rig.store.parts(ExpertKey(0, 3)) + rig.store.parts(ExpertKey(0, 4))
        assert every_buffer_is_free(rig, reads)
    finally:
        rig.close()


@pytest.mark.parametrize("backend", [DeferredBackend, CpuBackend])
def test_a_read_ahead_becomes_a_demand_while_it_is_read(checkpoint, in_parts, backend):
    """Some parts were read before it had a slot, the rest afterwards; all must land."""
    reads = GatedReads()
    first = start_of(checkpoint, 2) // 4096
    reads.hold((first + 2) * 4096)
    rig = Rig(checkpoint, backend=backend(), read_at=reads)
    try:
        (ticket,) = read_ahead(rig, 2)
        assert reads.started[first + 2].wait(20)
        fetch_it(rig, (2, 5))
        assert rig.engine._tickets[5] is ticket
        reads.gates[first + 2].set()
        assert rig.use((2, 5))
        assert len(reads.offsets) == rig.store.parts(ExpertKey(0, 2))
    finally:
        reads.gates[first + 2].set()
        rig.close()


def test_a_read_ahead_takes_half_of_the_readers_and_stops_when_cancelled(checkpoint, in_parts):
    reads = GatedReads()
    first = start_of(checkpoint, 2) // 4096
    for i in range(4):
        reads.hold((first + i) * 4096)
    rig = Rig(checkpoint, read_at=reads)
    try:
        (ticket,) = read_ahead(rig, 2)
        assert reads.started[first].wait(20)
        assert reads.started[first + 1].wait(20)
        assert not reads.started[first + 2].wait(0.1)
        rig.fetch((9, 3))
        rig.engine.read_ahead(())
        assert rig.use((9, 3)), "it must not wait for the cancelled read, which is held"
        for gate in reads.gates.values():
            gate.set()
        assert ticket.issued.wait(20)
        assert not reads.started[first + 2].is_set()
        assert every_buffer_is_free(rig, reads)
    finally:
        for gate in reads.gates.values():
            gate.set()
        rig.close()


def test_no_more_is_read_ahead_than_staging_may_hold(checkpoint):
    rig = Rig(checkpoint, read_at=(reads := GatedReads()))
    try:
        tickets = read_ahead(rig, *range(12))
        assert in_staging(rig, *tickets[:8])
        assert len(reads.offsets) == 8
        fetch_it(rig, (11, 2), (0, 3))
        assert rig.use((11, 2), (0, 3))
        assert every_buffer_is_free(rig, reads)
    finally:
        rig.close()


def test_a_failed_read_ahead_is_read_again_by_the_fetch_that_needs_it(checkpoint, reading):
    failing = threading.Event()
    failing.set()

    def read(descriptor, buffer, offset):
        if failing.is_set():
            raise OSError(5, "Input/output error")
        return os.preadv(descriptor, [buffer], offset)

    rig = Rig(checkpoint, read_at=read)
    try:
        tickets = read_ahead(rig, 3, 4)
        assert all(ticket.issued.wait(20) for ticket in tickets)
        failing.clear()
        fetch_it(rig, (3, 0))
        assert rig.use((3, 0))
    finally:
        rig.close()


@pytest.mark.parametrize("end", ["forget", "close"])
def test_what_stays_in_staging_does_not_outlive_the_end(checkpoint, end):
    rig = Rig(checkpoint, read_at=(reads := GatedReads()))
    try:
        assert in_staging(rig, *read_ahead(rig, 3, 4))
        getattr(rig.engine, end)()
        if end == "forget":
            fetch_it(rig, (3, 0))
            assert rig.use((3, 0))
            assert every_buffer_is_free(rig, reads)
    finally:
        rig.close()


class CountedCopies(DeferredBackend):
    """Records the sizes of copies, and the most copies that were queued at once."""

    def __init__(self):
        super().__init__()
        self.sizes, self.most = [], 0
        copy = self.copies.copy

        def counted(destination, source):
            self.sizes.append(destination.nbytes)
            copy(destination, source)
            self.most = max(self.most, sum(not land.done[0] for land in self.copies.pending))

        self.copies.copy = counted


@pytest.mark.parametrize("start", [Rig.prefetch, Rig.fetch])
def test_speculative_copies_go_in_pieces_two_at_a_time(checkpoint, start, monkeypatch):
    monkeypatch.setattr(slot_writer_module, "PIECE_BYTES", 1000)
    backend = CountedCopies()
    rig = Rig(checkpoint, backend=backend)
    try:
        start(rig, (3, 2))
        assert rig.engine._tickets[2].issued.wait(20)
        if start is Rig.prefetch:
            assert max(backend.sizes) <= 1000
            assert backend.most == 2
        else:
            assert backend.sizes == [ROWS * COLUMNS * 4] * 2
        assert sum(backend.sizes) == 2 * ROWS * COLUMNS * 4
        assert rig.use((3, 2))
    finally:
        rig.close()


def test_a_prefetch_that_is_demanded_while_it_waits_becomes_a_demand(checkpoint, reading):
    rig = Rig(checkpoint, slots=16)
    try:
        rig.prefetch(*[(e, e) for e in range(16)])
        assert rig.use((15, 15))
        assert rig.use(*[(e, e) for e in range(15)])
        assert all(layer == 0 and seconds >= 0 for layer, seconds in rig.stalls)
    finally:
        rig.close()


def test_an_error_surfaces_at_the_demand_that_needs_the_expert(checkpoint, reading):
    def fails(descriptor, buffer, offset):
        raise OSError(5, "Input/output error")

    rig = Rig(checkpoint, read_at=fails)
    try:
        rig.fetch((3, 2))
        with pytest.raises(TransferError, match=r"expert 3 of MoE layer 0"):
            rig.engine.ready(2)
    finally:
        rig.close()


def test_close_ends_threads_and_refuses_more(checkpoint, reading):
    rig = Rig(checkpoint)
    threads = [t for t in rig.engine._readers if t.is_alive()]
    assert len(threads) == 4
    rig.prefetch(*[(e, e % 8) for e in range(8)])
    rig.close()
    rig.close()
    assert not any(t.is_alive() for t in threads)
    with pytest.raises(TransferError, match="closed"):
        rig.fetch((1, 1))


def test_a_reader_that_cannot_start_leaves_no_thread_and_no_pinned_memory(checkpoint, monkeypatch):
    start, started = reader_module.Reader.start, []

    def start_two(reader):
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(reader)
        start(reader)

    monkeypatch.setattr(reader_module.Reader, "start", start_two)
    backend = PinningBackend()
    with pytest.raises(RuntimeError, match="can't start new thread"):
        Rig(checkpoint, backend=backend)
    assert len(started) == 2
    assert not any(reader.is_alive() for reader in started)
    assert not backend.pinned


def test_forget_leaves_nothing_under_way(checkpoint, reading):
    rig = Rig(checkpoint)
    try:
        rig.prefetch(*[(e, e) for e in range(8)])
        rig.engine.forget()
        assert not rig.engine._tickets
        rig.fetch((11, 0))
        assert rig.use((11, 0))
    finally:
        rig.close()


class InterruptedOnce:
    """An event whose first wait is interrupted by Ctrl-C."""

    def __init__(self, event):
        self.event, self.waits = event, 0

    def wait(self, *timeout):
        self.waits += 1
        if self.waits == 1:
            raise KeyboardInterrupt
        return self.event.wait(*timeout)

    def __getattr__(self, name):
        return getattr(self.event, name)


def forgets_while_a_read_goes_on(rig, reads, block):
    """Whether `forget` returns although a read is still under way."""
    forgetting = threading.Thread(target=rig.engine.forget)
    forgetting.start()
    forgetting.join(0.3)
    early = not forgetting.is_alive()
    reads.gates[block].set()
    forgetting.join(20)
    return early


def test_forget_waits_for_a_read_whose_wait_was_interrupted(checkpoint):
    reads = GatedReads()
    reads.hold(start_of(checkpoint, 0))
    (block,) = reads.gates
    rig = Rig(checkpoint, read_at=reads)
    try:
        rig.fetch((0, 3))
        assert reads.started[block].wait(20)
        ticket = rig.engine._tickets[3]
        ticket.issued = InterruptedOnce(ticket.issued)
        with pytest.raises(KeyboardInterrupt):
            rig.engine.ready(3)
        assert not forgets_while_a_read_goes_on(rig, reads, block)
        rig.fetch((9, 3))
        assert rig.use((9, 3))
    finally:
        rig.close()


def test_forget_waits_for_a_read_behind_which_another_was_queued(checkpoint):
    reads = GatedReads()
    for expert in range(4):
        reads.hold(start_of(checkpoint, expert))
    rig = Rig(checkpoint, read_at=reads)
    try:
        rig.fetch(*[(e, e) for e in range(4)])
        for started in reads.started.values():
            assert started.wait(20)
        rig.fetch((9, 3))  # queued: all readers are busy, one of them with this slot
        last = start_of(checkpoint, 3) // 4096
        for block in reads.gates.keys() - {last}:
            reads.gates[block].set()
        assert not forgets_while_a_read_goes_on(rig, reads, last)
        rig.fetch((11, 3))
        assert rig.use((11, 3))
    finally:
        rig.close()


def test_what_is_under_way_moves_with_its_slot(checkpoint):
    """Prefetches are read, and their copies have landed, before the slots are divided anew."""
    reads = GatedReads()
    for expert in (1, 2, 3):
        reads.hold(start_of(checkpoint, expert) // 4096 * 4096)
    rig = Rig(checkpoint, slots=4, read_at=reads)
    try:
        rig.prefetch((1, 0), (2, 1), (3, 2))
        threading.Timer(0.2, lambda: [gate.set() for gate in reads.gates.values()]).start()
        rig.engine.settle()
        rig.engine.prepare(NewSlots([LAYOUT] * 2, [], 0, KeptSlots({0: 2, 1: 0}, {})))()
        rig.backend.guard(rig.engine.writer)
        assert rig.sees(3, 0)
        assert rig.sees(1, 1)
        rig.fetch((7, 0))
        assert rig.use((7, 0), (1, 1))
    finally:
        rig.close()


def test_a_failed_prefetch_is_an_error_of_settling(checkpoint):
    def fails(*_):
        raise OSError(errno.EIO, "injected")

    rig = Rig(checkpoint, slots=4, read_at=fails)
    try:
        rig.prefetch((1, 0))
        with pytest.raises(TransferError, match="expert 1 of MoE layer 0"):
            rig.engine.settle()
    finally:
        rig.close()
