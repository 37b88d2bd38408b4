"""From a configuration to an engine that is ready for the next batch, fresh or resumed."""

from pathlib import Path
from typing import Any

import torch

from megavideo.checkpoint.commit import candidates_of, damage, first_whole
from megavideo.checkpoint.formats.run import RunReader
from megavideo.checkpoint.manifest import (
    Progress,
    Training,
    check_learned_from,
    read_training,
)
from megavideo.checkpoint.sources import Start, find_start
from megavideo.checkpoint.tokenizers import TokenizerDigests
from megavideo.config.deepspeed import (
    accumulation_steps,
    check_precision,
    check_schedule,
)
from megavideo.config.load import leaves
from megavideo.config.schema import Config, RecipeConfig
from megavideo.engine.base import store_base
from megavideo.engine.engine import Engine
from megavideo.engine.frozen import FrozenWeights
from megavideo.engine.home import Home, SingleStageHome
from megavideo.engine.mpu import mark_cut
from megavideo.engine.optimizer import build_optimizer, parameter_groups
from megavideo.engine.part_plan import frozen_tensors
from megavideo.engine.pipeline.home import PipelineHome
from megavideo.engine.quiet import deepspeed
from megavideo.engine.state import OptimizerState
from megavideo.engine.weights import DTYPES, checkpoint_weights, start_weights
from megavideo.engine.world import World
from megavideo.log import log
from megavideo.model.build import canonical_parameters
from megavideo.model.layers import use_pointwise
from megavideo.model.partition import ideal_bubble
from megavideo.model.places import copies
from megavideo.model.trainable import check_trainable
from megavideo.ops.pointwise import check_compiler, compiled

# Settings that a run keeps, beside the model's: no shape tells that they have changed.
OF_THE_RUN = ("recipe.stage", "recipe.window", "recipe.optimizer.name")
ONLY_AT_THE_START = ("recipe.base", "recipe.start_from")


def build_engine(
    config: Config,
    world: World,
    data: str,
    tokenizers: TokenizerDigests | None = None,
    keep_base: bool = True,
) -> Engine:
    """Build the model, hand it to DeepSpeed, resume the checkpoint in run.directory if it has one.

    Args:
        data: fingerprint of the training data and its order.
        tokenizers: that made it; None if it is made up.
        keep_base: store frozen weights in run.directory, without which its checkpoints are no use.

    Raises:
        ValueError: if layout, checkpoint, base or data do not fit; before any training.
    """
    world.from_rank_zero(lambda: check_layout(config, world.mesh.dp.size))
    if config.parallel.compile:
        world.together(lambda: check_compiler(world.device))
    checkpoint = find_resume(config, data, world)
    training = read_training(checkpoint) if checkpoint else None
    home_class: type[Home] = PipelineHome if config.parallel.pp > 1 else SingleStageHome
    model = home_class.new_model(config, world)
    if config.parallel.compile:
        use_pointwise(model, compiled())
    parameters = canonical_parameters(model)
    if checkpoint:
        world.together(lambda: checkpoint_weights(model, config, checkpoint))
    else:
        start = world.from_rank_zero(lambda: _find_start(config.recipe, tokenizers))
        world.together(lambda: start_weights(model, config, start))
    mark_cut(parameters)
    groups = parameter_groups(parameters, config.recipe.optimizer.weight_decay)
    stepped_on = torch.device("cpu") if config.parallel.offload_optimizer else world.device
    optimizer = build_optimizer(groups, config.recipe.optimizer, stepped_on)
    home = home_class.settle(model, optimizer, config, world)
    check_trainable(parameters, config.recipe.stage)
    trainable = {name: p for name, p in parameters.items() if p.requires_grad}
    copied = {name: copy.rows for name, copy in copies(home.module).items()}
    engine = Engine(
        home,
        home.objective.frames,
        OptimizerState(home.optimizer, home.wrapper, trainable, world.mesh, world.device),
        FrozenWeights(parameters, copied, world),
        config.recipe,
        world,
        training.progress if training else Progress(),
    )
    if checkpoint and training:
        _restore(engine, checkpoint, training)
    else:
        world.from_rank_zero(lambda: _check_same_base(engine, config.recipe, start.channel))
    log.info("frozen weights: %s", engine.frozen.digest)
    if not keep_base:
        return engine
    dtype = DTYPES[config.recipe.precision]
    store_base(engine.frozen, frozen_tensors(config, dtype), Path(config.run.directory))
    return engine


def _find_start(recipe: RecipeConfig, tokenizers: TokenizerDigests | None) -> Start:
    """`find_start`, whose checkpoints must have learned from tokens of the same tokenizers."""
    start = find_start(recipe)
    for name, checkpoint in (("base", start.base), ("start_from", start.channel)):
        if checkpoint is not None and tokenizers is not None:
            remedy = f"start from another recipe.{name}, or tokenise data.train with that one"
            check_learned_from(checkpoint, tokenizers, remedy)
    return start


