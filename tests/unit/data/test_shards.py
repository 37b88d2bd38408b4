"""Shards: ordinary tars, equal bytes for equal samples, and no damage that goes unnoticed."""

import json
import random
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import webdataset
import webdataset.utils

from megavideo.data.index import build_index, scan_shard
from megavideo.data.sample import TokenClip, pack, unpack
from megavideo.data.shards import (
    HashingReader,
    file_sha256,
    read_members,
    read_sidecar,
    sidecar_path,
    write_shard,
)
from tests.unit.data.token_sets import flip, make_clip, making_of, write_set


def clips(count: int = 4) -> list[tuple[str, TokenClip]]:
    return [(f"clip{number}", make_clip(number)) for number in range(count)]


def test_webdataset_itself_reads_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webdataset.utils, "enforce_security", False)  # it is a local file
    path = tmp_path / "shard.tar"
    write_shard(path, clips(), making_of())
    found = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [sample["__key__"] for sample in found] == ["clip0", "clip1", "clip2", "clip3"]
    for number, sample in enumerate(found):
        np.testing.assert_array_equal(unpack(sample["clip"]).frames, make_clip(number).frames)


def test_equal_clips_give_equal_bytes(tmp_path: Path) -> None:
    first, second = tmp_path / "a" / "shard.tar", tmp_path / "b" / "shard.tar"
    for path in (first, second):
        write_shard(path, clips(), making_of())
    assert first.read_bytes() == second.read_bytes()
    assert sidecar_path(first).read_bytes() == sidecar_path(second).read_bytes()


def test_the_sidecar_vouches_for_the_shard(tmp_path: Path) -> None:
    path = tmp_path / "shard.tar"
    written = write_shard(path, clips(), making_of(), source="job", failed=[{"key": "x"}])
    sidecar = read_sidecar(path)
    assert (sidecar.count, sidecar.bytes, sidecar.sha256) == (
        4, path.stat().st_size, file_sha256(path),
    )  # fmt: skip
    assert (sidecar.making, sidecar.source) == (written.making, "job")
    assert [entry.name for entry in tmp_path.iterdir()].count("shard.tar") == 1
    assert len(list(tmp_path.iterdir())) == 2, "a temporary file is left"


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("a.b", {}, "key 'a.b'"),
        ("clip0", {}, "occurs twice"),
        ("x", {"fps": 4.0}, r"3x3 tokens at 4.0 fps, its shard has 3x3 at 8.0 fps"),
        ("x", {"frames": np.zeros((1, 4), np.uint16)}, "2x2 tokens"),
        ("x", {"frames": np.full((1, 9), 50, np.uint16)}, "image token 50 is outside"),
    ],
)
def test_a_clip_that_does_not_belong_leaves_no_shard(
    tmp_path: Path, key: str, change: dict, message: str
) -> None:
    stranger = TokenClip(**(vars(make_clip(1)) | change))
    with pytest.raises(ValueError, match=message):
        write_shard(tmp_path / "shard.tar", [*clips(1), (key, stranger)], making_of())
    assert not list(tmp_path.iterdir())


def test_every_flipped_bit_of_a_shard_is_noticed(tmp_path: Path) -> None:
    """By the tar's checksums, the records' or the SHA-256, and the message names the shard."""
    write_set(tmp_path, 1, 3)
    shard = tmp_path / "shard-000000.tar"
    whole = shard.read_bytes()
    rng = random.Random(0)
    for _ in range(150):
        flip(shard, rng.randrange(len(whole)), rng.randrange(8))
        with pytest.raises(ValueError, match=r"shard .*shard-000000\.tar is "):
            scan_shard(shard, {})
        shard.write_bytes(whole)
    scan_shard(shard, {})


def test_every_truncation_is_noticed_with_its_place(tmp_path: Path) -> None:
    write_set(tmp_path, 1, 3)
    shard = tmp_path / "shard-000000.tar"
    whole = shard.read_bytes()
    for length in {0, 1, 511, 512, 600, len(whole) - 512, len(whole) - 1, *range(0, 4000, 97)}:
        shard.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"shard-000000\.tar is damaged at byte \d+"):
            scan_shard(shard, {})
    shard.write_bytes(whole + bytes(512))
    with pytest.raises(ValueError, match="end of the archive"):
        scan_shard(shard, {})


def test_a_swapped_shard_is_noticed(tmp_path: Path) -> None:
    write_set(tmp_path, 2, 3)
    (tmp_path / "shard-000001.tar").rename(tmp_path / "shard-000000.tar")
    with pytest.raises(ValueError, match=r"is not the one that its \.json describes"):
        scan_shard(tmp_path / "shard-000000.tar", {})


def test_a_shard_without_its_sidecar_does_not_count(tmp_path: Path) -> None:
    write_set(tmp_path, 1, 3)
    sidecar_path(tmp_path / "shard-000000.tar").unlink()
    with pytest.raises(ValueError, match="it was not finished"):
        build_index(tmp_path, 1, lambda: None)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"making": {}}', '{"version": 1}'])
def test_a_file_that_is_no_sidecar_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "shard.json").write_text(text)
    with pytest.raises(ValueError, match=r"shard\.json does not describe a shard"):
        read_sidecar(tmp_path / "shard.tar")


def test_a_sidecar_of_another_version_is_named(tmp_path: Path) -> None:
    write_shard(tmp_path / "shard.tar", clips(), making_of())
    path = tmp_path / "shard.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 9}))
    with pytest.raises(ValueError, match="version 9, this program reads 1"):
        read_sidecar(tmp_path / "shard.tar")


def test_other_files_in_a_tar_are_refused() -> None:
    buffer = BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in (("a.clip", pack(make_clip(0))), ("a.txt", b"hello")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, BytesIO(data))
    buffer.seek(0)
    with pytest.raises(ValueError, match=r"'a\.txt' is not a \.clip file"):
        list(read_members(HashingReader(buffer), "made.tar"))
