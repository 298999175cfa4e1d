from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from offmoe.report.report import describe
from offmoe.trace.trace import Parameters, Trace, read_trace, write_trace
from offmoe.types import CacheShape
from tests.cli.conftest import Outcome

Run = Callable[..., Outcome]

FIXTURE = Path(__file__).parents[1] / "data" / "gptoss20b_6req.npz"
ATTACK = "</script><script>alert('x')</script><img src=x onerror=alert(1)>"


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Two requests: a prompt of 30 tokens, then one by one. Tokens choose their expert; one is an attack."""
    rng = np.random.default_rng(0)
    tokens = 160
    token = rng.integers(0, 5, tokens).astype(np.int32)
    experts = np.stack([token, (token + 1) % 5, np.full(tokens, 6), token % 3], axis=1).reshape(tokens, 2, 2)
    half = [0] * 30 + list(range(1, 51))
    made = Trace(
        "tiny & <b>bold</b>",
        CacheShape((24, 8), (2, 2), (1000, 1000)),
        experts.astype(np.int16),
        np.repeat([0, 1], 80).astype(np.int32),
        np.array(half + [step + 51 for step in half], np.int32),
        token,
        pieces={0: ATTACK, 1: " the", 2: "ing", 3: "42", 4: "\u2028[red]"},
        parameters=Parameters(1000, (400, 400)),
    )
    write_trace(tmp_path / "t.npz", made)
    return tmp_path / "t.npz"


def data(html: str) -> dict[str, Any]:
    """What the page's script will read."""
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert len(found) == 1
    return json.loads(found[0])


def test_json_is_the_report(offmoe: Run, trace: Path) -> None:
    found = offmoe("report", trace, "--json").json
    assert found == json.loads(json.dumps(describe(read_trace(trace)).to_dict()))
    assert {"gini", "entropy", "alerts", "consistency", "by_layer", "specialisation", "active"} <= found.keys()
    assert found["alerts"][0].keys() == {"layer", "expert", "share", "times_mean", "routes"}
    assert found["alerts"][0]["layer"] == 0
    assert found["consistency"]["same_token"] == 1.0
    assert found["phases"]["prefill"]["tokens"] == 60
    assert found["active"]["flops_per_token"] == 2 * (1000 + 4 * 400)


def test_summary_for_people(offmoe: Run, trace: Path) -> None:
    out = offmoe("report", trace).out
    for words in ("experts by layer", "clearest specialists", "more than 3x the mean", "MFLOP", "prefill"):
        assert words in out or words == "MFLOP"
    assert "FLOP per token" in out
    assert max(map(len, out.splitlines()[1:6])) <= 80


def test_the_page_carries_all_and_runs_nothing_foreign(offmoe: Run, trace: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    outcome = offmoe("report", trace, "-o", page)
    assert (outcome.status, "page written to" in outcome.err) == (0, True)
    html = page.read_text(encoding="utf-8")
    assert html.lower().count("<script") == html.lower().count("</script") == 2
    assert "<img" not in html
    assert "<b>" not in html
    assert "\u2028" not in html
    found = data(html)
    assert found["model"] == "tiny & <b>bold</b>"
    texts = {piece for layer in found["types"]["favorites"] for expert in layer for piece, *_ in expert}
    assert ATTACK in texts
    assert found["layers"][0]["loads"] == describe(read_trace(trace)).loads[0].routes.tolist()
    assert not list(tmp_path.glob("*.partial"))


def test_the_page_needs_nothing_from_elsewhere(offmoe: Run, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert offmoe("report", FIXTURE, "-o", page).status == 0
    html = page.read_text(encoding="utf-8")
    assert "default-src 'none'" in html
    assert re.findall(r"""(?:src|href)\s*=|url\((?!#)|@import|fetch\(|https?://(?!www\.w3\.org/2000/svg)""", html) == []
    found = data(html)
    assert found["types"] is None
    assert len(found["missing"]) == 3
    assert [len(pair["tokens"]) for pair in found["pairs"]] == [32] * 23


def test_the_script_puts_texts_in_as_text() -> None:
    html = (Path(__file__).parents[2] / "offmoe" / "report" / "page.html").read_text(encoding="utf-8")
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", html)


def test_wide_layers_pair_their_busiest_experts(offmoe: Run, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    experts = (rng.random((400, 2, 1)) ** 2 * 200).astype(np.int16)
    shape = CacheShape((200, 200), (1, 1), (1, 1))
    zeros = np.zeros(400, np.int32)
    write_trace(tmp_path / "t.npz", Trace("wide", shape, experts, zeros, np.arange(400, dtype=np.int32)))
    assert offmoe("report", tmp_path / "t.npz", "-o", tmp_path / "p.html").status == 0
    (pair,) = data((tmp_path / "p.html").read_text(encoding="utf-8"))["pairs"]
    assert len(pair["rows"]) == len(pair["tokens"]) == len(pair["tokens"][0]) == 64
    assert 0 in pair["rows"]
    assert pair["rows"] == sorted(pair["rows"])


@pytest.mark.parametrize("tokens", [0, 1])
def test_short_traces(offmoe: Run, tmp_path: Path, tokens: int) -> None:
    shape = CacheShape((4, 6), (2, 2), (1, 1))
    rows = np.zeros(tokens, np.int32)
    experts = np.tile(np.array([0, 1], np.int16), (tokens, 2, 1))
    write_trace(tmp_path / "t.npz", Trace("", shape, experts, rows, rows))
    outcome = offmoe("report", tmp_path / "t.npz", "-o", tmp_path / "p.html")
    assert outcome.status == 0
    assert ("no tokens" if tokens == 0 else "may be chance") in outcome.out
    assert data((tmp_path / "p.html").read_text(encoding="utf-8"))["tokens"] == tokens
    assert offmoe("report", tmp_path / "t.npz", "--json").json["gini"] == (
        None if tokens == 0 else pytest.approx(0.583, abs=0.001)
    )


def test_a_page_that_cannot_be_written(offmoe: Run, trace: Path, tmp_path: Path) -> None:
    assert offmoe("report", trace, "-o", tmp_path / "nowhere" / "p.html").status == 2
    outcome = offmoe("report", trace, "-o", tmp_path)
    assert outcome.status == 2
    assert f"-o {tmp_path} is a folder" in outcome.err
    assert offmoe("report", tmp_path / "absent.npz").status == 1


def test_needs_no_torch(trace: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from offmoe.cli import main; status = main(sys.argv[1:]);"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'heavy'; sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "report", str(trace), "-o", str(tmp_path / "p.html")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "experts by layer" in done.stdout
