"""The index: every sample once, at its place; built anew only where needed; shared; never half."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import megavideo.data.index as index_module
from megavideo.data.index import (
    INDEX_FILE,
    SHARDS_FILE,
    ClipIndex,
    build_index,
    open_index,
    read_index_table,
)
from megavideo.data.sample import unpack
from megavideo.data.shards import Making, write_shard
from tests.unit.data.token_sets import CAPTIONS, flip, make_clip, making_of, write_set


def rebuild(folder: Path) -> ClipIndex:
    return build_index(folder, 2, lambda: None)


def test_every_row_points_at_its_record(tmp_path: Path) -> None:
    index = write_set(tmp_path, 3, 4)
    assert len(index) == 12
    for sample in range(12):
        row = index[sample]
        shard = tmp_path / index.shards[row.shard].file
        clip = unpack(shard.read_bytes()[row.offset : row.offset + row.size])
        np.testing.assert_array_equal(clip.frames, make_clip(sample).frames)
        assert (index.key(sample), row.n_frames) == (f"clip{sample}", len(clip.frames))


def test_the_tables_say_what_people_want_to_know(tmp_path: Path) -> None:
    write_set(tmp_path, 2, 30)
    row = read_index_table(tmp_path).to_pylist()[31]
    assert (row["id"], row["key"], row["shard"]) == (31, "clip31", 1)
    assert (row["fps"], row["duration_s"], row["n_text"]) == (8.0, 33 / 8, 2)
    assert row["caption_bytes"] == len(CAPTIONS[31 % 24].encode())
    hashes = read_index_table(tmp_path)["caption_hash"].to_pylist()
    assert hashes[0] == hashes[24] != hashes[1]
    assert pq.read_table(tmp_path / SHARDS_FILE)["count"].to_pylist() == [30, 30]


def test_building_again_changes_nothing_and_parses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = write_set(tmp_path, 3, 4)
    content = (tmp_path / INDEX_FILE).read_bytes()
    monkeypatch.setattr(index_module, "read_members", None)
    assert rebuild(tmp_path).fingerprint == first.fingerprint
    assert (tmp_path / INDEX_FILE).read_bytes() == content


def test_an_added_shard_gives_the_index_of_a_fresh_build(tmp_path: Path) -> None:
    write_set(tmp_path / "grown", 2, 3)
    for folder in ("grown", "fresh"):
        for number in range(2, 4) if folder == "grown" else range(4):
            clips = [(f"clip{3 * number + i}", make_clip(3 * number + i)) for i in range(3)]
            write_shard(tmp_path / folder / f"shard-{number:06d}.tar", clips, making_of())
    grown, fresh = rebuild(tmp_path / "grown"), rebuild(tmp_path / "fresh")
    assert grown.fingerprint == fresh.fingerprint
    assert read_index_table(tmp_path / "grown") == read_index_table(tmp_path / "fresh")


def test_a_known_shard_that_was_damaged_since_is_noticed(tmp_path: Path) -> None:
    write_set(tmp_path, 2, 3)
    before = (tmp_path / INDEX_FILE).read_bytes()
    flip(tmp_path / "shard-000001.tar", 700)
    with pytest.raises(ValueError, match=r"shard-000001\.tar is not the one that its \.json"):
        rebuild(tmp_path)
    assert (tmp_path / INDEX_FILE).read_bytes() == before, "the older index is gone"


def test_rows_may_be_removed_with_pyarrow(tmp_path: Path) -> None:
    full = write_set(tmp_path, 2, 3)
    table = read_index_table(tmp_path)
    pq.write_table(table.filter(np.arange(6) % 2 == 0), tmp_path / INDEX_FILE)
    index = open_index(tmp_path)
    assert [index.key(sample) for sample in range(3)] == ["clip0", "clip2", "clip4"]
    assert index[1] == full[2] and index.fingerprint != full.fingerprint
    assert rebuild(tmp_path).fingerprint == full.fingerprint


def test_the_fingerprint_is_of_the_samples_not_of_the_file(tmp_path: Path) -> None:
    index = write_set(tmp_path, 2, 3)
    pq.write_table(read_index_table(tmp_path), tmp_path / INDEX_FILE, compression="none")
    assert open_index(tmp_path).fingerprint == index.fingerprint
    assert write_set(tmp_path / "other", 2, 4).fingerprint != index.fingerprint


def test_columns_are_memory_mapped_and_the_map_is_made_once(tmp_path: Path) -> None:
    write_set(tmp_path / "set", 1, 3)
    first = open_index(tmp_path / "set", tmp_path / "cache")
    [mapped] = (tmp_path / "cache").iterdir()
    stamp = mapped.stat().st_mtime_ns
    second = open_index(tmp_path / "set", tmp_path / "cache")
    assert mapped.stat().st_mtime_ns == stamp
    assert not second.columns["offset"].flags.owndata
    assert str(mapped) in Path("/proc/self/maps").read_text()
    np.testing.assert_array_equal(first.columns["crc32"], second.columns["crc32"])


def test_a_map_that_cannot_be_written_says_what_to_do(tmp_path: Path) -> None:
    write_set(tmp_path, 1, 3)
    (tmp_path / "cache").write_text("a file, not a folder")
    with pytest.raises(ValueError, match=r"set data\.cache to a folder that you may write to"):
        open_index(tmp_path, tmp_path / "cache" / "below")


def test_a_damaged_map_is_named(tmp_path: Path) -> None:
    write_set(tmp_path, 1, 3)
    [mapped] = tmp_path.glob(".index-*.arrow")
    mapped.write_bytes(mapped.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"\.arrow is damaged: .*; delete it"):
        open_index(tmp_path)


def test_an_old_map_goes_with_its_index(tmp_path: Path) -> None:
    write_set(tmp_path, 1, 3)
    write_set(tmp_path, 2, 3)
    assert len(list(tmp_path.glob(".index-*.arrow"))) == 1


def test_half_an_index_is_refused(tmp_path: Path) -> None:
    write_set(tmp_path / "a", 1, 3)
    write_set(tmp_path / "b", 1, 4)
    (tmp_path / "a" / SHARDS_FILE).replace(tmp_path / "b" / SHARDS_FILE)
    with pytest.raises(ValueError, match=r"does not belong to shards\.parquet"):
        open_index(tmp_path / "b")
    with pytest.raises(ValueError, match=r"has no shards\.parquet; run `megavideo build-index"):
        open_index(tmp_path / "a")


def test_a_damaged_index_is_refused_or_reads_the_same(tmp_path: Path) -> None:
    """Page checksums cover the values; the rest of the file is structure, which must parse."""
    index = write_set(tmp_path, 2, 3)
    whole = (tmp_path / INDEX_FILE).read_bytes()
    refused = 0
    for offset in range(0, len(whole), 37):
        (tmp_path / INDEX_FILE).write_bytes(whole)
        flip(tmp_path / INDEX_FILE, offset, offset % 8)
        try:
            damaged = open_index(tmp_path, tmp_path / "cache")
        except ValueError:
            refused += 1
            continue
        for name, column in index.columns.items():
            np.testing.assert_array_equal(column, damaged.columns[name])
    assert refused > 20


def test_shards_made_in_different_ways_do_not_mix(tmp_path: Path) -> None:
    write_set(tmp_path, 1, 3)
    other = Making("text", "another image tokenizer", 50, 3, 8.0)
    write_shard(tmp_path / "shard-000001.tar", [("x", make_clip(9))], other)
    with pytest.raises(ValueError, match="keep them in separate folders"):
        rebuild(tmp_path)


def test_a_shard_that_is_lost_beside_its_sidecar_is_missed(tmp_path: Path) -> None:
    write_set(tmp_path, 3, 2)
    (tmp_path / "notes.json").write_text("{}")
    rebuild(tmp_path)
    (tmp_path / "shard-000001.tar").unlink()
    with pytest.raises(ValueError, match=r"1 shards are missing .*shard-000001\.tar; restore"):
        rebuild(tmp_path)
    (tmp_path / "shard-000001.json").unlink()
    assert len(rebuild(tmp_path)) == 4


def test_a_folder_without_shards_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no \.tar shard"):
        rebuild(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder"):
        rebuild(tmp_path / "nowhere")
