"""A computation with an arriving expert waits for the parts that it needs, and for no others."""

from __future__ import annotations

import threading

from offmoe.transfer.arrival import Arrival, Arriving


def waiting_for(arrival: Arrival, parts) -> threading.Thread:
    thread = threading.Thread(target=arrival.wait, args=(parts,))
    thread.start()
    return thread


def test_parts_are_copied_in_the_order_in_which_they_were_read():
    arrival = Arrival()
    for part in (2, 0, 1):
        arrival.part_read(part)
    assert [arrival.take_part() for _ in range(4)] == [2, 0, 1, None]


def test_a_wait_ends_with_the_last_of_its_parts():
    arrival = Arrival()
    thread = waiting_for(arrival, [0, 2])
    arrival.part_landed(2)
    arrival.part_landed(1)
    thread.join(0.05)
    assert thread.is_alive()
    arrival.part_landed(0)
    thread.join(20)
    assert not thread.is_alive()
    assert arrival.take_waited_s() >= 0.05
    arrival.wait([0, 1, 2])
    assert arrival.take_waited_s() == 0


def test_a_wait_ends_when_no_more_parts_will_land():
    arrival = Arrival()
    thread = waiting_for(arrival, [0])
    arrival.end()
    thread.join(20)
    assert not thread.is_alive()
    arrival.wait([7])


def test_bytes_are_waited_for_by_the_parts_that_bring_them():
    arrival = Arrival()
    waits: list[set[int]] = []
    arrival.wait = lambda parts: waits.append(set(parts))
    arriving = Arriving(arrival, {"up": [(0, 10, 0), (10, 30, 1)], "down": [(0, 5, 1), (5, 40, 2)]})
    for name, start, end in (("up", 0, 10), ("up", 9, 11), ("up", 10, 12), ("down", 0, 40), ("bias", 0, 4)):
        arriving.wait(name, start, end)
    assert waits == [{0}, {0, 1}, {1}, {1, 2}, set()]


def test_bytes_are_given_in_whole_units_to_whoever_brings_their_last():
    arrival = Arrival()
    assert arrival.whole_units(0, 5, 25, 10) == (10, 20)
    assert arrival.whole_units(0, 25, 28, 10) == (30, 30)  # nothing: bytes 28 and 29 are missing
    assert arrival.whole_units(1, 28, 30, 10) == (30, 30)  # another segment's
    assert arrival.whole_units(0, 0, 5, 10) == (0, 10)
    assert arrival.whole_units(0, 28, 50, 10) == (20, 50)


def test_whole_parameters_are_waited_for_by_all_of_their_parts():
    arrival = Arrival()
    waits: list[set[int]] = []
    arrival.wait = lambda parts: waits.append(set(parts))
    Arriving(arrival, {"gate": [(0, 10, 0), (10, 30, 1)], "up": [(0, 5, 2)], "down": [(0, 9, 3)]}).wait_for(
        ("gate", "up")
    )
    assert waits == [{0, 1, 2}]
