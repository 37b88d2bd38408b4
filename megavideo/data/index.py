"""The index of a folder of shards: where every sample is, and what it must look like.

`index.parquet` has a row a sample, `shards.parquet` a row a shard. They are for people and other
programs too: rows may be removed from `index.parquet` (with pyarrow) to leave samples out. Training
opens the numeric columns as one memory-mapped Arrow file, so that all processes share its pages.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from megavideo.data.sample import stored_checksum
from megavideo.data.shards import (
    HashingReader,
    Making,
    Member,
    list_lost_shards,
    list_shards,
    read_members,
    read_sidecar,
)
from megavideo.data.text_tokenizer import TextTokenizer
from megavideo.files import atomic_path
from megavideo.log import log

INDEX_FILE = "index.parquet"
SHARDS_FILE = "shards.parquet"
MAP_NAME = ".index-{}.arrow"  # of the memory-mapped copy, by the index's digest
VERSION = b"1"
READ_BYTES = 1 << 20

SCHEMA = pa.schema(
    [
        ("id", pa.int64()),  # row number when the index was built
        ("key", pa.string()),
        ("shard", pa.uint32()),  # row of shards.parquet
        ("offset", pa.int64()),  # of the record in the shard, bytes
        ("size", pa.uint32()),  # of the record, bytes
        ("crc32", pa.uint32()),  # the record's own
        ("n_frames", pa.uint32()),
        ("fps", pa.float64()),
        ("duration_s", pa.float64()),  # n_frames / fps
        ("n_text", pa.uint32()),  # token ids of the caption
        ("caption_bytes", pa.uint32()),
        ("caption_hash", pa.uint64()),  # xxh3_64 of the caption
    ]
)
SHARDS_SCHEMA = pa.schema(
    [
        ("file", pa.string()),
        ("bytes", pa.int64()),
        ("sha256", pa.string()),
        ("count", pa.int64()),
        ("text_tokenizer", pa.string()),
        ("image_tokenizer", pa.string()),
        ("image_codes", pa.int64()),
        ("side", pa.int64()),
        ("fps", pa.float64()),
    ]
)
# What training reads of every sample: 24 bytes.
MAPPED = ["shard", "offset", "size", "crc32", "n_frames"]


@dataclass(frozen=True)
class ShardEntry:
    """One row of shards.parquet; `making` is spread over its columns."""

    file: str
    bytes: int
    sha256: str
    count: int
    making: Making


@dataclass(frozen=True)
class IndexRow:
    """Where a sample's record is and what its header must say."""

    shard: int
    offset: int
    size: int
    crc32: int
    n_frames: int


class ClipIndex:
    """An opened index; a sample is named by its row.

    columns: read-only numpy views, [number of samples] each, in pages that all processes of a node
        share.
    """

    def __init__(self, folder: Path, table: pa.Table, shards: list[ShardEntry]):
        self.folder = folder
        self.shards = shards
        self.columns = {name: table[name].chunk(0).to_numpy() for name in MAPPED}

    def __len__(self) -> int:
        return len(self.columns["shard"])

    def __getitem__(self, sample: int) -> IndexRow:
        return IndexRow(**{name: column[sample].item() for name, column in self.columns.items()})

    @property
    def making(self) -> Making:
        """How all samples were made."""
        return self.shards[0].making

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the samples, their order, and how they were made: not of the files' format."""
        digest = xxhash.xxh3_128()
        for shard in self.shards:
            digest.update(repr((shard.sha256, shard.making)).encode())
        for column in self.columns.values():
            digest.update(column)
        return digest.hexdigest()

    def key(self, sample: int) -> str:
        """The name of a sample; read from the Parquet file, for messages."""
        return self._keys[sample].as_py()

    @cached_property
    def _keys(self) -> pa.ChunkedArray:
        return _read_table(self.folder / INDEX_FILE, ["key"])["key"]


# --- build -------------------------------------------------------------------


