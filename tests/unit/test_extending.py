"""docs/extending.md: its commands run, its kernel computes, and what it names is there."""

import ctypes
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from megavideo.cli import group
from tests.kernels.emulated import KERNELS, SCHEDULES, Emulator, Fault, build

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text()
# Others run these as the page has them, because they take long: test_verify_reference.py and
# test_verify_layouts.py, which reads the line off the page.
ELSEWHERE = ("verify-reference", "verify-layouts")
# Names inside files that the recipes send a reader to.
NAMED = {
    "megavideo/config/schema.py": ["class ModelConfig", "class ParallelConfig"],
    "megavideo/model/build.py": ["def _block"],
    "megavideo/model/init.py": ["def _drawn", "def inherited_from"],
    "megavideo/model/table.py": ["def _sizes", "def shard_named", "def expected_shapes"],
    "megavideo/checkpoint/formats/sat.py": ["NAMES ="],
    "megavideo/checkpoint/formats/megatron.py": ["NAMES ="],
    "megavideo/layout/rules.py": ["def _in_order", "def block", "def loss_frames", "own_frame"],
    "megavideo/model/execution.py": ["TILES:"],
    "megavideo/parallel/region.py": ["def enter", "def leave", "def applied"],
    "megavideo/ops/backends.py": ["_OBSTACLES:"],
    "megavideo/ops/attention_table.py": ["Backend ="],
    "megavideo/ops/library.py": ["ABI ="],
    "kernels/include/megavideo.h": ["#define MEGAVIDEO_ABI"],
    "tests/unit/model/test_tensor_parallel.py": ["MODEL ="],
    "tests/unit/layout/test_rules.py": ["def published_visibility"],
    "tests/unit/layout/test_intervals.py": ["def rules_of"],
    "tests/unit/ops/test_local_attention.py": ["RULES ="],
    "tests/kernels/test_interval.py": ["CASES ="],
    "tests/kernels/test_ptxas.py": ["_ENTRY =", "BLOCKS ="],
    "tests/engine/test_resume.py": ["def assert_resumes"],
}


def commands(program: str) -> list[list[str]]:
    """Arguments of the page's calls of `program`."""
    lines = "".join(re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)).splitlines()
    assert all(line.startswith(("megavideo ", "python -m pytest ")) for line in lines)
    return [shlex.split(line[len(program) :]) for line in lines if line.startswith(program + " ")]


def test_the_commands_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    found = commands("megavideo")
    assert {words[0] for words in found} == {"config", "benchmark", *ELSEWHERE}
    for words in found:
        if words[0] not in ELSEWHERE:
            result = CliRunner().invoke(group, words, catch_exceptions=False)
            assert result.exit_code == 0, f"{words}\n{result.output}"
    assert Path("runs/attention/attention.md").is_file()
    assert ["verify-reference", "tests/reference/vectors", "--failures-only"] in found


def test_the_tests_that_prove_a_step_are_part_of_the_suite() -> None:
    for words in commands("python -m pytest"):
        places = [ROOT / word for word in words if word.startswith("tests/")]
        assert places and all(place.exists() for place in places), words
    for file, texts in NAMED.items():
        content = (ROOT / file).read_text()
        assert Path(file).name in PAGE
        for text in texts:
            assert text in content, f"{file} has no {text!r}"
            assert re.search(r"\w+", text.removeprefix("def ").removeprefix("class "))[0] in PAGE  # type: ignore[index]


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> tuple[Emulator, Any]:
    """The page's kernel, built for the emulator in a copy of kernels/, and its structure."""
    (cuda,) = re.findall(r"```cuda\n(.*?)```", PAGE, re.DOTALL)
    (python,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    space: dict[str, Any] = {"ctypes": ctypes}
    exec(python, space)
    (members,) = re.findall(r"`(const float .*?)`", space["Scale"].__doc__)
    kernels = tmp_path_factory.mktemp("example") / "kernels"
    shutil.copytree(KERNELS, kernels, ignore=shutil.ignore_patterns("build"))
    header = kernels / "include" / "megavideo.h"
    declared = (
        f"typedef struct {{ {members} }} MegavideoScale;\n"
        "int megavideo_scale(const MegavideoScale *problem, void *stream);\n"
    )
    end = "#pragma GCC visibility pop"
    header.write_text(header.read_text().replace(end, declared + end))
    source = kernels / "local_attention" / "scale.cu"
    source.write_text(cuda)
    return Emulator(build([source], kernels, optimise="-O0")), space["Scale"]


def test_the_kernel_of_the_page_computes_and_its_emulator_watches(
    example: tuple[Emulator, Any],
) -> None:
    emulator, structure = example
    given = torch.arange(1000, dtype=torch.float32)
    for schedule in SCHEDULES:
        out = torch.full_like(given, torch.nan)
        problem = structure(given.data_ptr(), out.data_ptr(), 1000, 3.0)
        with emulator.watch(schedule, {"in": given}, {"out": out}):
            assert emulator.library.megavideo_scale(ctypes.byref(problem), None) == 0
        assert torch.equal(out, 3 * given)
    with (
        pytest.raises(Fault) as fault,
        emulator.watch("skewed", {"in": given[:999]}, {"out": out}),
    ):
        emulator.library.megavideo_scale(ctypes.byref(problem), None)
    assert str(fault.value) in PAGE
