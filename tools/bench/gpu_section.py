"""Shared by the measurements of tools/gpu_check: a section's state, which outlives its process, and a stopwatch."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tools.bench.gpu_hooks import Hooks

MIB = 2**20
SPARE_BYTES = 2 * 10**9
"""Bytes on the disk that stay free."""
WRITE_BYTES_PER_S = 0.4e9
"""A speed that every disk reaches. It decides whether writing a model is worth starting."""


@dataclass
class Section:
    """The state of a section: its limits, its figures, and what it skipped.

    Args:
        name: of the section.
        device: as torch names it.
        tiny: whether sizes are those of the dry run.
        work: a folder for files and results.
        deadline: `time.monotonic()` by which it should be done.
        hooks: what the kind of device offers.
        out: a file that gets a line of JSON for every figure.
    """

    name: str
    device: str
    tiny: bool
    work: Path
    deadline: float
    hooks: Hooks
    out: Path
    found: dict[str, Any] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)

    def left(self) -> float:
        """Seconds until the section should be done."""
        return self.deadline - time.monotonic()

    def note(self, **figures: object) -> None:
        """Store figures at once: in the section's state and in the file of results, which outlive the process."""
        self.found.update(figures)
        with open(self.out, "a", encoding="utf-8") as out:
            out.write(json.dumps({"section": self.name, **figures}) + "\n")
        self.save()

    def skip(self, what: str) -> None:
        """Say that a part is not measured, and why."""
        print(f"  left out: {what}")
        self.skipped.append(what)
        self.save()

    def save(self, error: str | None = None) -> None:
        file = self.work / f"{self.name}.json"
        state = {"found": self.found, "skipped": self.skipped, "error": error}
        file.with_suffix(".part").write_text(json.dumps(state))
        os.replace(file.with_suffix(".part"), file)

    def wait(self) -> None:
        """Wait until the device is idle."""
        torch.accelerator.synchronize()


def copy_gb_s(section: Section, source: torch.Tensor, destination: torch.Tensor) -> float:
    """GB/s of copying uint8 [n] to the device; the best of some rounds."""
    repeats = max(1, min(20, 256 * MIB // source.numel()))

    def copies() -> None:
        for _ in range(repeats):
            destination.copy_(source, non_blocking=True)

    copies()
    return repeats * source.numel() / 1e9 / min(section.hooks.seconds(copies) for _ in range(3))


def reads_directly(folder: Path) -> bool:
    """Whether files in the work folder can be read without the page cache."""
    file = folder / "direct"
    file.write_bytes(bytes(4096))
    try:
        os.close(os.open(file, os.O_RDONLY | os.O_DIRECT))
    except (AttributeError, OSError):
        return False
    finally:
        file.unlink()
    return True
