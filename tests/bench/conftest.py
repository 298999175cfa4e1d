from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers.utils import logging

from offmoe.bench.messages import OFFMOE, Task
from tests import tiny


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    """offmoe with a tiny Mixtral in bf16 and three slots per layer."""
    folder = tiny.save(tiny.build("mixtral", torch.bfloat16), tmp_path_factory.mktemp("bench") / "model")
    options = {"slots_per_layer": 3, "prefetch": 0, "max_context": 64}
    return Task(OFFMOE, str(folder), "cpu", "bfloat16", 64 << 20, options)


@pytest.fixture(autouse=True)
def _verbosity() -> Iterator[None]:
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)
