"""Conversion of a checkpoint into another format or cut, offline, in memory for a few blocks.

Everything is written into `.DST.partial` beside DST and renamed once it is complete: DST is whole
or absent. A conversion that was interrupted goes on after the files that it had finished.

Threads take one tensor each and stream it from file to file. Where a group's files are complete,
others bring them to the disk while the next are written; all are there before the manifest is.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Condition, Lock

import torch
import xxhash
from torch import Tensor

from megavideo.checkpoint.files import RunningEntry, TensorEntry
from megavideo.checkpoint.formats.detect import open_checkpoint
from megavideo.checkpoint.formats.interface import Group, OpenGroup, Reader, Writer, is_moment
from megavideo.checkpoint.journal import Journal
from megavideo.checkpoint.tensor_stream import TensorSpec
from megavideo.files import fsync_dir, fsync_file
from megavideo.log import progress

# Files that are brought to the disk at a time: a file system commits those that wait together.
SYNCING = 8


@dataclass(frozen=True)
class Conversion:
    """What is to become what.

    Attributes:
        tensors: what is written: the reader's tensors, or some of them, in their new types.
        threads: tensors that are converted at a time.
    """

    reader: Reader
    writer: Writer
    destination: Path
    tensors: dict[str, TensorSpec]
    threads: int = 4

    @property
    def partial(self) -> Path:
        """Where the destination grows."""
        return self.destination.with_name(f".{self.destination.name}.partial")

    def groups(self) -> list[Group]:
        """Groups of files, those with the largest tensors first: begun last, they would end last.

        Raises: ValueError if the format cannot hold the tensors.
        """

        def largest(group: Group) -> int:
            return -max(self.tensors[name].nbytes for name in group.tensors)

        return sorted(self.writer.groups(self.tensors), key=largest)

    def memory(self, name: str) -> int:
        """Bytes of a tensor in the wider of its two types."""
        return max(self.tensors[name].nbytes, self.reader.tensors[name].nbytes)

    def resident(self, name: str) -> int:
        """Bytes that converting a tensor holds at a time beyond blocks of rows."""
        spec = self.tensors[name]
        return self.reader.resident(name) + self.writer.resident(name, spec)

    def identity(self) -> str:
        """Equal for conversions of which one may go on with what the other has finished."""
        stats = {str(file): os.stat(self.reader.path / file) for file in self.reader.files}
        about = (
            str(self.reader.path.resolve()),
            sorted((file, stat.st_size, stat.st_mtime_ns) for file, stat in stats.items()),
            self.writer.format,
            [asdict(group) for group in self.groups()],
            sorted((name, str(spec)) for name, spec in self.tensors.items()),
        )
        return xxhash.xxh3_128_hexdigest(json.dumps(about).encode())


def select(reader: Reader, dtype: torch.dtype | None, moments: bool) -> dict[str, TensorSpec]:
    """The tensors to write: weights in `dtype` (None keeps their types), and moments if asked."""
    return {
        name: spec if dtype is None or is_moment(name) else TensorSpec(dtype, spec.shape)
        for name, spec in reader.tensors.items()
        if moments or not is_moment(name)
    }


def convert(conversion: Conversion, verify: bool) -> None:
    """Write the destination.

    Args:
        verify: before it gets its name, read it all back and compare digests of whole tensors.

    Raises:
        FileExistsError: if there is something at the destination.
        ValueError: if the source is damaged; what was finished is kept for another try.
    """
    refuse_existing(conversion.destination)
    conversion.reader.verify_files()
    conversion.destination.parent.mkdir(parents=True, exist_ok=True)
    journal = Journal(conversion.partial, conversion.identity())
    groups = conversion.groups()
    count = sum(len(group.tensors) for group in groups)
    with progress("converting", count) as advance, _Work(conversion, journal, advance) as work:
        entries = work.run(groups)
    conversion.writer.finish(conversion.partial, entries)
    if verify:
        _verify(conversion.partial, entries, conversion.threads)
    journal.remove()
    fsync_dir(conversion.partial)
    os.replace(conversion.partial, conversion.destination)
    fsync_dir(conversion.destination.parent)


def refuse_existing(destination: Path) -> None:
    """Raises: FileExistsError if there is something at the destination."""
    if destination.exists():
        raise FileExistsError(f"{destination} exists; remove it, or name another folder")


class _Work:
    """A conversion's groups on their way: tensors are written, finished files brought to the disk.

    Used as a context: its threads are gone at the end of the block.
    """

    def __init__(self, conversion: Conversion, journal: Journal, advance: Callable[..., None]):
        self._conversion = conversion
        self._journal = journal
        self._advance = advance
        self._memory = _Memory(2 * max(map(conversion.memory, conversion.tensors)))
        self._writers = ThreadPoolExecutor(conversion.threads)
        self._syncers = ThreadPoolExecutor(SYNCING)
        self._syncing: list[Future[None]] = []
        self._open: set[_GroupWork] = set()

    def __enter__(self) -> "_Work":
        return self

    def __exit__(self, *error: object) -> None:
        self._memory.refuse()
        self._writers.shutdown(cancel_futures=True)
        self._syncers.shutdown()  # what is finished is worth a note, also after an error
        for work in self._open:
            work.files.abandon()

    def run(self, groups: list[Group]) -> dict[str, TensorEntry]:
        """Write every group that the journal does not have; entries of all tensors."""
        entries: dict[str, TensorEntry] = {}
        begun: list[_GroupWork] = []
        pending: set[Future[None]] = set()
        for group in groups:
            finished = self._journal.finished(group)
            if finished is not None:
                self._advance(len(group.tensors))
                entries |= finished
                continue
            begun.append(self._begin(group))
            for name in begun[-1].names:
                pending = _wait_for(pending, at_most=2 * self._conversion.threads)
                pending.add(self._writers.submit(self._write, begun[-1], name))
        _wait_for(pending, at_most=0)
        for future in self._syncing:
            future.result()
        self._sync_folders(groups)
        for work in begun:
            entries |= work.entries
        return entries

    def _begin(self, group: Group) -> "_GroupWork":
        conversion = self._conversion
        for file in group.files:
            (conversion.partial / file).parent.mkdir(parents=True, exist_ok=True)
        files = conversion.writer.open(conversion.partial, group, conversion.tensors)
        work = _GroupWork(group, files, conversion.tensors)
        self._open.add(work)
        return work

    def _write(self, work: "_GroupWork", name: str) -> None:
        """Convert one tensor; with the group's last one, finish its files."""
        with self._memory.for_bytes(self._conversion.resident(name)):
            entry = self._stream(work.files, name)
        self._advance()
        if work.add(name, entry):
            work.files.close()
            self._open.remove(work)
            self._syncing.append(self._syncers.submit(self._sync, work))

    def _stream(self, files: OpenGroup, name: str) -> TensorEntry:
        reader, spec = self._conversion.reader, self._conversion.tensors[name]
        running = RunningEntry()
        blocks = (_cast(block, spec.dtype, name) for block in reader.blocks(name))
        files.write(name, spec, running.over(blocks))
        return running.entry()

    def _sync(self, work: "_GroupWork") -> None:
        for file in work.group.files:
            fsync_file(self._conversion.partial / file)
        self._journal.note(work.group, work.entries)

    def _sync_folders(self, groups: list[Group]) -> None:
        files = {Path(file) for group in groups for file in group.files}
        folders = {folder for file in files for folder in file.parents}
        for _ in self._syncers.map(fsync_dir, (self._conversion.partial / f for f in folders)):
            pass


