"""The option descriptions: complete, the same in Python, on the command line and in the pages made from them."""

from __future__ import annotations

import inspect
from dataclasses import fields

import pytest

import offmoe
from offmoe.cli import VERBS
from offmoe.cli.option_docs import flag, help_text, option_docs
from offmoe.cli.options import Parser, add_cache, add_graphs, add_loading, add_state
from offmoe.config import OffloadConfig
from tools.reference import DOCS, INTERNAL, ON_COMMAND_LINE, PAGES


def test_every_option_is_described() -> None:
    docs = option_docs()
    assert list(docs) == [f.name for f in fields(OffloadConfig) if f.init]
    for name, doc in docs.items():
        assert len(doc.meaning.split()) > 3, name
        assert doc.default or name in INTERNAL, name


def test_the_command_line_says_what_python_says() -> None:
    parser = Parser("generate", "")
    add_loading(parser)
    add_cache(parser)
    add_state(parser)
    add_graphs(parser.add_argument_group("generating"))
    helps = {action.option_strings[0]: action.help for action in parser._actions if action.option_strings}
    assert {flag(name) for name in ON_COMMAND_LINE} <= set(helps)
    for name in ON_COMMAND_LINE:
        assert helps[flag(name)] == help_text(name)
    assert not set(ON_COMMAND_LINE) - set(inspect.signature(offmoe.from_pretrained).parameters)


def test_help_speaks_the_words_of_the_command_line() -> None:
    assert help_text("slots_per_layer").endswith("(default: as many as fit in --device-memory)")
    assert help_text("slots_per_layer", "the recorded run's").endswith("(default: the recorded run's)")
    assert "for --eviction aged-lfu" in help_text("half_life")
    assert "fetch = always load into a slot" in help_text("on_miss")


@pytest.mark.parametrize("page", PAGES)
def test_pages_are_current(page: str) -> None:
    assert (DOCS / page).read_text(encoding="utf-8") == PAGES[page](), "run: python tools/reference.py"


def test_pages_name_every_verb_and_option() -> None:
    options, verbs = PAGES["options.md"](), PAGES["cli.md"]()
    assert all(f"## {f.name}\n" in options for f in fields(OffloadConfig) if f.init and f.name not in INTERNAL)
    assert all(f"## {verb}\n" in verbs for verb in VERBS)
