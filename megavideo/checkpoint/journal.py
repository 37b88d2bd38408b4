"""What an interrupted conversion has finished: a note a group of files, trusted after a check."""

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import xxhash

from megavideo.checkpoint.files import TensorEntry
from megavideo.checkpoint.formats.interface import Group
from megavideo.checkpoint.manifest import entries_from_json, read_sealed, write_sealed
from megavideo.log import log

FORMAT = "megavideo-journal-1"
CHUNK = 1 << 22


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
        """Note that the files of `group`, which are durable, hold `entries`."""
        files = {file: file_digest(self.folder / file) for file in group.files}
        tensors = {name: asdict(entry) for name, entry in entries.items()}
        write_sealed(self._path(group), FORMAT, {"files": files, "tensors": tensors})

    def finished(self, group: Group) -> dict[str, TensorEntry] | None:
        """What the files of `group` hold, if they are noted and unchanged."""
        if not self._path(group).is_file():
            return None
        body = read_sealed(self._path(group), FORMAT)
        for file, digest in body["files"].items():
            path = self.folder / file
            if not path.is_file() or file_digest(path) != digest:
                log.warning("%s is not as it was finished; writing it again", path)
                return None
        return entries_from_json(body["tensors"])

    def remove(self) -> None:
        """Take the notes out of the finished folder."""
        shutil.rmtree(self._notes)

    def _path(self, group: Group) -> Path:
        return self._notes / f"{group.files[0].replace('/', ' ')}.json"


def file_digest(path: Path) -> str:
    """XXH3-128 of a file's bytes, read piece by piece."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while piece := file.read(CHUNK):
            digest.update(piece)
    return digest.hexdigest()
