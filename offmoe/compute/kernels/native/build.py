"""Compile the CPU kernels: every variant with the flags of its instruction set, linked into one shared library.

Used by setup.py when the package is built and by tests; needs nothing but a C compiler and the standard library, and
imports nothing of offmoe. A variant that the compiler does not know is left out, the library says which it has. The
library carries a digest of its sources, so that one that does not belong to them is never used.
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
"""Where an installation has its library; ctypes takes this name on macOS too."""

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
"""Where the compiler has them. With it GCC 12 keeps sums in their registers; without, a third of the instructions of a
kernel's inner loop are moves between registers.
"""

X86_FLAGS = ("-march=x86-64",)
"""Whatever the compiler was set up to make by default: only the variants, chosen by what a processor has, take more."""

AVX2_FLAGS = ("-O3", "-mavx2", "-mfma", "-mf16c")
AVX512_FLAGS = (*AVX2_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni")
EXACT_FLAGS = ("-ffp-contract=off",)
"""Of the encoder, whose every operation rounds as torch's does."""

REQUIRED = {
    "portable.c": ("-O2", "-Wno-psabi"),
    "encode_portable.c": ("-O2", "-Wno-psabi", *EXACT_FLAGS),
    "encode.c": ("-O2",),
    "pool.c": ("-O2",),
}
VARIANTS = {
    "avx2.c": AVX2_FLAGS,
    "avxvnni.c": (*AVX2_FLAGS, "-mavxvnni"),
    "vnni256.c": (*AVX512_FLAGS, "-mprefer-vector-width=256"),
    "avx512vnni.c": AVX512_FLAGS,
    "encode_avx2.c": (*AVX2_FLAGS, *EXACT_FLAGS),
    "encode_avx512.c": (*AVX512_FLAGS, *EXACT_FLAGS),
}
"""Of x86-64. vnni256 is avxvnni's code in the encoding that AVX-512 processors have."""

COMPILERS = ("cc", "gcc", "clang")


class BuildError(Exception):
    """There is no compiler, or it failed; the message says which and how."""


def find_compiler() -> str | None:
    """Path of a C compiler, or None."""
    return next((path for name in COMPILERS if (path := shutil.which(name))), None)


def sources_digest() -> str:
    """What a library built from these sources for this kind of machine answers when asked for its sources."""
    digest = hashlib.sha256(f"{platform.system()} {platform.machine()}".encode())
    for path in sorted([*SOURCES.glob("*.c"), *SOURCES.glob("*.h"), Path(__file__)]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def build(library: Path = LIBRARY, compiler: str | None = None) -> None:
    """Write `library`, complete or not at all, unless it is there and of these sources.

    BuildError if there is no compiler, or it refuses the portable part.
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
            """The object, or what the compiler said."""
            out = Path(folder, source).with_suffix(".o")
            said = _run(compiler, *COMMON_FLAGS, *known_flags, *flags, "-c", str(SOURCES / source), "-o", str(out))
            return out if said is None else said

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
        said = _run(compiler, "-shared", "-o", str(whole), *map(str, objects), "-lpthread")
        if said is not None:
            raise BuildError(f"{compiler} does not link the kernels: {said}")
        whole.replace(library)


def _run(*command: str) -> str | None:
    """What a failed command said, or None."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        return str(error)
    return None if done.returncode == 0 else done.stderr.strip()[-2000:] or f"exit status {done.returncode}"


if __name__ == "__main__":
    build()
