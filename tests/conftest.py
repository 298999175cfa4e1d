"""Set-up of all tests."""

from __future__ import annotations

import pytest
import torch
import transformers
from hypothesis import settings

settings.register_profile("shared machine", deadline=None)  # how long an example takes says nothing here
settings.load_profile("shared machine")


@pytest.fixture(scope="session", autouse=True)
def _small_matrices_on_one_thread():
    """Tiny models are faster on one thread, and the machine may have little more."""
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
