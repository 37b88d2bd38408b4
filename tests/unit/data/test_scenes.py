"""Scenes do what their captions say, and captions are spread evenly."""

from collections import Counter

import numpy as np
import pytest

from megavideo.data.scenes import (
    ACTIONS,
    BACKGROUNDS,
    COLORS,
    MOTIONS,
    SHAPES,
    TEMPLATES,
    Scene,
    draw_scene,
    make_scene,
)

SIZE, FRAMES = 32, 20


def draw(motion: str, shape: str = "square", color: str = "red") -> np.ndarray:
    """How much of the shape covers each pixel, [FRAMES, SIZE, SIZE] in [0, 1]."""
    frames = draw_scene(Scene(shape, motion, color, "black", TEMPLATES[0], 0.0, 0.0), SIZE, FRAMES)
    return frames[..., 0] / COLORS[color][0]


def centre(cover: np.ndarray) -> np.ndarray:
    """Centre of mass (x, y) in pixels right and down from the middle, of one frame."""
    places = np.arange(SIZE) - (SIZE - 1) / 2
    return np.array([(cover.sum(0) * places).sum(), (cover.sum(1) * places).sum()]) / cover.sum()


@pytest.mark.parametrize("motion", [motion for motion in MOTIONS if motion.startswith("moves")])
def test_a_moving_shape_goes_where_the_caption_says(motion: str) -> None:
    cover = draw(motion)
    x, y = centre(cover[-1])
    assert np.abs(centre(cover[0])).max() < 0.1  # the first frame does not tell
    assert (x > 5, x < -5) == ("right" in motion, "left" in motion)
    words = motion.split()
    assert (y > 5, y < -5) == (
        "down" in words or "bottom" in words,
        "up" in words or "top" in words,
    )


@pytest.mark.parametrize(
    ("motion", "axis", "sign"),
    [
        ("enters from the left", 0, -1),
        ("enters from the right", 0, 1),
        ("enters from the top", 1, -1),
        ("enters from the bottom", 1, 1),
    ],
)
def test_an_entering_shape_comes_from_its_side(motion: str, axis: int, sign: int) -> None:
    cover = draw(motion)
    assert cover[0].max() == 0
    assert centre(cover[FRAMES // 4])[axis] * sign > 5
    assert np.abs(centre(cover[-1])).max() < 0.1


def test_growing_shrinking_and_staying_change_the_area_as_they_should() -> None:
    area = {m: draw(m).sum((1, 2)) for m in ("grows", "shrinks", "does not move", "rotates")}
    assert (np.diff(area["grows"]) > 0).all() and area["grows"][-1] > 2.5 * area["grows"][0]
    assert (np.diff(area["shrinks"]) < 0).all() and area["shrinks"][-1] < area["shrinks"][0] / 4
    assert (draw("does not move") == draw("does not move")[0]).all()
    np.testing.assert_allclose(area["rotates"], area["rotates"][0], rtol=0.02)
    assert np.abs(np.diff(draw("rotates"), axis=0)).max((1, 2)).min() > 0.2


def test_appearing_disappearing_and_blinking_change_the_opacity() -> None:
    assert draw("appears")[0].max() == 0 and draw("appears")[-1].max() == 1
    assert draw("disappears")[0].max() == 1 and draw("disappears")[-1].max() == 0
    shown = draw("blinks").max((1, 2))
    assert set(shown) == {0, 1} and np.count_nonzero(np.diff(shown)) == 4


def test_a_bouncing_shape_turns_on_both_sides() -> None:
    x = np.array([centre(cover)[0] for cover in draw("bounces left and right")])
    y = np.array([centre(cover)[1] for cover in draw("bounces up and down")])
    for way in (x, y):
        assert way.min() < -6 and way.max() > 6 and abs(way[0]) < 0.1


def test_shapes_differ_and_edges_are_smooth() -> None:
    covers = {shape: draw("does not move", shape)[0] for shape in SHAPES}
    for shape, cover in covers.items():
        assert all(np.abs(cover - covers[other]).sum() > 20 for other in covers if other != shape)
        assert cover.max() == 1
    circle = covers["circle"]
    assert ((circle > 0.02) & (circle < 0.98)).sum() >= 16


def test_colours_are_those_of_the_caption() -> None:
    for color, rgb in COLORS.items():
        scene = Scene("square", "does not move", color, "pink", TEMPLATES[0], 0.0, 0.0)
        frame = draw_scene(scene, SIZE, 1)[0]
        assert tuple(frame[SIZE // 2, SIZE // 2]) == rgb
        assert tuple(frame[0, 0]) == BACKGROUNDS["pink"]


def test_every_attribute_comes_equally_often() -> None:
    scenes = [make_scene(3, number) for number in range(6 * len(ACTIONS))]
    for pick in (lambda s: (s.shape, s.motion), lambda s: s.color, lambda s: s.background):
        counts = Counter(map(pick, scenes))
        assert len(set(counts.values())) == 1
    assert len({scene.caption for scene in scenes}) > 0.9 * len(scenes)


def test_the_article_fits_the_colour() -> None:
    captions = [make_scene(0, number).caption for number in range(200)]
    assert any("an orange" in caption for caption in captions)
    assert not any("a orange" in caption or "an red" in caption for caption in captions)
