"""What only Linux, or only some of it, has, taken away one by one: everything works, some of it slower."""

from __future__ import annotations

import functools
import mmap
import os
import subprocess
import sys
import types

import pytest
import torch

import offmoe
from offmoe.device import backend, cgroup
from offmoe.device.cuda import CudaKind
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save(tiny.build("mixtral"), tmp_path_factory.mktemp("portable") / "model")


def tokens(folder):
    model = offmoe.from_pretrained(folder, device="cpu", slots_per_layer=3)
    with model.offload:
        return model.generate(input_ids=tiny.prompt(), max_new_tokens=8, min_new_tokens=8, do_sample=False).tolist()


@pytest.fixture(scope="module")
def want(folder):
    return tokens(folder)


ABSENT = {
    "O_DIRECT": [(os, "O_DIRECT")],
    "preadv": [(os, "preadv")],
    "preadv and pread": [(os, "preadv"), (os, "pread")],
    "madvise flags": [(mmap, "MADV_HUGEPAGE"), (mmap, "MADV_DONTFORK")],
    "mmap flags": [(mmap, "MAP_PRIVATE"), (mmap, "MAP_ANONYMOUS")],
    "sched_getaffinity": [(os, "sched_getaffinity")],
}


@pytest.mark.parametrize("what", ABSENT)
def test_each_of_them_absent(folder, want, monkeypatch, what):
    for module, name in ABSENT[what]:
        monkeypatch.delattr(module, name, raising=False)
    assert tokens(folder) == want


def test_cgroup_files_absent(folder, want, monkeypatch, tmp_path):
    nowhere = str(tmp_path / "nowhere")
    monkeypatch.setattr(backend, "cgroup_free_bytes", functools.partial(cgroup.cgroup_free_bytes, nowhere, nowhere))
    assert backend.cgroup_free_bytes() == cgroup.UNLIMITED
    assert tokens(folder) == want


def test_cuda_host_register_absent(monkeypatch):
    monkeypatch.setattr(torch.cuda, "cudart", lambda: types.SimpleNamespace())
    assert CudaKind().register(4096, 4096) is False


def test_all_of_them_absent_before_the_package_is_imported(folder, want):
    """As on Windows and macOS, where no module has ever seen them."""
    names = [(module.__name__, name) for pairs in ABSENT.values() for module, name in pairs]
    script = "\n".join(
        [
            "import mmap, os, torch, transformers",  # these two know what platform they are on
            *(f"if hasattr({module}, {name!r}): del {module}.{name}" for module, name in names),
            "import offmoe",
            "from tests.test_portability import tokens",
            f"print(tokens({str(folder)!r}))",
        ]
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == str(want)
