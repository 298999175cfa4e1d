"""Set-up of all tests."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import settings

from tests import families_table

settings.register_profile("shared machine", deadline=None)  # how long an example takes says nothing here
settings.load_profile("shared machine")


@pytest.fixture(scope="session", autouse=True)
def _small_matrices_on_one_thread():
    """Tiny models are faster on one thread, and the machine may have little more."""
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()


@pytest.fixture(scope="session", autouse=True)
def _modules_are_no_garbage():
    """What is imported by now is not looked at again by the collector: 370,000 objects, a quarter of a second each."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def _child_processes_wait_asleep():
    """Commands that tests start leave the processors to others while their threads wait: as many threads, same bits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_WAIT_POLICY", "PASSIVE")
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_state_of_the_user(tmp_path_factory: pytest.TempPathFactory):
    """Commands that tests run neither read nor keep a state in the user's own cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


FOUND = pytest.StashKey[families_table.Found]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-families", action="store_true", help="write docs/families.md from what the tests find")
    parser.addoption("--llama-library", type=Path, help="folder with libllama and libggml*, to compare tokens with")
    parser.addoption("--openapi-seconds", type=float, default=60.0, help="seconds of the slow fuzz of the server's API")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FOUND] = families_table.Found()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A page is written from a complete run only: a family that failed must not fall out of it silently."""
    if session.config.getoption("--write-families") and exitstatus == pytest.ExitCode.OK:
        families_table.PATH.write_text(families_table.render(session.config.stash[FOUND]))


@pytest.fixture
def families_found(request: pytest.FixtureRequest) -> families_table.Found:
    """Where tests put what they found out about a family."""
    return request.config.stash[FOUND]
