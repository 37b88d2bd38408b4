"""The stream under damage and trouble: nothing wrong gets through, and every rank sees the same."""

import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from megavideo.data.frames import FrameChooser, FrameWindow
from megavideo.data.index import ClipIndex, open_index
from megavideo.data.order import Order
from megavideo.data.source import LocalShards, ShardReader
from megavideo.data.stream import Damage, DamageLog, SampleStream, Visit, read_ahead
from tests.unit.data.token_sets import flip, make_clip, write_set


def stream_of(
    index: ClipIndex, max_bad_in_row: int = 8, store: LocalShards | None = None
) -> SampleStream:
    reader = ShardReader(store or LocalShards(index.folder, index.shards), retries=0)
    order = Order(index.columns["shard"], np.arange(len(index)), seed=5, window_shards=2)
    chooser = FrameChooser("keyframes", (1.0, 4.0, 8.0), 5, seed=5)
    return SampleStream(index, reader, order, chooser, max_bad_in_row)


def is_genuine(visit: Visit) -> bool:
    """Whether the visit shows what was written under its number."""
    written = make_clip(visit.sample)
    return bool(np.array_equal(visit.clip.frames, written.frames)) and visit.frames.shape == (5, 9)


def damage_sample(folder: Path, sample: int, byte: int = 40) -> None:
    index = open_index(folder)
    row = index[sample]
    flip(folder / index.shards[row.shard].file, row.offset + byte)


def test_a_visit_is_a_function_of_the_position(tmp_path: Path) -> None:
    index = write_set(tmp_path, 3, 6)
    first, second = stream_of(index), stream_of(index)
    assert first.clip_at(40).position == 40
    for position in range(60):
        a, b = first.clip_at(position), second.clip_at(position)
        assert a.sample == b.sample and a.window == b.window and is_genuine(a) and not a.damages
    one_epoch = {first.clip_at(position).sample for position in range(18)}
    assert one_epoch == set(range(18))


def test_no_flipped_bit_of_a_shard_gets_into_a_sample(tmp_path: Path) -> None:
    """Wherever it is: either every sample is genuine, or the damaged one is named and replaced."""
    index = write_set(tmp_path, 2, 4)
    rng = random.Random(1)
    replaced = 0
    for _ in range(120):
        path = tmp_path / index.shards[rng.randrange(2)].file
        whole = path.read_bytes()
        offset = rng.randrange(len(whole))
        flip(path, offset, rng.randrange(8))
        visits = [stream_of(index).clip_at(position) for position in range(8)]
        assert all(is_genuine(visit) for visit in visits)
        damages = [damage for visit in visits for damage in visit.damages]
        inside = any(
            index.shards[row.shard].file == path.name
            and row.offset <= offset < row.offset + row.size
            for row in map(index.__getitem__, range(8))
        )
        assert bool(damages) == inside
        replaced += bool(damages)
        path.write_bytes(whole)
    assert replaced > 20


def test_no_truncation_of_a_shard_gets_into_a_sample(tmp_path: Path) -> None:
    index = write_set(tmp_path, 2, 4)
    path = tmp_path / "shard-000001.tar"
    whole = path.read_bytes()
    for length in range(0, len(whole), 331):
        path.write_bytes(whole[:length])
        visits = [stream_of(index, 99).clip_at(position) for position in range(8)]
        assert all(is_genuine(visit) for visit in visits)
        lost = sum(index[s].offset + index[s].size > length for s in range(4, 8))
        assert sum(bool(visit.damages) for visit in visits) == lost


def test_two_swapped_records_are_noticed(tmp_path: Path) -> None:
    """Each is whole in itself, but the index knows which checksum belongs where."""
    index = write_set(tmp_path, 1, 26)
    path, a, b = tmp_path / "shard-000000.tar", index[1], index[25]  # captions of equal length
    data = bytearray(path.read_bytes())
    records = [bytes(data[row.offset : row.offset + row.size]) for row in (b, a)]
    for row, record in zip((a, b), records, strict=True):
        data[row.offset : row.offset + row.size] = record
    path.write_bytes(data)
    damages = [d for p in range(26) for d in stream_of(index).clip_at(p).damages]
    assert {damage.sample for damage in damages} == {1, 25}
    assert {damage.reason for damage in damages} == {"another record than the index says"}


