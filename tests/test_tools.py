"""The set-up behind tools/offmoe and tools/test, run on a make-believe machine.

Nothing is installed and nothing is fetched. A fake python3 logs what it is asked for, makes a `.venv` whose python is
itself, and has a pip that fails where the test says so; the shell scripts, the state file, the lock and the exit status
are the real ones.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

FAKE_PYTHON = """#!/bin/bash
world={world}
echo "$*" | tr '\\n' ' ' >>"$world/calls"; echo >>"$world/calls"
case "$1 $2" in
"-m venv")
    mkdir -p "$3/bin" && ln -s "$world/bin/python3" "$3/bin/python"
    printf '#!/bin/bash\\necho "offmoe ran with:" "$@"\\nexit 7\\n' >"$3/bin/offmoe"
    chmod +x "$3/bin/offmoe" ;;
"-m pip")
    while read -r pattern; do
        case "$*" in $pattern) cat "$world/pip_says" 2>/dev/null; exit 1 ;; esac
    done <"$world/pip_fails"
    trap 'exit 1' INT # as pip does
    while [ -e "$world/pip_waits" ]; do touch "$world/pip_is_waiting"; sleep 0.02; done ;;
"-m pytest") shift 2; printf 'pytest in %s:' "$PWD"; printf ' <%s>' "$@"; echo; exit 5 ;;
"-c "*"ensurepip"*) [ ! -e "$world/no_ensurepip" ] ;;
"-c "*"transformers"*) [ ! -e "$world/broken_torch" ] ;;
"-c "*"realpath"*) echo "$world/bin/python3" ;;
*) exec {python} "$@" ;;
esac
"""


def executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


LAUNCH = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
"""The tests may run where Ctrl-C is ignored (a background job), and a shell cannot undo that for itself."""


class Machine:
    """A checkout that holds only the tools, on a machine whose python3, pip and nvidia-smi are scripts."""

    def __init__(self, folder: Path) -> None:
        self.world = folder / "world"
        self.checkout = folder / "a checkout"
        (self.world / "bin").mkdir(parents=True)
        self.checkout.mkdir()
        shutil.copytree(ROOT / "tools", self.checkout / "tools", ignore=shutil.ignore_patterns("__pycache__", "*.py"))
        shutil.copy(ROOT / "pyproject.toml", self.checkout)
        text = FAKE_PYTHON.replace("{world}", str(self.world)).replace("{python}", sys.executable)
        executable(self.world / "bin" / "python3", text)
        self.pip_fails()

    def pip_fails(self, *patterns: str, saying: str = "") -> None:
        (self.world / "pip_fails").write_text("".join(f"{p}\n" for p in patterns))
        (self.world / "pip_says").write_text(saying)

    def has(self, name: str) -> None:
        (self.world / name).touch()

    def has_gpu(self) -> None:
        executable(self.world / "bin" / "nvidia-smi", "#!/bin/bash\necho 'GPU 0: NVIDIA H100 (UUID: 0)'\n")

    def start(self, *command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", LAUNCH, str(self.checkout / "tools" / command[0]), *command[1:]],
            cwd=self.world,
            env={"PATH": f"{self.world / 'bin'}:{os.defpath}:/usr/bin:/bin"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*command)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def calls(self, kind: str) -> list[str]:
        """What the fake python3 was asked since the last look: the calls that start with `kind`, in order."""
        log = self.world / "calls"
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return [line.strip() for line in lines if line.startswith(kind)]

    def installs(self) -> list[str]:
        """What pip was asked to install since the last look, without its fixed options."""
        return [
            re.sub(r"^-m pip install (--(quiet|no-\w+|disable-[\w-]+) )+", "", c) for c in self.calls("-m pip install")
        ]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_the_commands_of_the_readme_are_executable() -> None:
    for name in ("tools/offmoe", "tools/test", ".ci/run"):
        assert os.access(ROOT / name, os.X_OK), name


def test_first_use_makes_the_environment_and_later_uses_only_run(machine: Machine) -> None:
    first = machine.run("offmoe", "generate", "demo", "two words")
    assert first.returncode == 7  # offmoe's own
    assert first.stdout == "offmoe ran with: generate demo two words\n"
    assert "first use" in first.stderr
    assert re.search(r"ready in \d+ s", first.stderr)
    assert machine.installs() == [
        "torch==2.13.0+cpu setuptools>=77",
        f"--no-build-isolation --editable {machine.checkout}",
    ]
    again = machine.run("offmoe")
    assert (again.returncode, again.stderr) == (7, "")
    assert machine.calls("") == []


def test_the_test_tools_are_added_to_what_is_there_and_serve_offmoe_too(machine: Machine) -> None:
    machine.run("offmoe")
    machine.calls("")
    assert machine.run("test").returncode == 5  # pytest's own
    assert machine.installs()[-1] == f"--no-build-isolation --editable {machine.checkout}[test]"
    machine.run("offmoe")
    assert machine.installs() == []


@pytest.mark.parametrize(
    ("gpu", "arguments", "passed_on"),
    [
        (False, [], "<-m> <not slow and not gpu> <-n> <2> <--dist> <worksteal>"),
        (True, [], "<-m> <not slow and not gpu> <-n> <2> <--dist> <worksteal>"),
        (False, ["--all"], "<-m> <not gpu> <-n> <0>"),
        (True, ["tests/a b.py", "--all", "-x"], "<-m> <> <-n> <0> <tests/a b.py> <-x>"),
    ],
)
def test_which_tests_run(machine: Machine, gpu: bool, arguments: list[str], passed_on: str) -> None:
    if gpu:
        machine.has_gpu()
    assert machine.run("test", *arguments).stdout == f"pytest in {machine.checkout}: {passed_on}\n"


def test_a_gpu_machine_gets_the_normal_torch(machine: Machine) -> None:
    machine.has_gpu()
    machine.run("offmoe")
    assert machine.installs()[0] == "torch>=2.10 setuptools>=77"


def test_without_a_cpu_build_at_hand_the_cpu_index_is_asked(machine: Machine) -> None:
    machine.pip_fails("*install*torch==2.13.0+cpu setuptools>=77")
    assert machine.run("offmoe").returncode == 7
    assert [c.split()[0:2] for c in machine.installs()[:2]] == [["torch==2.13.0+cpu", "setuptools>=77"]] * 2


def test_cuda_is_the_last_resort_and_said(machine: Machine) -> None:
    machine.pip_fails("*install*torch==2.13.0+cpu*", "*index versions*")
    done = machine.run("offmoe")
    assert done.returncode == 7
    assert "no CPU build of torch" in done.stderr
    assert machine.installs()[1:2] == ["torch==2.13.0 setuptools>=77"]


def test_without_a_network_nothing_else_is_tried(machine: Machine) -> None:
    machine.pip_fails("*install*", saying="NewConnectionError\nERROR: no torch (from versions: none)\n")
    failed = machine.run("offmoe")
    assert failed.returncode == 1
    assert "Check the network" in failed.stderr
    assert "CUDA" not in failed.stderr
    assert len(machine.installs()) == 1


@pytest.mark.parametrize(
    ("pip_says", "told"),
    [
        ("NewConnectionError: Name or service not known", "Check the network"),
        ("OSError: No space left on device", "the disk is full"),
        ("ERROR: ResolutionImpossible", "see above"),
    ],
)
def test_a_failed_installation_says_why_and_is_begun_anew(machine: Machine, pip_says: str, told: str) -> None:
    noise = "WARNING: Location 'file:///x/' is ignored: it is neither a file nor a directory."
    machine.pip_fails("*--editable*", saying=f"{noise}\n{pip_says}\n")
    failed = machine.run("offmoe")
    assert (failed.returncode, failed.stdout) == (1, "")
    assert pip_says in failed.stderr
    assert told in failed.stderr
    assert noise not in failed.stderr
    machine.pip_fails()
    machine.calls("")
    (machine.checkout / ".venv" / "half a package").touch()
    assert machine.run("offmoe").returncode == 7
    assert not (machine.checkout / ".venv" / "half a package").exists()


def test_libraries_that_do_not_start_leave_no_environment(machine: Machine) -> None:
    machine.has("broken_torch")
    for _ in range(2):
        failed = machine.run("offmoe")
        assert failed.returncode == 1
        assert "does not start" in failed.stderr


def test_a_changed_pyproject_updates_in_place(machine: Machine) -> None:
    machine.run("test")
    machine.calls("")
    (machine.checkout / ".venv" / "kept").touch()
    with (machine.checkout / "pyproject.toml").open("a") as file:
        file.write("\n# changed\n")
    done = machine.run("offmoe")
    assert "updating" in done.stderr
    assert machine.installs()[-1].endswith("[test]")  # the tests' tools are not forgotten
    assert (machine.checkout / ".venv" / "kept").exists()


def test_a_moved_checkout_gets_a_new_environment(machine: Machine) -> None:
    machine.run("offmoe")
    (machine.checkout / ".venv" / "of the old place").touch()
    machine.checkout = machine.checkout.rename(machine.checkout.with_name("moved"))
    assert machine.run("offmoe").returncode == 7
    assert not (machine.checkout / ".venv" / "of the old place").exists()


def test_a_python_that_went_away_gets_a_new_environment(machine: Machine) -> None:
    machine.run("offmoe")
    (machine.checkout / ".venv" / "bin" / "python").unlink()
    assert machine.run("offmoe").returncode == 7
    assert (machine.checkout / ".venv" / "bin" / "python").exists()


def test_old_python_and_missing_venv_are_named(machine: Machine) -> None:
    machine.has("no_ensurepip")
    missing = machine.run("offmoe")
    assert missing.returncode == 1
    assert re.search(r"apt install python3\.\d+-venv", missing.stderr)
    for name in ("python3", "python3.10", "python3.11", "python3.12", "python3.13", "python3.14"):
        executable(machine.world / "bin" / name, '#!/bin/bash\n[ "$1" = --version ] && echo Python 3.9.2\n')
    old = machine.run("offmoe")
    assert old.returncode == 1
    assert "needs Python 3.10 or newer, found Python 3.9.2" in old.stderr
    assert not (machine.checkout / ".venv").exists()


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.01)  # a file made by another process; there is no event to wait on


def test_ctrl_c_ends_the_first_use_and_the_next_one_repairs(machine: Machine) -> None:
    machine.has("pip_waits")
    process = machine.start("offmoe")
    wait_for(machine.world / "pip_is_waiting")
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=10)
    assert (process.returncode, out) == (130, "")
    (machine.world / "pip_waits").unlink()
    assert machine.run("offmoe").returncode == 7


@pytest.mark.parametrize("first_dies", [False, True])
def test_two_first_uses_at_once_take_turns(machine: Machine, first_dies: bool) -> None:
    machine.has("pip_waits")
    first = machine.start("offmoe")
    wait_for(machine.world / "pip_is_waiting")
    second = machine.start("offmoe")
    assert second.stderr is not None
    assert "waiting" in second.stderr.readline()
    if first_dies:
        os.killpg(first.pid, signal.SIGKILL)
    (machine.world / "pip_waits").unlink()
    first.communicate(timeout=60)
    second.communicate(timeout=60)
    assert (first.returncode, second.returncode) == (-signal.SIGKILL if first_dies else 7, 7)
    assert len(machine.calls("-m venv")) == 1 + first_dies  # ruins are rebuilt, a finished environment is used