class _GroupWork:
    """A group that is being written, and what of it is there.

    Attributes:
        names: its tensors, the largest first.
    """

    def __init__(self, group: Group, files: OpenGroup, tensors: Mapping[str, TensorSpec]):
        self.group = group
        self.files = files
        self.names = sorted(group.tensors, key=lambda name: -tensors[name].nbytes)
        self.entries: dict[str, TensorEntry] = {}
        self._lock = Lock()

    def add(self, name: str, entry: TensorEntry) -> bool:
        """Note that a tensor was written; whether it was the last."""
        with self._lock:
            self.entries[name] = entry
            return len(self.entries) == len(self.names)


def _cast(block: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Raises: ValueError if a number is too large for `dtype`, in which it would be infinite."""
    cast = block.to(dtype)
    narrows = dtype == torch.float16 and block.dtype != dtype
    if narrows and not cast.isfinite().equal(block.isfinite()):
        raise ValueError(f"{name} has numbers that fp16 cannot hold; use --dtype bf16 or keep")
    return cast


def _wait_for(pending: set[Future[None]], at_most: int) -> set[Future[None]]:
    """Wait until at most so many are left; raise what one raised."""
    while len(pending) > at_most:
        done, pending = wait(pending, return_when=FIRST_COMPLETED)
        for future in done:
            future.result()
    return pending


def _verify(folder: Path, entries: Mapping[str, TensorEntry], threads: int) -> None:
    reader = open_checkpoint(folder)
    assert reader.tensors.keys() == entries.keys()

    def check(name: str) -> None:
        running = RunningEntry()
        for _ in running.over(reader.blocks(name)):
            pass
        if running.entry() != entries[name]:
            raise ValueError(f"{folder}: {name} reads back different from what was written")
        advance()

    with progress("verifying", len(entries)) as advance, ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(check, entries):
            pass


class _Memory:
    """Lets threads hold `limit` bytes in all: as much as a few large tensors, not as many."""

    def __init__(self, limit: int):
        self._free = limit
        self._refused = False
        self._changed = Condition()

    @contextmanager
    def for_bytes(self, count: int) -> Iterator[None]:
        """Wait until `count` bytes, at most the limit, are free; hold them for the block."""
        with self._changed:
            self._changed.wait_for(lambda: self._refused or self._free >= count)
            if self._refused:
                raise RuntimeError("the conversion was stopped")
            self._free -= count
        try:
            yield
        finally:
            with self._changed:
                self._free += count
                self._changed.notify_all()

    def refuse(self) -> None:
        """Stop every thread at its next tensor: one has failed, or the user wants an end."""
        with self._changed:
            self._refused = True
            self._changed.notify_all()
