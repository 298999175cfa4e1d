from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import offmoe as package
from offmoe.cli import VERBS, main, simulate
from offmoe.errors import CapacityError, ConfigError, OffmoeError, TraceError
from tests.cli.conftest import Outcome

Run = Callable[..., Outcome]


def test_help_lists_what_is_built(offmoe: Run) -> None:
    for option in ("--help", "-h"):
        outcome = offmoe(option)
        assert outcome.status == 0
        assert all(verb in outcome.out for verb in VERBS)


def test_every_module_of_a_verb_is_found_with_its_line_of_the_help() -> None:
    modules = Path(simulate.__file__).parent.glob("*.py")
    assert set(VERBS) == {module.stem for module in modules if "def run(args" in module.read_text(encoding="utf-8")}
    assert all(len(summary.split()) > 3 and not set(summary) & set('`"') for summary in VERBS.values())


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_verbs(offmoe: Run, verb: str) -> None:
    outcome = offmoe(verb, "--help")
    assert outcome.status == 0
    assert outcome.out.startswith(f"usage: offmoe {verb}")


def test_version_is_that_of_the_package(offmoe: Run) -> None:
    assert offmoe("--version").out == f"offmoe {package.__version__}\n"
    project = Path(__file__).parents[2] / "pyproject.toml"
    assert 'version = { attr = "offmoe.__version__" }' in project.read_text(), "there is one version"
    assert f'__version__ = "{package.__version__}"' in Path(package.__file__).read_text()


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "available: batch, bench, calibrate"),
        (["generat", "x"], "did you mean 'generate'?"),
        (["--json", "generate"], "'--json' before the verb"),
        (["generate", "m", "p", "--slots", "3"], "did you mean '--slots-per-layer'?"),
        (["generate", "m", "p", "--evicton=lru"], "did you mean '--eviction'?"),
        (["inspect"], "MODEL"),
        (["generate", "m", "p", "--slots-per-layer", "two"], "--slots-per-layer: 'two' is not a number"),
        (["generate", "m", "p", "--slots-per-layer", "0"], "slots_per_layer=0 must be a positive"),
        (["generate", "m", "p", "--prefetch", "-1"], "prefetch='-1' must be"),
        (["generate", "m", "p", "--prefetch", "many"], "must be 'auto' or a number"),
        (["generate", "m", "p", "--eviction", "fifo"], "aged-lfu, lru"),
        (["generate", "m", "p", "--eviction", "static"], "use a profile"),
        (["generate", "m", "p", "--experts", "int3"], "native, int8, int4"),
        (["generate", "m", "p", "--device-memory", "much"], "'10GiB'"),
        (["generate", "m", "p", "--host-memory", "some"], "not a size"),
        (["generate", "m", "p", "--max-context", "0"], "--max-context: '0' is not a positive whole number"),
        (["generate", "m", "p", "--profile", "/no/p.json"], "profile='/no/p.json': cannot be read"),
        (["simulate", "t", "--profile", "/no/p.json"], "cannot be read"),
        (["generate", "m"], "PROMPT is missing"),
        (["generate", "m", ""], "PROMPT is empty"),
        (["generate", "m", "p", "--prompt-file", "f"], "both given"),
        (["generate", "m", "--prompt-file", "/no/such/file"], "No such file"),
        (["generate", "m", "a\udcffb"], "not valid UTF-8"),
        (["generate", "m", "p", "--temperature", "-1"], "--temperature -1.0"),
        (["generate", "m", "p", "--temperature", "nan"], "--temperature nan"),
        (["generate", "m", "p", "--temperature", "1e-300"], "use 0 (greedy)"),
        (["generate", "m", "p", "--top-k", "5"], "give --temperature T as well"),
        (["generate", "m", "p", "--temperature", "1", "--top-p", "2"], "--top-p 2.0"),
        (["generate", "m", "p", "--seed", "-3"], "--seed -3"),
    ],
)
def test_wrong_options(offmoe: Run, argv: list[str], says: str) -> None:
    outcome = offmoe(*argv)
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err.startswith("offmoe: error: ")
    assert outcome.err.count("\n") == 1
    assert says in outcome.err


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (ConfigError("wrong\noption"), 2, "offmoe: error: wrong option\n"),
        (TraceError("damaged"), 1, "offmoe: error: damaged\n"),
        (CapacityError("full"), 1, "offmoe: error: full\n"),
        (MemoryError(), 1, "offmoe: error: out of memory (no details); lower --device-memory"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"),
            1,
            "offmoe: error: out of memory (Default",
        ),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory"), 1, "offmoe: error: out of memory (CUDA"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "offmoe: error: cannot write: No space left on device"),
        (KeyboardInterrupt(), 130, ""),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, ""),
    ],
)
def test_exit_status_of_errors(
    offmoe: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, says: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(simulate, "run", fail)
    outcome = offmoe("simulate", "trace.npz")
    assert (outcome.status, outcome.out) == (status, "")
    assert outcome.err.startswith(says)
    assert "Traceback" not in outcome.err


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(simulate, "run", fail)
    with pytest.raises(ZeroDivisionError, match="ours"):
        main(["simulate", "trace.npz"])


def test_public_errors_have_their_status() -> None:
    assert (OffmoeError.exit_status, ConfigError.exit_status) == (1, 2)


def test_module_and_command_are_the_same() -> None:
    done = subprocess.run([sys.executable, "-m", "offmoe", "chatt"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert "unknown verb 'chatt' (did you mean 'chat'?)" in done.stderr


def test_lazy_names_are_the_real_ones() -> None:
    code = (
        "import offmoe, sys, json; before = sorted({'numpy', 'torch', 'transformers'} & set(sys.modules));"
        "config = offmoe.OffloadConfig(prefetch=0); stats = offmoe.CacheStats();"
        "print(json.dumps([before, config.prefetch, stats.hit_rate, 'torch' in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout) == [[], 0, 0.0, False]
