"""`megavideo doctor`: one verdict a line, and status 1 if training would fail."""

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import click
import torch.distributed as dist

from megavideo.config.command import config_arguments
from megavideo.config.deepspeed import check_world
from megavideo.config.load import load_config
from megavideo.config.schema import Config
from megavideo.data.urls import resolve
from megavideo.doctor import network, storage
from megavideo.doctor.facts import Facts, collect, with_own_names
from megavideo.doctor.judge import judge
from megavideo.doctor.verdict import Verdict, failed
from megavideo.engine.build import check_layout
from megavideo.engine.errors import rank_lost
from megavideo.engine.world import World, join_world
from megavideo.log import log, rank


@click.command()
@config_arguments
@click.option("--directory", help="Folder to test instead of run.directory (default: this one).")
@click.option(
    "--timeout", type=click.FloatRange(1, 3600), default=60.0, show_default=True,
    help="Longest wait for another node, in seconds.",
)  # fmt: skip
def main(
    files: tuple[str, ...], assignments: tuple[str, ...], directory: str | None, timeout: float
) -> None:
    """Would training work here? Checks every node; give it the configuration that you will train.

    Start it as you would start training, on the same nodes: versions, GPUs, fused operators,
    limits, all-reduce within and between nodes, clocks, the run's folder, space for checkpoints.
    One verdict a line: ok, warn, or fail with the remedy; status 1 if anything fails.

    \b
    Example:
      megavideo doctor                                      this machine, one process
      launch/slurm.sbatch doctor configs/model/cogvideo-9b.yaml configs/recipe/stage1.yaml \\
          configs/parallel/zero2.yaml configs/data/local.yaml --set run.directory=runs/stage1
    """
    config = load_config(files, assignments) if files else None
    facts = collect(_paths(config))
    verdicts = _together(facts, config, directory, timeout)
    if rank() == 0 or (verdicts[0].check == "rendezvous" and facts.local_rank == 0):
        click.echo("\n".join(map(str, verdicts)))
    if verdicts[0].check == "rendezvous" and _world_size() > 1:
        # Where torchrun's store is, its end ends the other nodes', which may not have spoken yet.
        time.sleep(timeout)
    # One process of a node is enough: at the first status that is not 0, torchrun kills the others,
    # and one of them may still be printing.
    if failed(verdicts) and facts.local_rank == 0:
        sys.exit(1)


def _paths(config: Config | None) -> tuple[str, ...]:
    """Local files and folders that every node reads."""
    if config is None:
        return ()
    data = config.data
    addresses = [address for address in (data.train, data.validation) if address]
    places = [resolve(address, data.allow_commands) for address in addresses]
    folders = [str(place) for place in places if isinstance(place, Path)]
    named = (data.text_tokenizer, config.recipe.base, config.recipe.start_from)
    return (*folders, *(path for path in named if path))


def _together(
    facts: Facts, config: Config | None, directory: str | None, timeout: float
) -> list[Verdict]:
    """The verdicts of all ranks, the same on each; alone, if the others cannot be reached."""
    try:
        world = join_world(timeout / 60)
        verdicts = _examine(world, facts, config, directory)
        dist.barrier()
        dist.destroy_process_group()
    except RuntimeError as error:
        if not rank_lost(error):
            raise
        alone = replace(facts, rank=0, local_rank=0)
        return [_unreachable(facts, error, timeout), *judge([alone])]
    return verdicts


def _unreachable(facts: Facts, error: RuntimeError, timeout: float) -> Verdict:
    place = os.environ.get("MASTER_ADDR", "itself")
    text = (
        f"rank {facts.rank} on {facts.node} does not reach all {_world_size()} ranks ({place}) "
        f"within {timeout:g} s: look at firewalls, MEGAVIDEO_INTERFACE and dead nodes "
        f"({str(error).splitlines()[0]})"
    )
    return Verdict("fail", "rendezvous", text)


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _examine(
    world: World, own: Facts, config: Config | None, directory: str | None
) -> list[Verdict]:
    gathered: list[Facts] = [own] * world.size
    dist.all_gather_object(gathered, own)
    facts = with_own_names(gathered)
    if world.rank == 0:
        log.info("%d rank(s) on %d node(s)", world.size, len(network.leaders(facts)))
    verdicts = judge(facts)
    verdicts += network.bandwidth(facts, world.device)
    verdicts.append(_clocks(world, facts))
    verdicts += _folder(world, facts, config, directory)
    if config is not None:
        verdicts.append(_layout(config, world.size))
    return world.from_rank_zero(lambda: verdicts)


def _clocks(world: World, facts: list[Facts]) -> Verdict:
    heads = network.leaders(facts)
    ranks = [head.rank for head in heads]
    offsets = network.clock_offsets(ranks, world.device) if world.rank in ranks else {}
    return network.judge_clocks({facts[r].node: offset for r, offset in offsets.items()})


def _folder(
    world: World, facts: list[Facts], config: Config | None, directory: str | None
) -> list[Verdict]:
    wanted = Path(directory or (config.run.directory if config else "."))
    folder = world.from_rank_zero(lambda: storage.existing(wanted))
    mark = world.from_rank_zero(lambda: _mark(folder))
    if isinstance(mark, Verdict):
        return [mark]
    seen: list[bool] = [False] * world.size
    dist.all_gather_object(seen, mark.exists())
    if world.rank == 0:
        mark.unlink()
    heads = network.leaders(facts)
    blind = [head.node for head in heads if not seen[head.rank]]
    verdicts = [storage.judge_shared(folder, blind, len(heads))]
    if world.rank == 0:
        checkpoint = storage.sizes(config).checkpoint if config else None
        verdicts.append(_rates(folder, checkpoint))
        if config:
            verdicts.append(storage.judge_space(folder, config))
    return verdicts


def _mark(folder: Path) -> Path | Verdict:
    try:
        return storage.leave_mark(folder)
    except OSError as error:
        return storage.unusable("shared folder", folder, error)


def _rates(folder: Path, checkpoint: int | None) -> Verdict:
    try:
        return storage.judge_rates(folder, storage.measure(folder), checkpoint)
    except OSError as error:  # raised on one rank alone, it would leave the others waiting
        return storage.unusable("storage", folder, error)


def _layout(config: Config, world_size: int) -> Verdict:
    replica = config.parallel.pp * config.parallel.tp
    try:
        check_world(config.parallel, world_size)
        check_layout(config, world_size // replica)
    except ValueError as error:
        return Verdict("fail", "configuration", str(error))
    text = f"{world_size} rank(s), batch {config.recipe.batch}, {config.recipe.precision}"
    return Verdict("ok", "configuration", text)


if __name__ == "__main__":
    main()
