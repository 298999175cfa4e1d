"""Every wait that keeps weights and rows right, as one method each.

Moves: nothing.
Bound: a wait ends with the work that it names.
Must never: be left out. tests/transfer replaces one method at a time by nothing and shows what becomes wrong.

The engine (engine.py) calls W1 in the computing thread. Readers (reader.py) call W2 to W7; where the computing thread
queues a copy itself (ram_slots.py), it calls W2. The exchange of rows (host_exchange.py) calls W8 and W9 in the
computing thread.

Two waits need no method, because the order of calls cannot be changed without them: `TransferEngine.ready` waits until
a copy has been queued, since its event marks nothing before; an expert that is computed with while it arrives is
waited for piece by piece (`Arriving.wait` and `wait_for`), which only devices with unified memory allow.
"""

from __future__ import annotations

import threading

from offmoe.device.backend import Event, Stream


class Waits:
    """The waits of one model. It has no state, so one object may serve many models."""

    def slot_landed(self, compute: Stream, landed: Event) -> None:
        """W1: computation waits for the copy into its slot; else it multiplies by weights that have not arrived."""
        compute.wait(landed)

    def slot_last_read(self, copies: Stream, last_read: Event) -> None:
        """W2: a copy into a slot waits for the last computation with it; else the device reads a mix of two experts."""
        copies.wait(last_read)

    def staging_copied(self, copied: Event) -> None:
        """W3: a read into a staging buffer waits for the last copy out of it; else that copy takes the new bytes."""
        copied.synchronize()

    def superseded_issued(self, issued: threading.Event) -> None:
        """W4: a fetch waits for the copy of the fetch that lost the slot to it; else the older expert may land last."""
        issued.wait()

    def slot_turn(self, turn: threading.Event) -> None:
        """W5: a fetch of a later wave waits until earlier waves have computed; else W2 has nothing to wait for yet."""
        turn.wait()

    def host_slot_issued(self, issued: threading.Event) -> None:
        """W6: a fetch waits for the previous ticket of its RAM slot; else it copies bytes that have not been read."""
        issued.wait()

    def host_slot_copied(self, copied: Event) -> None:
        """W7: a read into a RAM slot waits for the last copy out of it; else that copy takes the new bytes."""
        copied.synchronize()

    def rows_on_host(self, copied: Event) -> None:
        """W8: the host waits for the rows that it computes with; else it takes the buffer's earlier content."""
        copied.synchronize()

    def rows_on_device(self, compute: Stream, copied: Event) -> None:
        """W9: computation waits for the rows that the host computed; else it sums whatever the memory held."""
        compute.wait(copied)


WAITS = Waits()
"""What every model uses outside of tests."""
