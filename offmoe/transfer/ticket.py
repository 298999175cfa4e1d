"""One movement of one expert, as it is queued and carried out, and the reads that several readers share.

Moves: nothing.
Bound: a lock per part of a few MB.
Must never: begin a part of a read that nobody needs any more.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from offmoe.errors import OffmoeError, TransferError
from offmoe.transfer.arrival import Arrival
from offmoe.types import Fetch

DEMAND, NEXT, LATER, FILL = 0, 1, 2, 3
"""Priorities of tickets; those that are no demands are speculative.

DEMAND: computation waits for the expert. NEXT: the next layer may want it. LATER: its layer has run since without it.
FILL: the background fill brings it, and nothing has asked for it.
"""
NO_SLOT = -1
"""`Fetch.slot` of a read-ahead, which has no slot yet."""


@dataclass(eq=False, slots=True)
class Ticket:
    """One fetch on its way."""

    fetch: Fetch
    """The expert, its slot and its RAM slot. A read-ahead gets them when a fetch adopts it."""
    priority: int
    order: int = 0
    """Counts the tickets of a queue; earlier ones go first within a priority."""
    lands_after: int = 0
    """Number of times that the slot must have been computed with before this expert may land there."""
    turn: threading.Event | None = None
    """Set when `lands_after` is reached; None if it was reached from the start."""
    superseded: Ticket | None = None
    """An unwanted ticket that was already copying into the slot when this one took the slot over (W4)."""
    after_in_ram: Ticket | None = None
    """The ticket that uses the same RAM slot before this one (W6)."""
    next: Ticket | None = None
    """The ticket that lands in the same slot after this expert has been computed with."""
    landing: bool = False
    """Whether the expert is being copied into its slot. The ticket can then no longer be sent elsewhere."""
    dropped: bool = False
    """Whether the slot has been given to another expert, or everything has been forgotten."""
    buffer: int | None = None
    """The staging buffer that the expert passes through; None before a reader takes the ticket, or without one."""
    arrival: Arrival = field(default_factory=Arrival)
    issued: threading.Event = field(default_factory=threading.Event)
    """Set when the copy into the slot has been queued on the copy stream, has failed, or will never be made."""
    error: BaseException | None = None
    filling: bool = False
    """Whether the background fill brings the expert, and no access has counted with it yet."""

    @classmethod
    def over(cls, fetch: Fetch, lands_after: int, error: BaseException | None = None) -> Ticket:
        """A demand that the computing thread has carried out itself, so that nobody ever waits for it.

        Args:
            fetch: What was copied.
            lands_after: As the ticket keeps it.
            error: What went wrong.
        """
        return cls(fetch, DEMAND, 0, lands_after, landing=True, arrival=_ENDED, issued=_ISSUED, error=error)

    def __lt__(self, other: Ticket) -> bool:
        return (self.priority, self.order) < (other.priority, other.order)

    @property
    def slot_is_free(self) -> bool:
        """Whether the expert could be copied into its slot without a wait for another ticket."""
        turned = self.turn is None or self.turn.is_set()
        return turned and (self.superseded is None or self.superseded.issued.is_set())

    @property
    def is_useless(self) -> bool:
        """Whether the rest of the read can be skipped.

        A dropped ticket still fills its RAM slot, if it has one; but not for the background fill, because nothing
        counts with that slot yet.
        """
        return self.dropped and (self.filling or self.fetch.host is None)

    def check(self) -> None:
        """Raise the error that ended the ticket, if one did, with the expert in its message.

        Raises:
            OffmoeError: The same error; a TransferError for one that is not ours.
        """
        if self.error is None:
            return
        which = f"expert {self.fetch.key.expert} of MoE layer {self.fetch.key.layer}"
        if isinstance(self.error, OffmoeError):
            raise type(self.error)(f"{which}: {self.error}") from self.error
        raise TransferError(f"{which} could not be loaded: {self.error!r}") from self.error

    def drop(self) -> None:
        """Keep the expert out of its slot, and release a reader that waits for the slot's turn."""
        self.dropped = True
        if self.turn is not None:
            self.turn.set()


_ISSUED, _ENDED = threading.Event(), Arrival()
"""Those of every ticket that is over from the start; nothing changes them. To make them takes as long as a copy."""
_ISSUED.set()
_ENDED.end()


class SharedRead:
    """A read of one expert that several readers carry out, part by part."""

    def __init__(self, ticket: Ticket, num_parts: int, read: Callable[[int], None]) -> None:
        """read(part): reads one part, in the calling thread."""
        self.ticket = ticket
        self._read, self._num_parts = read, num_parts
        self._num_begun = self._num_ended = 0
        self._changed = threading.Condition()
        """Notified whenever a part has ended."""
        self._error: BaseException | None = None

    @property
    def is_begun(self) -> bool:
        """Whether each part has a reader, or needs none any more."""
        return self._num_begun == self._num_parts or self.ticket.is_useless

    def wants_reader(self, most: int) -> bool:
        """Whether another reader should help. A speculative read has at most `most`, because a read that is cancelled
        ends only when these have finished their parts.
        """
        if self.is_begun:
            return False
        return self.ticket.priority == DEMAND or self._num_begun - self._num_ended < most

    def help(self) -> bool:
        """Read one part; False if no part is left to begin."""
        with self._changed:
            if self.is_begun:
                return False
            part = self._num_begun
            self._num_begun += 1
        try:
            self._read(part)
        except BaseException as error:  # `finish` raises it
            with self._changed:
                self._error = self._error or error
                self._num_parts = self._num_begun  # so that no further part is begun
        with self._changed:
            self._num_ended += 1
            self._changed.notify_all()
        return True

    def finish(self) -> None:
        """Read the parts that are left and wait for the readers of the others; raises the first error of any part."""
        while self.help():
            pass
        with self._changed:
            self._changed.wait_for(lambda: self._num_ended == self._num_begun)
        if self._error is not None:
            raise self._error
