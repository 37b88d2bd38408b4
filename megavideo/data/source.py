"""Bytes of samples: read at their place in shard files, local or fetched into a local cache.

What goes wrong for a moment (a network, a server) is tried again and then stops the run: ranks must
never disagree about a sample because of timing. What is wrong for good is told apart by the reader
above, which checks every record.
"""

import fcntl
import hashlib
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import lru_cache
from http.client import HTTPException
from pathlib import Path
from queue import SimpleQueue
from typing import Protocol, TypeVar

from megavideo.data.index import ShardEntry
from megavideo.data.urls import open_url
from megavideo.files import atomic_path
from megavideo.log import log, rank

OPEN_FILES = 256
FIRST_WAIT_S = 0.5
COPY_BYTES = 1 << 20
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")

Result = TypeVar("Result")


class ShardStore(Protocol):
    """Where shard files are; shards are named by their number in the index."""

    def path(self, shard: int) -> Path:
        """A local file with the shard's bytes."""

    def renew(self, shard: int) -> None:
        """Called when what `path` gave was damaged: the next `path` may give a better one."""

    def expect(self, shards: Sequence[int]) -> None:
        """These are needed soon."""


class ShardReader:
    """Reads byte ranges of shards, from any number of threads."""

    def __init__(self, store: ShardStore, retries: int):
        self.store = store
        self.retries = retries
        self._open = lru_cache(maxsize=OPEN_FILES)(lambda shard: _OpenFile(store.path(shard)))

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """`size` bytes, fewer only where the file ends. OSError after the last try."""

        def read() -> bytes:
            try:
                return self._open(shard).read(offset, size)
            except OSError:
                self._open.cache_clear()  # NFS may have made the open file stale for good
                raise

        return with_retries(read, self.retries)

    def renew(self, shard: int) -> None:
        """Forget what is known about a shard that gave damaged bytes."""
        self.store.renew(shard)
        self._open.cache_clear()


class _OpenFile:
    """A descriptor that closes itself: a thread may still read when the cache lets it go."""

    def __init__(self, path: Path):
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, offset: int, size: int) -> bytes:
        data = os.pread(self.descriptor, size, offset)
        while len(data) < size and (
            more := os.pread(self.descriptor, size - len(data), offset + len(data))
        ):
            data += more
        return data

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def with_retries(work: Callable[[], Result], retries: int) -> Result:
    """`work()`, tried again after an OSError with doubling waits; the last error is raised."""
    for attempt in range(retries):
        try:
            return work()
        except OSError as error:
            wait = FIRST_WAIT_S * 2**attempt
            log.warning(
                "read failed (%s); try %d of %d in %.1f s", error, attempt + 2, retries + 1, wait
            )
            time.sleep(wait)
    return work()


class LocalShards:
    """Shards in a folder."""

    def __init__(self, folder: Path, entries: Sequence[ShardEntry]):
        self.folder = folder
        self.entries = entries

    def check_sizes(self) -> None:
        """ValueError if a shard is missing or has not the size that the index says."""
        wrong = [
            f"{entry.file} ({size} bytes, not {entry.bytes})"
            for entry in self.entries
            if (size := _size(self.folder / entry.file)) != entry.bytes
        ]
        if wrong:
            raise ValueError(
                f"{self.folder}: {len(wrong)} shards differ from the index: {', '.join(wrong[:3])}"
                f"; restore them, or if they are right run `megavideo build-index {self.folder}`"
            )

    def path(self, shard: int) -> Path:
        """The shard itself."""
        return self.folder / self.entries[shard].file

    def renew(self, shard: int) -> None:
        """Nothing to do: there is no better copy."""

    def expect(self, shards: Sequence[int]) -> None:
        """Nothing to do: local files need no fetching."""


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


