"""A cluster of two workers on this machine, one of which is killed; what a command says where there is no cluster."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("starlette", reason="the extra offmoe[serve] is not installed")
pytest.importorskip("openai", reason="the extra offmoe[serve] is not installed")
pytest.importorskip("ray", reason="the extra offmoe[ray] is not installed")

from tests.cli.conftest import Outcome, _own_cache_folder, offmoe  # noqa: F401

NODES = 2
ENVIRONMENT = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
"""One thread everywhere: last bits depend on the number."""


def write(path: Path, count: int) -> Path:
    requests = [
        {"prompt": f"Chapter {i}", "temperature": 0.8, "seed": i, "max_tokens": 4 + i % 9} for i in range(count)
    ]
    path.write_text("".join(json.dumps(request) + "\n" for request in [*requests, {"prompt": "x", "nonsense": 1}]))
    os.utime(path, (7, 7))
    return path


def start(source: Path, results: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "offmoe", "batch", "demo", str(source), "-o", str(results), "--device", "cpu"]
    command += ["--batch-size", "2", "--exactness", "bitwise", *options]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)


CLUSTER = f"""
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={{"num_cpus": 0, "include_dashboard": False}})
for _ in range({NODES}):
    cluster.add_node(num_cpus=2)
print("address", cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@contextmanager
def running(script: str, word: str) -> Iterator[str]:
    """A Python process until the block ends. Gives what follows the word in its output."""
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-c", script], text=True, env=ENVIRONMENT, **pipes) as process:
        assert process.stdout is not None
        while (line := process.stdout.readline()) and not line.startswith(word):
            pass
        assert line, "the process has ended"
        yield line.removeprefix(word).strip()
        process.communicate("")
    assert process.returncode == 0


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The address of a cluster of two machines of two processors each."""
    with running(CLUSTER, "address") as found:
        yield found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """Prompts, and what a run without a cluster answers."""
    folder = tmp_path_factory.mktemp("alone")
    source, results = write(folder / "in.jsonl", 80), folder / "out.jsonl"
    with start(source, results, "--no-state") as process:
        process.communicate()
    assert process.returncode == 1  # one line has an error
    return source, results.read_bytes()


def actors() -> list[psutil.Process]:
    """The processes of workers that have the model, or are loading it."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "MapWorker" in process.cmdline()[0]:
                found.append(process)
    return found


def count(results: Path) -> int:
    return results.read_bytes().count(b"\n") if results.exists() else 0


def wait_for_lines(process: subprocess.Popen[str], results: Path) -> None:
    """Return when the run has written some of its lines, or has ended."""
    while process.poll() is None and count(results) < 12:
        time.sleep(0.01)


@pytest.mark.slow
def test_a_worker_that_is_killed_loses_and_doubles_no_line(
    tmp_path: Path, address: str, alone: tuple[Path, bytes]
) -> None:
    source, expected = alone
    results = tmp_path / "out.jsonl"
    with start(source, results, "--ray", address) as process:
        wait_for_lines(process, results)
        workers = actors()
        workers[0].send_signal(signal.SIGKILL)
        done = count(results)
        said = process.communicate()[1]
    assert process.returncode == 1
    assert len(workers) == NODES
    assert 12 <= done < 70
    assert "1 of 81 lines have an error" in said
    assert results.read_bytes() == expected


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_without_the_cluster(
    tmp_path: Path, address: str, alone: tuple[Path, bytes]
) -> None:
    source, expected = alone
    results = tmp_path / "out.jsonl"
    with start(source, results, "--ray", address) as process:
        wait_for_lines(process, results)
        process.kill()
        process.communicate()
    assert 12 <= count(results) < 70
    with start(source, results, "--no-state") as process:
        process.communicate()
    assert results.read_bytes() == expected


@pytest.mark.slow
def test_datasets_of_parquet_files(tmp_path: Path, address: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    source, body = tmp_path / "in.parquet", {"max_tokens": 3, "temperature": 0}
    rows = [{"custom_id": str(i), "prompt": f"Chapter {i}", **body} for i in range(20)]
    parquet.write_table(pa.Table.from_pylist(rows), source)
    script = f"""
import ray
from offmoe.ray import Generator
ray.init({address!r}, log_to_driver=False)
answers = ray.data.read_parquet({str(source)!r}).map_batches(
    Generator, fn_constructor_kwargs={{"model": "demo", "device": "cpu"}}, batch_size=8,
    compute=ray.data.ActorPoolStrategy(size={NODES}), num_cpus=1)
answers.write_parquet({str(tmp_path / "out")!r})
print("written", flush=True)
"""
    with running(script, "written"):
        pass
    rows = parquet.read_table(tmp_path / "out").to_pylist()
    assert sorted(int(row["custom_id"]) for row in rows) == list(range(20))
    assert all(json.loads(row["response"])["body"]["usage"]["completion_tokens"] == 3 for row in rows)


@pytest.mark.slow
def test_a_deployment_of_ray_serve_answers(address: str) -> None:
    import httpx

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = f"""
import sys
import ray
from ray import serve
from offmoe.ray import deployment
ray.init({address!r}, log_to_driver=False)
serve.start(http_options={{"port": {port}}})
serve.run(deployment("demo", api_key="key", device="cpu", max_context=256))
print("ready", flush=True)
sys.stdin.read()
serve.shutdown()
"""
    with running(script, "ready"):
        body = {"prompt": "And the LORD said", "max_tokens": 4, "temperature": 0}
        url = f"http://127.0.0.1:{port}/v1/completions"
        assert httpx.post(url, json=body, timeout=60).status_code == 401
        answer = httpx.post(url, json=body, timeout=60, headers={"authorization": "Bearer key"})
        assert answer.json()["choices"][0]["text"] == " unto me, I"


@pytest.mark.slow
def test_a_model_that_workers_cannot_load_is_one_error(tmp_path: Path, address: str) -> None:
    source = write(tmp_path / "in.jsonl", 3)
    with start(source, tmp_path / "out.jsonl", "--ray", address, "--device-memory", "1KiB") as process:
        said = process.communicate()[1]
    assert process.returncode == 1
    assert said.splitlines()[-1].startswith("offmoe: error: ")
    assert "CapacityError" in said.splitlines()[-1]


def test_addresses_without_a_cluster_are_refused(tmp_path: Path, offmoe: Callable[..., Outcome]) -> None:  # noqa: F811
    source = write(tmp_path / "in.jsonl", 1)
    command = ("batch", "demo", source, "-o", tmp_path / "out.jsonl", "--device", "cpu")
    for options, words in (
        (("--ray", "127.0.0.1:1"), "no cluster answers"),
        (("--ray", "here"), "must be local, auto, HOST:PORT or ray://HOST:PORT"),
        (("--ray", "ray://127.0.0.1:99999"), "no cluster answers"),
        (("--ray", "local", "--state", "x"), "leave it out with --ray"),
        (("--ray-workers", "2"), "works with --ray ADDRESS only"),
    ):
        outcome = offmoe(*command, *options)
        assert outcome.status == 2, options
        assert words in outcome.err.splitlines()[-1]
