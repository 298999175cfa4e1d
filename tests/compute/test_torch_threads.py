"""One thread of torch for a few tokens or beside kernels, and the former number afterwards."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from offmoe.compute.torch_threads import TorchThreads, kernels_alone


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_the_former_number_comes_back() -> None:
    with TorchThreads().one():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 3


def test_it_comes_back_after_an_error() -> None:
    with pytest.raises(KeyError), TorchThreads().one():
        raise KeyError
    assert torch.get_num_threads() == 3


def test_passes_that_take_turns() -> None:
    threads = TorchThreads()
    first, second = threads.one(), threads.one()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.get_num_threads() == 1
    second.__exit__(None, None, None)
    assert torch.get_num_threads() == 3


def test_one_thread_stays_one() -> None:
    torch.set_num_threads(1)
    with TorchThreads().one():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 1


def test_beside_kernels() -> None:
    with kernels_alone():
        assert torch.get_num_threads() == 1
        with kernels_alone():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 3
    with pytest.raises(KeyError), kernels_alone():
        raise KeyError
    assert torch.get_num_threads() == 3
