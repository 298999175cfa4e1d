"""The command line: `offmoe VERB ...`, the same as `python -m offmoe VERB ...`.

Each verb is the module of its name, with `parser()` and `run(args, out)`; the first line of its docstring is what
`offmoe --help` says. A new verb is a new module. No library is imported before the verb is known: `offmoe --help`
starts in under 0.3 s, and the verbs that only read traces never import torch. `main` turns every outcome into an exit
status and at most one line on stderr: 0; 2 for an option that cannot be used; 1 for any other error that a user can
meet; 130 after Ctrl-C. Only bugs of offmoe show a traceback.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path

from offmoe.cli.interrupt import STATUS as INTERRUPTED
from offmoe.cli.interrupt import CtrlC
from offmoe.errors import CapacityError, ConfigError, OffmoeError, out_of_memory


def _verbs() -> dict[str, str]:
    """What each verb does, by its name. The first lines of the modules say so; they are read here, not imported."""
    verbs = {}
    for module in sorted(Path(__file__).parent.glob("*.py")):
        first = module.read_text(encoding="utf-8").partition("\n")[0]
        if first.startswith(f'"""`offmoe {module.stem}'):
            verbs[module.stem] = first.partition("`: ")[2].rstrip(".")
    return verbs


VERBS = _verbs()

HELP = f"""usage: offmoe VERB [options]

Run Mixture-of-Experts models whose experts do not fit the device.

{"".join(f"  {verb:<10} {summary}{chr(10)}" for verb, summary in VERBS.items())}
Options of a verb: offmoe VERB --help. Version: offmoe --version.
Try: offmoe generate demo "Once upon a time"
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status. argv: without the program's name; None: the process's own."""
    ctrl_c = CtrlC(ends_process=argv is None)
    try:
        with ctrl_c:
            status = _run(list(sys.argv[1:] if argv is None else argv))
            _flush()
    except BaseException as error:
        if ctrl_c.pressed or isinstance(error, KeyboardInterrupt):
            status = INTERRUPTED
        elif isinstance(error, BrokenPipeError):
            status = 1  # the reader of stdout has closed it
        else:
            status = _complain(error)
    if ctrl_c.pressed:  # also if a library swallowed the KeyboardInterrupt
        status = INTERRUPTED
        _say("interrupted")
    _discard_unwritten()
    ctrl_c.end()
    return status


def _run(argv: list[str]) -> int:
    verb, rest = (argv[0], argv[1:]) if argv else ("", [])
    if verb in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if verb == "--version":
        from offmoe import __version__

        print(f"offmoe {__version__}")
        return 0
    available = ", ".join(VERBS)
    if not verb:
        raise ConfigError(f"no verb given; available: {available}. See 'offmoe --help'.")
    if verb.startswith("-"):
        raise ConfigError(
            f"unknown option {verb!r} before the verb; use 'offmoe VERB [options]' with one of: {available}."
        )
    if verb not in VERBS:
        from offmoe.text import did_you_mean

        raise ConfigError(f"unknown verb {verb!r}{did_you_mean(verb, VERBS)}; available: {available}.")
    from offmoe.cli.output import Output, logging_to_stderr

    module = import_module(f"offmoe.cli.{verb}")
    try:
        args = module.parser().parse_intermixed_args(rest)
    except SystemExit:  # argparse, after --help
        return 0
    args.words = argv
    out = Output(json=args.json)
    with logging_to_stderr(args.verbose):
        module.run(args, out)
    return 0


def _complain(error: BaseException) -> int:
    """Print one line for an error that a user can meet -> the exit status. A bug of offmoe is raised again."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        error = OffmoeError(f"cannot write: {error.strerror}; free space or send the output elsewhere.")
    if not isinstance(error, OffmoeError):
        if not out_of_memory(error):
            raise error
        reason = " ".join(str(error).split())[:200]
        error = CapacityError(
            f"out of memory ({reason or 'no details'}); lower --device-memory, --slots-per-layer or --max-context."
        )
    _say("error: " + " ".join(str(error).split()))
    return error.exit_status


def _say(line: str) -> None:
    with suppress(OSError):  # stderr is closed; the exit status still tells
        print(f"offmoe: {line}", file=sys.stderr, flush=True)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()


def _discard_unwritten() -> None:
    """Redirect broken streams, because Python would write again at shutdown, print an error and change the status."""
    try:
        _flush()
    except (OSError, ValueError):
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):  # closed, or no file at all: Python flushes nothing
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
