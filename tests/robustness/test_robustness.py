"""The programs of this folder, with few kills and flips; run them by themselves for many."""

import subprocess
import sys

import pytest

from tests.robustness.flip_bits import count_silent, flip_and_load


def test_no_flipped_bit_is_loaded_silently() -> None:
    outcomes = flip_and_load(30, seed=1)
    assert sum(outcomes.values()) == 30
    assert count_silent(outcomes) == 0, outcomes


@pytest.mark.slow
def test_a_killed_run_ends_like_one_that_was_not() -> None:
    # In a process of its own, because it forks.
    line = [sys.executable, "-m", "tests.robustness.kill_ranks", "--kills", "1"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    assert "equal the unbroken run's, bit for bit" in done.stdout
