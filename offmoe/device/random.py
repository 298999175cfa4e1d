"""torch's random numbers, handed from one user to the next."""

from __future__ import annotations

import torch


class RandomState:
    """Takes the state of torch's default generators, and puts one back.

    Args:
        device: The device whose generator counts, besides the CPU's.
    """

    def __init__(self, device: torch.device):
        self._device = device

    def take(self) -> list[torch.Tensor]:
        """The state now."""
        states = [torch.get_rng_state()]
        if self._device.type != "cpu":
            states.append(torch.get_device_module(self._device).get_rng_state(self._device))
        return states

    def put(self, states: list[torch.Tensor]) -> None:
        """Go on from a state that `take` gave."""
        torch.set_rng_state(states[0])
        if self._device.type != "cpu":
            torch.get_device_module(self._device).set_rng_state(states[1], self._device)
