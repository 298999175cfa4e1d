"""Everything about the package is in pyproject.toml, except how its C kernels are compiled.

They are optional: without a C compiler the package installs all the same, and computes with torch's operators.
"""

import importlib.util
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

NATIVE = "offmoe.compute.kernels.native"
FOLDER = Path(__file__).parent.joinpath(*NATIVE.split("."))


class BuildKernels(build_ext):
    """A plain shared library without Python's ABI, by the package's own compiler calls: flags differ between files."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def build_extension(self, ext: Extension) -> None:
        spec = importlib.util.spec_from_file_location("offmoe_native_build", FOLDER / "build.py")
        build = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(build)
        try:
            build.build(Path(self.get_ext_fullpath(ext.name)).resolve())
        except build.BuildError as error:
            raise CompileError(f"the CPU kernels were not built, offmoe will use torch's operators: {error}") from error


setup(
    ext_modules=[
        Extension(
            f"{NATIVE}.kernels",
            sources=sorted(str(path.relative_to(Path(__file__).parent)) for path in FOLDER.glob("*.c")),
            depends=sorted(str(path.relative_to(Path(__file__).parent)) for path in FOLDER.glob("*.h")),
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)
