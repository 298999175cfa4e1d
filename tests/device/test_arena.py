import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from offmoe.device.arena import SlotArena
from offmoe.device.backend import CpuBackend
from offmoe.device.pages import map_pages
from offmoe.errors import OffmoeError
from offmoe.storage.layout import PARAM_ALIGNMENT, ExpertLayout

SMALL = ExpertLayout.of({"up": (torch.bfloat16, (5, 3)), "down": (torch.bfloat16, (3, 5))})
LARGE = ExpertLayout.of({"w": (torch.float32, (100, 7)), "bias": (torch.float32, (7,))})


class Allocator:
    """Aligned memory, and a record of what was asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, nbytes: int) -> torch.Tensor:
        self.asked.append(nbytes)
        return torch.frombuffer(map_pages(max(nbytes, 1)), dtype=torch.uint8)[:nbytes]


class TestSlotArena:
    def test_allocates_once_and_exactly_the_sum_of_its_slots(self) -> None:
        allocate = Allocator()
        arena = SlotArena(allocate, [SMALL, LARGE, SMALL])
        assert allocate.asked == [2 * SMALL.nbytes + LARGE.nbytes] == [arena.nbytes]
        assert len(arena) == 3
        assert [arena.bytes(i).numel() for i in range(3)] == [SMALL.nbytes, LARGE.nbytes, SMALL.nbytes]

    def test_slots_are_aligned_and_do_not_overlap(self) -> None:
        odd = ExpertLayout(SMALL.params, SMALL.nbytes - 200)  # a size that is no multiple of the alignment
        arena = SlotArena(Allocator(), [odd, SMALL, odd, LARGE])
        for i in range(4):
            assert arena.bytes(i).data_ptr() % PARAM_ALIGNMENT == 0
            arena.bytes(i).fill_(i)
        assert [arena.bytes(i).unique().tolist() for i in range(4)] == [[0], [1], [2], [3]]

    def test_views_show_the_slot(self) -> None:
        arena = SlotArena(Allocator(), [SMALL, SMALL])
        views = arena.views(1, SMALL)
        assert {name: (v.dtype, tuple(v.shape)) for name, v in views.items()} == {
            "up": (torch.bfloat16, (5, 3)),
            "down": (torch.bfloat16, (3, 5)),
        }
        arena.bytes(0).fill_(0)
        arena.bytes(1).fill_(0)
        views["down"].fill_(1.5)
        assert arena.views(1, SMALL)["down"].eq(1.5).all()
        assert not arena.bytes(0).any()

    def test_views_are_made_once_per_slot_and_equal_layout(self) -> None:
        arena = SlotArena(Allocator(), [LARGE, LARGE])
        again = ExpertLayout(SMALL.params, SMALL.nbytes)
        assert again is not SMALL
        assert arena.views(0, SMALL) is arena.views(0, SMALL)
        assert arena.views(0, again) is arena.views(0, SMALL)
        assert arena.views(1, again) is arena.views(1, SMALL)
        assert arena.views(0, SMALL) is not arena.views(1, SMALL)
        assert arena.views(0, LARGE) is not arena.views(0, SMALL)

    def test_views_survive_layouts_that_are_gone(self) -> None:
        arena = SlotArena(Allocator(), [LARGE])
        for size in range(1, 200):  # ids of dead objects are reused at once
            assert arena.views(0, ExpertLayout.of({"w": (torch.int8, (size,))}))["w"].shape == (size,)

    def test_layout_above_the_slot_is_our_bug(self) -> None:
        with pytest.raises(AssertionError):
            SlotArena(Allocator(), [SMALL]).views(0, LARGE)

    def test_unaligned_memory_is_our_bug(self) -> None:
        with pytest.raises(AssertionError, match="aligned"):
            SlotArena(lambda n: torch.frombuffer(map_pages(n + 64), dtype=torch.uint8)[64:], [SMALL])

    def test_no_slots(self) -> None:
        assert SlotArena(Allocator(), []).nbytes == 0


def test_a_closed_arena_holds_nothing_and_says_so() -> None:
    layout = ExpertLayout.of({"a": (torch.float32, (4, 8))})
    arena = SlotArena(CpuBackend().allocate, [layout] * 2)
    memory = StorageWeakRef(arena.memory.untyped_storage())
    view = arena.views(0, layout)["a"]
    arena.close()
    arena.close()
    with pytest.raises(OffmoeError, match="was closed"):
        arena.views(0, layout)
    assert not memory.expired()  # somebody still computes with it
    del view
    assert memory.expired()
