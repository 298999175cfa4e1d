"""Finding models: folders, the Hub's cache, and a Hub on this machine that records its requests."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from offmoe.errors import CheckpointError, ConfigError
from offmoe.hf.hub.locate import locate
from offmoe.hf.hub.remote_header import HEAD_BYTES
from tests import tiny
from tests.cli.conftest import byte_tokenizer
from tests.hub import ROOT, VALID_TOKEN, Client, HubServer, Repo, environment

JUNK = {
    "README.md": b"# model",
    "pytorch_model.bin": b"pickle" * 1000,
    "pytorch_model.bin.index.json": b"{}",
    "model.safetensors.index.fp16.json": b"{}",
    "model.fp16.safetensors": b"variant",
    "consolidated.safetensors": b"the publisher's own",
    "consolidated.safetensors.index.json": b"{}",
    "original/consolidated.00.pth": b"pickle",
    "original/params.json": b"{}",
    "original/chat.jinja": b"",
    "additional/other.jinja": b"",
    "additional_chat_templates_old/other.jinja": b"",
    "additional_chat_templates/old/other.jinja": b"",
    "onnx/model.onnx": b"another format",
    "modeling_custom.py": b"raise SystemExit",
}
MIXTRAL = b'{"model_type": "mixtral"}'
TINY = ("--device", "cpu", "--json")
GENERATE = (*TINY, "--max-new-tokens", "3")


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def client(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with Client(hub.url, tmp_path_factory.mktemp("home")) as client:
        yield client


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral in five shards, all but the last several times HEAD_BYTES large, with a tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    model = tiny.build("mixtral", vocab_size=259, intermediate_size=192)
    tiny.save(model, folder, max_shard_size="450KB")
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def repo(hub: HubServer, folder: Path) -> str:
    """Name of a repository for this test alone: the model, and the other files that repositories hold."""
    name = f"owner/model-{len(hub.repos)}"
    hub.repos[name] = Repo.of(folder)
    hub.repos[name].files |= JUNK
    return name


def shards_of(repo: Repo) -> set[str]:
    return set(json.loads(repo.files["model.safetensors.index.json"])["weight_map"].values())


# --- what is not on the Hub


def test_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    assert locate(tmp_path).folder == tmp_path
    assert locate(str(tmp_path)).folder == tmp_path
    assert locate("demo").folder.parts[-3:] == ("offmoe", "demo", "model")


@pytest.mark.parametrize(
    "name",
    ["./nowhere", "/no/such/folder", "a/b/c", "", "white space/model", "~nobody-here/m", "a\0b", "./" + "a" * 5000],
)
def test_folder_that_is_not_there_is_a_config_error(name: str) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        locate(name)


def test_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(CheckpointError, match="a file, not a model"):
        locate(tmp_path / "model.onnx")


def test_a_gguf_file_that_is_not_there_or_has_another_name_is_called_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no such file; check the path, or complete the download"):
        locate(tmp_path / "model-00002-of-00003.gguf")
    for name in ("MODEL.GGUF", "sha256-0123", "model.gguf.part"):
        (tmp_path / name).write_bytes(b"GGUF" + bytes(60))
        with pytest.raises(CheckpointError, match=r"a GGUF file under another name; once .* ends in \.gguf"):
            locate(tmp_path / name)


def test_hub_id_that_is_not_in_the_cache_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"owner/nothing.*local_files_only"):
        locate("owner/nothing", cache_dir=tmp_path, local_files_only=True)


def test_model_in_the_hub_cache_is_found_without_a_network(tmp_path: Path) -> None:
    commit = "0" * 40
    repository = tmp_path / "models--owner--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    save_file({"x": torch.ones(1)}, snapshot / "model.safetensors")
    source = locate("owner/model", cache_dir=tmp_path, local_files_only=True)
    assert source.folder == snapshot
    assert not source.checkpoint().shards_absent


# --- what is fetched, and when


def unmeasured(out: str) -> dict[str, Any]:
    """What inspect says without what depends on free memory, on the model's name and on how fast the machine is."""
    found = json.loads(out)
    measured = {"plan", *found["predicted"]} | {name for name in found if name.startswith(("best_", "predicted"))}
    choices = [
        {name: value for name, value in choice.items() if name in ("experts", "exactness", "fits")}
        for choice in found["choices"]
    ]
    return {name: value for name, value in found.items() if name not in measured} | {"choices": choices}