class FetchedShards:
    """Shards behind a URL, each copied once a node into `cache`.

    A shard appears there only with the size and SHA-256 of the index. The cache is not emptied: it
    grows to the size of the data set.
    """

    def __init__(self, url: str, entries: Sequence[ShardEntry], cache: Path, allow_commands: bool):
        for entry in entries:
            check_name(entry.file)
        self.url = url
        self.entries = entries
        self.cache = cache
        self.allow_commands = allow_commands
        self._warn_of_space()
        self._expected: set[int] = set()
        self._queue: SimpleQueue[int] = SimpleQueue()
        # A daemon, because a pool's threads would fetch all that is queued before the program ends.
        threading.Thread(target=self._fetch_expected, name="fetch", daemon=True).start()

    def _warn_of_space(self) -> None:
        """A cache that fills up stops the run, perhaps days from now."""
        paths = map(self._cached, range(len(self.entries)))
        sizes = [e.bytes for e, path in zip(self.entries, paths, strict=True) if not path.exists()]
        self.cache.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.cache).free
        if sum(sizes) > free and rank() == 0:
            log.warning(
                "data.cache=%s has %.1f GB free, the shards that are not in it take %.1f GB: the "
                "run will stop when it is full", self.cache, free / 1e9, sum(sizes) / 1e9,
            )  # fmt: skip

    def path(self, shard: int) -> Path:
        """The cached copy, fetched now if need be; OSError if the index says otherwise of it."""
        path = self._cached(shard)
        if not path.exists():
            with _locked(path.with_suffix(".lock")):
                if not path.exists():  # another process may have fetched it while this one waited
                    self._fetch(self.entries[shard], path)
        return path

    def renew(self, shard: int) -> None:
        """Remove the cached copy."""
        self._cached(shard).unlink(missing_ok=True)

    def expect(self, shards: Sequence[int]) -> None:
        """Fetch in the background; an error shows when the shard is read."""
        for shard in shards:
            if shard not in self._expected:
                self._expected.add(shard)
                self._queue.put(shard)

    def _fetch_expected(self) -> None:
        while True:
            with suppress(OSError, ValueError):
                self.path(self._queue.get())

    def _cached(self, shard: int) -> Path:
        entry = self.entries[shard]
        return self.cache / f"{entry.sha256[:16]}-{entry.file}"

    def _fetch(self, entry: ShardEntry, path: Path) -> None:
        for left in self.cache.glob(f".{path.stem}.tmp-*"):  # by a program that was killed
            left.unlink()
        with atomic_path(path) as temporary:
            size, sha256 = fetch(f"{self.url}/{entry.file}", temporary, self.allow_commands)
            if (size, sha256) != (entry.bytes, entry.sha256):
                raise OSError(
                    f"{self.url}/{entry.file} gave {size} bytes with SHA-256 {sha256}; the index "
                    f"says {entry.bytes} bytes, {entry.sha256}"
                )


def fetch(url: str, path: Path, allow_commands: bool) -> tuple[int, str]:
    """Copy what `url` gives to `path`; its size and SHA-256. OSError if it breaks off."""
    size, sha256 = 0, hashlib.sha256()
    with open(path, "wb") as file:
        for data in _read_url(url, allow_commands):
            size += file.write(data)
            sha256.update(data)
    return size, sha256.hexdigest()


def _read_url(url: str, allow_commands: bool) -> Iterator[bytes]:
    """What `url` gives, piece by piece; any error is an OSError that names it."""
    try:
        with closing(open_url(url, allow_commands)) as stream:
            while data := stream.read(COPY_BYTES):
                yield data
    except (OSError, HTTPException) as error:  # HTTPException: the reply makes no sense
        raise OSError(f"{url}: {error!r}") from error


def check_name(name: str) -> None:
    """ValueError if a name from an index could leave its folder or mean something to a shell."""
    if not PLAIN_NAME.fullmatch(name):
        raise ValueError(f"shard name {name!r} may only have letters, digits, '_', '-' and '.'")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Only one thread of one process of this node at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
