"""`megavideo train`: start a run, or go on with it."""

import math
import os
import socket
import sys
import time
from functools import partial
from pathlib import Path
from typing import NoReturn

import click
import torch

from megavideo.checkpoint.commit import checkpoints_of, list_checkpoints
from megavideo.checkpoint.tokenizers import TokenizerDigests
from megavideo.config.command import config_arguments
from megavideo.config.deepspeed import accumulation_steps, check_schedule, check_world
from megavideo.config.load import dump_config, load_config
from megavideo.config.schema import Config
from megavideo.data.batch import BatchStream, check_alike, open_stream
from megavideo.engine.build import build_engine
from megavideo.engine.errors import RunFailed, rank_lost
from megavideo.engine.snapshot import Saver
from megavideo.engine.weights import new_model
from megavideo.engine.world import World, join_world
from megavideo.files import atomic_write
from megavideo.log import log, rank
from megavideo.model.build import canonical_parameters, stage_grid
from megavideo.model.flops import training_flops
from megavideo.model.partition import describe_stages, ideal_bubble
from megavideo.train.loop import Run, train
from megavideo.train.record import Recorder

LATE_S = 20.0  # how much later than others rank 0 may come, on a busy node


@click.command()
@config_arguments
@click.option("--fresh", is_flag=True, help="Refuse to go on with a run that has a checkpoint.")
@click.option("--dry-run", is_flag=True, help="Print layout, counts and batch arithmetic; exit.")
@click.option(
    "--stopped-status", type=click.IntRange(0, 255), default=0, show_default=True,
    envvar="MEGAVIDEO_STOPPED_STATUS", show_envvar=True,
    help="Exit status of a run that a signal ended early, for schedulers to which 0 means done.",
)  # fmt: skip
def main(
    files: tuple[str, ...],
    assignments: tuple[str, ...],
    fresh: bool,
    dry_run: bool,
    stopped_status: int,
) -> None:
    """Train a model, or go on with a run: run.directory's checkpoint is resumed if it has one.

    A resumed run draws the samples that an unbroken one would have drawn. SIGTERM and Ctrl-C
    finish the step, save, and exit with status 0. Metrics go to metrics.jsonl and tensorboard/ in
    the run's folder. Several processes are started by torchrun; parallel.pp x parallel.tp of them
    are one replica of the model. A signal to torchrun reaches them all, but torchrun itself then
    exits with 1; launch/local.sh and its like keep the status.

    \b
    Example:
      torchrun --nproc-per-node 2 -m megavideo train configs/model/demo.yaml \\
          configs/recipe/stage1.yaml configs/parallel/laptop.yaml configs/data/demo.yaml \\
          --set recipe.base=runs/base --set recipe.steps=200 --set run.directory=runs/stage1
    """
    config = load_on_all_ranks(files, assignments)
    if dry_run:
        click.echo(describe(config, int(os.environ.get("WORLD_SIZE", "1"))))
        return
    world = join_world(config.run.timeout_minutes, config.parallel)
    if fresh:
        world.from_rank_zero(lambda: _refuse_checkpoints(Path(config.run.directory)))
    try:
        run = _open_run(config, world)
        train(run)
    except RunFailed as error:
        if world.rank:
            _leave_it_to_rank_zero(1)
        raise click.ClickException(str(error)) from None
    except RuntimeError as error:
        if not rank_lost(error):
            raise
        raise click.ClickException(_loss_of_rank(error, world, config)) from error
    torch.distributed.destroy_process_group()
    if run.step < config.recipe.steps:
        sys.exit(stopped_status)


def _loss_of_rank(error: RuntimeError, world: World, config: Config) -> str:
    """One line for each rank that is left: which of them were there tells which are not."""
    cause = str(error).splitlines()[0]
    return (
        f"rank {world.rank} of {world.size} on {socket.gethostname()} lost another rank at a "
        f"collective: that process or its node has failed or cannot be reached, or it took longer "
        f"than run.timeout_minutes={config.run.timeout_minutes}. The last checkpoint is intact; "
        f"the same command goes on from it, also on other nodes. ({cause})"
    )


def load_on_all_ranks(files: tuple[str, ...], assignments: tuple[str, ...]) -> Config:
    """`load_config`, its errors told once: every rank reads the same files."""
    try:
        return load_config(files, assignments)
    except (ValueError, FileNotFoundError):
        if rank():
            _leave_it_to_rank_zero(2)
        raise


def _leave_it_to_rank_zero(status: int) -> NoReturn:
    """End after rank 0 has said why: torchrun ends all as soon as one has ended."""
    time.sleep(LATE_S)
    sys.exit(status)


