"""kill -9 of a random rank at random moments around saves: nothing saved is lost, nothing differs.

    python -m tests.robustness.kill_ranks --kills 20
    python -m tests.robustness.kill_ranks --kills 20 --set parallel.tp=2

A run of two ranks is killed again and again, most times while a checkpoint is being written, and
started again. After each kill the newest checkpoint must be whole and no older than the one before;
in the end weights and moments must equal those of a run that was never killed, bit for bit.
"""

import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import click
import torch
import torch.distributed as dist

from megavideo.checkpoint.commit import TEMPORARY, checkpoints_of, newest_whole, step_of
from megavideo.checkpoint.manifest import MANIFEST, read_manifest
from megavideo.config.load import load_config
from megavideo.engine.world import join_world
from megavideo.train.command import _open_run
from megavideo.train.loop import train
from tests.engine.dataset import make_dataset

SAVE_EVERY = 2
STEPS_A_KILL = 6
RANKS = 2
Start = Callable[[Path], AbstractContextManager[list[BaseProcess]]]


@click.command()
@click.option("--kills", default=20, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--set", "assignments", multiple=True, help="A setting of the run, as KEY=VALUE.")
def main(kills: int, seed: int, assignments: tuple[str, ...]) -> None:
    """Print where each kill struck and what was found, and whether the end is the same."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        steps = kills * STEPS_A_KILL
        dataset = make_dataset(folder)
        settings = (f"recipe.steps={steps}", f"run.save_every={SAVE_EVERY}", *assignments)
        started = partial(start, dataset, (*settings, "run.evaluate_every=0"))
        unbroken, killed = folder / "unbroken", folder / "killed"
        with started(unbroken) as ranks:
            assert wait(ranks) == [0] * RANKS
        found = [kill_once(started, killed, random.Random(seed + n)) for n in range(kills)]
        with started(killed) as ranks:
            assert wait(ranks) == [0] * RANKS
        during = sum(struck for struck, _ in found)
        restored = [step for _, step in found]
        assert restored == sorted(restored), f"a checkpoint was lost: {restored}"
        assert seals(killed) == seals(unbroken), "the killed run ended with other weights"
    print(
        f"{kills} kills, {during} of them while a checkpoint was written or committed; every time "
        f"the newest was whole. Resumed from steps {restored}; after step {steps} weights and "
        "moments equal the unbroken run's, bit for bit"
    )


def kill_once(started: Start, run: Path, chosen: random.Random) -> tuple[bool, int]:
    """Start the run and kill a rank; whether a save was on, and the step of what is left."""
    with started(run) as ranks:
        for _ in range(chosen.randint(1, 2)):
            wait_for_save(run, ranks)
        time.sleep(chosen.choice((0.0, chosen.uniform(0, 0.02), chosen.uniform(0, 0.2))))
        os.kill(chosen.choice(ranks).pid, signal.SIGKILL)  # type: ignore[arg-type]
        assert wait(ranks) != [0] * RANKS
    struck = any(checkpoints_of(run).glob(f"{TEMPORARY}*"))
    whole = newest_whole(run)
    return struck, 0 if whole is None else step_of(whole)


def wait_for_save(run: Path, ranks: list[BaseProcess]) -> None:
    """Until no save is on, then until one is."""
    for wanted in (False, True):
        while any(checkpoints_of(run).glob(f"{TEMPORARY}step-*")) != wanted:
            assert all(rank.is_alive() for rank in ranks), "the run ended before its kill"
            time.sleep(0.0005)


@contextmanager
def start(dataset: Path, settings: tuple[str, ...], run: Path) -> Iterator[list[BaseProcess]]:
    """Ranks of `megavideo train`; forked, since starting Python anew takes longer than a run."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as store:
        ranks: list[BaseProcess] = [
            context.Process(target=_rank, args=(rank, Path(store), dataset, settings, run))
            for rank in range(RANKS)
        ]
        for rank in ranks:
            rank.start()
        yield ranks


def wait(ranks: list[BaseProcess]) -> list[int | None]:
    """Exit codes. Once a rank has failed, the others are killed, as torchrun does."""
    while any(rank.is_alive() for rank in ranks):
        if any(rank.exitcode for rank in ranks):
            for rank in ranks:
                rank.kill()
        time.sleep(0.01)
    for rank in ranks:
        rank.join()
    return [rank.exitcode for rank in ranks]


def seals(run: Path) -> dict[str, str]:
    """What tells the newest checkpoint's content from any other."""
    whole = newest_whole(run)
    assert whole is not None
    return read_manifest(whole / MANIFEST).seals


def _rank(rank: int, store: Path, dataset: Path, settings: tuple[str, ...], run: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    dist.init_process_group(
        "gloo", init_method=(store / "store").as_uri(), rank=rank, world_size=RANKS
    )
    config = load_config([dataset], [*settings, f"run.directory={run}"])
    train(_open_run(config, join_world(1.0, config.parallel)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
