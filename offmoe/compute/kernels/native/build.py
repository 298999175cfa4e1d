"""Compile the CPU kernels: every variant with the flags of its instruction set, linked into one shared library.

setup.py uses it when the package is built, and so do tests. It needs a C compiler and the standard library, and imports
nothing of offmoe. Variants that the compiler does not know are omitted; the library lists those that it has. It carries
a digest of its sources, so that a library built from other sources is never used.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent
LIBRARY = SOURCES / "kernels.so"
"""Path of an installation's library. ctypes accepts this name on macOS too."""

COMMON_FLAGS = (
    "-std=gnu11",
    "-fPIC",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
)
GCC_FLAGS = ("-fno-tree-coalesce-vars",)
"""Used if the compiler knows them. Without this one, GCC 12 spends a third of the instructions of a kernel's inner loop
on moves between registers."""

X86_FLAGS = ("-march=x86-64",)
"""The baseline, whatever the compiler's default is. Only the variants, chosen by the processor, need more."""

AVX2_FLAGS = ("-O3", "-mavx2", "-mfma", "-mf16c")
AVX512_FLAGS = (*AVX2_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni")
EXACT_FLAGS = ("-ffp-contract=off",)
"""For the encoder, the decoders and what stands between a layer's parts: each operation rounds as torch's does."""

REQUIRED = {
    "portable.c": ("-O2", "-Wno-psabi"),
    "encode_portable.c": ("-O2", "-Wno-psabi", *EXACT_FLAGS),
    "encode.c": ("-O2",),
    "decode.c": ("-O2",),
    "retile.c": ("-O3",),
    "tile.c": ("-O3",),
    "place.c": ("-O2",),
    "decode_portable.c": ("-O2", *EXACT_FLAGS),
    "pool.c": ("-O2",),
    "attention.c": ("-O3",),
    "multiply.c": ("-O3",),
    "route.c": ("-O3",),
    "layers.c": ("-O3", *EXACT_FLAGS),
}
VARIANTS = {
    "avx2.c": AVX2_FLAGS,
    "avxvnni.c": (*AVX2_FLAGS, "-mavxvnni"),
    "vnni256.c": (*AVX512_FLAGS, "-mprefer-vector-width=256"),
    "avx512vnni.c": AVX512_FLAGS,
    "encode_avx2.c": (*AVX2_FLAGS, *EXACT_FLAGS),
    "encode_avx512.c": (*AVX512_FLAGS, *EXACT_FLAGS),
    "decode_avx2.c": (*AVX2_FLAGS, *EXACT_FLAGS),
    "decode_avx512.c": (*AVX512_FLAGS, *EXACT_FLAGS, "-mprefer-vector-width=256"),
    "decode_avx512bf16.c": (*AVX512_FLAGS, *EXACT_FLAGS, "-mavx512bf16", "-mprefer-vector-width=256"),
}
"""Variants for x86-64. vnni256 is the code of avxvnni in the encoding of AVX-512 processors, with the decoders for all
of these: where avx512vnni decodes with AVX512-BF16, a test of vnni256 still runs those."""

COMPILERS = ("cc", "gcc", "clang")


class BuildError(Exception):
    """There is no compiler, or it failed; the message says which one, and why."""


def find_compiler() -> str | None:
    """Path of a C compiler, or None."""
    return next((path for name in COMPILERS if (path := shutil.which(name))), None)


def sources_digest() -> str:
    """The digest that a library of these sources for this kind of machine carries."""
    digest = hashlib.sha256(f"{platform.system()} {platform.machine()}".encode())
    for path in sorted([*SOURCES.glob("*.c"), *SOURCES.glob("*.h"), Path(__file__)]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def build(library: Path = LIBRARY, compiler: str | None = None) -> None:
    """Write `library`, completely or not at all, unless it exists and was built from these sources.

    Raises:
        BuildError: there is no compiler, or it refuses the portable part.
    """
    if library.exists() and sources_digest().encode() in library.read_bytes():
        return
    compiler = compiler or find_compiler()
    if compiler is None:
        raise BuildError(f"no C compiler found (looked for {', '.join(COMPILERS)})")
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="offmoe-build-", dir=library.parent) as folder:
        probe = Path(folder, "probe.c")
        probe.write_text("int nothing;\n")
        known_flags = [
            flag for flag in GCC_FLAGS if _run(compiler, "-Werror", flag, "-c", str(probe), "-o", f"{probe}.o") is None
        ]
        known_flags += X86_FLAGS if x86 else ()

        def compile_one(source: str, *flags: str) -> Path | str:
            """The object file, or the compiler's error message."""
            out = Path(folder, source).with_suffix(".o")
            error = _run(compiler, *COMMON_FLAGS, *known_flags, *flags, "-c", str(SOURCES / source), "-o", str(out))
            return out if error is None else error

        with ThreadPoolExecutor(2) as pool:
            required = {name: pool.submit(compile_one, name, *flags) for name, flags in REQUIRED.items()}
            variants = {name: pool.submit(compile_one, name, *flags) for name, flags in VARIANTS.items() if x86}
            objects = [done for job in variants.values() if isinstance(done := job.result(), Path)]
            known = [f"-DOFFMOE_HAS_{path.stem.upper()}" for path in objects]
            digest = f'-DOFFMOE_SOURCES="{sources_digest()}"'
            required["expert.c"] = pool.submit(compile_one, "expert.c", "-O2", *known, digest)
        for name, job in required.items():
            done = job.result()
            if not isinstance(done, Path):
                raise BuildError(f"{compiler} does not compile {name}: {done}")
            objects.append(done)
        whole = Path(folder, library.name)
        error = _run(compiler, "-shared", "-o", str(whole), *map(str, objects), "-lpthread", "-lm")
        if error is not None:
            raise BuildError(f"{compiler} does not link the kernels: {error}")
        whole.replace(library)


def _run(*command: str) -> str | None:
    """The error message of a failed command; None if it succeeded."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        return str(error)
    return None if done.returncode == 0 else done.stderr.strip()[-2000:] or f"exit status {done.returncode}"


if __name__ == "__main__":
    build()
