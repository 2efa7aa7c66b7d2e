"""Compiles the C kernels into the wheel if the environment has ``MANYLORA_PREBUILD=1``, as ``make wheel`` does.

Everything else is in pyproject.toml. Without the variable a wheel has the kernels' sources alone, fits every platform,
and needs no compiler to be made; nor does an editable install.
"""

import os
import platform
import shutil
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

PREBUILD = os.environ.get("MANYLORA_PREBUILD") == "1"


class DistributionWithKernels(Distribution):
    """Has setuptools make a wheel for a platform."""

    def has_ext_modules(self) -> bool:
        return PREBUILD


class BuildWithKernels(build_py):
    """Puts the compiled kernels beside the modules."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        if not Path(__file__).with_name("server").joinpath("page", "dist", "index.html").exists():
            self.warn("the wheel has no web page, because it is not built: run `make page` first")
        prebuilt = Path(self.build_lib, "server", "compute", "cpu", "prebuilt")
        shutil.rmtree(prebuilt, ignore_errors=True)  # setuptools packs whatever an earlier build left there
        if PREBUILD:
            prebuilt.mkdir()
            compile_kernels(prebuilt)


class WheelWithKernels(bdist_wheel):
    """Tags a wheel with compiled kernels for any Python 3: ctypes loads them."""

    def get_tag(self) -> tuple[str, str, str]:
        *python, platform_tag = super().get_tag()
        return ("py3", "none", platform_tag) if PREBUILD else (*python, platform_tag)


def compile_kernels(folder: Path) -> None:
    """Every variant for this machine's architecture, whether or not its processor runs it."""
    # Imports torch: only for those who asked for it, with --no-build-isolation.
    sys.path.insert(0, str(Path(__file__).parent))
    from server.compute.cpu.build import compile_library, file_name, find_compiler
    from server.compute.cpu.variants import of_architecture

    for variant in of_architecture(platform.machine()):
        compile_library(variant, find_compiler(), folder / file_name(variant))


setup(
    distclass=DistributionWithKernels,
    cmdclass={"build_py": BuildWithKernels, "bdist_wheel": WheelWithKernels},
)
