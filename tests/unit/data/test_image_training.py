"""Training the image tokenizer: it learns, repeats exactly, resumes exactly, and fails loudly."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megavideo.data.frame_pool import load_frames
from megavideo.data.image_tokenizer import ImageTokenizerConfig
from megavideo.data.image_training import ImageTrainer, ImageTraining
from megavideo.data.video import write_video

CONFIG = ImageTokenizerConfig(
    channels=8,
    z_channels=8,
    num_codes=16,
    rates=(4,),
    compress_rate=4,
    mean=(0.5, 0.5, 0.5),
    std=(0.3, 0.3, 0.3),
)
TRAINING = ImageTraining(steps=10, batch=4, learning_rate=5e-3, seed=0, decay=0.9)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)  # sums of several threads may come in another order


def striped_frames(count: int = 32, size: int = 8) -> np.ndarray:
    """Black frames with one coloured half, in four colours."""
    colors = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)], np.uint8)
    frames = np.zeros((count, size, size, 3), np.uint8)
    frames[:, :, : size // 2] = colors[np.arange(count) % 4, None, None]
    return frames


def train(training: ImageTraining = TRAINING, until: int | None = None) -> ImageTrainer:
    """Train to the end, or stop as an interruption would after `until` steps."""
    trainer = ImageTrainer(CONFIG, training, CPU)
    run_until(trainer, until)
    return trainer


class Interrupted(Exception):
    pass


def run_until(trainer: ImageTrainer, until: int | None) -> None:
    def stop(*_: object) -> None:
        if trainer.step == until:
            raise Interrupted

    with suppress(Interrupted):
        trainer.train([striped_frames()], stop)


def test_frames_of_few_colours_are_learned() -> None:
    trainer = train(replace(TRAINING, steps=100))
    score = trainer.evaluate(striped_frames())
    assert score.psnr > 18  # the mean frame has 9 dB
    assert score.perplexity > 4 and score.used > 0.5


def test_crops_cover_the_same_area_and_end_before_the_training_does() -> None:
    training = replace(TRAINING, crop=4)
    trainer = ImageTrainer(CONFIG, training, CPU)
    assert trainer._batch([striped_frames()], 0).shape == (16, 3, 4, 4)
    trainer.step = 7
    assert trainer._batch([striped_frames()], 0).shape == (4, 3, 8, 8)


def test_sizes_and_rates_take_turns_with_one_codebook() -> None:
    config = replace(CONFIG, rates=(4, 8))
    trainer = ImageTrainer(config, replace(TRAINING, steps=40), CPU)
    pools = [striped_frames(size=8), striped_frames(size=24)]
    scales = [(pool, rate) for pool in pools for rate in (4, 8)]
    before = [trainer.evaluate(pool, rate).psnr for pool, rate in scales]
    seen = []
    step = trainer._train_step
    trainer._train_step = lambda images, rate: (  # type: ignore[method-assign]
        seen.append((tuple(images.shape), rate)) or step(images, rate)
    )
    trainer.train(pools)
    small, large = (4, 3, 8, 8), (1, 3, 24, 24)  # fewer of the larger ones, to the same area
    assert seen[:5] == [(small, 4), (large, 4), (small, 8), (large, 8), (small, 4)]
    after = [trainer.evaluate(pool, rate).psnr for pool, rate in scales]
    assert all(new > old + 1 for new, old in zip(after, before, strict=True)), (before, after)


def test_training_is_a_function_of_the_seed() -> None:
    digest = train().model.digest
    assert train().model.digest == digest
    assert train(replace(TRAINING, seed=1)).model.digest != digest


@pytest.mark.parametrize("until", [1, 6])  # before and after the codebook is placed
def test_resuming_is_bitwise_the_same_as_not_stopping(tmp_path: Path, until: int) -> None:
    interrupted = train(until=until)
    assert interrupted.step == until
    interrupted.save(tmp_path / "checkpoint")
    resumed = ImageTrainer(CONFIG, TRAINING, CPU)
    resumed.resume(tmp_path / "checkpoint")
    run_until(resumed, None)
    assert resumed.model.digest == train().model.digest


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    train(until=1).save(tmp_path / "checkpoint")
    other = ImageTrainer(CONFIG, replace(TRAINING, batch=5), CPU)
    with pytest.raises(ValueError, match="belongs to other settings"):
        other.resume(tmp_path / "checkpoint")


def test_a_loss_that_is_not_finite_stops_the_training() -> None:
    trainer = ImageTrainer(CONFIG, TRAINING, CPU)
    with torch.no_grad():
        trainer.model.enc.conv_in.bias[0] = float("nan")
    with pytest.raises(ValueError, match="step 0: the loss is nan; use a lower --learning-rate"):
        trainer.train([striped_frames()])


def write_files(folder: Path, count: int) -> None:
    for number in range(count):
        level = np.full((16, 16, 3), 8 * number, np.uint8)
        write_video(folder / "deep" / f"{number}.mp4", [level] * 6, 8)


def test_frames_come_evenly_from_all_files_and_held_out_files_are_apart(tmp_path: Path) -> None:
    write_files(tmp_path, 17)
    Image.fromarray(np.full((20, 30, 3), 200, np.uint8)).save(tmp_path / "image.png")
    pool = load_frames(tmp_path, size=8, fps=8, limit=36, seed=0, workers=1)
    assert pool.train.shape[1:] == pool.held_out.shape[1:] == (8, 8, 3)
    assert len(pool.train) + len(pool.held_out) == 35  # two of each video, one of the image
    levels = {round(float(frame.mean()) / 8) for frame in pool.train}
    assert len(levels) == 16
    assert not levels & {round(float(frame.mean()) / 8) for frame in pool.held_out}


def test_the_pool_depends_on_the_seed_alone(tmp_path: Path) -> None:
    write_files(tmp_path, 9)
    pools = [load_frames(tmp_path, 8, 8, 9, seed, workers=1) for seed in (0, 0, 1)]
    assert np.array_equal(pools[0].train, pools[1].train)
    assert not np.array_equal(pools[0].train, pools[2].train)


def test_a_broken_video_is_logged_and_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megavideo.data.frame_pool.log.propagate", True)
    write_files(tmp_path, 3)
    (tmp_path / "broken.mp4").write_bytes(b"nothing")
    pool = load_frames(tmp_path, 8, 8, 100, seed=0, workers=1)
    assert len(pool.train) + len(pool.held_out) == 18
    assert "skipping video" in caplog.text and "broken.mp4" in caplog.text


@pytest.mark.parametrize(("count", "message"), [(0, "no video or image"), (1, "1 of 1 files")])
def test_too_few_files_are_an_error(tmp_path: Path, count: int, message: str) -> None:
    write_files(tmp_path, count)
    with pytest.raises(ValueError, match=message):
        load_frames(tmp_path, 8, 8, 100, seed=0, workers=1)
