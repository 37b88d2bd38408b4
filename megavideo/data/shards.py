"""Shards: WebDataset tars of `.clip` members, each with a JSON file that vouches for it.

The writer is `webdataset.TarWriter`; equal samples give equal bytes. The reader walks the tar
itself, because the usual readers stop without an error at a damaged header and lose every sample
behind it.
"""

import hashlib
import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from webdataset import TarWriter

from megavideo.data.sample import TokenClip, pack, unpack
from megavideo.files import atomic_path, atomic_write

SUFFIX = ".clip"
BLOCK = tarfile.BLOCKSIZE
SIDECAR_VERSION = 1


@dataclass(frozen=True)
class Making:
    """How the tokens of a shard were made; samples mix only with samples made alike.

    text_tokenizer, image_tokenizer: digests of the model files. image_codes: size of the codebook,
        and the first text id.
    side: tokens per row of a frame. fps: of the time grid.
    """

    text_tokenizer: str
    image_tokenizer: str
    image_codes: int
    side: int
    fps: float


@dataclass(frozen=True)
class Sidecar:
    """What `NAME.json` says of `NAME.tar`; written last, so a shard without it does not count.

    source: digest of what the shard was made from, so that a resumed job knows whether it is done.
    failed: videos that should be in this shard and could not be read, with the reason.
    """

    version: int
    sha256: str
    bytes: int
    count: int
    making: Making
    source: str = ""
    failed: tuple[dict[str, str], ...] = ()


@dataclass(frozen=True)
class Member:
    """One sample in a tar: where its record starts, how long it is, and what is in it."""

    key: str
    offset: int
    size: int
    record: bytes
    clip: TokenClip


def sidecar_path(shard: Path) -> Path:
    """The JSON file beside a shard."""
    return shard.with_suffix(".json")


def list_shards(folder: Path) -> list[Path]:
    """The shards in `folder` by name, without what a killed writer has left."""
    return sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))


def list_lost_shards(folder: Path) -> list[Path]:
    """Shards of which only the sidecar is in `folder`, as after a copy that was cut off."""
    shards = (path.with_suffix(".tar") for path in sorted(folder.glob("*.json")))
    return [shard for shard in shards if not shard.exists() and _is_described(shard)]


def _is_described(shard: Path) -> bool:
    try:
        read_sidecar(shard)
    except ValueError:  # a .json of something else
        return False
    return True


def remove_shard(path: Path) -> None:
    """Remove a shard, its sidecar and what a killed writer has left of it."""
    sidecar_path(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)
    for left in path.parent.glob(f".{path.stem}.tmp-*"):
        left.unlink()


def write_shard(
    path: Path,
    clips: Iterable[tuple[str, TokenClip]],
    making: Making,
    source: str = "",
    failed: Iterable[dict[str, str]] = (),
) -> Sidecar:
    """Write `clips` (key, clip) to `path`, read it back, give it its name, then write its sidecar.

    Raises:
        ValueError: a clip does not fit `making`, a key has a dot or occurs twice, or there is no
            clip.
        OSError: what was read back is not what was written.
    """
    path = Path(path)
    with atomic_path(path) as temporary:
        with open(temporary, "wb") as file:
            written = _write_members(file, clips, making)
            file.flush()
            os.fsync(file.fileno())
            # Forget the pages, so that reading back asks the disk.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with open(temporary, "rb") as file:
            hashed = HashingReader(file)
            if [member.key for member in read_members(hashed, temporary)] != written:
                raise OSError(f"shard {path}: reading back gave other samples than were written")
            sidecar = Sidecar(
                SIDECAR_VERSION, hashed.hexdigest(), hashed.position, len(written), making,
                source, tuple(failed),
            )  # fmt: skip
    with atomic_write(sidecar_path(path)) as file:
        file.write(json.dumps(asdict(sidecar), indent=1, ensure_ascii=False).encode() + b"\n")
    return sidecar


