"""Train in one layout, go on in another: the losses are those of a run that stayed where it was."""

import json
from pathlib import Path
from typing import Any

import pytest

from megavideo.checkpoint.commit import list_checkpoints
from megavideo.checkpoint.manifest import MANIFEST, read_manifest
from megavideo.config.schema import Config
from megavideo.engine.build import build_engine
from megavideo.engine.world import World, join_world
from tests.engine import support
from tests.engine.support import FINGERPRINT, MODEL, micro_batches, save_checkpoint
from tests.engine.test_parity import LOSS_TOLERANCE
from tests.world import run_world

STEPS = 5
# An odd number of words: trained in stage image, their last rank's rows are padded.
DEEP = MODEL.model_copy(update={"layers": 4, "vocab_size": 41})
# Of four processes; what is left of them are replicas.
LAYOUTS: dict[str, dict[str, Any]] = {
    "pp2-tp2-vp2": {"pp": 2, "tp": 2, "virtual_stages": 2, "zero": 1},
    "tp2-sp-dp2-zero2": {"tp": 2, "sequence_parallel": True, "zero": 2},
    "dp4-zero3": {"zero": 3},
    "image-tp2-dp2-zero1": {"tp": 2, "zero": 1},
}


def config(folder: Path, name: str, parallel: dict[str, Any] | None = None) -> Config:
    stage = "image" if name.startswith("image") else "keyframes"
    return support.config(folder, {"stage": stage}, {}, parallel, model=DEEP)


def losses_of(settings: Config, world: World, steps: int, save: bool = False) -> list[float]:
    """Resume what is in the run's folder, or start; train, and save at the end if asked."""
    engine = build_engine(settings, world, FINGERPRINT)
    replica = world.mesh.dp
    batches = micro_batches(
        engine.progress.consumed_samples,
        replica.rank,
        replica.size,
        frames=1 if settings.recipe.stage == "image" else DEEP.frames,
    )
    losses = [engine.train_batch(batches).loss for _ in range(steps)]
    if save:
        save_checkpoint(engine, settings, FINGERPRINT)
    return losses


@pytest.mark.slow
def test_any_layout_goes_on_with_any_layouts_checkpoint(world: World, tmp_path: Path) -> None:
    unbroken = {
        stage: losses_of(config(tmp_path / stage, stage), world, 2 * STEPS)
        for stage in ("image", "video")
    }
    for name in LAYOUTS:  # each resumes a run of its own, which one process has begun
        losses_of(config(tmp_path / f"to-{name}", name), world, STEPS, save=True)
    run_world(_on_four, 4, tmp_path, deadline_s=300)
    for name, layout in LAYOUTS.items():
        expected = unbroken["image" if name.startswith("image") else "video"]
        told = json.loads((tmp_path / f"{name}.json").read_text())
        assert told["fresh"] == pytest.approx(expected[:STEPS], rel=LOSS_TOLERANCE), name
        assert told["resumed"] == pytest.approx(expected[STEPS:], rel=LOSS_TOLERANCE), name
        (checkpoint,) = list_checkpoints(tmp_path / f"from-{name}")
        assert read_manifest(checkpoint / MANIFEST).tp == layout.get("tp", 1)
        back = losses_of(config(tmp_path / f"from-{name}", name), world, STEPS)
        assert back == pytest.approx(expected[STEPS:], rel=LOSS_TOLERANCE), name


def _on_four(rank: int, folder: Path) -> None:
    for name, layout in LAYOUTS.items():
        settings = config(folder / f"from-{name}", name, layout)
        world = join_world(2.0, settings.parallel)
        told = {
            "fresh": losses_of(settings, world, STEPS, save=True),
            "resumed": losses_of(config(folder / f"to-{name}", name, layout), world, STEPS),
        }
        if rank == 0:
            (folder / f"{name}.json").write_text(json.dumps(told))
