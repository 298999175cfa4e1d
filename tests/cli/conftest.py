"""A checkpoint small enough to generate in a test: a tiny Mixtral with a tokenizer of bytes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from offmoe.cli import main
from tests import tiny

TEMPLATE = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}{% if add_generation_prompt %}!{% endif %}"


@dataclass
class Outcome:
    status: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        """The last line of stdout; it must be the only one."""
        assert self.out.count("\n") == 1, self.out
        return json.loads(self.out)


@pytest.fixture(autouse=True)
def _own_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test begins where another one, or the user, has ended."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "cache"))


@pytest.fixture
def offmoe(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Outcome]]:
    """Run a command in this process."""
    verbosity = logging.get_verbosity()

    def run(*argv: object) -> Outcome:
        status = main([str(arg) for arg in argv])
        return Outcome(status, *capsys.readouterr())

    yield run
    logging.set_verbosity(verbosity)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Ids 0-2 are special, 3-258 are the bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<pad>", "<s>", "</s>"]
    vocabulary = {token: i for i, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral of 3 layers, 8 experts, top-2, that seldom ends a text by itself."""
    folder = tmp_path_factory.mktemp("checkpoint") / "mixtral"
    tiny.save(tiny.build("mixtral", vocab_size=259), folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
