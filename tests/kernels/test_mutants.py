"""The emulator's tests can fail: kernels spoiled in one place each are all found out.

A mutant is a copy of kernels/ with one text replaced. It is caught by a fault of the emulator, by a
result that is not the softmax, or by bank conflicts.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels import test_interval, test_neighbourhood
from tests.kernels.emulated import KERNELS, SCHEDULES, Emulator, Fault, build
from tests.kernels.watched import WatchedLibrary

Case = test_interval.Case | test_neighbourhood.Case


@dataclass(frozen=True)
class Family:
    """Kernels in files named `sources`*, and what their tests do with them."""

    sources: str
    run: Callable[..., dict[str, Tensor]]
    truth: Callable[[Any], dict[str, Tensor]]
    tolerance: dict[torch.dtype, float]
    cases: Sequence[Case]
    conflict_free: Case


_INTERVAL = (
    test_interval.truth,
    test_interval.TOLERANCE,
    test_interval.CASES,
    test_interval.CASES[4],
)
FAMILIES = {
    "interval": Family("interval", test_interval.run, *_INTERVAL),
    "atomic": Family("interval", partial(test_interval.run, atomic=True), *_INTERVAL),
    "neighbourhood": Family(
        "neighbourhood",
        test_neighbourhood.run,
        test_neighbourhood.truth,
        test_neighbourhood.TOLERANCE,
        test_neighbourhood.CASES,
        test_neighbourhood.WITHOUT_CONFLICTS,
    ),
}


@dataclass(frozen=True)
class Mutant:
    """`before` occurs once in `file`; the tests of `family` must find out."""

    name: str
    family: str
    file: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.family}-{self.name.replace(' ', '-')}"


# (family, file): what it is called: (before, after)
PATCHES = {
    ("interval", "common.cuh"): {
        "no swizzle": ("(chunk ^ (row & 7)) << 4", "chunk << 4"),
        "half a swizzle": ("^ (row & 7)", "^ (row & 3)"),
        "dropout bits exchanged": ("16 * q_bit + 8 * k_bit", "8 * q_bit + 16 * k_bit"),
        "half of a row summed": ("return x + shuffle_xor(x, 2);", "return x;"),
    },
    ("neighbourhood", "common.cuh"): {
        "dropout one too many": ("& 0xff) >= threshold", "& 0xff) > threshold"),
    },
    ("interval", "fragments.cuh"): {
        "transposed load forgotten": ("ldmatrix_x4_trans(right,", "ldmatrix_x4(right,"),
    },
    ("atomic", "fragments.cuh"): {
        "scores not transposed": ("ldmatrix_x4_trans(words,", "ldmatrix_x4(words,"),
    },
    ("interval", "attention.cuh"): {
        "maximum of one lane": ("maximum = quad_max(maximum);", ""),
        "old output not shrunk": ("scale_rows(out, shrink);", ""),
        "padding written": ("if (slot < 0) continue;", ""),
        "padding read": (
            "source, real);\n    }\n  }\n}\n\n// Copy",
            "source + (real ? 0 : -8), true);\n    }\n  }\n}\n\n// Copy",
        ),
    },
    ("neighbourhood", "attention.cuh"): {
        "old sum not shrunk": ("rows.sum[half] * shrink[half]", "rows.sum[half]"),
    },
    ("interval", "interval_forward.cu"): {
        "no wait for keys": ("cp_async_wait<0>();", ""),
        "no barrier after keys": ("sync_block();  // This step", "// This step"),
        "no barrier after queries": ("cp_async_wait<1>();\n  sync_block();", "cp_async_wait<1>();"),
        "no commit of queries": ("cp_async_commit();\n  gather_step(0);", "gather_step(0);"),
        "output read too early": ("sync_warp();", ""),
        "scores not masked": ("if (!sight.all(is_text, first_key))", "if (false)"),
    },
    ("interval", "interval.cuh"): {
        "interval one too long": ("begin <= key && key < end", "begin <= key && key <= end"),
        "tile taken as whole": ("first + count <= end;", "first + count <= end + 1;"),
        "last tile left out": ("tiles_of(end) - first_image", "end / kTile - first_image"),
        "padding seen": ("{p.text_slots - length,", "{p.text_slots - length - 1,"),
    },
    ("interval", "interval_backward.cu"): {
        "no delta": ("(grad_scores[0][n][i] - delta[i / 2])", "grad_scores[0][n][i]"),
        "last queries left out": ("load_global(seen_by + 1))", "load_global(seen_by + 1) - 1)"),
        "no barrier after queries backward": (
            "sync_block();  // This step's rows",
            "// This step's rows",
        ),
    },
    ("atomic", "interval_backward.cu"): {
        "sums not cleared": ("store_global(reinterpret_cast<float4*>(sums), float4{});", ""),
        "sums of other queries": ("first_query + row, element, [&]", "first_query, element, [&]"),
        "added twice": (
            "add_global(sums, float4{",
            "for (int i = 0; i < 2; ++i) add_global(sums, float4{",
        ),
        "written instead of added": (
            "add_global(sums, float4{",
            "store_global(reinterpret_cast<float4*>(sums), float4{",
        ),
        "sums never converted": (
            "return launch_by_queries(interval_backward_end<Variant>, kTileBytes, p, stream);",
            "return 0;",
        ),
        "no barrier before adding": ("sync_block();  // All warps'", "// All warps'"),
        "keys overwritten in use": ("Way == Queries::added ? sync_block() : ", ""),
        "keys that nobody sees multiplied": (
            "if (!some.meets(block.first_key + key, 16)) continue;",
            "",
        ),
    },
    ("neighbourhood", "neighbourhood.cuh"): {
        "strip overwritten": ("sync_block();  // The last strip", "// The last strip"),
        "no wait for strip": ("cp_async_wait<0>();", ""),
        "no barrier after strip": ("sync_block();\n        for_each_chunk", "for_each_chunk"),
        "window one short": ("cell(queries.end - 1) + after + 1", "cell(queries.end - 1) + after"),
        "queries one short": ("(keys.end + before) * ratio", "(keys.end + before) * ratio - 1"),
        "sees past the window": ("right <= source.columns.after", "right <= source.columns.size"),
        "causal sees its row": ("below < 0 || (below == 0 && right <= 0)", "below <= 0"),
        "last cell counted again": ("{ return first + i < count; }", "{ return true; }"),
        "division by truncated inverse": ("return 65535u / by + 1;", "return 65536u / by;"),
        "swizzle without rows": ("(cell.row * pitch + cell.column) & 7", "cell.column & 7"),
    },
    ("neighbourhood", "neighbourhood_backward.cu"): {
        "gradients over keys in use": ("sync_warp();  // The warp's own", "// The warp's own"),
        "gradients read too early": ("sync_warp();\n  // grad_kv", "// grad_kv"),
    },
}

MUTANTS = [
    Mutant(name, family, file, before, after)
    for (family, file), patches in PATCHES.items()
    for name, (before, after) in patches.items()
]


def complaint(library: Path, family: str) -> str:
    """What the tests of a family have against a library; empty if nothing."""
    emulator, tests = Emulator(library), FAMILIES[family]
    cases = (tests.conflict_free, *filter(_is_common, tests.cases))
    for schedule, case in product(SCHEDULES, cases):  # Few mutants need the other schedule.
        kernels = WatchedLibrary(emulator, schedule)
        try:
            ours = tests.run(case, kernels)
        except Fault as fault:
            return f"fault: {fault}"
        if wrong := _wrong(ours, tests.truth(case), tests.tolerance[case.dtype]):
            return f"wrong: {', '.join(wrong)}"
        if case == tests.conflict_free and kernels.counters.bank_conflicts:
            return "bank conflicts"
    return ""


def _is_common(case: Case) -> bool:
    return case.size == 64 and case.dtype == torch.bfloat16


def _wrong(ours: dict[str, Tensor], truth: dict[str, Tensor], limit: float) -> list[str]:
    """Names of results that are off by more than `limit`; log-sum-exp must be exact to float32."""

    def is_close(name: str) -> bool:
        most = 1e-5 if name == "lse" else limit
        return torch.allclose(ours[name].double(), truth[name], rtol=most, atol=most)

    return [name for name in truth if not is_close(name)]


def _sources(kernels: Path, family: str) -> list[Path]:
    folder = kernels / "local_attention"
    named = sorted(folder.glob(f"{FAMILIES[family].sources}*.cu"))
    return [kernels / "library.cu", *named]


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_said_against_the_kernels_as_they_are(family: str) -> None:
    assert complaint(build(_sources(KERNELS, family)), family) == ""


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_a_mutant_is_caught(mutant: Mutant, tmp_path: Path) -> None:
    kernels = tmp_path / "kernels"
    shutil.copytree(KERNELS, kernels, ignore=shutil.ignore_patterns("build"))
    file = next(kernels.rglob(mutant.file))
    text = file.read_text()
    assert text.count(mutant.before) == 1, f"{mutant.file} has changed: describe the mutant anew"
    file.write_text(text.replace(mutant.before, mutant.after))
    library = build(_sources(kernels, mutant.family), kernels, optimise="-O0")
    assert complaint(library, mutant.family)
