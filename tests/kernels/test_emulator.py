"""The emulator computes what the instructions compute, and faults where they are undefined."""

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.kernels.dropout_bits import kept_bits
from tests.kernels.emulated import SCHEDULES, Counters, Emulator, Fault, Schedule, build


@pytest.fixture(scope="module")
def emulator() -> Emulator:
    return Emulator(build([Path(__file__).with_name("probes.cu")]))


def run(
    emulator: Emulator,
    name: str,
    given: Tensor,
    schedule: Schedule = "round_robin",
    blocks: int = 1,
) -> tuple[Tensor, Counters]:
    """Run a probe of probes.cu on 1024 floats; the output starts as NaN."""
    out = torch.full((1024,), torch.nan)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (given, out)]
    with emulator.watch(schedule, {"in": given}, {"out": out}) as counters:
        assert emulator.library.run_probe(name.encode(), *pointers, blocks) != -1
    return out, counters


RISING = torch.arange(1024, dtype=torch.float32)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warps_exchange_through_shared_memory(emulator: Emulator, schedule: Schedule) -> None:
    out, counters = run(emulator, "exchange", RISING, schedule)
    assert out[:64].tolist() == [float(i ^ 32) for i in range(64)]
    assert counters.barriers == 1


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_copies_arrive_by_their_wait_and_invalid_ones_are_zero(
    emulator: Emulator, schedule: Schedule
) -> None:
    out, counters = run(emulator, "copy", RISING, schedule)
    other = [4 * ((i ^ 1) + 64) if i % 2 else 0 for i in range(64)]
    assert out[:64].tolist() == [float(4 * i + other[i]) for i in range(64)]
    assert counters.copied == 16 * (64 + 32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_fragments_multiply_like_matrices(emulator: Emulator, dtype: torch.dtype) -> None:
    given = torch.randn(1024, generator=torch.Generator().manual_seed(0)).to(dtype).float()
    out, counters = run(emulator, f"product_{str(dtype).split('.')[1]}", given)
    matrix = given[:256].reshape(16, 16)
    plain, transposed = (out[256 * i :][:256].reshape(16, 16)[:, :8] * 1024 for i in (0, 1))
    torch.testing.assert_close(plain, (matrix @ matrix.T)[:, :8], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(transposed, (matrix @ matrix)[:, :8], rtol=1e-5, atol=1e-5)
    assert (counters.mma, counters.ldmatrix, counters.bank_conflicts) == (2, 4, 0)


def test_shuffles_reduce_over_quads(emulator: Emulator) -> None:
    out, _ = run(emulator, "shuffles", RISING)
    for i in range(64):
        quad = [float(j) for j in range(i // 4 * 4, i // 4 * 4 + 4)]
        assert out[i] == max(quad) + sum(quad) + (i ^ 16)


def test_rounding_is_torch_rounding(emulator: Emulator) -> None:
    exponents = torch.linspace(-30, 18, 256)
    given = torch.zeros(1024)
    given[:256] = torch.exp2(exponents) * torch.linspace(1, 2, 256)
    given[:4] = torch.tensor([65519.0, 65520.0, 2.0**-25, 3 * 2.0**-25])
    out, _ = run(emulator, "rounding", given)
    bfloat16, float16 = given[:256].bfloat16().float(), given[:256].half().float()
    assert torch.equal(out, torch.cat([bfloat16, -bfloat16, float16, -float16]))


def test_dropout_bits_are_those_of_the_restatement_in_numpy(emulator: Emulator) -> None:
    out, _ = run(emulator, "dropout", RISING)
    kept = kept_bits(0x123456789ABCDEF, np.array([3]), 64, 16, threshold=128)[0]
    assert out[:64].tolist() == (kept * 2.0 ** np.arange(16)).sum(1).tolist()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_threads_of_many_blocks_add_to_one_place(emulator: Emulator, schedule: Schedule) -> None:
    out = torch.full((1024,), torch.nan)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (RISING, out)]
    with emulator.watch(schedule, {"in": RISING}, {"out": out}) as counters:
        for name in (b"clear", b"add"):
            assert emulator.library.run_probe(name, *pointers, 5) == 0
    assert torch.equal(out[:128], 10 * RISING[:128])
    assert counters.added == 5 * 64 * 16


def test_blocks_run_in_either_order(emulator: Emulator) -> None:
    """Small numbers added before a big one count, and are lost after it."""
    given = torch.full((1024,), 0.75)
    sums = {}
    for schedule in SCHEDULES:
        out = torch.full((1024,), 0.0)
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (given, out)]
        with emulator.watch(schedule, {"in": given}, {"out": out}):
            assert emulator.library.run_probe(b"add_big_in_block_0", *pointers, 3) == 0
        sums[schedule] = float(out[0])
    assert sums["round_robin"] < sums["skewed"]


FAULTS = {
    "no_barrier": "never written|no barrier between",
    "no_second_barrier": "no barrier between",
    "no_warp_barrier": "never written|no barrier between",
    "no_wait": "before its cp.async was waited for",
    "no_commit": "before its cp.async was waited for",
    "wait_without_barrier": "never written|no barrier between|before its cp.async",
    "never_written": "never written",
    "past_shared": "outside the block's 4096 bytes",
    "misaligned": "not a multiple of 16",
    "past_input": r"in \+ 4096 are outside its 4096 bytes",
    "into_input": "in, which is read-only",
    "two_writers": r"second write to out \+ 0",
    "read_back": "written by another thread",
    "add_and_write": r"second write to out \+ 0",
    "read_sum": r"read of out \+ 0, written by another thread",
    "divergent": "while other lanes of the warp are at",
    "missed_barrier": "deadlock: from thread 0 at sync_block; from thread 32 at exit",
    "missed_shuffle": "deadlock: from thread 0 at shuffle_xor; from thread 7 at exit",
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", FAULTS)
def test_an_undefined_act_is_a_fault(emulator: Emulator, name: str, schedule: Schedule) -> None:
    with pytest.raises(Fault, match=FAULTS[name]):
        run(emulator, name, RISING, schedule)


def test_a_fault_does_not_spoil_the_next_launch(emulator: Emulator) -> None:
    with pytest.raises(Fault):
        run(emulator, "missed_barrier", RISING)
    out, _ = run(emulator, "exchange", RISING)
    assert out[0] == 32
