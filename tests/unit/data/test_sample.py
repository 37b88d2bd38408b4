"""Records: what is packed comes back, and a record that was changed in any way is refused."""

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from megavideo.data.sample import HEADER, TokenClip, checksum, pack, unpack
from tests.unit.data.token_sets import make_clip


@given(
    frames=st.integers(1, 3).flatmap(
        lambda side: arrays(np.uint16, st.tuples(st.integers(1, 5), st.just(side * side)))
    ),
    text=arrays(np.uint32, st.integers(1, 6)),
    caption=st.text(min_size=1, max_size=12),
    milli=st.integers(1, 60_000),
)
def test_any_clip_round_trips(
    frames: np.ndarray, text: np.ndarray, caption: str, milli: int
) -> None:
    try:
        caption.encode()
    except UnicodeEncodeError:  # a lone surrogate is no text
        return
    clip = unpack(pack(TokenClip(frames, milli / 1000, text, caption)))
    np.testing.assert_array_equal(clip.frames, frames)
    np.testing.assert_array_equal(clip.text, text)
    assert (clip.caption, clip.fps) == (caption, milli / 1000)
    assert clip.frames.dtype == np.uint16 and clip.text.dtype == np.uint32


def test_every_flipped_bit_is_noticed() -> None:
    record = pack(make_clip(3, n_frames=2))
    for bit in range(8 * len(record)):
        changed = bytearray(record)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError):
            unpack(bytes(changed))


def test_every_cut_is_noticed() -> None:
    record = pack(make_clip(3, n_frames=2))
    for length in range(len(record)):
        with pytest.raises(ValueError, match="record has"):
            unpack(record[:length])
    with pytest.raises(ValueError, match="bytes, its header says"):
        unpack(record + b"\0")


def test_a_record_of_another_version_is_refused_by_its_number() -> None:
    record = bytearray(pack(make_clip(0)))
    struct.pack_into("<H", record, 4, 2)
    struct.pack_into("<I", record, HEADER.size - 4, checksum(bytes(record)))
    with pytest.raises(ValueError, match="version 2, this program reads version 1"):
        unpack(bytes(record))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": np.full((1, 4), 65_536)}, r"span 65536\.\.65536, the record holds 0\.\.65535"),
        ({"frames": np.full((1, 4), -1)}, "image tokens span -1"),
        ({"frames": np.zeros((1, 5), int)}, "5 tokens a frame are no square"),
        ({"frames": np.zeros((0, 4), int)}, "non-empty"),
        ({"frames": np.zeros((1, 4))}, "integer array"),
        ({"text": np.zeros(0, int)}, "text ids of shape"),
        ({"caption": ""}, "the caption is empty"),
        ({"fps": 29.9701}, "multiple of 0.001"),
        ({"fps": 0.0}, "positive"),
    ],
)
def test_what_a_record_cannot_hold_is_refused(change: dict, message: str) -> None:
    parts = {"frames": np.zeros((1, 4), int), "fps": 8.0, "text": np.array([7]), "caption": "x"}
    with pytest.raises(ValueError, match=message):
        pack(TokenClip(**(parts | change)))