def find_shards(folder: Path) -> list[Path]:
    """The shards in `folder`, by name; ValueError if it holds none, or one is lost."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    shards = list_shards(folder)
    if not shards:
        raise ValueError(
            f"{folder} holds no .tar shard; make some with `megavideo tokenize-videos`"
        )
    if lost := list_lost_shards(folder):
        raise ValueError(
            f"{len(lost)} shards are missing beside their .json, as {lost[0]}; restore them, or "
            "delete the .json to go without"
        )
    return shards


def build_index(folder: Path, threads: int, advance: Callable[[], None]) -> ClipIndex:
    """Read every shard in `folder` and write its index.

    A shard that an older index lists with the same SHA-256 is hashed, but not parsed again.

    Args:
        advance: called after each shard.
    Raises: ValueError naming the shard, and the byte if the tar is damaged there.
    """
    shards = find_shards(folder)
    known = _known_tables(folder)
    entries, tables = [], []
    with ThreadPoolExecutor(threads) as pool:
        for entry, table in pool.map(partial(scan_shard, known=known), shards):
            entries.append(entry)
            tables.append(table)
            advance()
    write_index(folder, entries, tables)
    return open_index(folder)


def scan_shard(path: Path, known: Mapping[str, pa.Table]) -> tuple[ShardEntry, pa.Table]:
    """Read a whole shard: its entry, and a row a sample, from `known` (by SHA-256) if it is there.

    Raises: ValueError if anything in the shard is damaged, or it is not what its sidecar describes.
    """
    sidecar = read_sidecar(path)
    table = known.get(sidecar.sha256)
    with open(path, "rb") as file:
        hashed = HashingReader(file)
        if table is None:
            table = _table(read_members(hashed, path))
        while hashed.read(READ_BYTES):
            pass
    found = (hashed.hexdigest(), hashed.position, len(table))
    if found != (sidecar.sha256, sidecar.bytes, sidecar.count):
        raise ValueError(
            f"shard {path} is not the one that its .json describes: SHA-256 {found[0]}, {found[1]} "
            f"bytes, {found[2]} samples, not {sidecar.sha256}, {sidecar.bytes}, {sidecar.count}"
        )
    entry = ShardEntry(path.name, sidecar.bytes, sidecar.sha256, sidecar.count, sidecar.making)
    return entry, table


def _known_tables(folder: Path) -> dict[str, pa.Table]:
    """The rows of every whole shard in the index that is there already, by the shard's SHA-256."""
    if not (folder / INDEX_FILE).is_file():
        return {}
    try:
        shards, table = open_index(folder).shards, read_index_table(folder)
    except ValueError as error:
        log.warning("%s; it is built anew", error)
        return {}
    rows = np.searchsorted(table["shard"].to_numpy(), np.arange(len(shards) + 1))
    return {
        shard.sha256: table.slice(start, end - start)
        for shard, start, end in zip(shards, rows, rows[1:], strict=False)
        if end - start == shard.count  # rows may have been removed on purpose
    }


def _table(members: Iterable[Member]) -> pa.Table:
    return pa.Table.from_pylist([_row(member) for member in members], SCHEMA)


def _row(member: Member) -> dict[str, object]:
    clip = member.clip
    caption = clip.caption.encode()
    return {
        "id": 0,  # this and the next are given when all shards are known
        "shard": 0,
        "key": member.key,
        "offset": member.offset,
        "size": member.size,
        "crc32": stored_checksum(member.record),
        "n_frames": len(clip.frames),
        "fps": clip.fps,
        "duration_s": len(clip.frames) / clip.fps,
        "n_text": len(clip.text),
        "caption_bytes": len(caption),
        "caption_hash": xxhash.xxh3_64_intdigest(caption),
    }


def write_index(folder: Path, entries: Sequence[ShardEntry], tables: Sequence[pa.Table]) -> None:
    """Write both files.

    The index is written last, and names the digest of the shards' table that it belongs to.

    Raises: ValueError if the shards were not made alike.
    """
    for entry in entries:
        if entry.making != entries[0].making:
            raise ValueError(
                f"{folder}: {entry.file} was made by {entry.making}, {entries[0].file} by "
                f"{entries[0].making}; keep them in separate folders"
            )
    shards = pa.Table.from_pylist([_flat(entry) for entry in entries], SHARDS_SCHEMA)
    _write_table(folder / SHARDS_FILE, shards, {})
    index = pa.concat_tables(_numbered(tables))
    digest = file_digest(folder / SHARDS_FILE)
    _write_table(folder / INDEX_FILE, index, {b"version": VERSION, b"shards": digest.encode()})
    for old in folder.glob(MAP_NAME.format("*")):
        old.unlink()


