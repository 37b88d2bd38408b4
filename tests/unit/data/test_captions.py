"""Captions tables: three kinds of file say the same, and an error names file, row and remedy."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megavideo.data.captions import Caption, read_captions, write_captions

ROWS = [
    Caption("a/1.mp4", 'a "quoted", comma-ed caption'),
    Caption("a/2.mp4", "一只猫在跑\nsecond line"),
    Caption("b.mkv", "emoji 🎬"),
]


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_every_kind_of_table_round_trips(tmp_path: Path, suffix: str) -> None:
    write_captions(tmp_path / f"captions.{suffix}", ROWS)
    assert read_captions(tmp_path / f"captions.{suffix}") == ROWS


def test_other_columns_and_a_byte_order_mark_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "captions.csv"
    path.write_text("\ufeffid,caption,video\n7, a cat ,x.mp4\n", encoding="utf-8")
    assert read_captions(path) == [Caption("x.mp4", "a cat")]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.csv", "video,text\nx.mp4,cat\n", r"c\.csv: row 2: no column 'caption' among"),
        ("c.csv", "video,caption\nx.mp4,\n", r"row 2: column 'caption' is ''; fill it"),
        ("c.csv", "video,caption\nx.mp4\n", r"row 2: column 'caption' is None"),
        ("c.csv", "video,caption\nx,a\nx,b\n", r"row 3: video 'x' is already in row 2"),
        ("c.csv", "video,caption\nx,a cat, asleep\n", r"row 2: more cells .* ' asleep'; .*quotes"),
        ("c.csv", 'video,caption\nx,"b\ny,c\nz,d\n', r"c\.csv: row 2: unexpected end"),
        ("c.csv", "video,caption,caption\nx,a,b\n", r"two columns are called 'caption'"),
        ("c.csv", "video,caption\n", r"c\.csv: the table has no rows"),
        ("c.jsonl", '{"video": "x", "caption": "a"}\n{bad\n', r"c\.jsonl: row 2: .*JSON"),
        (
            "c.jsonl",
            '{"video": "x", "caption": "\\ud83d"}\n',
            r"row 1: column 'caption': .*surrogate",
        ),
        ("c.jsonl", "[1, 2]\n", r"row 1: \[1, 2\] is not a JSON object"),
        ("c.jsonl", '{"video": "x", "caption": 5}\n', r"row 1: column 'caption' is 5"),
        ("c.parquet", "no parquet", r"c\.parquet: "),
        ("c.txt", "x", r"c\.txt: the name must end in \.csv, \.jsonl, \.parquet"),
    ],
)
def test_a_bad_table_is_one_error_that_names_the_place(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_captions(tmp_path / name)


def test_a_parquet_table_without_the_column_says_which(tmp_path: Path) -> None:
    pq.write_table(pa.table({"video": ["x"], "text": ["a"]}), tmp_path / "c.parquet")
    with pytest.raises(ValueError, match="no column 'caption'"):
        read_captions(tmp_path / "c.parquet")


def test_bytes_that_are_no_utf8_are_an_error(tmp_path: Path) -> None:
    rows = b"".join(b"%d.mp4,a cat\n" % number for number in range(1000))
    (tmp_path / "c.csv").write_bytes(b"video,caption\n" + rows + b"x.mp4,caf\xe9\n")
    with pytest.raises(ValueError, match=r"c\.csv: row 1002: .*utf-8"):
        read_captions(tmp_path / "c.csv")
