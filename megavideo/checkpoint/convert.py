"""Conversion of a checkpoint into another format or cut, offline, one tensor at a time.

Everything is written into `.DST.partial` beside DST and renamed once it is complete: DST is whole
or absent. A conversion that was interrupted goes on after the files that it had finished.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Condition

import torch
import xxhash

from megavideo.checkpoint.files import TensorEntry, tensor_entry
from megavideo.checkpoint.formats.detect import open_checkpoint
from megavideo.checkpoint.formats.interface import Group, Reader, Writer, is_moment
from megavideo.checkpoint.journal import Journal
from megavideo.checkpoint.tensor_stream import TensorSpec
from megavideo.files import fsync_dir
from megavideo.log import progress


@dataclass(frozen=True)
class Conversion:
    """What is to become what.

    Attributes:
        tensors: what is written: the reader's tensors, or some of them, in their new types.
        threads: groups of files that are written at a time.
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

    def memory(self, name: str) -> int:
        """Bytes of a tensor in the wider of its two types."""
        return max(self.tensors[name].nbytes, self.reader.tensors[name].nbytes)

    def identity(self) -> str:
        """Equal for conversions of which one may go on with what the other has finished."""
        stats = {str(file): os.stat(self.reader.path / file) for file in self.reader.files}
        about = (
            str(self.reader.path.resolve()),
            sorted((file, stat.st_size, stat.st_mtime_ns) for file, stat in stats.items()),
            self.writer.format,
            [asdict(group) for group in self.writer.groups(self.tensors)],
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
    with progress("converting", len(conversion.tensors)) as advance:
        entries = _write_groups(conversion, journal, advance)
    conversion.writer.finish(conversion.partial, entries)
    if verify:
        _verify(conversion.partial, entries)
    journal.remove()
    fsync_dir(conversion.partial)
    os.replace(conversion.partial, conversion.destination)
    fsync_dir(conversion.destination.parent)


def refuse_existing(destination: Path) -> None:
    """Raises: FileExistsError if there is something at the destination."""
    if destination.exists():
        raise FileExistsError(f"{destination} exists; remove it, or name another folder")


def _write_groups(
    conversion: Conversion, journal: Journal, advance: Callable[..., None]
) -> dict[str, TensorEntry]:
    """Write every group that the journal does not have; entries of all tensors."""
    memory = _Memory(max(map(conversion.memory, conversion.tensors)))

    def work(group: Group) -> dict[str, TensorEntry]:
        entries = journal.finished(group)
        if entries is None:
            entries = _write_group(conversion, group, memory, advance)
            journal.note(group, entries)
        else:
            advance(len(group.tensors))
        return entries

    written: dict[str, TensorEntry] = {}
    with ThreadPoolExecutor(conversion.threads) as pool:
        try:
            for entries in pool.map(work, conversion.writer.groups(conversion.tensors)):
                written |= entries
        except BaseException:
            memory.refuse()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return written


def _write_group(
    conversion: Conversion, group: Group, memory: "_Memory", advance: Callable[..., None]
) -> dict[str, TensorEntry]:
    entries = {}
    with conversion.writer.writing(conversion.partial, group, conversion.tensors) as write:
        for name in group.tensors:
            with memory.for_bytes(conversion.memory(name)):
                tensor = conversion.reader.read(name).to(conversion.tensors[name].dtype)
                entries[name] = tensor_entry(tensor)
                write(name, tensor)
                del tensor  # before another thread may use its memory
            advance()
    return entries


def _verify(folder: Path, entries: Mapping[str, TensorEntry]) -> None:
    reader = open_checkpoint(folder)
    assert reader.tensors.keys() == entries.keys()
    with progress("verifying", len(entries)) as advance:
        for name, entry in entries.items():
            if tensor_entry(reader.read(name)) != entry:
                raise ValueError(f"{folder}: {name} reads back different from what was written")
            advance()


class _Memory:
    """Lets threads hold tensors of `limit` bytes in all: as much as the largest, not as many."""

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