def _write_members(
    file: BinaryIO, clips: Iterable[tuple[str, TokenClip]], making: Making
) -> list[str]:
    keys: dict[str, None] = {}
    with TarWriter(file, mtime=0, encoder=False) as writer:
        for key, clip in clips:
            if key in keys or "." in key or not key:
                raise ValueError(f"key {key!r} is empty, has a dot, or occurs twice")
            check_clip(clip, making)
            writer.write({"__key__": key, SUFFIX[1:]: pack(clip)})
            keys[key] = None
    if not keys:
        raise ValueError("a shard needs at least one clip")
    return list(keys)


def check_clip(clip: TokenClip, making: Making) -> None:
    """ValueError if `clip` was not made as `making` says."""
    if clip.side != making.side or clip.fps != making.fps:
        raise ValueError(
            f"clip has {clip.side}x{clip.side} tokens at {clip.fps} fps, its shard has "
            f"{making.side}x{making.side} at {making.fps} fps"
        )
    if clip.frames.max() >= making.image_codes:
        raise ValueError(
            f"image token {clip.frames.max()} is outside the codebook of {making.image_codes}"
        )


def read_sidecar(shard: Path) -> Sidecar:
    """The sidecar of `shard`; ValueError if it is not one."""
    path = sidecar_path(shard)
    if not path.is_file():
        raise ValueError(
            f"shard {shard} has no {path.name}: it was not finished; make it again with "
            "`megavideo tokenize-videos`"
        )
    try:
        content = json.loads(path.read_bytes())
        making = Making(**content.pop("making"))
        failed = tuple(content.pop("failed"))
        sidecar = Sidecar(making=making, failed=failed, **content)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} does not describe a shard: {error!r}") from error
    if sidecar.version != SIDECAR_VERSION:
        raise ValueError(
            f"{path} has version {sidecar.version}, this program reads {SIDECAR_VERSION}"
        )
    return sidecar


class HashingReader:
    """Reads a file once, start to end, and knows its SHA-256."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.position = 0
        self._sha256 = hashlib.sha256()

    def read(self, size: int) -> bytes:
        """The next `size` bytes, fewer at the end of the file."""
        data = self.file.read(size)
        self.position += len(data)
        self._sha256.update(data)
        return data

    def hexdigest(self) -> str:
        """SHA-256 of all that was read."""
        return self._sha256.hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_members(file: HashingReader, name: Path | str) -> Iterator[Member]:
    """Every sample of a tar in order, each checked; reads to the very end of the file.

    Raises: ValueError naming the shard and the byte at which it is not a whole tar of `.clip`
        records.
    """
    while True:
        start = file.position
        try:
            info = _read_header(file)
            if info is None:
                return
            record = _read_exactly(file, info.size)
            clip = unpack(record)
            if any(_read_exactly(file, -info.size % BLOCK)):
                raise ValueError("padding is not zero")
        except ValueError as error:
            raise ValueError(f"shard {name} is damaged at byte {start}: {error}") from error
        yield Member(info.name.removesuffix(SUFFIX), start + BLOCK, info.size, record, clip)


def _read_header(file: HashingReader) -> tarfile.TarInfo | None:
    """The next member, its header's checksum verified; None at the end of the archive."""
    block = _read_exactly(file, BLOCK)
    if not any(block):
        _read_end(file)
        return None
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    except (tarfile.TarError, ValueError) as error:
        raise ValueError(f"tar header: {error}") from error
    if not info.isreg() or not info.name.endswith(SUFFIX):
        raise ValueError(f"{info.name!r} is not a {SUFFIX} file; shards hold nothing else")
    return info


def _read_end(file: HashingReader) -> None:
    """An archive ends in two empty blocks, then zeros up to a full tape record."""
    rest = _read_exactly(file, BLOCK) + file.read(tarfile.RECORDSIZE)
    if any(rest) or file.position % tarfile.RECORDSIZE or file.read(1):
        raise ValueError("the end of the archive is not followed by the end of the file")


def _read_exactly(file: HashingReader, size: int) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise ValueError(f"the file ends {size - len(data)} bytes early")
    return data
