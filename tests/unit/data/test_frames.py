"""Frame windows: the rates that fit, the lowest or any of them, always inside the clip."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megavideo.config.schema import RecipeConfig, Stage
from megavideo.data.frames import FrameChooser, frame_chooser

RATES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)


def chooser(stage: Stage, rates: tuple[float, ...] = RATES, seed: int = 0) -> FrameChooser:
    return FrameChooser(stage, rates, 5, seed)


@given(
    stage=st.sampled_from(["image", "keyframes", "interpolation"]),
    n_frames=st.integers(1, 200),
    grid_fps=st.sampled_from([1.0, 8.0, 12.0, 24.0, 29.97]),
    epoch=st.integers(0, 5),
    sample=st.integers(0, 2**40),
)
def test_a_window_lies_inside_its_clip_at_its_rate(
    stage: Stage, n_frames: int, grid_fps: float, epoch: int, sample: int
) -> None:
    choose = chooser(stage)
    if not choose.windows(n_frames, grid_fps):
        return
    window = choose.choose(epoch, sample, n_frames, grid_fps)
    taken = window.cut(np.arange(n_frames))
    assert len(taken) == (1 if stage == "image" else 5)
    if stage != "image":
        assert np.all(np.diff(taken) == window.stride)
        assert window.stride * window.fps == pytest.approx(grid_fps)
        assert window.seconds == 4 / window.fps
    assert window == choose.choose(epoch, sample, n_frames, grid_fps)


@pytest.mark.parametrize(
    ("n_frames", "rate"), [(5, 8.0), (8, 8.0), (9, 4.0), (32, 2.0), (33, 1.0), (129, 0.25)]
)
def test_keyframes_take_the_lowest_rate_that_fits(n_frames: int, rate: float) -> None:
    rates = {chooser("keyframes").choose(0, s, n_frames, 8.0).fps for s in range(20)}
    assert rates == {rate}


def test_interpolation_takes_every_rate_that_fits_equally_often() -> None:
    choose = chooser("interpolation", (2.0, 4.0, 8.0))
    rates = [choose.choose(0, sample, 17, 8.0).fps for sample in range(3000)]
    counts = [rates.count(rate) for rate in (2.0, 4.0, 8.0)]
    assert all(abs(count - 1000) < 120 for count in counts), counts
    assert {choose.choose(0, sample, 16, 8.0).fps for sample in range(60)} == {4.0, 8.0}


def test_every_start_is_drawn_equally_often() -> None:
    starts = [chooser("keyframes").choose(0, s, 36, 8.0).first for s in range(2000)]
    assert sorted(set(starts)) == [0, 1, 2, 3]
    assert min(starts.count(start) for start in range(4)) > 400
    frames = {chooser("image").choose(0, s, 7, 8.0).first for s in range(200)}
    assert frames == set(range(7))


def test_a_rate_that_does_not_divide_the_clips_is_not_available() -> None:
    assert [w.fps for w in chooser("interpolation", (2.0, 5.0, 8.0)).windows(99, 8.0)] == [2.0, 8.0]
    assert [w.fps for w in chooser("interpolation", (16.0, 8.0)).windows(99, 8.0)] == [8.0]
    with pytest.raises(ValueError, match=r"none of recipe\.frame_rates=\(3\.0,\) divides"):
        chooser("keyframes", (3.0,)).shortest(8.0)


def test_the_shortest_clip_is_the_one_that_just_fits() -> None:
    for stage, shortest in (("image", 1), ("keyframes", 9), ("interpolation", 9)):
        choose = chooser(stage, (1.0, 4.0))
        assert choose.shortest(8.0) == shortest
        assert (
            choose.windows(shortest, 8.0) and not choose.windows(shortest - 1, 8.0)[: shortest - 1]
        )


def test_visits_draw_anew_in_every_epoch_stage_and_seed() -> None:
    def starts(choose: FrameChooser, epoch: int) -> list[int]:
        return [choose.choose(epoch, sample, 200, 8.0).first for sample in range(20)]

    drawn = [
        starts(chooser("keyframes"), 0), starts(chooser("keyframes"), 1),
        starts(chooser("keyframes", seed=1), 0), starts(chooser("image"), 0),
    ]  # fmt: skip
    assert len({tuple(each) for each in drawn}) == 4


def test_the_recipe_says_which_rates() -> None:
    recipe = RecipeConfig(stage="keyframes", steps=1, frame_rates=RATES, min_fps=1.0, seed=3)
    assert frame_chooser(recipe, 5) == FrameChooser("keyframes", (1.0, 2.0, 4.0, 8.0), 5, 3)
    recipe = RecipeConfig(stage="interpolation", window=2, steps=1, frame_rates=(2.0, 4.0))
    assert frame_chooser(recipe, 5).rates == (2.0, 4.0)
