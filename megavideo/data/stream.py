"""The sample at a position: found by the order, read, checked, replaced if it is damaged.

Everything here is a function of the position and of the stored bytes, never of a rank, a thread or
the time.
"""

import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from megavideo.data.frames import FrameChooser, FrameWindow
from megavideo.data.index import ClipIndex
from megavideo.data.order import Order
from megavideo.data.sample import TokenClip, stored_checksum, unpack
from megavideo.data.shards import check_clip
from megavideo.data.source import ShardReader
from megavideo.log import log, rank

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Damage:
    """A sample that could not be used at a position, and why."""

    position: int
    sample: int
    key: str
    shard: str
    offset: int
    reason: str


@dataclass(frozen=True)
class Visit:
    """The sample at a position: its clip, the frames shown this time, and what it stands in for."""

    position: int
    sample: int
    clip: TokenClip
    window: FrameWindow
    damages: tuple[Damage, ...]

    @property
    def frames(self) -> np.ndarray:
        """uint16 [F, N]."""
        return self.window.cut(self.clip.frames)


def read_clip(index: ClipIndex, reader: ShardReader, sample: int) -> TokenClip:
    """The clip that row `sample` of the index points at; ValueError says how it is damaged."""
    row = index[sample]
    record = reader.read(row.shard, row.offset, row.size)
    clip = unpack(record)
    if stored_checksum(record) != row.crc32 or len(clip.frames) != row.n_frames:
        raise ValueError("another record than the index says")
    check_clip(clip, index.making)
    return clip


class SampleStream:
    """Visits by position. Safe to use from several threads.

    max_bad_in_row: substitutes that are tried for one position.
    """

    def __init__(
        self,
        index: ClipIndex,
        reader: ShardReader,
        order: Order,
        chooser: FrameChooser,
        max_bad_in_row: int,
    ):
        self.index = index
        self.reader = reader
        self.order = order
        self.chooser = chooser
        self.max_bad_in_row = max_bad_in_row

    def clip_at(self, position: int) -> Visit:
        """The visit at `position`.

        Raises:
            ValueError: the sample and all its substitutes are damaged.
            OSError: reading failed again and again.
        """
        place = self.order[position]
        sample = place.sample
        damages: list[Damage] = []
        while len(damages) < self.max_bad_in_row:
            try:
                clip = self._read(sample)
            except ValueError as error:
                damages.append(self._damage(position, sample, str(error)))
                sample = self.order.substitute(position, len(damages))
                continue
            window = self.chooser.choose(place.epoch, sample, len(clip.frames), clip.fps)
            return Visit(position, sample, clip, window, tuple(damages))
        raise ValueError(
            f"{len(damages)} damaged samples in a row (data.max_bad_in_row), the last one "
            f"{damages[-1].key} in {damages[-1].shard}: {damages[-1].reason}; run "
            f"`megavideo verify-shards {self.index.folder}`"
        )

    def expect(self, position: int) -> None:
        """Reading will go on from `position`: shards that are not here yet may be fetched."""
        self.reader.store.expect(self.order.shards_near(position))

    def _read(self, sample: int) -> TokenClip:
        """Read a clip; once more, from a fresh copy, if it is damaged. ValueError says how."""
        try:
            return read_clip(self.index, self.reader, sample)
        except ValueError:
            self.reader.renew(self.index[sample].shard)
            return read_clip(self.index, self.reader, sample)

    def _damage(self, position: int, sample: int, reason: str) -> Damage:
        row = self.index[sample]
        shard = self.index.shards[row.shard].file
        return Damage(position, sample, self.index.key(sample), shard, row.offset, reason)


class DamageLog:
    """Counts damaged samples in the order of training, and stops the run at too many.

    Args:
        max_share: of the samples seen. It is judged once more than `max_in_row` were damaged: one
            bad sample among the first thousand says little.
        max_in_row: positions in a row whose own sample was damaged.
        quarantine: JSON lines are appended here; None only logs.
    """

    def __init__(self, max_share: float, max_in_row: int, quarantine: Path | None):
        self.max_share = max_share
        self.max_in_row = max_in_row
        self.quarantine = quarantine
        self.seen = 0
        self.damaged = 0
        self._in_row = 0

    def account(self, visit: Visit) -> None:
        """Note that `visit` goes into training. ValueError if too many samples were damaged."""
        self.seen += 1
        self.damaged += len(visit.damages)
        self._in_row = self._in_row + 1 if visit.damages else 0
        for damage in visit.damages:
            self._write(damage)
        self._judge()

    def _judge(self) -> None:
        if self._in_row > self.max_in_row:
            raise ValueError(f"{self._in_row} damaged samples in a row; {self._remedy('in_row')}")
        if self.damaged > max(self.max_in_row, self.max_share * self.seen):
            raise ValueError(
                f"{self.damaged} of {self.seen} samples were damaged; {self._remedy('share')}"
            )

    def _remedy(self, limit: str) -> str:
        return f"run `megavideo verify-shards` on the data, or raise data.max_bad_{limit}"

    def _write(self, damage: Damage) -> None:
        log.warning(
            "damaged sample %s in %s at byte %d: %s; another one takes its place",
            damage.key, damage.shard, damage.offset, damage.reason,
        )  # fmt: skip
        if self.quarantine is not None:
            self.quarantine.parent.mkdir(parents=True, exist_ok=True)
            line = json.dumps({"rank": rank(), **asdict(damage)}) + "\n"
            # One write to a file opened for appending: ranks share it without mixing their lines.
            descriptor = os.open(self.quarantine, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(descriptor, line.encode())
            finally:
                os.close(descriptor)


def read_ahead(
    pool: Executor, work: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Iterator[Result]:
    """work(item) for every item, in order, done by `pool` up to `ahead` items in advance.

    Closing the iterator cancels what has not begun.
    """
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
