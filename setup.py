"""Packaging. `data_tools/` installs as `megavideo.data_tools`, `kernels/` as files beside the code;
metadata is in pyproject.toml.

Where nvcc and make are found, the kernels are compiled too. Elsewhere, or where that fails, the
install is plain Python, and megavideo/ops/library.py says at run time what is missing.
"""

import shutil
import subprocess
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.build_py import build_py

CAN_COMPILE = all(shutil.which(tool) for tool in ("nvcc", "make"))


class BuildWithKernels(build_py):
    """Copies kernels/ into the package and compiles it there. A checkout needs neither."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "megavideo" / "kernels"
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree("kernels", target, ignore=shutil.ignore_patterns("build"))
            if CAN_COMPILE:
                self._compile(target)

    def _compile(self, target: Path) -> None:
        objects = Path(self.build_lib).absolute().parent / "kernels"
        command = ["make", "-C", str(target), "-j2", f"BUILD={objects}"]
        if subprocess.run(command).returncode:
            self.warn("the CUDA kernels did not compile; MegaVideo will try again on first use")
            return
        (target / "build").mkdir()
        for name in ("libmegavideo.so", "sources.sha256"):
            shutil.copy(objects / name, target / "build")


class KernelDistribution(Distribution):
    """A wheel with compiled kernels is for one platform."""

    def has_ext_modules(self) -> bool:
        return CAN_COMPILE


setup(
    packages=[*find_packages(include=["megavideo", "megavideo.*"]), "megavideo.data_tools"],
    package_dir={"megavideo.data_tools": "data_tools"},
    package_data={"megavideo.ops": ["attention_table.json"]},
    cmdclass={"build_py": BuildWithKernels},
    distclass=KernelDistribution,
)
