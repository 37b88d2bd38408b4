"""A run that was cut for other ranks and put together again goes on as if nothing had happened."""

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from megavideo.checkpoint.convert_command import main
from megavideo.engine.build import build_engine
from megavideo.engine.world import World
from tests.engine.support import FINGERPRINT, config, micro_batches, save_checkpoint
from tests.engine.test_nonfinite import assert_same_state


def convert(*arguments: object) -> None:
    CliRunner().invoke(main, list(map(str, arguments)), catch_exceptions=False)


def test_training_goes_on_from_a_converted_run_bit_for_bit(world: World, tmp_path: Path) -> None:
    settings = config(tmp_path / "run", {"precision": "bf16"})
    engine = build_engine(settings, world, FINGERPRINT)
    for _ in range(2):
        engine.train_batch(micro_batches(engine.progress.consumed_samples))
    save_checkpoint(engine, settings, FINGERPRINT)
    convert(tmp_path / "run", tmp_path / "cut", "--to", "megavideo", "--tp", 2, "--verify")
    convert(tmp_path / "cut", tmp_path / "back", "--to", "run", "--verify")
    moved = config(tmp_path / "back", {"precision": "bf16"})
    resumed = build_engine(moved, world, FINGERPRINT)
    assert resumed.progress == engine.progress
    assert_same_state(resumed, engine)
    expected = engine.train_batch(micro_batches(engine.progress.consumed_samples))
    result = resumed.train_batch(micro_batches(resumed.progress.consumed_samples))
    assert result.loss == expected.loss


def test_converted_weights_start_a_run_like_the_run_they_came_from(
    world: World, tmp_path: Path
) -> None:
    settings = config(tmp_path / "run")
    save_checkpoint(build_engine(settings, world, FINGERPRINT), settings, FINGERPRINT)
    convert(tmp_path / "run", tmp_path / "sat", "--to", "sat", "--tp", 2)
    digests = set()
    for base in ("run", "sat"):
        started = config(tmp_path / f"on-{base}", {"base": str(tmp_path / base)})
        digests.add(build_engine(started, world, FINGERPRINT).frozen.digest)
    assert len(digests) == 1


@pytest.mark.parametrize(("precision", "zero"), [("bf16", 1), ("fp32", 3)])
def test_deepspeed_itself_restores_a_universal_checkpoint_of_ours(
    precision: str, zero: int, world: World, tmp_path: Path
) -> None:
    """Weights, moments and counts, by the loader of DeepSpeed's engine in another fresh run."""
    recipe, layout = {"precision": precision}, {"zero": zero}
    settings = config(tmp_path / "run", recipe, parallel=layout)
    engine = build_engine(settings, world, FINGERPRINT)
    for _ in range(2):
        engine.train_batch(micro_batches(engine.progress.consumed_samples))
    save_checkpoint(engine, settings, FINGERPRINT)
    convert(tmp_path / "run", tmp_path / "universal", "--to", "universal", "--verify")
    fresh = build_engine(config(tmp_path / "fresh", recipe, parallel=layout), world, FINGERPRINT)
    fresh.train_batch(micro_batches(0))
    home: Any = fresh._home
    home._engine._config.load_universal_checkpoint = True
    home._engine.load_checkpoint(str(tmp_path / "universal"))
    assert home._engine.global_steps == 2
    assert_same_state(fresh, engine)
