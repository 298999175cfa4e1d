"""Machines by name: what a name means, what it costs to misspell it, and arithmetic that data sheets can be held to."""

from __future__ import annotations

import pytest
import torch

from offmoe.device.machines import DISKS, GIB, GPUS, Machine, machine_parts, parse_machine, ram_auto_bytes, ram_for_auto
from offmoe.device.planned import PlannedBackend
from offmoe.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "gb_s"),
    [
        ("rtx-3060-12g", 360),
        ("rtx-3090-24g", 936),
        ("rtx-4060-8g", 272),
        ("rtx-4090-24g", 1008),
        ("rtx-5090-32g", 1792),
        ("t4-16g", 320),
        ("a100-40g", 1555),
        ("a100-80g", 1935),
        ("h100-80g", 3350),
        ("h200-141g", 4800),
    ],
)
def test_bandwidths_follow_from_bus_and_data_rate(name: str, gb_s: float) -> None:
    """The makers state both the bandwidth and what it follows from."""
    assert GPUS[name].memory_gb_s == pytest.approx(gb_s, rel=2e-3)


def test_names_hold_the_memory() -> None:
    assert all(name.endswith(f"-{gpu.memory_gib}g") for name, gpu in GPUS.items())


def test_links_are_those_of_the_standard() -> None:
    assert GPUS["rtx-3060-12g"].link_gb_s == pytest.approx(31.5, rel=1e-3)
    assert GPUS["rtx-4060-8g"].link_gb_s == pytest.approx(15.75, rel=1e-3)
    assert DISKS["nvme-gen3"] == pytest.approx(3.94, rel=1e-3)
    assert parse_machine("ddr4-3200").ram.gb_s == pytest.approx(51.2)
    assert parse_machine("ddr5-4800x8").ram.gb_s == pytest.approx(307.2)


def test_a_name_with_all_parts() -> None:
    machine = parse_machine("RTX 3060 12GB + DDR5-6000-64GiB + nvme_gen4")
    assert machine.name == "rtx-3060-12g+ddr5-6000-64g+nvme-gen4"
    assert machine.assumed == ()
    assert machine.link_gb_s == pytest.approx(24, rel=0.01)
    assert machine.device_gb_s == pytest.approx(270)
    assert machine.device_free_bytes < 12 * GIB
    assert machine.ram_free_bytes < 64 * GIB


def test_what_a_name_leaves_out_is_assumed_and_said() -> None:
    machine = parse_machine("rtx-3060")
    assert machine.name == "rtx-3060-12g+ddr4-3200-32g+nvme-gen3"
    assert machine.assumed == ("ddr4-3200 RAM", "32 GiB of RAM", "a disk of kind nvme-gen3")
    assert parse_machine("rtx-3060+ddr4-3200-64g").assumed == ("a disk of kind nvme-gen3",)
    assert parse_machine("hdd").name == "ddr4-3200-32g+hdd"


def test_every_part_is_a_name() -> None:
    for part in machine_parts():
        assert isinstance(parse_machine(part), Machine)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("rtx-3061-12g", r"'rtx-3061-12g' is no known part\. Did you mean rtx-3060-12g"),
        ("rtx-3060+ddr4-3201", "'ddr4-3201' is no known part. Did you mean ddr4-3200"),
        ("quantum", "Known: rtx-2060-6g, .*ddr5-8000, hdd, .*nvme-gen5"),
        ("rtx-3080", "exists with several memories. Use rtx-3080-10g or rtx-3080-12g"),
        ("rtx-3060+rtx-4090", "two parts of one kind, GPU"),
        ("nvme-gen3+hdd", "two parts of one kind, disk"),
        ("ddr4-3200x0", "is no known part"),
        ("ddr4-3200-0g", "is no known part"),
        ("", "is no known part"),
    ],
)
def test_wrong_names_are_refused_with_what_is_close(name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_machine(name)


def test_ram_for_what_was_asked() -> None:
    machine = parse_machine("rtx-3060").with_ram_for(48 * GIB)
    assert PlannedBackend(machine).host_free_bytes() >= 48 * GIB
    assert "32 GiB of RAM" not in machine.assumed
    assert machine.name.startswith("rtx-3060-12g+ddr4-3200-71g")


def test_a_planned_device_knows_its_memory_and_runs_nothing() -> None:
    gpu, cpu = PlannedBackend(parse_machine("rtx-3060")), PlannedBackend(parse_machine("ddr4-3200-64g"))
    assert (gpu.unified_memory, gpu.has_device_kernels, gpu.device.type) == (False, True, "cuda")
    assert (cpu.unified_memory, cpu.has_device_kernels, cpu.device.type) == (True, False, "cpu")
    assert (cpu.free_bytes(), cpu.host_free_bytes()) == (62 * GIB, 0)
    for run in (lambda: gpu.compute, gpu.event, lambda: gpu.pin(0, 1), lambda: gpu.unpin(0)):
        with pytest.raises(AssertionError):
            run()
    assert torch.device("cpu") == cpu.device


def test_auto_leaves_a_tenth_of_the_ram_or_a_gibibyte_but_at_most_three_tenths() -> None:
    assert ram_auto_bytes(100 * GIB) == 90 * GIB
    assert ram_auto_bytes(8 * GIB) == 7 * GIB
    assert ram_auto_bytes(2 * GIB) == 2 * GIB - int(0.6 * GIB)
    assert ram_auto_bytes(0) == 0
    for nbytes in (1, GIB, 3 * GIB, 30 * GIB):
        assert nbytes <= ram_auto_bytes(ram_for_auto(nbytes)) <= nbytes + 2