def _numbered(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The tables with their columns `id` and `shard` filled in."""
    first = 0
    for number, table in enumerate(tables):
        columns = {"id": np.arange(first, first + len(table)), "shard": np.full(len(table), number)}
        for name, column in columns.items():
            field = SCHEMA.field(name)
            table = table.set_column(
                SCHEMA.get_field_index(name), field, pa.array(column, field.type)
            )
        yield table.replace_schema_metadata()
        first += len(table)


def _flat(entry: ShardEntry) -> dict[str, object]:
    row = asdict(entry)
    return row | row.pop("making")


def _write_table(path: Path, table: pa.Table, metadata: dict[bytes, bytes]) -> None:
    with atomic_path(path) as temporary:
        pq.write_table(
            table.replace_schema_metadata(metadata), temporary, compression="zstd",
            write_page_checksum=True,
        )  # fmt: skip


# --- open --------------------------------------------------------------------


def open_index(folder: Path, cache: Path | None = None) -> ClipIndex:
    """Open the index in `folder`.

    Args:
        cache: folder of the memory-mapped copy; None puts it into `folder` itself.
    Raises: ValueError if there is no index, or it is damaged, half-written or empty.
    """
    index_file, shards_file = folder / INDEX_FILE, folder / SHARDS_FILE
    for file in (index_file, shards_file):
        if not file.is_file():
            raise ValueError(f"{folder} has no {file.name}; run `megavideo build-index {folder}`")
    index_digest, shards_digest = file_digest(index_file), file_digest(shards_file)
    metadata = _metadata(index_file)
    if metadata.get(b"version") != VERSION or metadata.get(b"shards") != shards_digest.encode():
        raise ValueError(
            f"{index_file} does not belong to {shards_file.name} beside it; "
            f"run `megavideo build-index {folder}`"
        )
    table = _map_columns(index_file, index_digest, cache or folder)
    if not len(table):
        raise ValueError(f"{index_file} lists no sample")
    if np.any(np.diff(table["shard"].to_numpy().astype(np.int64)) < 0):
        raise ValueError(f"{index_file}: column shard must rise; sort the rows by (shard, offset)")
    return ClipIndex(folder, table, read_shard_entries(folder))


def open_text_tokenizer(path: Path, index: ClipIndex) -> TextTokenizer:
    """The tokenizer in `path`; ValueError if it is not the one that made the index's text."""
    tokenizer = TextTokenizer(path, index.making.image_codes)
    if tokenizer.digest != index.making.text_tokenizer:
        raise ValueError(
            f"{path} has digest {tokenizer.digest}; the text in {index.folder} was made by "
            f"{index.making.text_tokenizer}"
        )
    return tokenizer


def read_shard_entries(folder: Path) -> list[ShardEntry]:
    """The rows of shards.parquet."""
    entries = []
    for row in _read_table(folder / SHARDS_FILE).to_pylist():
        making = Making(**{name: row.pop(name) for name in Making.__dataclass_fields__})
        entries.append(ShardEntry(making=making, **row))
    return entries


def read_index_table(folder: Path) -> pa.Table:
    """All columns of index.parquet."""
    return _read_table(folder / INDEX_FILE)


def _map_columns(index_file: Path, digest: str, cache: Path) -> pa.Table:
    """The columns of `MAPPED` as one record batch in a memory map, written to `cache` on first use.

    Processes that meet here write the same bytes, and the last rename wins.
    """
    mapped = cache / MAP_NAME.format(digest)
    if not mapped.exists():
        table = _read_table(index_file, MAPPED).replace_schema_metadata().combine_chunks()
        _write_map(mapped, table)
    elif os.stat(mapped).st_uid not in (os.geteuid(), os.stat(index_file).st_uid):
        raise ValueError(
            f"{mapped} belongs to another user; set data.cache to a folder of your own"
        )
    try:
        return pa.ipc.open_file(pa.memory_map(str(mapped))).read_all()
    except pa.ArrowException as error:
        raise ValueError(f"{mapped} is damaged: {error}; delete it") from error


def _write_map(mapped: Path, table: pa.Table) -> None:
    try:
        with (
            atomic_path(mapped) as temporary,
            pa.OSFile(str(temporary), "wb") as sink,
            pa.ipc.new_file(sink, table.schema) as writer,
        ):
            writer.write_table(table)
    except OSError as error:
        raise ValueError(
            f"cannot write the memory map of the index to {mapped.parent} ({error}); set "
            "data.cache to a folder that you may write to"
        ) from error


def _read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    try:
        return pq.read_table(
            path, columns=columns, page_checksum_verification=True, partitioning=None
        )
    except (pa.ArrowException, OSError, KeyError) as error:
        raise ValueError(
            f"{path} is damaged: {error}; run `megavideo build-index {path.parent}`"
        ) from error


def _metadata(path: Path) -> dict[bytes, bytes]:
    try:
        return pq.read_schema(path).metadata or {}
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{path} is damaged: {error}; run `megavideo build-index {path.parent}`"
        ) from error


def file_digest(path: Path) -> str:
    """xxh3_128 of a file."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()
