"""GGUF models on the Hub: one of many is chosen, its header is read by ranges, and nothing else is downloaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest

from offmoe.errors import ConfigError
from offmoe.hf.hub.gguf_repo import Wanted, chosen_model, split_tag
from offmoe.hf.hub.locate import locate
from offmoe.hf.hub.remote_header import HEAD_BYTES
from tests import gguf_models
from tests.gguf_models import Kinds, q4_k_m, q8_0
from tests.hub import Client, HubServer, Repo

FILES = [
    "README.md",
    "config.json",
    "Model-Q4_K_M.gguf",
    "Model-Q4_K_S.gguf",
    "Model-UD-Q4_K_XL.gguf",
    "Model-Q8_0.gguf",
    "BF16/Model-BF16-00001-of-00003.gguf",
    "BF16/Model-BF16-00002-of-00003.gguf",
    "BF16/Model-BF16-00003-of-00003.gguf",
    "mmproj-F16.gguf",
    "imatrix.gguf",
]
CPU = ("--device", "cpu", "--json")


@pytest.mark.parametrize(
    ("tag", "file"),
    [
        ("Q4_K_M", "Model-Q4_K_M.gguf"),
        ("q8_0", "Model-Q8_0.gguf"),
        ("Q4_K_XL", "Model-UD-Q4_K_XL.gguf"),
        ("BF16", "BF16/Model-BF16-00001-of-00003.gguf"),
    ],
)
def test_a_quantization_names_one_model(tag: str, file: str) -> None:
    assert chosen_model("owner/model", FILES, Wanted(tag)) == file


def test_a_file_names_its_model_whichever_part_it_is() -> None:
    part = "BF16/Model-BF16-00002-of-00003.gguf"
    assert chosen_model("o/m", FILES, Wanted(gguf_file=part)) == part.replace("00002", "00001")


@pytest.mark.parametrize(
    ("wanted", "what"),
    [
        (Wanted(), "several GGUF files; give one of them, as .*--gguf-file NAME .*Model-Q4_K_M.gguf"),
        (Wanted("Q5_K_M"), "no GGUF file for 'Q5_K_M'; give one of them"),
        (Wanted("Q4_K"), "no GGUF file for 'Q4_K'"),
        (Wanted(gguf_file="mmproj-F16.gguf"), "has no GGUF file 'mmproj-F16.gguf'"),
        (Wanted("Q4_K_M", "Model-Q8_0.gguf"), "'owner/model:Q4_K_M': 'Model-Q8_0.gguf' is of another quantization"),
    ],
)
def test_what_names_none_or_several_lists_what_is_there(wanted: Wanted, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        chosen_model("owner/model", FILES, wanted)


def test_a_quantization_of_two_models_is_asked_for_by_file() -> None:
    with pytest.raises(ConfigError, match=r"several GGUF files for 'Q8_0'.*a-Q8_0\.gguf, b-Q8_0\.gguf$"):
        chosen_model("o/m", ["a-Q8_0.gguf", "b-Q8_0.gguf", "c-Q4_0.gguf"], Wanted("Q8_0"))


def test_safetensors_are_preferred_and_a_lone_gguf_needs_no_name() -> None:
    assert chosen_model("o/m", ["model.safetensors", "m-Q8_0.gguf"], Wanted()) is None
    assert chosen_model("o/m", ["m-Q8_0.gguf", "mmproj.gguf"], Wanted()) == "m-Q8_0.gguf"
    assert chosen_model("o/m", ["config.json"], Wanted()) is None


def test_only_a_hub_id_has_a_quantization() -> None:
    assert split_tag("owner/name:Q4_K_M") == ("owner/name", "Q4_K_M")
    assert split_tag("owner/name") == ("owner/name", None)
    assert split_tag("C:/models") == ("C:/models", None)


def test_a_file_of_a_folder_is_chosen_by_its_name(tmp_path: Path) -> None:
    for name in ("a.gguf", "b-00001-of-00002.gguf", "b-00002-of-00002.gguf"):
        (tmp_path / name).write_bytes(b"")
    assert locate(tmp_path, gguf_file="b-00002-of-00002.gguf").model == tmp_path / "b-00001-of-00002.gguf"
    missing = r"has no GGUF file 'c\.gguf' .*; give one of them: a\.gguf, b-00001-of-00002\.gguf$"
    with pytest.raises(ConfigError, match=missing):
        locate(tmp_path, gguf_file="c.gguf")
    with pytest.raises(ConfigError, match="or --gguf-file NAME"):
        locate(tmp_path)


def test_a_file_in_a_folder_below_has_its_own_neighbors(tmp_path: Path) -> None:
    (tmp_path / "Q8_0").mkdir()
    (tmp_path / "Q8_0" / "m.gguf").write_bytes(b"")
    found = locate(tmp_path, gguf_file="Q8_0/m.gguf")
    assert (found.folder, found.model) == (tmp_path / "Q8_0", tmp_path / "Q8_0" / "m.gguf")


def test_what_is_no_gguf_file_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for name in ("config.json", "", "a\0b.gguf"):
        with pytest.raises(ConfigError, match=r"has no GGUF file .*; it holds no GGUF model$"):
            locate(tmp_path, gguf_file=name)
    with pytest.raises(ConfigError, match="must be a text"):
        locate(tmp_path, gguf_file=tmp_path)  # type: ignore[arg-type]


def test_a_file_is_the_model_and_a_second_name_must_be_its_own(tmp_path: Path) -> None:
    for name in ("a.gguf", "b-00001-of-00002.gguf", "b-00002-of-00002.gguf"):
        (tmp_path / name).write_bytes(b"")
    assert locate(tmp_path / "a.gguf", gguf_file="a.gguf").model == tmp_path / "a.gguf"
    assert locate(tmp_path / "a.gguf", gguf_file=str(tmp_path / "a.gguf")).model == tmp_path / "a.gguf"
    part = tmp_path / "b-00002-of-00002.gguf"
    assert locate(part, gguf_file="b-00001-of-00002.gguf").model == tmp_path / "b-00001-of-00002.gguf"
    for other in ("b-00001-of-00002.gguf", "elsewhere/a.gguf"):
        with pytest.raises(ConfigError, match=r"names another.*leave that out, or give the folder"):
            locate(tmp_path / "a.gguf", gguf_file=other)
    with pytest.raises(ConfigError, match="the demo is no GGUF model"):
        locate("demo", gguf_file="a.gguf")


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def client(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with Client(hub.url, tmp_path_factory.mktemp("home")) as client:
        yield client


def long_vocabulary(writer: gguf.GGUFWriter) -> None:
    """The demo's vocabulary, behind a header that is longer than the first range."""
    gguf_models.vocabulary(writer)
    writer.add_array("tokenizer.ggml.filler", [f"filler number {i}" for i in range(HEAD_BYTES // 16)])


@pytest.fixture(scope="module")
def repo(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A repository with two quantizations, one of them split and in a folder; and the single file on this machine."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "a").mkdir()
    (folder / "b").mkdir()

    def save(to: str, kinds: Kinds, name: str, parts: int) -> Path:
        written = gguf_models.save(
            folder / to, "mixtral", kinds, name=name, parts=parts, wide=True, vocab_size=4096, more=long_vocabulary
        )
        return written.file

    single = save("a", q4_k_m, "m-Q4_K_M", 0)
    parts = save("b", q8_0, "m-Q8_0", 20).parent
    files = {single.name: single.read_bytes(), "README.md": b"hello", "mmproj-F16.gguf": b"no model"}
    files |= {f"Q8_0/{path.name}": path.read_bytes() for path in parts.iterdir()}
    hub.repos["owner/m-GGUF"] = Repo(files)
    return "owner/m-GGUF", single


def test_inspect_reads_headers_by_ranges_and_downloads_no_weights(
    hub: HubServer, client: Client, repo: tuple[str, Path]
) -> None:
    name, single = repo
    for tag in ("Q4_K_M", "Q8_0"):
        before = len(hub.requests)
        found = client.offmoe("inspect", f"{name}:{tag}", *CPU)
        assert found["status"] == 0, found["err"]
        fetched = {file: n for file, n in hub.fetched(before).items() if file.endswith(".gguf")}
        assert all(tag in file for file in fetched)
        sizes = {file: len(data) for file, data in hub.repos[name].files.items()}
        assert sum(fetched.values()) < sum(sizes[file] for file in fetched) / 3
    local = client.offmoe("inspect", single, *CPU)
    remote = client.offmoe("inspect", name, *CPU, "--gguf-file", single.name)
    there, here = json.loads(remote["out"]), json.loads(local["out"])
    for key in ("family", "layers", "moe_layers", "experts", "top_k", "expert_bytes", "dense_bytes"):
        assert there[key] == here[key]


def test_generate_downloads_one_quantization_and_runs_offline_afterwards(
    hub: HubServer, client: Client, repo: tuple[str, Path]
) -> None:
    name, _ = repo
    argv = ("generate", f"{name}:Q8_0", "The king", *CPU, "--max-new-tokens", 3)
    before = len(hub.requests)
    first = client.offmoe(*argv)
    assert first["status"] == 0, first["err"]
    assert {file for file in hub.fetched(before) if file.endswith(".gguf")} == {
        file for file in hub.repos[name].files if file.startswith("Q8_0/")
    }
    before = len(hub.requests)
    offline = client.offmoe(*argv, "--local-files-only")
    assert offline["status"] == 0, offline["err"]
    assert json.loads(offline["out"])["text"] == json.loads(first["out"])["text"]
    assert len(hub.requests) == before


def test_a_model_in_a_folder_has_the_configuration_and_the_tokenizer_above_it(
    hub: HubServer, client: Client, tmp_path: Path
) -> None:
    """Neither is in the file: it has no vocabulary, and a rotary embedding that metadata cannot say."""
    written = gguf_models.save(
        tmp_path,
        "mixtral",
        vocab_size=4096,
        more=lambda writer: writer.add_tensor("rope_freqs.weight", np.ones(4, np.float32)),
    )
    beside = {name: (gguf_models.DEMO / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    beside["config.json"] = (written.dense / "config.json").read_bytes()
    model = {"Q8_0/m-Q8_0.gguf": written.file.read_bytes()}
    argv = ("The king", *CPU, "--max-new-tokens", 3)
    hub.repos["owner/bare-GGUF"] = Repo(model)
    without = client.offmoe("generate", "owner/bare-GGUF:Q8_0", *argv)
    assert without["status"] == 1
    assert "'rope_freqs.weight', which no config of transformers can express" in without["err"]
    hub.repos["owner/whole-GGUF"] = Repo({**model, **beside})
    first = client.offmoe("generate", "owner/whole-GGUF:Q8_0", *argv)
    assert first["status"] == 0, first["err"]
    offline = client.offmoe("generate", "owner/whole-GGUF:Q8_0", *argv, "--local-files-only")
    assert offline["status"] == 0, offline["err"]
    assert json.loads(offline["out"])["text"] == json.loads(first["out"])["text"]


def test_a_repository_with_several_lists_them(client: Client, repo: tuple[str, Path]) -> None:
    found = client.offmoe("inspect", repo[0], *CPU)
    assert found["status"] == 2
    assert "has several GGUF files; give one of them, as 'owner/m-GGUF:Q8_0' or --gguf-file NAME" in found["err"]
    assert "m-Q4_K_M.gguf" in found["err"]
