"""Pages that are read into: aligned, huge where the kernel has them, and of this process alone."""

import mmap
import os

import pytest
import torch

from offmoe.device import pages
from offmoe.device.backend import CpuBackend
from offmoe.device.pages import HUGE_PAGE_BYTES, empty_tensor, map_pages
from offmoe.errors import CapacityError


class TestMapPages:
    def test_aligned_and_zero(self) -> None:
        memory = map_pages(3 * HUGE_PAGE_BYTES + 1)
        tensor = torch.frombuffer(memory, dtype=torch.uint8)
        assert tensor.numel() == 3 * HUGE_PAGE_BYTES + 1
        assert tensor.data_ptr() % HUGE_PAGE_BYTES == 0
        assert not tensor.any()

    @pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="looks into /proc")
    def test_touched_huge_and_not_inherited(self) -> None:
        memory = map_pages(2 * HUGE_PAGE_BYTES)
        address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
        region = smaps_region(address)
        assert int(region["Rss"].split()[0]) * 1024 >= 2 * HUGE_PAGE_BYTES
        assert {"dc", "hg"} <= set(region["VmFlags"].split())  # dc: MADV_DONTFORK, hg: MADV_HUGEPAGE

    @pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="looks into /proc")
    def test_slots_take_memory_when_they_are_used(self) -> None:
        slots = CpuBackend().allocate(8 * HUGE_PAGE_BYTES)
        region = smaps_region(slots.data_ptr())
        assert int(region["Rss"].split()[0]) * 1024 < 8 * HUGE_PAGE_BYTES
        assert {"dc", "hg"} <= set(region["VmFlags"].split())
        with pytest.raises(CapacityError, match="Lower --slots-per-layer"):
            CpuBackend().allocate(2**62)

    def test_without_what_only_linux_has(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("MAP_PRIVATE", "MAP_ANONYMOUS", "MADV_HUGEPAGE", "MADV_DONTFORK"):
            monkeypatch.delattr(mmap, name)
        memory = map_pages(10_000)
        memory[:] = bytes([7]) * 10_000
        assert bytes(memory[-2:]) == b"\x07\x07"

    def test_advice_that_the_kernel_refuses_is_optional(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 10_000)  # EINVAL
        assert len(map_pages(4096)) == 4096

    def test_no_memory_is_a_capacity_error(self) -> None:
        with pytest.raises(CapacityError, match="lower --host-memory"):
            map_pages(2**62)


class TestEmptyTensor:
    @pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="looks into /proc")
    def test_huge_and_inherited(self) -> None:
        tensor = empty_tensor((8 * HUGE_PAGE_BYTES // 4, 2), torch.bfloat16)
        region = smaps_region(tensor.data_ptr() + HUGE_PAGE_BYTES)
        assert "hg" in region["VmFlags"].split()
        assert "dc" not in region["VmFlags"].split()

    @pytest.mark.parametrize("shape", [(), (0, 3), (5,), (3, HUGE_PAGE_BYTES + 7)])
    def test_is_as_any_tensor(self, shape: tuple[int, ...]) -> None:
        tensor = empty_tensor(shape, torch.float32)
        assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == (torch.Size(shape), torch.float32, True)
        assert tensor.untyped_storage().resizable()
        assert not tensor.zero_().any()

    def test_without_what_only_linux_has(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE")
        pages._advise.cache_clear()
        try:
            assert not empty_tensor((4, HUGE_PAGE_BYTES), torch.uint8).zero_().any()
        finally:
            pages._advise.cache_clear()


def smaps_region(address: int) -> dict[str, str]:
    """Fields of the mapping in /proc/self/smaps that holds the address."""
    inside, fields = False, {}
    with open("/proc/self/smaps") as lines:
        for line in lines:
            first = line.split()[0]
            if not first.endswith(":"):
                if inside:
                    break
                low, high = (int(end, 16) for end in first.split("-"))
                inside = low <= address < high
            elif inside:
                name, _, value = line.partition(":")
                fields[name] = value
    return fields
