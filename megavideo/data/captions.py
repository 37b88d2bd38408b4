"""Captions tables: which text belongs to which video, as CSV, JSONL or Parquet.

Every table has the columns `video` (a path, relative to the folder of videos) and `caption`; others
are ignored.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from megavideo.files import atomic_write

COLUMNS = ("video", "caption")


@dataclass(frozen=True, slots=True)
class Caption:
    """One row: a video's path as the table gives it, and its text."""

    video: str
    text: str


def read_captions(path: Path | str) -> list[Caption]:
    """The rows of a captions table in file order; its suffix is .csv, .jsonl or .parquet.

    Raises: ValueError naming the file, and the row where there is one, on a missing column, an
        empty cell, a row that does not parse, a video named twice, or a table without rows.
    """
    path = Path(path)
    captions: list[Caption] = []
    line_of: dict[str, int] = {}
    for line, row in _of_kind(path, _READERS)(path):
        caption = _caption(path, line, row)
        if caption.video in line_of:
            raise ValueError(
                f"{path}: row {line}: video {caption.video!r} is already in row "
                f"{line_of[caption.video]}; keep one row a video"
            )
        line_of[caption.video] = line
        captions.append(caption)
    if not captions:
        raise ValueError(f"{path}: the table has no rows")
    return captions


def write_captions(path: Path | str, captions: Sequence[Caption]) -> None:
    """Write a table that `read_captions` reads; it replaces an older one in one step."""
    path = Path(path)
    data = _of_kind(path, _WRITERS)(captions)
    with atomic_write(path) as file:
        file.write(data)


Rows = Iterator[tuple[int, dict[str, Any]]]  # row number as an editor shows it, cells by column


def _caption(path: Path, line: int, row: dict[str, Any]) -> Caption:
    for column in COLUMNS:
        if column not in row:
            raise ValueError(
                f"{path}: row {line}: no column {column!r} among {sorted(map(str, row))}; "
                f"the table needs the columns {', '.join(COLUMNS)}"
            )
        if not isinstance(row[column], str) or not row[column].strip():
            raise ValueError(
                f"{path}: row {line}: column {column!r} is {row[column]!r}; "
                "fill it with text or delete the row"
            )
        try:
            row[column].encode()
        except UnicodeEncodeError as error:  # JSON may escape half of a pair
            raise ValueError(f"{path}: row {line}: column {column!r}: {error}") from error
    return Caption(row["video"], row["caption"].strip())


def _read_csv(path: Path) -> Rows:
    begins = 1  # line of the row that is being read: a quote that is never closed takes all others
    with open(path, "rb") as file:
        reader = csv.reader(_decoded(file), strict=True)
        try:
            header = next(reader, [])
            if twice := [column for column in COLUMNS if header.count(column) > 1]:
                raise ValueError(f"{path}: two columns are called {twice[0]!r}; rename one")
            begins = reader.line_num + 1
            for cells in filter(None, reader):
                if any(cells[len(header) :]):
                    raise ValueError(
                        f"{path}: row {reader.line_num}: more cells than columns, up to "
                        f"{cells[-1]!r}; put a text that has commas into double quotes"
                    )
                yield reader.line_num, dict(zip_longest(header, cells[: len(header)]))
                begins = reader.line_num + 1
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: row {begins}: {error}") from error


def _decoded(file: BinaryIO) -> Iterator[str]:
    """Lines, decoded one by one, so that an error belongs to its line; spreadsheets write a BOM."""
    for number, line in enumerate(file):
        yield line.decode("utf-8" if number else "utf-8-sig")


def _read_jsonl(path: Path) -> Rows:
    with open(path, "rb") as file:
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except ValueError as error:  # no JSON, or no UTF-8
                raise ValueError(
                    f"{path}: row {line}: {error}; expected one JSON object"
                ) from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}: row {line}: {row!r} is not a JSON object")
            yield line, row


def _read_parquet(path: Path) -> Rows:
    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: {error}") from error
    with file:
        present = [column for column in COLUMNS if column in file.schema_arrow.names]
        line = 0
        for batch in file.iter_batches(columns=present):
            for row in batch.to_pylist():
                line += 1
                yield line, row


def _csv_bytes(captions: Sequence[Caption]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows((caption.video, caption.text) for caption in captions)
    return text.getvalue().encode()


def _jsonl_bytes(captions: Sequence[Caption]) -> bytes:
    rows = ({"video": caption.video, "caption": caption.text} for caption in captions)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _parquet_bytes(captions: Sequence[Caption]) -> bytes:
    columns = {"video": [c.video for c in captions], "caption": [c.text for c in captions]}
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


_READERS: dict[str, Callable[[Path], Rows]] = {
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
_WRITERS: dict[str, Callable[[Sequence[Caption]], bytes]] = {
    ".csv": _csv_bytes,
    ".jsonl": _jsonl_bytes,
    ".parquet": _parquet_bytes,
}


def _of_kind(path: Path, handlers: dict[str, Callable[[Any], Any]]) -> Callable[[Any], Any]:
    if path.suffix not in handlers:
        raise ValueError(f"captions table {path}: the name must end in {', '.join(handlers)}")
    return handlers[path.suffix]
