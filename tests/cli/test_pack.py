"""`offmoe pack`: what it prints, what it refuses, and that the next verb takes what it wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.cli.conftest import Outcome
from tests.cli.test_interrupt import check, interrupt, read_until, running

Run = Callable[..., Outcome]


def test_json_and_what_other_verbs_make_of_it(offmoe: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    outcome = offmoe("pack", "demo", out, "--experts", "int4", "--json")
    assert outcome.status == 0, outcome.err
    found = outcome.json
    assert found.keys() == {"bytes_in", "bytes_out", "seconds", "max_error", "layers"}
    assert found["bytes_out"] == sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert found["bytes_out"] < 0.45 * found["bytes_in"]
    assert found["max_error"] == max(layer["max_error"] for layer in found["layers"])
    assert len(found["layers"]) == 6
    assert all(0 < layer["mean_error"] < layer["max_error"] for layer in found["layers"])
    assert "packing" not in outcome.err  # no bar
    assert offmoe("inspect", out, "--json").json["expert_bytes"] < 60_000
    outcome = offmoe("generate", out, "Once upon a time", "--max-new-tokens", "4", "--device", "cpu", "--json")
    assert outcome.json["new_tokens"] == 4
    again = offmoe("pack", "demo", out)
    assert again.status == 0
    assert "max error" in again.out
    assert "model.layers.5.mlp.experts" in again.out
    assert "finished by an earlier run: 2 of 2 shards" in again.err


def test_perplexity_before_and_after(offmoe: Run, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a king who had three daughters. " * 12)
    outcome = offmoe("pack", "demo", tmp_path / "out", "--experts", "int8", "--perplexity", text, "--json")
    assert outcome.status == 0, outcome.err
    found = outcome.json["perplexity"]
    assert found.keys() == {"before", "after", "tokens"}
    assert 1 < found["before"] != found["after"]
    assert abs(found["after"] / found["before"] - 1) < 0.02
    assert 50 < found["tokens"] < 720


def test_refusals(offmoe: Run, checkpoint: Path, tmp_path: Path) -> None:
    def refused(status: int, says: str, *argv: object) -> None:
        outcome = offmoe("pack", *argv)
        assert (outcome.status, outcome.out) == (status, ""), outcome
        assert says in outcome.err
        assert outcome.err.count("\n") == 1

    refused(2, "use 'int4' or 'int8'", "demo", tmp_path / "out", "--experts", "int5")
    refused(2, "48 is not one of 32, 64, 128", "demo", tmp_path / "out", "--group", "48")
    refused(2, "one scale per row", "demo", tmp_path / "out", "--experts", "int8", "--zero-points")
    refused(1, "needs multiples of [16, 64]. Use groups of 32 (", checkpoint, tmp_path / "out")
    refused(2, "the model's own folder", checkpoint, checkpoint / "out")
    (tmp_path / "notes.txt").write_text("mine")
    refused(2, "holds other files (notes.txt)", "demo", tmp_path)
    refused(2, "cannot be read", "demo", tmp_path / "out", "--perplexity", tmp_path / "absent")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    refused(2, "not text in UTF-8", "demo", tmp_path / "out", "--perplexity", tmp_path / "bytes")
    (tmp_path / "empty").write_text("")
    refused(2, "perplexity needs at least two", "demo", tmp_path / "out", "--perplexity", tmp_path / "empty")
    assert not (tmp_path / "out").exists()


SLOW = """
import sys, time
import offmoe.pack.pack as packing
from offmoe.cli import main

def slow(pieces):
    for piece in pieces:
        time.sleep(0.05)
        yield piece

def write_slowly(path, pieces):
    return write(path, slow(pieces) if "00002-of" in path.name else pieces)

write, packing.write_file = packing.write_file, write_slowly
sys.exit(main())
"""
"""Hundreds of pieces of the second shard, so that there is time to interrupt it once the first is there."""


def test_ctrl_c_leaves_finished_shards(offmoe: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with running("-c", SLOW, "pack", "demo", str(out), "--zero-points", "--verbose") as child:
        read_until(child, lambda line: "written, 1 of 2" in line)
        check(interrupt(child))
    assert sorted(path.name for path in out.iterdir()) == ["model-00001-of-00002.safetensors", "offmoe-pack.json"]
    half = offmoe("generate", out, "Once upon a time")
    assert (half.status, half.err.count("\n")) == (1, 1)
    assert "packing into this folder was interrupted; run the same 'offmoe pack' again" in half.err
    outcome = offmoe("pack", "demo", out, "--zero-points")
    assert outcome.status == 0
    assert "finished by an earlier run: 1 of 2 shards" in outcome.err
    assert (out / "config.json").exists()
