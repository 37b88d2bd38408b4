"""What an interrupted conversion has finished: a note for each group of files.

A note says how long each file is and when it was last written. It is made once the files are on the
disk, so a file that still is so has what was written to it.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from megavideo.checkpoint.files import TensorEntry
from megavideo.checkpoint.formats.interface import Group
from megavideo.checkpoint.manifest import entries_from_json, read_sealed, write_sealed
from megavideo.log import log

FORMAT = "megavideo-journal-1"


class Journal:
    """Notes in `folder`/journal about the files in `folder`."""

    def __init__(self, folder: Path, identity: str):
        """Take over the folder if it was begun for the same `identity`, else begin it anew."""
        self.folder = folder
        self._notes = folder / "journal"
        start = self._notes / "identity.json"
        if start.is_file() and read_sealed(start, FORMAT) == {"identity": identity}:
            log.info("going on with what is in %s", folder)
            return
        if folder.exists():
            log.info("discarding %s, which another conversion began", folder)
            shutil.rmtree(folder)
        self._notes.mkdir(parents=True)
        write_sealed(start, FORMAT, {"identity": identity})

    def note(self, group: Group, entries: Mapping[str, TensorEntry]) -> None:
        """Note that the files of `group`, which are durable, hold `entries`.

        The note itself need not be durable: without it, the files are written again.
        """
        body = {
            "files": {file: _mark(self.folder / file) for file in group.files},
            "tensors": {name: asdict(entry) for name, entry in entries.items()},
        }
        temporary = self._path(group).with_suffix(".tmp")
        temporary.write_text(json.dumps(body))
        os.replace(temporary, self._path(group))

    def finished(self, group: Group) -> dict[str, TensorEntry] | None:
        """What the files of `group` hold, if they are noted and unchanged."""
        try:
            body = json.loads(self._path(group).read_bytes())
        except (FileNotFoundError, ValueError):  # never written, or lost with the power
            return None
        for file, mark in body["files"].items():
            path = self.folder / file
            if not path.is_file() or _mark(path) != mark:
                log.warning("%s is not as it was finished; writing it again", path)
                return None
        return entries_from_json(body["tensors"])

    def remove(self) -> None:
        """Take the notes out of the finished folder."""
        shutil.rmtree(self._notes)

    def _path(self, group: Group) -> Path:
        return self._notes / f"{group.files[0].replace('/', '+')}.json"


def _mark(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]
