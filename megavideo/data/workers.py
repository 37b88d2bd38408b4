"""Work over many files in processes: ordered results, no queue that can hang."""

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from typing import TypeVar

from megavideo.log import log

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
    with _processes(workers) as pool:
        yield from pool.map(work, items, chunksize=chunk)


def map_survivors(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    ahead: int,
    died: Callable[[Item], Result],
) -> Iterator[Result]:
    """Yield `work(item)` in the order of `items`, or `died(item)` if a process dies over it.

    Up to `ahead` items are worked on in advance. Nothing says over which of them a process died (of
    a fault in a library, or of too little memory), so they are done again, one by one, and then all
    processes go on. With one worker, which is this process, a death ends everything.
    """
    items, begun = iter(items), deque[Item]()
    while True:
        try:
            with _pool(workers) as pool:
                yield from _in_order(pool, work, items, begun, ahead)
            return
        except BrokenProcessPool:
            log.warning("a process died; doing what was begun, %d items, one by one", len(begun))
        yield from _one_by_one(work, begun, died)


def _in_order(
    pool: Executor,
    work: Callable[[Item], Result],
    items: Iterator[Item],
    begun: deque[Item],
    ahead: int,
) -> Iterator[Result]:
    """Results of `items`; those that are not yielded yet are in `begun`."""
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            begun.append(item)
            waiting.append(pool.submit(work, item))
            if len(waiting) > ahead:
                result = waiting.popleft().result()
                begun.popleft()
                yield result
        while waiting:
            result = waiting.popleft().result()
            begun.popleft()
            yield result
    finally:
        for future in waiting:
            future.cancel()


def _one_by_one(
    work: Callable[[Item], Result], items: deque[Item], died: Callable[[Item], Result]
) -> Iterator[Result]:
    """Results of `items`, which end up empty, by one process at a time."""
    while items:
        try:
            with _processes(1) as pool:
                while items:
                    result = pool.submit(work, items[0]).result()
                    items.popleft()
                    yield result
        except BrokenProcessPool:
            yield died(items.popleft())


def _pool(workers: int) -> Executor:
    return ThreadPoolExecutor(1) if workers == 1 else _processes(workers)


def _processes(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, get_context("spawn"), _begin)


def _begin() -> None:
    """What each process does first."""
    # An interrupt from the keyboard reaches every process, and is for the parent alone.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Without its parent, as after `kill -9`, a process would wait for work for ever."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
