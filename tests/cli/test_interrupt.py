"""Ctrl-C at several moments: 130, in under two seconds, without a traceback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from offmoe.cli.interrupt import CtrlC

# The child starts with SIGINT as a terminal leaves it: a test run in the background would hand down "ignored".
LAUNCH = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.executable, sys.argv[1:])"


@contextmanager
def running(*argv: str) -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen(
        [sys.executable, "-c", LAUNCH, sys.executable, *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
    )
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def interrupt(child: subprocess.Popen[bytes]) -> tuple[int, float, str]:
    """Exit status, seconds from the signal to the end, and what stderr had after it."""
    child.send_signal(signal.SIGINT)
    started = time.monotonic()
    stderr = child.communicate(timeout=30)[1].decode(errors="replace")
    return child.returncode, time.monotonic() - started, stderr


def read_until(child: subprocess.Popen[bytes], found: Callable[[str], bool]) -> None:
    """Lines of stderr up to the first that is the one."""
    assert child.stderr is not None
    for line in child.stderr:
        if found(line.decode(errors="replace")):
            return
    pytest.fail("the child ended before that")


def check(outcome: tuple[int, float, str]) -> None:
    status, seconds, stderr = outcome
    assert status == 130, stderr
    assert seconds < 2.0
    assert "Traceback" not in stderr
    assert "offmoe: interrupted" in stderr


def generate(checkpoint: Path, *options: str) -> list[str]:
    argv = ["-m", "offmoe", "generate", str(checkpoint), "Once", "--device", "cpu", "--slots-per-layer", "3"]
    return [*argv, "--max-new-tokens", "500", *options]


def imported(module: str) -> Callable[[str], bool]:
    return lambda line: line.startswith("import time:") and line.rpartition("|")[2].strip() == module


def test_torch_is_never_interrupted_in_its_import(tmp_path: Path) -> None:
    """C++ code of torch's import calls Python: an exception there aborts the process, with a dump of the stack."""
    body = "import os, signal, time\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(5)\n"
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(f"{body}except BaseException:\n    os.abort()\n", encoding="utf-8")
    run = "import sys; from offmoe.cli import main; sys.path.insert(0, sys.argv.pop(1)); main()"
    with running("-c", run, str(tmp_path), "doctor") as child:
        stderr = child.communicate(timeout=30)[1].decode(errors="replace")
    assert (child.returncode, stderr) == (130, "offmoe: interrupted\n")


def test_while_importing(checkpoint: Path) -> None:
    with running("-X", "importtime", *generate(checkpoint)) as child:
        read_until(child, imported("torch._C"))
        check(interrupt(child))


def test_while_loading(checkpoint: Path) -> None:
    with running(*generate(checkpoint)) as child:
        read_until(child, lambda line: line.startswith("memory on cpu"))
        check(interrupt(child))


def test_while_generating(checkpoint: Path, tmp_path: Path) -> None:
    with running(*generate(checkpoint, "--trace", str(tmp_path / "t.npz"))) as child:
        assert child.stdout is not None
        assert child.stdout.read(1)
        check(interrupt(child))
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.slow
@pytest.mark.parametrize("imports", [0, 1, 10, 50, 100, 200, 400, 800, 1200, 1600, 2000, 2300])
def test_at_any_time(checkpoint: Path, imports: int) -> None:
    """So many imports after the command has started, which goes on importing while it loads.

    About 2,500 follow in all, the last of them when the text is done and there is nothing left to interrupt.
    """
    with running("-X", "importtime", *generate(checkpoint)) as child:
        read_until(child, imported("offmoe.cli"))
        more = iter(range(imports))
        read_until(child, lambda line: next(more, None) is None)
        status, seconds, stderr = interrupt(child)
        assert status == 130, stderr
        assert seconds < 2.0
        assert "Traceback" not in stderr


