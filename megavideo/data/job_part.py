"""Jobs that share the shards of one output folder, and keep out of each other's way."""

import fcntl
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

from megavideo.log import log

LOCK_FILE = ".lock"

Shard = TypeVar("Shard")


@dataclass(frozen=True)
class Part:
    """Of `of` jobs that share the shards, the `number`-th; 1 is the first."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> "Part":
        """From "3/8". ValueError if it is something else."""
        number, _, of = text.partition("/")
        if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
            raise ValueError(f"{text!r} is not K/N with K from 1 to N, as 3/8")
        return cls(int(number), int(of))

    @property
    def failed_file(self) -> str:
        """Each job's own."""
        return "failed.jsonl" if self.of == 1 else f"failed-{self.number}-of-{self.of}.jsonl"

    def choose(self, shards: Sequence[Shard]) -> Sequence[Shard]:
        """This job's shards. ValueError if there is none."""
        if self.of > len(shards):
            raise ValueError(f"part {self.number}/{self.of}: there are only {len(shards)} shards")
        return shards[self.number - 1 :: self.of]

    @contextmanager
    def alone_in(self, output: Path) -> Iterator[None]:
        """Hold what no job for the same shards can hold too: each would remove the other's files.

        Raises: ValueError if one does.
        """
        output.mkdir(parents=True, exist_ok=True)
        locks = [(LOCK_FILE, fcntl.LOCK_EX if self.of == 1 else fcntl.LOCK_SH)]
        if self.of > 1:
            locks.append((f"{LOCK_FILE}-{self.number}-of-{self.of}", fcntl.LOCK_EX))
        with ExitStack() as files:
            for name, kind in locks:
                _lock(files.enter_context(open(output / name, "a+")), kind)
            yield


def _lock(file: IO[str], kind: int) -> None:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(
            f"another tokenize-videos holds {file.name}; wait for it, or share the work by --part"
        ) from error
    except OSError as error:  # a file system without locks, as Lustre by default
        log.warning("cannot lock %s (%s): start no second job like this one", file.name, error)