def describe(config: Config, world_size: int) -> str:
    """What a run would do, in words and numbers.

    Raises:
        ValueError: if the batch does not divide or the world has another size.
    """
    recipe, parallel = config.recipe, config.parallel
    check_world(parallel, world_size)
    replicas = world_size // (parallel.pp * parallel.tp)
    accumulation = accumulation_steps(recipe, replicas)
    check_schedule(parallel, accumulation)
    parameters = canonical_parameters(new_model(config, torch.device("meta")))
    trainable = sum(p.numel() for p in parameters.values() if p.requires_grad)
    frozen = sum(p.numel() for p in parameters.values() if not p.requires_grad)
    flops = training_flops(config.model, recipe) * recipe.batch
    grid = stage_grid(config.model, recipe.stage)
    return "\n".join(
        (
            f"stage        {recipe.stage}, {grid.text} text slots and {grid.frames} frame(s) of "
            f"{grid.side} x {grid.side} tokens: {grid.sequence} a sample",
            f"parameters   {trainable:,} trainable, {frozen:,} frozen",
            f"layout       {world_size} process(es) = pp {parallel.pp} x dp {replicas} x tp "
            f"{parallel.tp}, ZeRO {parallel.zero}, {recipe.precision}, "
            f"recompute {parallel.recompute}"
            + (", optimizer in host memory" if parallel.offload_optimizer else ""),
            *_pipeline(config, accumulation),
            f"batch        {recipe.batch} samples = {replicas} replica(s) x {accumulation} "
            f"micro-batches x {recipe.micro_batch}",
            f"steps        {recipe.steps:,}: {recipe.steps * recipe.batch:,} samples, "
            f"{recipe.steps * recipe.batch * grid.sequence:,} tokens",
            f"work         {flops / 1e12:,.3f} TFLOP a step, "
            f"{flops * recipe.steps:.2e} FLOP in all",
            f"checkpoints  {_saves(config)} in {checkpoints_of(Path(config.run.directory))}, "
            f"the newest {config.run.keep_last} kept"
            + (f", and every {config.run.keep_every:,}th step" if config.run.keep_every else ""),
        )
    )


def _pipeline(config: Config, micro_batches: int) -> list[str]:
    if config.parallel.pp == 1:
        return []
    stages = describe_stages(config.model, config.recipe, config.parallel)
    bubble = ideal_bubble(config.parallel, micro_batches)
    lines = [*stages, f"{bubble:.1%} of a step is bubble, with even stages and free communication"]
    return [f"{'' if number else 'pipeline':<13}{line}" for number, line in enumerate(lines)]


def _saves(config: Config) -> int:
    every = config.run.save_every
    return math.ceil(config.recipe.steps / every) if every else 1


def _refuse_checkpoints(run: Path) -> None:
    if list_checkpoints(run):
        raise FileExistsError(
            f"{run} has checkpoints, and --fresh goes on with none; choose another run.directory, "
            "or move the folder away yourself"
        )


def _open_run(config: Config, world: World) -> Run:
    training = _open_stream(config, world, config.data.train)
    validation = None
    if config.run.evaluate_every and config.data.validation is not None:
        validation = _open_stream(config, world, config.data.validation)
        world.first_on_rank_zero(partial(check_alike, training, validation))
    tokenizers = TokenizerDigests.of(training.making)
    engine = build_engine(config, world, training.fingerprint, tokenizers)
    world.from_rank_zero(lambda: _keep_config(config))  # now that nothing refused it
    step = engine.progress.step
    has_random_base = config.recipe.base is None and config.recipe.stage != "image"
    if has_random_base and step == 0 and world.rank == 0:
        log.warning("recipe.base is not set: the frozen base keeps its random initial values")
    if step >= config.recipe.steps:
        log.info("nothing to do: step %d of recipe.steps=%d is done", step, config.recipe.steps)
    recorder = Recorder(config, engine.loss_frames, world.rank, world.size, step)
    saver = Saver(engine, config, training.fingerprint, tokenizers)
    return Run(config, engine, training, validation, recorder, saver, step, step)


def _keep_config(config: Config) -> None:
    with atomic_write(Path(config.run.directory) / "config.yaml") as file:
        file.write(dump_config(config).encode())


def _open_stream(config: Config, world: World, folder: str) -> BatchStream:
    quarantine = Path(config.run.directory) / "quarantine.jsonl"
    return world.first_on_rank_zero(
        lambda: open_stream(config.data, config.model, config.recipe, folder, quarantine)
    )


if __name__ == "__main__":
    main()
