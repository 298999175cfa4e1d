"""Writes docs/options.md from the docstring of `OffloadConfig` and docs/cli.md from the parsers of the command line.

python tools/reference.py           write both pages
python tools/reference.py --check   exit with status 1 if a page is not current
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from offmoe.cli import VERBS  # noqa: E402
from offmoe.cli.option_docs import flag, option_docs  # noqa: E402
from offmoe.config import OffloadConfig  # noqa: E402

DOCS = ROOT / "docs"
NOTE = "<!-- Written by tools/reference.py; do not edit. -->"
ON_COMMAND_LINE = (
    *("device", "device_memory", "host_memory", "max_context", "prefill_chunk", "experts", "exactness", "activations"),
    *("slots_per_layer", "eviction", "scope", "prefetch", "on_miss", "lag", "cuda_graphs", "profile", "state"),
)
INTERNAL = ("miss_costs", "warm_counts")
HELP = ("-h", "--help")


def options_page() -> str:
    """docs/options.md: every option of `from_pretrained` and `OffloadConfig`."""
    docs, types = option_docs(), {f.name: str(f.type) for f in fields(OffloadConfig)}
    parts = [
        NOTE,
        "# Options",
        "The keyword arguments of `offmoe.from_pretrained`, the fields of `offmoe.OffloadConfig` and the options of "
        "the [command line](cli.md) are the same. An option that is given wins over the profile, and the profile over "
        "the default. A value that cannot be used raises `offmoe.ConfigError` before anything is downloaded, quantized "
        "or loaded, unless another error is named.",
        "```python\n"
        "import offmoe\n\n"
        'config = offmoe.OffloadConfig(device_memory="8GiB", eviction="lru")\n'
        'model = offmoe.from_pretrained("demo", config, max_context=512)  # a keyword wins over config\n'
        "```",
    ]
    for name, doc in docs.items():
        if name in INTERNAL:
            continue
        spelled = f", `{flag(name)}` on the command line" if name in ON_COMMAND_LINE else ""
        parts += [f"## {name}", f"`{types[name]}`{spelled}", f"{doc.meaning}."]
        parts += [
            f"- **{title}:** {text}." for title, text in (("Default", doc.default), ("Errors", doc.errors)) if text
        ]
    return "\n\n".join(parts).replace(".\n\n- **Errors", ".\n- **Errors") + "\n"


def cli_page() -> str:
    """docs/cli.md: every verb with its options."""
    parts = [
        NOTE,
        "# Command line",
        "`offmoe VERB [options]`, the same as `python -m offmoe VERB [options]`. `offmoe VERB --help` shows what this "
        "page says. The exit status is 0, 2 for an option that cannot be used, 1 for any other error, and 130 after "
        "Ctrl-C. The meaning of the options of the cache and of memory is on the page [Options](options.md) too.",
        table(("Verb", "What it does"), [(f"[`{verb}`](#{verb})", summary) for verb, summary in VERBS.items()]),
    ]
    for verb in VERBS:
        parser = import_module(f"offmoe.cli.{verb}").parser()
        parts += [f"## {verb}", f"`offmoe {verb} {usage(parser)}`", str(parser.description)]
        for group in parser._action_groups:
            actions = [action for action in group._group_actions if not set(HELP) & set(action.option_strings)]
            if actions:
                title = {"positional arguments": "Argument", "options": "Option"}.get(
                    str(group.title), str(group.title)
                )
                parts.append(
                    table((title[0].upper() + title[1:], "Meaning"), [(names(a), str(a.help)) for a in actions])
                )
    return "\n\n".join(parts).replace("%%", "%") + "\n"


def usage(parser: argparse.ArgumentParser) -> str:
    """The positional arguments of a verb."""
    words = [
        f"[{action.metavar}]" if action.nargs == "?" else str(action.metavar)
        for action in parser._actions
        if not action.option_strings
    ]
    return " ".join([*words, "[options]"])


def names(action: argparse.Action) -> str:
    """The spellings of an option, with the name of its value."""
    metavar = action.metavar if isinstance(action.metavar, str) else ""
    return f"`{', '.join(action.option_strings)} {metavar}`".replace(" `", "`").replace("` ", "`")


def table(head: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    """A table of two columns in Markdown."""
    lines = [head, ("---", "---"), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


PAGES = {"options.md": options_page, "cli.md": cli_page}


def main() -> int:
    check = sys.argv[1:] == ["--check"]
    stale = [name for name, page in PAGES.items() if not (DOCS / name).is_file() or (DOCS / name).read_text() != page()]
    for name in stale:
        if check:
            print(f"docs/{name} is not current; run: python tools/reference.py", file=sys.stderr)
        else:
            (DOCS / name).write_text(PAGES[name](), encoding="utf-8")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
