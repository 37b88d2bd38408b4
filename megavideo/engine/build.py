"""From a configuration to an engine that is ready for the next batch, fresh or resumed."""

from pathlib import Path

from torch import nn

from megavideo.checkpoint.base import base_path, store_base
from megavideo.checkpoint.commit import newest_whole
from megavideo.checkpoint.files import read_tensors
from megavideo.checkpoint.manifest import Manifest, Progress, read_manifest
from megavideo.checkpoint.sources import OPTIMIZER, find_checkpoint, read_weights
from megavideo.config.deepspeed import (
    accumulation_steps,
    check_precision,
    deepspeed_config,
)
from megavideo.config.schema import Config, RecipeConfig
from megavideo.engine.engine import Engine
from megavideo.engine.frozen import FrozenWeights
from megavideo.engine.home import SingleStageHome
from megavideo.engine.objective import Objective
from megavideo.engine.optimizer import build_optimizer, parameter_groups
from megavideo.engine.quiet import deepspeed, hushed
from megavideo.engine.state import OptimizerState
from megavideo.engine.weights import checkpoint_weights, new_model, start_weights
from megavideo.engine.world import World
from megavideo.log import log
from megavideo.model.build import canonical_parameters
from megavideo.model.trainable import check_trainable


def build_engine(config: Config, world: World, data: str) -> Engine:
    """Build the model, hand it to DeepSpeed, resume the checkpoint in run.directory if it has one.

    Args:
        data: fingerprint of the training data and its order.

    Raises:
        ValueError: if layout, checkpoint, base or data do not fit; before any training.
    """
    world.from_rank_zero(lambda: check_layout(config, world.mesh.dp.size))
    checkpoint = world.from_rank_zero(lambda: find_resume(config, data))
    manifest = read_manifest(checkpoint) if checkpoint else None
    model = new_model(config, world.device)
    parameters = canonical_parameters(model)
    if checkpoint:
        world.first_on_rank_zero(lambda: checkpoint_weights(parameters, checkpoint))
    else:
        world.first_on_rank_zero(lambda: start_weights(parameters, config))
    home = _initialize(model, parameters, config, world)
    check_trainable(parameters, config.recipe.stage)
    trainable = {name: p for name, p in parameters.items() if p.requires_grad}
    engine = Engine(
        home,
        home.objective.frames,
        OptimizerState(home.optimizer, home.wrapper, trainable, world.device),
        FrozenWeights(parameters, world),
        config.recipe,
        world,
        manifest.progress if manifest else Progress(),
    )
    if checkpoint and manifest:
        _restore(engine, checkpoint, manifest)
    else:
        world.from_rank_zero(lambda: _check_same_base(engine, config.recipe))
    _keep_base(engine, Path(config.run.directory))
    return engine


def check_layout(config: Config, dp_size: int) -> None:
    """Refuse a batch or precision that cannot be trained in this layout (config/deepspeed.py)."""
    accumulation_steps(config.recipe, dp_size)
    accelerator = deepspeed.get_accelerator()
    check_precision(config.recipe, config.parallel, bool(accelerator.is_fp16_supported()))


def find_resume(config: Config, data: str) -> Path | None:
    """The checkpoint in run.directory to go on from, None if there is none.

    Raises:
        ValueError: if it belongs to another stage, optimizer or data set.
    """
    run = Path(config.run.directory)
    checkpoint = newest_whole(run)
    if checkpoint is None:
        return None
    manifest = read_manifest(checkpoint)
    if manifest.data != data:
        raise ValueError(
            f"{checkpoint} was trained on other data, or in another order (fingerprint "
            f"{manifest.data}, now {data}); give back data.train and recipe.seed, or choose "
            "another run.directory"
        )
    before = manifest.config["recipe"]
    now = config.recipe
    for key, was, wanted in (
        ("recipe.stage", before["stage"], now.stage),
        ("recipe.optimizer.name", before["optimizer"]["name"], now.optimizer.name),
    ):
        if was != wanted:
            raise ValueError(
                f"{checkpoint} was trained with {key}={was}, not {wanted}; choose another "
                "run.directory"
            )
    return checkpoint


def _initialize(
    model: nn.Module, parameters: dict[str, nn.Parameter], config: Config, world: World
) -> SingleStageHome:
    groups = parameter_groups(parameters, config.recipe.optimizer.weight_decay)
    optimizer = build_optimizer(groups, config.recipe.optimizer, world.device)
    with hushed():
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=deepspeed_config(config.recipe, config.parallel, world.mesh.dp.size),
            dist_init_required=False,
        )
    objective = Objective(config.model, config.recipe, world.device)
    return SingleStageHome(engine, objective, config.recipe.optimizer.clip, world)


def _restore(engine: Engine, checkpoint: Path, manifest: Manifest) -> None:
    moments = read_tensors(checkpoint / OPTIMIZER, manifest.files[OPTIMIZER])
    engine.state.restore(read_weights(checkpoint), moments, manifest.progress.updates)
    for name, value in (manifest.loss_scaler or {}).items():
        setattr(engine.loss_scaler, name, value)
    if engine.frozen.digest != manifest.base:
        raise ValueError(
            f"{checkpoint} was trained over the frozen base {manifest.base}, but this run's is "
            f"{engine.frozen.digest}; go on with the precision that it was trained in"
        )
    log.info("resumed %s at step %d", checkpoint, manifest.progress.step)


def _check_same_base(engine: Engine, recipe: RecipeConfig) -> None:
    """Refuse to put a temporal channel over another base than it was trained over.

    Digests of different precisions cannot be compared.
    """
    if recipe.start_from is None:
        return
    checkpoint = find_checkpoint(Path(recipe.start_from))
    assert checkpoint is not None, "its weights were read before"
    start = read_manifest(checkpoint)
    if (
        start.config["recipe"]["precision"] == recipe.precision
        and start.base != engine.frozen.digest
    ):
        raise ValueError(
            f"recipe.start_from={recipe.start_from} was trained over the frozen base {start.base}, "
            f"but recipe.base={recipe.base} gives {engine.frozen.digest}; name the base that it "
            f"was trained with, or the run itself: recipe.base={recipe.start_from}"
        )


def _keep_base(engine: Engine, run: Path) -> None:
    """Store the frozen weights in the run's folder, unless an earlier start did."""
    digest = engine.frozen.digest
    if digest is None:
        return
    log.info("frozen weights: %s", digest)
    if not engine.world.from_rank_zero(base_path(run, digest).exists):
        tensors = engine.frozen.gather()
        engine.world.from_rank_zero(lambda: store_base(run, tensors, digest))
