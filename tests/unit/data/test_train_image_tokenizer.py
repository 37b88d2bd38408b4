"""train-image-tokenizer: from a folder of videos to a file that loads, with a picture of it."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from megavideo.data_tools.train_image_tokenizer import main, pixel_statistics
from PIL import Image

from megavideo.data.image_tokenizer import ImageTokenizer, images_of
from megavideo.data.scenes import draw_scene, make_scene
from megavideo.data.video import write_video

OPTIONS = [
    "--size=16",
    "--compress-rate=4",
    "--channels=4",
    "--z-channels=8",
    "--codes=16",
    "--steps=6",
    "--batch=4",
    "--learning-rate=0.004",
    "--frames=40",
    "--workers=1",
    "--device=cpu",
]


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    for number in range(5):
        frames = draw_scene(make_scene(0, number), 16, 8)
        write_video(tmp_path / "clips" / f"{number}.mp4", frames, 8)
    return tmp_path / "clips"


def train(clips: Path, out: Path, *options: str) -> str:
    result = CliRunner().invoke(main, [str(clips), f"--out={out}", *OPTIONS, *options])
    if isinstance(result.exception, ValueError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_the_model_loads_and_the_preview_shows_pairs_of_rows(clips: Path, tmp_path: Path) -> None:
    out = tmp_path / "image.safetensors"
    output = train(clips, out, f"--preview={tmp_path / 'preview.png'}")
    tokenizer = ImageTokenizer.load(out)
    assert "held-out frames 16 pixels at 1/4: PSNR" in output and tokenizer.digest in output
    assert tokenizer.config.mean != tokenizer.config.std != (1, 1, 1)
    tokens = tokenizer.encode(images_of(np.zeros((1, 16, 16, 3), np.uint8)))
    assert tokens.shape == (1, 4, 4) and int(tokens.max()) < 16
    assert Image.open(tmp_path / "preview.png").height > 2 * 128
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "clips",
        "image.safetensors",
        "preview.png",
    ]


def test_two_sizes_and_two_rates_share_a_codebook(clips: Path, tmp_path: Path) -> None:
    out = tmp_path / "image.safetensors"
    output = train(clips, out, "--size=48", "--compress-rate=8")
    tokenizer = ImageTokenizer.load(out)
    assert tokenizer.config.rates == (4, 8) and tokenizer.config.compress_rate == 4
    for scale in ("16 pixels at 1/4", "48 pixels at 1/4", "16 pixels at 1/8", "48 pixels at 1/8"):
        assert scale in output


def test_an_interrupted_run_continues_from_its_checkpoint(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(clips, tmp_path / "whole.safetensors")
    out = tmp_path / "cut.safetensors"
    with monkeypatch.context() as patch:  # everything is done but the result is not written yet
        patch.setattr("megavideo.data_tools.train_image_tokenizer._finish", lambda *_: 1 / 0)
        with pytest.raises(AssertionError):
            train(clips, out, "--save-every=4")
    assert (tmp_path / "cut.safetensors.checkpoint").exists() and not out.exists()
    train(clips, out, "--save-every=4")
    assert not (tmp_path / "cut.safetensors.checkpoint").exists()
    digests = {
        ImageTokenizer.load(tmp_path / f"{name}.safetensors").digest for name in ("whole", "cut")
    }
    assert len(digests) == 1


def test_a_size_that_does_not_divide_is_refused(clips: Path, tmp_path: Path) -> None:
    for option in ("--size=18", "--crop=10", "--crop=32"):
        message = option.replace("=", " ") + " must be a multiple of --compress-rate 4, at most"
        with pytest.raises(ValueError, match=message):
            train(clips, tmp_path / "x.safetensors", option)


def test_pixel_statistics_are_per_channel_and_never_zero() -> None:
    frames = np.zeros((2, 4, 4, 3), np.uint8)
    frames[0, ..., 0] = 255
    mean, std = pixel_statistics(frames)
    assert mean == (0.5, 0, 0) and std == (0.5, 0.01, 0.01)