def test_every_rank_replaces_a_damaged_sample_by_the_same_one(tmp_path: Path) -> None:
    index = write_set(tmp_path, 3, 6)
    for sample in (2, 7, 8):
        damage_sample(tmp_path, sample)
    one, other = stream_of(index), stream_of(index)
    forwards = {p: one.clip_at(p) for p in range(36)}
    for position in reversed(range(36)):
        visit = other.clip_at(position)
        assert (visit.sample, visit.window) == (
            forwards[position].sample, forwards[position].window,
        )  # fmt: skip
        assert visit.damages == forwards[position].damages
        assert bool(visit.damages) == (one.order[position].sample in (2, 7, 8))
        assert visit.sample not in (2, 7, 8)


def test_damage_is_named_by_shard_key_and_reason(tmp_path: Path) -> None:
    index = write_set(tmp_path, 2, 4)
    damage_sample(tmp_path, 6)
    stream = stream_of(index)
    [damage] = [d for p in range(8) for d in stream.clip_at(p).damages]
    assert (damage.key, damage.shard, damage.offset) == (
        "clip6",
        "shard-000001.tar",
        index[6].offset,
    )
    assert "CRC-32" in damage.reason


def test_damage_that_goes_away_on_reading_again_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = write_set(tmp_path, 1, 4)
    stream = stream_of(index)
    read, reads = stream.reader.read, []

    def once_wrong(shard: int, offset: int, size: int) -> bytes:
        reads.append(offset)
        return bytes(size) if len(reads) == 1 else read(shard, offset, size)

    monkeypatch.setattr(stream.reader, "read", once_wrong)
    assert not stream.clip_at(0).damages and len(reads) == 2


def test_only_damaged_samples_end_in_an_error(tmp_path: Path) -> None:
    index = write_set(tmp_path, 1, 3)
    for sample in range(3):
        damage_sample(tmp_path, sample)
    with pytest.raises(
        ValueError, match=r"4 damaged samples in a row .*clip\d in shard-000000\.tar"
    ):
        stream_of(index, max_bad_in_row=4).clip_at(0)


def visit(position: int, bad: int = 0) -> Visit:
    damages = tuple(Damage(position, 9, "key9", "s.tar", 512, "why") for _ in range(bad))
    return Visit(position, position, make_clip(position), FrameWindow(0, 1, 5, 8.0), damages)


def test_one_bad_sample_early_stops_nothing(tmp_path: Path) -> None:
    log = DamageLog(max_share=1e-4, max_in_row=16, quarantine=None)
    for position in range(50):
        log.account(visit(position, bad=int(position == 3)))
    assert (log.damaged, log.seen) == (1, 50)


def test_too_large_a_share_stops_the_run() -> None:
    log = DamageLog(max_share=0.1, max_in_row=4, quarantine=None)
    with pytest.raises(ValueError, match=r"5 of 9 samples were damaged.*data\.max_bad_share"):
        for position in range(100):
            log.account(visit(position, bad=int(position % 2 == 0)))


def test_too_many_in_a_row_stop_the_run() -> None:
    log = DamageLog(max_share=0.9, max_in_row=4, quarantine=None)
    for position in range(40):
        log.account(visit(position, bad=int(position % 5 != 0)))
    with pytest.raises(ValueError, match=r"5 damaged samples in a row.*data\.max_bad_in_row"):
        for position in range(10):
            log.account(visit(position, bad=1))


def test_the_quarantine_file_lists_every_damaged_sample(tmp_path: Path) -> None:
    path = tmp_path / "run" / "quarantine.jsonl"
    log = DamageLog(1.0 - 1e-9, 99, path)
    for position in range(3):
        log.account(visit(position, bad=position))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["position"] for row in rows] == [1, 2, 2]
    assert rows[0].items() >= {"key": "key9", "shard": "s.tar", "reason": "why", "rank": 0}.items()


def test_reading_ahead_keeps_the_order_and_stays_within_its_bound() -> None:
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        time.sleep(0.002 * (item % 3))
        return item * item

    with ThreadPoolExecutor(3) as pool:
        results = read_ahead(pool, work, iter(range(10**9)), ahead=6)
        for item in range(20):
            assert next(results) == item * item
            assert max(begun) <= item + 6
        results.close()
    assert len(begun) <= 27


def test_an_error_ahead_comes_in_its_turn() -> None:
    def work(item: int) -> int:
        if item == 3:
            raise OSError("gone")
        return item

    with ThreadPoolExecutor(2) as pool:
        results = read_ahead(pool, work, range(9), ahead=8)
        assert [next(results) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(OSError, match="gone"):
            next(results)
