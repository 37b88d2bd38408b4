"""Work over many files in processes: ordered results, no queue that can hang."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def map_processes(
    work: Callable[[Item], Result], items: Sequence[Item], workers: int, chunk: int = 1
) -> Iterator[Result]:
    """Yield `work(item)` in the order of `items`, done by `workers` processes (here if it is one).

    `work` and the items must be picklable. An exception of `work` arrives here and ends the rest; a
    process that is killed raises BrokenProcessPool instead of waiting for ever.
    Spawned, not forked: a fork copies locked locks of torch's and ffmpeg's threads.
    """
    if workers == 1:
        yield from map(work, items)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(work, items, chunksize=chunk)
