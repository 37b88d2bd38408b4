"""Saving a run: every rank brings its part, rank 0 writes the checkpoint."""

from pathlib import Path

from megavideo.checkpoint.commit import new_checkpoint, prune
from megavideo.checkpoint.files import write_tensors
from megavideo.checkpoint.manifest import Manifest, write_manifest
from megavideo.checkpoint.sources import OPTIMIZER, WEIGHTS
from megavideo.config.schema import Config
from megavideo.engine.engine import Engine
from megavideo.log import log

# What DeepSpeed's dynamic loss scaler changes while it runs.
LOSS_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def save_checkpoint(engine: Engine, config: Config, data: str) -> None:
    """Write a checkpoint of `engine` into the run's folder. All ranks must call it.

    Args:
        data: fingerprint of the training data.

    Raises:
        RunFailed: if a frozen weight changed; then nothing is written.
    """
    engine.frozen.check()
    tensors = {
        WEIGHTS: engine.state.gather_weights(),
        OPTIMIZER: engine.state.gather_moments(),
    }
    run = Path(config.run.directory)

    def write() -> None:
        with new_checkpoint(run, engine.progress.step) as folder:
            files = {name: write_tensors(folder / name, held) for name, held in tensors.items()}
            write_manifest(
                folder,
                Manifest(
                    engine.progress,
                    config.model_dump(mode="json"),
                    data,
                    engine.frozen.digest,
                    _loss_scaler(engine),
                    files,
                ),
            )
        prune(run, config.run.keep_last)
        log.info("saved step %d (frozen weights %s)", engine.progress.step, engine.frozen.digest)

    engine.world.from_rank_zero(write)


def _loss_scaler(engine: Engine) -> dict[str, float] | None:
    scaler = engine.loss_scaler
    return None if scaler is None else {name: getattr(scaler, name) for name in LOSS_SCALER}