def check_layout(config: Config, dp_size: int) -> None:
    """Refuse a batch or precision that cannot be trained in this layout (config/deepspeed.py)."""
    micro_batches = accumulation_steps(config.recipe, dp_size)
    check_schedule(config.parallel, micro_batches)
    if micro_batches < config.parallel.pp:
        log.warning(
            "%d micro-batches do not fill parallel.pp=%d stages: %.0f %% of each step is waiting; "
            "lower recipe.micro_batch or parallel.pp",
            *(micro_batches, config.parallel.pp),
            100 * ideal_bubble(config.parallel, micro_batches),
        )
    accelerator = deepspeed.get_accelerator()
    check_precision(config.recipe, config.parallel, bool(accelerator.is_fp16_supported()))


def find_resume(config: Config, data: str, world: World) -> Path | None:
    """The checkpoint in run.directory to go on from, None if there is none.

    All ranks read and check it together, each some files.

    Raises:
        ValueError: if all are damaged, or it belongs to another model, stage or data set.
    """

    def problem(checkpoint: Path) -> str | None:
        mine: list[str | None] = []
        unread = world.problem(lambda: mine.append(damage(checkpoint, world.rank, world.size)))
        if unread is not None:
            raise ValueError(
                f"{checkpoint} could not be read, which does not make it damaged: {unread}; try "
                "again, or move it away to go on from the one before"
            )
        return next(filter(None, world.gathered(mine[0])), None)

    found: list[Path | None] = []
    run = Path(config.run.directory)
    candidates = world.from_rank_zero(lambda: candidates_of(run))
    world.together(lambda: found.append(first_whole(run, candidates, problem)))
    (checkpoint,) = found
    if checkpoint is not None:
        world.from_rank_zero(lambda: _check_same_run(checkpoint, config, data))
    return checkpoint


def _check_same_run(checkpoint: Path, config: Config, data: str) -> None:
    training = read_training(checkpoint)
    if training.data != data:
        raise ValueError(
            f"{checkpoint} was trained on other data, or in another order (fingerprint "
            f"{training.data}, now {data}); give back data.train and recipe.seed, or choose "
            "another run.directory"
        )
    before = dict(leaves(training.config))
    for path, now in leaves(config.model_dump(mode="json")):
        if before.get(path, now) != now:
            _check_change(path, before[path], now, checkpoint)


def _check_change(path: str, was: Any, now: Any, checkpoint: Path) -> None:
    """Refuse a setting that makes another model or training of the same state; tell the others."""
    if path.startswith("model.") or path in OF_THE_RUN:
        raise ValueError(
            f"{checkpoint} was trained with {path}={was}, not {now}; give it back, or choose "
            "another run.directory"
        )
    if path in ONLY_AT_THE_START:
        log.warning("%s=%s has no effect: this run began with %s", path, now, was)
    elif path.startswith("recipe."):
        log.info("%s is %s from now on, it was %s", path, now, was)


def _restore(engine: Engine, checkpoint: Path, training: Training) -> None:
    reader = RunReader(checkpoint)
    engine.world.together(lambda: engine.state.restore(reader, training.progress.updates))
    for name, value in (training.loss_scaler or {}).items():
        setattr(engine.loss_scaler, name, value)
    engine.world.from_rank_zero(lambda: _check_base(engine, checkpoint, training))
    log.info("resumed %s at step %d", checkpoint, training.progress.step)


def _check_base(engine: Engine, checkpoint: Path, training: Training) -> None:
    if engine.frozen.digest != training.base:
        raise ValueError(
            f"{checkpoint} was trained over the frozen base {training.base}, but this run's is "
            f"{engine.frozen.digest}; go on with the precision that it was trained in"
        )


def _check_same_base(engine: Engine, recipe: RecipeConfig, checkpoint: Path | None) -> None:
    """Refuse to put a temporal channel over another base than it was trained over.

    Digests of different precisions cannot be compared.

    Args:
        checkpoint: that the channel comes from; None if it is new.
    """
    if checkpoint is None:
        return
    start = read_training(checkpoint)
    if (
        start.config["recipe"]["precision"] == recipe.precision
        and start.base != engine.frozen.digest
    ):
        raise ValueError(
            f"recipe.start_from={recipe.start_from} was trained over the frozen base {start.base}, "
            f"but recipe.base={recipe.base} gives {engine.frozen.digest}; name the base that it "
            f"was trained with, or the run itself: recipe.base={recipe.start_from}"
        )
