"""The library of C kernels for tests: the installed one, or one built from this checkout and kept in build/."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from offmoe.compute.kernels.library import Library, status
from offmoe.compute.kernels.native.build import BuildError, build, find_compiler, sources_digest

ROOT = Path(__file__).resolve().parents[1]

installed = pytest.mark.skipif(status().library is None, reason="the CPU kernels are not installed")
"""Mark of tests of whole models whose numeric mode computes with the installed library."""
VARIANTS = ("portable", "avx2", "avxvnni", "vnni256", "avx512vnni")


def library() -> Library:
    """Skips the test where there is no library and no compiler to build one."""
    found = _library()
    if found is None:
        pytest.skip("the CPU kernels are not installed, and there is no C compiler to build them")
    return found


def library_with(variant: str) -> Library:
    """Skips the test where the processor does not run `variant`."""
    found = library()
    if variant not in found.variants:
        pytest.skip(f"this processor, or the compiler, has no {variant}")
    return found


@cache
def _library() -> Library | None:
    if found := status().library:
        return found
    if find_compiler() is None:
        return None
    path = ROOT / "build" / f"kernels-{sources_digest()}" / "kernels.so"
    if not path.exists():
        try:
            build(path)
        except BuildError as error:
            pytest.fail(str(error))
    return Library(path)