def python(code: str) -> list[str]:
    """A program that replaces what `simulate` does and runs the command as a process of its own."""
    return [
        "-c",
        f"import sys, offmoe.cli.simulate as verb\nsys.argv = ['offmoe', 'simulate', 't']\n{code}\n"
        "verb.run = run\nfrom offmoe.cli import main\nsys.exit(main())",
    ]


@pytest.mark.parametrize(
    "body",
    [
        "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)",  # minutes in C, with the lock released
        "while True: swallow()",
    ],
)
def test_code_that_does_not_come_back(body: str) -> None:
    """The watching thread ends the process."""
    code = (
        "import hashlib, time\n"
        "def swallow():\n"
        "    try: time.sleep(60)\n"
        "    except KeyboardInterrupt: pass\n"
        "def run(args, out):\n"
        "    out.note('waiting')\n"
        f"    {body}\n"
    )
    with running(*python(code)) as child:
        read_until(child, lambda line: line == "waiting\n")
        status, seconds, stderr = interrupt(child)
        assert status == 130
        assert seconds < 2.0
        assert "Traceback" not in stderr


def test_an_interrupt_that_arrives_as_another_error() -> None:
    code = (
        "def run(args, out):\n"
        "    import time\n"
        "    try: out.note('waiting'); time.sleep(60)\n"
        "    except KeyboardInterrupt: raise ImportError('numpy.core.multiarray failed to import')\n"
    )
    with running(*python(code)) as child:
        read_until(child, lambda line: line == "waiting\n")
        check(interrupt(child))


def test_pressing_again_while_it_ends() -> None:
    code = (
        "def run(args, out):\n"
        "    import time\n"
        "    try: out.note('waiting'); time.sleep(60)\n"
        "    finally: out.note('closing'); time.sleep(0.3); out.note('closed')\n"
    )
    with running(*python(code)) as child:
        read_until(child, lambda line: line == "waiting\n")
        child.send_signal(signal.SIGINT)
        read_until(child, lambda line: line == "closing\n")
        outcome = interrupt(child)
        check(outcome)
        assert "closed" in outcome[2]


def test_ignored_signals_stay_ignored() -> None:
    code = (
        "def run(args, out):\n    import os, signal\n    os.kill(os.getpid(), signal.SIGINT)\n    out.json({'a': 1})\n"
    )
    ignore = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); os.execv(sys.executable, sys.argv[1:])"
    )
    argv = python(code)
    argv[1] = argv[1].replace("'simulate', 't'", "'simulate', 't', '--json'")
    done = subprocess.run([sys.executable, "-c", ignore, sys.executable, *argv], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"a": 1}


def test_the_guard_leaves_nothing_behind() -> None:
    before = (signal.getsignal(signal.SIGINT), set(threading.enumerate()), len(os.listdir("/proc/self/fd")))
    for _ in range(3):
        with CtrlC(ends_process=False) as guard:
            assert not guard.pressed
    assert (signal.getsignal(signal.SIGINT), set(threading.enumerate()), len(os.listdir("/proc/self/fd"))) == before


def test_another_thread_is_not_guarded() -> None:
    found: list[bool] = []

    def use() -> None:
        with CtrlC(ends_process=True) as guard:
            found.append(guard.pressed)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert found == [False]


def test_a_caller_in_the_same_process_lives_on() -> None:
    """`main([...])` within a program: interrupted, reported, and the program goes on undisturbed."""
    code = (
        "import os, signal, time, sys, offmoe.cli.simulate as verb\n"
        "from offmoe.cli import interrupt, main\n"
        "interrupt.GRACE_S = 0.2\n"
        "verb.run = lambda args, out: os.kill(os.getpid(), signal.SIGINT)\n"
        "hook = sys.unraisablehook\n"
        "assert main(['simulate', 't']) == main(['simulate', 't']) == 130\n"
        "time.sleep(0.5)\n"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler and sys.unraisablehook is hook\n"
        "print('alive')\n"
    )
    done = subprocess.run([sys.executable, "-c", LAUNCH, sys.executable, "-c", code], capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, b"alive\n"), done.stderr
