from __future__ import annotations

import platform
import shutil
from pathlib import Path

import pytest
import torch

from offmoe.compute.kernels import library as module
from offmoe.compute.kernels.cpu import CpuKernels
from offmoe.compute.kernels.library import Library, status
from offmoe.compute.kernels.native import build as builder
from offmoe.compute.kernels.native.build import BuildError, build, find_compiler
from offmoe.errors import ConfigError
from offmoe.pack.quantizer import NativeQuantizer, TorchQuantizer
from offmoe.quant.packed_weight import int4
from tests.native import VARIANTS, library
from tests.packed import values


def test_status_without_a_library(tmp_path: Path) -> None:
    found = status(tmp_path / "kernels.so")
    assert found.library is None
    assert found.variant is None
    assert "not built" in found.message
    assert "torch's operators" in found.message
    assert "Install a C compiler" in found.message


def test_status_with_a_file_that_is_no_library(tmp_path: Path) -> None:
    (tmp_path / "kernels.so").write_bytes(b"\x7fELF nonsense")
    found = status(tmp_path / "kernels.so")
    assert found.library is None
    assert "do not load" in found.message


def test_a_library_of_other_sources_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's structures and C's must be of one version."""
    copy = tmp_path / "kernels.so"
    shutil.copy(_path_of(library()), copy)
    monkeypatch.setattr(module, "sources_digest", lambda: "0123456789abcdef")
    found = status(copy)
    assert found.library is None
    assert "built from other sources" in found.message


def test_variants() -> None:
    found = library()
    assert found.variants[0] == "portable"
    assert list(found.variants) == [v for v in VARIANTS if v in found.variants], "slowest first"
    assert module.KernelStatus(found, "").variant == found.variants[-1]


def test_status_says_what_runs(tmp_path: Path) -> None:
    copy = tmp_path / "kernels.so"
    shutil.copy(_path_of(library()), copy)
    found = status(copy)
    assert found.variant is not None
    assert f"CPU kernels {found.variant}" in found.message


def test_a_machine_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "COMPILERS", ("no-such-compiler",))
    with pytest.raises(BuildError, match="no C compiler found"):
        build(tmp_path / "kernels.so")
    assert list(tmp_path.iterdir()) == []


def test_a_compiler_that_fails_leaves_nothing(tmp_path: Path) -> None:
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho 'cc: internal error' >&2\nexit 4\n")
    broken.chmod(0o755)
    with pytest.raises(BuildError, match=r"does not compile portable\.c: cc: internal error"):
        build(tmp_path / "out" / "kernels.so", str(broken))
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.skipif(find_compiler() is None, reason="there is no C compiler")
def test_variants_that_the_compiler_does_not_know_are_left_out(tmp_path: Path) -> None:
    """A compiler that refuses every instruction set: what remains is the portable variant, and it loads."""
    old = tmp_path / "cc"
    old.write_text(f'#!/bin/sh\ncase "$*" in *-mavx2*) exit 1 ;; esac\nexec {find_compiler()} "$@" -O0\n')
    old.chmod(0o755)
    build(tmp_path / "kernels.so", str(old))
    written = (tmp_path / "kernels.so").stat().st_mtime_ns
    build(tmp_path / "kernels.so", str(old))
    assert (tmp_path / "kernels.so").stat().st_mtime_ns == written, "it was there already"
    assert Library(tmp_path / "kernels.so").variants == ("portable",)


OLD_CPU = """#!/bin/sh
case "$*" in *" -mavx"*|*probe.c*|*-shared*) check= ;; *) check="-include {check}" ;; esac
exec {cc} -march=haswell -D'__builtin_cpu_supports(x)=0' $check "$@" -O0
"""
"""A compiler that makes AVX2 by default, on a processor without it."""


@pytest.mark.skipif(find_compiler() is None, reason="there is no C compiler")
@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="only x86-64 has variants")
def test_a_processor_that_lacks_what_was_compiled(tmp_path: Path) -> None:
    """The variants are in the library, and none but the portable one is used, for kernels and encoder alike."""
    compiler = tmp_path / "cc"
    check = tmp_path / "check.h"
    check.write_text("#ifdef __AVX__\n#error AVX for every processor\n#endif\n")
    compiler.write_text(OLD_CPU.format(cc=find_compiler(), check=check))
    compiler.chmod(0o755)
    build(tmp_path / "kernels.so", str(compiler))
    assert b"avx2" in (tmp_path / "kernels.so").read_bytes()
    found = Library(tmp_path / "kernels.so")
    assert found.variants == ("portable",)
    with pytest.raises(ConfigError, match="kernel variant 'avx2' does not run here; there are portable"):
        found.variant("avx2")
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    with NativeQuantizer(found, 1) as quantize:
        packed = quantize(weight, int4(32))
    right = TorchQuantizer()(weight, int4(32))
    assert torch.equal(packed.words, right.words)
    assert torch.equal(packed.scales, right.scales)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(2))
    with CpuKernels(found, 1, int8_activations=False) as native:
        assert torch.allclose(native.linear(packed.tiled())(x), x @ values(packed).T, atol=0.01, rtol=0.01)


def _path_of(found: Library) -> str:
    return str(found.calls._name)