def test_inspect_fetches_headers_and_no_weights(hub: HubServer, client: Client, repo: str, folder: Path) -> None:
    before = len(hub.requests)
    found = client.offmoe("inspect", repo, *TINY)
    assert found["status"] == 0
    local = client.offmoe("inspect", folder, *TINY)
    assert unmeasured(found["out"]) == unmeasured(local["out"])
    fetched, shards = hub.fetched(before), shards_of(hub.repos[repo])
    assert shards <= fetched.keys()
    assert all(fetched[shard] <= HEAD_BYTES for shard in shards)
    assert sum(fetched.values()) < sum(map(len, hub.repos[repo].files.values())) / 3
    assert not list(client.home.rglob(f"*{repo.partition('/')[2]}/snapshots/*/*.safetensors"))


def test_chat_templates_in_a_folder_of_their_own_are_fetched(hub: HubServer, client: Client, repo: str) -> None:
    """A model that has them and no other template generates without one, unless one is asked for."""
    hub.repos[repo].files["additional_chat_templates/tool_use.jinja"] = b"{{ messages[0].content }}"
    before = len(hub.requests)
    ours = client.offmoe("generate", repo, "hello", *GENERATE)
    assert ours["status"] == 0, ours["err"]
    assert "additional_chat_templates/tool_use.jinja" in hub.fetched(before)
    assert not hub.fetched(before).keys() & JUNK.keys()
    asked = client.offmoe("generate", repo, "hello", *GENERATE, "--chat-template")
    assert (asked["status"], "--chat-template: the model's tokenizer has none" in asked["err"]) == (2, True)


def test_generate_fetches_what_the_index_names_and_nothing_else(
    hub: HubServer, client: Client, repo: str, folder: Path
) -> None:
    before = len(hub.requests)
    ours = client.offmoe("generate", repo, "hello", *GENERATE)
    assert ours["status"] == 0, ours["err"]
    assert ours["err"].startswith("memory on cpu: ")
    assert not re.search("warn|fetching|hugging|token=", ours["err"], re.IGNORECASE)
    fetched = hub.fetched(before)
    assert fetched.keys() == set(hub.repos[repo].files) - JUNK.keys()
    local = client.offmoe("generate", folder, "hello", *GENERATE)
    assert json.loads(ours["out"])["text"] == json.loads(local["out"])["text"]

    before = len(hub.requests)
    again = client.offmoe("generate", repo, "hello", *GENERATE)
    assert json.loads(again["out"])["text"] == json.loads(local["out"])["text"]
    assert hub.fetched(before) == {}

    before = len(hub.requests)
    offline = client.offmoe("generate", repo, "hello", *GENERATE, "--local-files-only")
    assert json.loads(offline["out"])["text"] == json.loads(local["out"])["text"]
    assert len(hub.requests) == before


def test_what_cannot_run_is_not_downloaded(hub: HubServer, client: Client, repo: str) -> None:
    before = len(hub.requests)
    found = client.offmoe("generate", repo, "hello", *GENERATE, "--device-memory", "1MiB", "--slots-per-layer", "8")
    assert found["status"] == 1
    assert all(hub.fetched(before)[shard] <= HEAD_BYTES for shard in shards_of(hub.repos[repo]))


@pytest.mark.slow
def test_single_file_is_preferred_as_transformers_does(hub: HubServer, client: Client, repo: str, folder: Path) -> None:
    whole = folder.parent / "whole"
    tiny.save(tiny.build("mixtral", vocab_size=259, intermediate_size=192), whole, max_shard_size="1GB")
    hub.repos[repo].files["model.safetensors"] = (whole / "model.safetensors").read_bytes()
    before = len(hub.requests)
    assert client.offmoe("generate", repo, "hello", *GENERATE)["status"] == 0
    assert not hub.fetched(before).keys() & shards_of(hub.repos[repo])


