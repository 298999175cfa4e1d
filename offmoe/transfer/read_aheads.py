"""Experts that are read before anything demands them: they stay in staging until a fetch adopts them.

Moves: nothing. Readers carry the tickets out.
Bound: some microseconds per access.
Must never: go on with a read-ahead that the next access did not fetch.
"""

from __future__ import annotations

from collections.abc import Sequence

from offmoe.transfer.queue import TicketQueue
from offmoe.transfer.ticket import NEXT, NO_SLOT, Ticket
from offmoe.types import ExpertKey, Fetch


class ReadAheads:
    """The read-aheads of the last access, for the next one to adopt; for the thread that computes."""

    def __init__(self, queue: TicketQueue) -> None:
        self._queue = queue
        self._tickets: dict[ExpertKey, Ticket] = {}

    def replace(self, keys: Sequence[ExpertKey]) -> None:
        """Cancel the read-aheads that no fetch has adopted, and begin to read these experts, behind everything else."""
        if not keys and not self._tickets:
            return
        with self._queue.lock:
            for ticket in self._tickets.values():
                self._queue.drop(ticket)
            self._tickets = {key: self._queue.push(Ticket(Fetch(key, NO_SLOT, None), NEXT)) for key in keys}

    def adopt(self, ticket: Ticket) -> Ticket | None:
        """Turn the read-ahead of a new ticket's expert into that ticket, for `TicketQueue.resume`. The lock is held.

        Returns:
            The read-ahead; None if it has not begun, failed or was cancelled. The expert is read like any other then.
        """
        adopted = self._tickets.pop(ticket.fetch.key, None)
        if adopted is None or adopted.issued.is_set():
            return None
        if self._queue.is_waiting(adopted):
            self._queue.remove(adopted)
            return None
        adopted.fetch, adopted.lands_after = ticket.fetch, ticket.lands_after
        adopted.turn, adopted.superseded = ticket.turn, ticket.superseded
        return adopted

    def forget(self) -> None:
        """Drop the books. The queue forgets the tickets."""
        self._tickets.clear()
