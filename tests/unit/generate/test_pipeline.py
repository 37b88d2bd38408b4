"""Frames between frames: which runs there are, and that given frames stay."""

import pytest

from megavideo.generate.pipeline import starts


def test_runs_share_their_ends_and_cover_all_frames() -> None:
    assert starts(5, 3) == [0, 2]
    assert starts(9, 3) == [0, 2, 4, 6]
    assert starts(3, 2) == [0, 1]
    assert starts(6, 3) == [0, 2, 3]
    for count in range(3, 30):
        gaps = {(s + i, s + i + 1) for s in starts(count, 3) for i in range(2)}
        assert gaps == {(i, i + 1) for i in range(count - 1)}


def test_too_few_frames_are_refused() -> None:
    with pytest.raises(ValueError, match="2 frames are fewer than the 3"):
        starts(2, 3)