def test_header_longer_than_the_first_piece(hub: HubServer, client: Client, repo: str, tmp_path: Path) -> None:
    tensors = {f"{'a-long-name-' * 8}{i}": torch.zeros(64) for i in range(1000)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes(MIXTRAL)
    hub.repos[repo] = Repo.of(tmp_path)
    before = len(hub.requests)
    code = f"from offmoe.hf.hub.locate import locate; result = sorted(locate({repo!r}).checkpoint().tensors)"
    answer = client.python(code)
    assert answer["result"] == sorted(tensors)
    assert HEAD_BYTES < hub.fetched(before)["model.safetensors"] < 64 * 4 * 1000


def test_revision_and_token_are_passed_on(hub: HubServer, client: Client, repo: str, tmp_path: Path) -> None:
    hub.repos[repo].private, hub.repos[repo].revisions = True, ("main", "v2")
    before = len(hub.requests)
    options = f"revision='v2', token={VALID_TOKEN!r}, cache_dir={str(tmp_path)!r}"
    answer = client.python(
        f"from offmoe.hf.hub.locate import locate; source = locate({repo!r}, {options}); "
        "source.fetch(source.checkpoint()); result = str(source.folder)"
    )
    assert Path(answer["result"]).is_relative_to(tmp_path)
    assert Path(answer["result"]).name == hub.repos[repo].commit
    ours = [request for request in hub.requests[before:] if repo in request.path]
    assert {request.token for request in ours} == {VALID_TOKEN}
    assert f"/api/models/{repo}/revision/v2" in {request.path for request in ours}
    assert not any("/main" in request.path for request in ours)


@pytest.mark.slow
def test_interrupted_download_ends_at_once_and_is_completed_later(
    hub: HubServer, client: Client, repo: str, tmp_path: Path
) -> None:
    whole = hub.repos[repo]
    assert client.offmoe("inspect", repo, *TINY)["status"] == 0
    whole.stall = max(shards_of(whole))
    before = len(hub.requests)
    process = subprocess.Popen(
        [sys.executable, "-m", "offmoe", "generate", repo, "hello", *GENERATE],
        cwd=ROOT,
        env=environment(hub.url, client.home),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert whole.half_sent.wait(60)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    whole.go_on.set()
    assert (process.returncode, out) == (130, ""), err
    assert err in ("", "offmoe: interrupted\n")  # nothing, where a reading thread had to be left behind
    done = {file for file, sent in hub.fetched(before).items() if sent > HEAD_BYTES and file != whole.stall}
    before = len(hub.requests)
    assert client.offmoe("generate", repo, "hello", *GENERATE)["status"] == 0
    again = {file for file, sent in hub.fetched(before).items() if sent > HEAD_BYTES}
    assert whole.stall in again
    assert not again & done


# --- what can go wrong


def refused(client: Client, *argv: object) -> tuple[int, str]:
    answer = client.offmoe(*argv)
    assert answer["err"].count("\n") == 1, answer["err"]
    assert answer["out"] == ""
    return answer["status"], answer["err"]


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"gated": True}, 2, "access is restricted; accept its terms at http"),
        ({"files": {"config.json": MIXTRAL}}, 1, "the repository has no safetensors weights"),
        ({"private": True}, 2, "neither a folder here nor a repository on the Hub"),
        ({"revisions": ()}, 2, "has no revision 'main'"),
        ({"status": 503}, 1, "the Hub answers with status 503; try again later"),
        ({"ranges": False}, 1, "the server does not send parts of"),
        ({"files": {}}, 1, "the repository has no config.json"),
        ({"files": {"config.json": b"{}"}}, 1, "not the config of a transformers model"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_one_line_that_says_what_to_do(
    hub: HubServer, client: Client, repo: str, change: dict[str, object], status: int, words: str
) -> None:
    for name, value in change.items():
        setattr(hub.repos[repo], name, value)
    got, line = refused(client, "inspect", repo, *TINY)
    assert (got, words in line, repo.partition("/")[2] in line) == (status, True, True), line


def test_pickles_only(hub: HubServer, client: Client, repo: str) -> None:
    files = hub.repos[repo].files
    hub.repos[repo].files = {name: data for name, data in files.items() if "safetensors" not in name}
    before = len(hub.requests)
    status, line = refused(client, "generate", repo, "hello", *GENERATE)
    assert status == 1
    assert "holds only pickled weights (pytorch_model.bin)" in line
    assert not any("pytorch_model" in file for file in hub.fetched(before))


def test_wrong_token(client: Client, repo: str) -> None:
    answer = client.python(f"import offmoe; offmoe.from_pretrained({repo!r}, device='cpu', token='hf_wrong')")
    assert answer["error"] == "ConfigError"
    assert "the Hub refuses the token (401)" in answer["message"]


def test_repository_that_is_not_there(client: Client) -> None:
    status, line = refused(client, "generate", "owner/nothing", "x")
    assert status == 2
    assert "neither a folder here nor a repository on the Hub" in line


def test_cache_without_all_shards(client: Client, repo: str) -> None:
    assert client.offmoe("inspect", repo, *TINY)["status"] == 0  # leaves all but the shards
    status, line = refused(client, "generate", repo, "x", "--local-files-only", "--device", "cpu")
    assert status == 1
    assert "of its 5 shards the Hub cache lacks 5 (model-00001-of-00005.safetensors)" in line
    assert "run it once with a network" in line


def test_shard_that_the_index_names_is_not_in_the_repository(hub: HubServer, client: Client, repo: str) -> None:
    del hub.repos[repo].files["model-00002-of-00005.safetensors"]
    status, line = refused(client, "inspect", repo, *TINY)
    assert status == 1
    assert "a file that its index names is not in the repository" in line
    assert "model-00002-of-00005" in line


@pytest.mark.slow
def test_ill_hub_does_not_matter_where_the_cache_has_the_model(hub: HubServer, client: Client, repo: str) -> None:
    assert client.offmoe("generate", repo, "hello", *GENERATE)["status"] == 0
    hub.repos[repo].status = 503
    answer = client.offmoe("generate", repo, "hello", *GENERATE)
    assert answer["status"] == 0
    assert "status 503; try again later; using the copy in the Hub cache" in answer["err"]


def test_disk_that_is_too_small_is_known_before(hub: HubServer, client: Client, repo: str) -> None:
    size = 1 << 60
    header = json.dumps({"x": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    data = len(header).to_bytes(8, "little") + header
    hub.repos[repo] = Repo({"config.json": b"{}", "model.safetensors": data + bytes(HEAD_BYTES)})
    hub.repos[repo].sizes["model.safetensors"] = len(data) + size
    answer = client.python(
        f"from offmoe.hf.hub.locate import locate; source = locate({repo!r}); source.fetch(source.checkpoint())"
    )
    assert answer["error"] == "CapacityError", answer["message"]
    assert "1048576.0 TiB are to be downloaded to" in answer["message"]


def test_disk_that_fills_up_during_the_download(hub: HubServer, client: Client, repo: str) -> None:
    answer = client.python(
        f"""
import resource
from offmoe.hf.hub.locate import locate
before = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
try:
    source = locate({repo!r})
    source.fetch(source.checkpoint())
finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
"""
    )
    assert answer["error"] == "CapacityError"
    assert "no room for the download in the Hub cache (File too large)" in answer["message"]


@pytest.mark.slow
def test_without_a_network_one_line(client: Client, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "offmoe", "generate", "mistralai/Mixtral-8x7B-v0.1", "x"],
        cwd=ROOT,
        env=environment("http://127.0.0.1:1", tmp_path),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert "the Hub cannot be reached" in done.stderr
