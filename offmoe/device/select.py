"""From the name of a device to its backend.

Moves: nothing.
Bound: nothing; a device is initialized when it is first asked for.
Must never: choose another device than the one that was named.
"""

from __future__ import annotations

import torch

from offmoe.device.accelerator import AcceleratorBackend, DeviceKind
from offmoe.device.backend import Backend, CpuBackend
from offmoe.device.cuda import CudaKind
from offmoe.errors import ConfigError

KINDS: dict[str, DeviceKind] = {kind.name: kind for kind in (CudaKind(),)}
"""Kinds of accelerators, by torch's name."""


def select_backend(device: str | None) -> Backend:
    """The backend for a device name.

    Args:
        device: "cpu", "cuda" or "cuda:N". None chooses CUDA if torch finds a device, else the CPU.

    Raises:
        ConfigError: The name is unknown, or torch finds no such device.
    """
    if device is None:
        device = "cuda" if KINDS["cuda"].count() else "cpu"
    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"device={device!r} is unknown. Use 'cpu', 'cuda' or 'cuda:N'.") from None
    if wanted.type == "cpu":
        return CpuBackend()
    kind = KINDS.get(wanted.type)
    if kind is None:
        raise ConfigError(f"device={device!r} is not supported. Use 'cpu', 'cuda' or 'cuda:N'.")
    count, name = kind.count(), kind.name.upper()
    if not count:
        raise ConfigError(
            f"device={device!r}: torch finds no {name} device here. Use device='cpu' or install a {name} build."
        )
    if wanted.index is not None and wanted.index >= count:
        raise ConfigError(f"device={device!r}: there are {count} {name} devices, counted from 0.")
    return AcceleratorBackend(kind, wanted)
