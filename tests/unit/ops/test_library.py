"""Where the kernel library is looked for, and what is said when it cannot be had."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from megavideo.ops import library
from megavideo.ops.library import LibraryError

KERNELS = Path(__file__).parents[3] / "kernels"

# Stands for nvcc: makes each output, and libraries out of C that has the version wanted.
COMPILER = """#!/bin/sh
echo called >>"{calls}"
while [ "$1" != -o ]; do shift; done
case "$2" in
  *.so) printf 'int megavideo_abi(void) {{ return {abi}; }}
char *megavideo_error_text(int s) {{ return ""; }}
long megavideo_interval_workspace(void *p) {{ return 0; }}' | gcc -shared -fPIC -o "$2" -x c - ;;
  *) : >"$2" ;;
esac
"""


@pytest.fixture(autouse=True)
def own_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No library named, none cached, no nvcc; sources that nobody has built."""
    monkeypatch.delenv("MEGAVIDEO_LIBRARY", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    package = tmp_path / "site" / "megavideo"
    shutil.copytree(KERNELS, package / "kernels", ignore=shutil.ignore_patterns("build"))
    monkeypatch.setattr(library, "_PACKAGE", package)
    library.load.cache_clear()
    yield
    library.load.cache_clear()


def install_nvcc(tmp_path: Path, abi: int = library.ABI) -> Path:
    """Put an nvcc where CUDA_HOME has it; the file returned gets a line per call."""
    calls = tmp_path / "calls"
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(COMPILER.format(calls=calls, abi=abi))
    nvcc.chmod(0o755)
    return calls


def test_the_interface_number_is_that_of_the_header() -> None:
    header = (KERNELS / "include" / "megavideo.h").read_text()
    found = re.search(r"#define MEGAVIDEO_ABI (\d+)", header)
    assert found and int(found[1]) == library.ABI


def test_first_use_builds_into_the_users_cache_and_later_uses_do_not(tmp_path: Path) -> None:
    calls = install_nvcc(tmp_path)
    path = library.find()
    assert path.is_relative_to(tmp_path / "cache" / "megavideo")
    assert library.load().megavideo_abi() == library.ABI
    count = len(calls.read_text().splitlines())
    assert library.find() == path
    assert len(calls.read_text().splitlines()) == count
    assert sorted(entry.name for entry in path.parent.iterdir()) == [library.NAME, "lock"]


def test_changed_sources_are_built_again(tmp_path: Path) -> None:
    install_nvcc(tmp_path)
    before = library.find()
    with open(library._PACKAGE / "kernels" / "library.cu", "a") as file:
        file.write("// changed\n")
    assert library.find() != before


def test_a_build_beside_the_sources_is_taken_unless_they_changed(tmp_path: Path) -> None:
    install_nvcc(tmp_path)
    folder = library._PACKAGE / "kernels"
    subprocess.run(["make", "-C", folder, f"NVCC={tmp_path}/cuda/bin/nvcc"], check=True)
    built = folder / "build" / library.NAME
    assert library.find() == built
    with open(folder / "library.cu", "a") as file:
        file.write("// changed\n")
    assert library.find() != built


def test_without_nvcc_the_message_says_what_to_do() -> None:
    with pytest.raises(LibraryError, match=r"no nvcc in PATH or .*make -C kernels"):
        library.load()


def test_a_named_library_must_exist_and_be_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MEGAVIDEO_LIBRARY", str(tmp_path / "none.so"))
    with pytest.raises(LibraryError, match=r"MEGAVIDEO_LIBRARY=.*none\.so does not exist"):
        library.load()
    (tmp_path / "none.so").write_text("text")
    with pytest.raises(LibraryError, match="is not a libmegavideo"):
        library.load()


def test_another_interface_number_is_refused(tmp_path: Path) -> None:
    install_nvcc(tmp_path, abi=library.ABI + 1)
    with pytest.raises(LibraryError, match=f"has interface {library.ABI + 1}, .* needs"):
        library.load()


def test_a_cache_that_others_can_write_is_refused(tmp_path: Path) -> None:
    install_nvcc(tmp_path)
    cache = tmp_path / "cache" / "megavideo"
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    with pytest.raises(LibraryError, match="others can write to"):
        library.load()


def test_a_failed_build_shows_the_compilers_words(tmp_path: Path) -> None:
    install_nvcc(tmp_path)
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'unsupported gpu architecture' >&2\nexit 1\n")
    with pytest.raises(LibraryError, match="unsupported gpu architecture"):
        library.load()
