"""`megavideo score-clips` and the report's page on generated videos, on clips made from scenes."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from megavideo.data_tools import score_clips

from megavideo.data.captions import Caption, write_captions
from megavideo.data.image_tokenizer import ImageTokenizer
from megavideo.data.scenes import draw_scene, make_scene
from megavideo.data.video import write_video
from megavideo.generate.output import write_video_folder
from megavideo.generate.requests import Request
from megavideo.report.generated import draw_generated, enlarging, judgement


class Pixels:
    """In place of a tokenizer: an image's only token is its number."""

    def __init__(self, frames: np.ndarray):
        self.frames = frames

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        return score_clips.images_of(self.frames[tokens.flatten().numpy()])


def scenes(count: int) -> list:
    return [make_scene(0, number) for number in range(count)]


def test_a_caption_names_one_color_and_one_motion() -> None:
    for scene in scenes(200):
        color, motion = score_clips.named_in(scene.caption)
        assert score_clips.COLOR_NAMES[color] == scene.color
        assert score_clips.MOTION_NAMES[motion] == scene.motion
    assert score_clips.named_in("a red dog moves up and a blue one too") is None
    assert score_clips.named_in("a dog") is None


def test_the_judge_knows_real_clips_and_not_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(score_clips, "SCENES", 512)
    shown = scenes(40)
    frames = np.concatenate([draw_scene(scene, 32, 5) for scene in shown])
    for name, shift in (("right", 0), ("wrong", 1)):
        for number in range(len(shown)):
            scene = shown[(number + shift) % len(shown)]
            codes = np.arange(5 * number, 5 * number + 5)[:, None]
            folder = tmp_path / name / str(number)
            folder.mkdir(parents=True)
            (folder / "about.json").write_text(json.dumps({"prompt": scene.caption}))
            np.save(folder / "tokens.npy", codes)
    judge = score_clips.train_judge(32)
    shares = {
        name: score_clips.accuracies(judge, score_clips.generated(tmp_path / name, Pixels(frames)))
        for name in ("right", "wrong")
    }
    assert shares["right"]["color"] == (pytest.approx(1, abs=0.2), 40)
    assert shares["right"]["motion"][0] > 0.25 > 0.2 > shares["wrong"]["motion"][0]
    assert shares["wrong"]["color"][0] < 0.5
    assert 0 < shares["right"]["direction"][1] < 30
    (tmp_path / "right" / "0" / "about.json").write_text('{"prompt": "a dog"}')
    some = score_clips.generated(tmp_path / "right", Pixels(frames))
    assert len(some.color) == 39 and "1 of 40 videos are left out" in caplog.text
    still = torch.full_like(some.motion, score_clips.MOTION_NAMES.index("does not move"))
    assert score_clips.accuracies(judge, replace(some, motion=still)).keys() == {"color", "motion"}
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="holds no video"):
        score_clips.generated(tmp_path / "none", Pixels(frames))


def test_the_program_says_chance_and_what_real_clips_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score_clips, "SCENES", 128)
    monkeypatch.setattr(score_clips, "REAL", 36)
    from tests.unit.superres.samples import write_tokenizers

    write_tokenizers(tmp_path)
    frames = np.zeros((5, 16, 16, 3), np.uint8)
    codes = {"tokens": np.zeros((5, 4), np.int64)}
    request = Request("a red circle moves up on a white background")
    write_video_folder(tmp_path / "videos" / "one", request, {}, codes, frames, 1.0)
    arguments = [str(tmp_path / "videos"), "--image-tokenizer", str(tmp_path / "image.safetensors")]
    arguments += ["--json", str(tmp_path / "scores.json")]
    result = CliRunner().invoke(score_clips.main, arguments, catch_exceptions=False)
    assert [line.split()[0] for line in result.output.splitlines()[1:]] == [
        "color", "motion", "direction"
    ]  # fmt: skip
    rows = json.loads((tmp_path / "scores.json").read_text())
    assert [row["chance"] for row in rows] == [1 / 6, 1 / 21, 1 / 4]
    assert judgement(tmp_path / "scores.json")[0][0] == "color"


def test_generated_videos_are_shown_under_real_ones(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (33, 16, 16, 3), np.uint8)
    for prompt in ("a red circle", "something new"):
        request = Request(prompt)
        codes = {"tokens": np.zeros((33, 4), np.int64)}
        write_video_folder(tmp_path / "out" / request.name, request, {}, codes, frames, 8.0)
    write_video(tmp_path / "real.mp4", frames, 8.0)
    write_captions(tmp_path / "captions.csv", [Caption("real.mp4", "a red circle")])
    three = draw_generated(tmp_path / "out", tmp_path / "captions.csv", None)
    write_captions(tmp_path / "captions.csv", [Caption("real.mp4", "another")])
    two = draw_generated(tmp_path / "out", tmp_path / "captions.csv", None)
    assert three.height > 1.4 * two.height
    with pytest.raises(ValueError, match="no finished video"):
        draw_generated(tmp_path / "real", tmp_path / "captions.csv", None)


def test_enlarged_videos_are_shown_with_what_they_were_before(tmp_path: Path) -> None:
    from tests.unit.superres.samples import write_tokenizers

    write_tokenizers(tmp_path)
    tokenizer = ImageTokenizer.load(tmp_path / "image.safetensors")
    large = np.random.default_rng(0).integers(0, 255, (5, 48, 48, 3), np.uint8)
    codes = {"tokens": np.ones((5, 4), np.int64), "enlarged": np.ones((5, 36), np.int64)}
    request = Request("a red circle")
    write_video_folder(tmp_path / "out" / "one", request, {}, codes, large, 1.0)
    write_video(tmp_path / "real.mp4", large, 1.0)
    write_captions(tmp_path / "captions.csv", [Caption("real.mp4", "a red circle")])
    arguments = (tmp_path / "out", tmp_path / "captions.csv")
    without, sheet = draw_generated(*arguments, None), draw_generated(*arguments, tokenizer)
    assert sheet.width == without.width
    assert sheet.height == pytest.approx(1.5 * without.height, rel=0.05)
    small = tokenizer.decode_frames(torch.ones(5, 2, 2, dtype=torch.int64))[0]
    row = np.asarray(sheet)[sheet.height // 3 : 2 * sheet.height // 3]
    shown = {tuple(pixel) for pixel in row.reshape(-1, 3)}
    assert {tuple(pixel) for pixel in small.reshape(-1, 3)} <= shown


def test_the_report_says_what_super_resolution_reached(tmp_path: Path) -> None:
    score = {"frames": 54, "loss": 1.0, "accuracy": 0.758, "commonest": 0.206}
    (tmp_path / "superres.json").write_text(json.dumps(score))
    said = enlarging(tmp_path / "superres.json")
    assert "75.8% of the fine tokens of 54 held-out frames" in said and "20.6%" in said
