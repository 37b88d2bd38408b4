"""What an installed package has of the kernels."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
INCLUDED = ("setup.py", "MANIFEST.in", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The files that packaging reads, without a build."""
    for name in INCLUDED:
        shutil.copy(ROOT / name, tmp_path)
    for folder in ("megavideo", "data_tools", "kernels"):
        ignored = shutil.ignore_patterns("build", "__pycache__")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    return tmp_path


def build(checkout: Path, path: str) -> Path:
    """Run setuptools' build with this PATH; the built kernels folder."""
    command = [sys.executable, "setup.py", "--quiet", "build", "--build-lib", "built"]
    environment = os.environ | {"PATH": path}
    subprocess.run(command, cwd=checkout, env=environment, check=True, capture_output=True)
    return checkout / "built" / "megavideo" / "kernels"


def test_without_nvcc_the_sources_are_installed(checkout: Path) -> None:
    kernels = build(checkout, path="/usr/bin:/bin")
    for source in (ROOT / "kernels").rglob("*.cu*"):
        assert (kernels / source.relative_to(ROOT / "kernels")).is_file()
    assert (kernels / "include" / "megavideo.h").is_file()
    assert not (kernels / "build").exists()
    assert (kernels.parent / "ops" / "attention_table.json").is_file()


def test_with_nvcc_the_library_is_installed_too(checkout: Path) -> None:
    nvcc = checkout / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho compiled >"$2"\n')
    nvcc.chmod(0o755)
    kernels = build(checkout, path=f"{nvcc.parent}:/usr/bin:/bin")
    built = sorted(path.name for path in (kernels / "build").iterdir())
    assert built == ["libmegavideo.so", "sources.sha256"]


def test_a_compiler_that_fails_leaves_a_plain_install(checkout: Path) -> None:
    nvcc = checkout / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    nvcc.chmod(0o755)
    kernels = build(checkout, path=f"{nvcc.parent}:/usr/bin:/bin")
    assert (kernels / "Makefile").is_file() and not (kernels / "build").exists()
