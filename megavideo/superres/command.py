"""`megavideo train-superres`: a small direct super-resolution model, from captioned videos."""

import time
from pathlib import Path

import click
import numpy as np
import torch

from megavideo import options
from megavideo.checkpoint.manifest import read_training
from megavideo.checkpoint.sources import find_checkpoint, open_base_weights
from megavideo.config.schema import ModelConfig
from megavideo.data.captions import read_captions
from megavideo.data.image_tokenizer import ImageTokenizer
from megavideo.data.pictures import contact_sheet
from megavideo.data.text_tokenizer import TextTokenizer
from megavideo.data.tokenizing import is_held_out
from megavideo.data.trainer_file import train_with_checkpoints
from megavideo.files import atomic_path
from megavideo.superres.checkpoint import Origin, save
from megavideo.superres.config import DirectConfig
from megavideo.superres.pairs import Pairs, Reading, load_pairs
from megavideo.superres.training import FACTOR, DirectTrainer, Training, direct_config, new_model
from megavideo.superres.upsample import direct_strategy, upsample

PREVIEW_FRAMES = 6


@click.command()
@click.argument("captions", type=click.Path(path_type=Path))
@click.option(
    "--base", type=click.Path(path_type=Path), required=True,
    help="A run of stage image: its weights are kept frozen.",
)  # fmt: skip
@options.text_tokenizer
@click.option(
    "--image-tokenizer", type=click.Path(path_type=Path), required=True,
    help="VQ-VAE, best trained on both sizes of picture.",
)  # fmt: skip
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder of the new model."
)
@options.videos_folder
@click.option(
    "--holdout", type=click.FloatRange(0, 1, min_open=True, max_open=True), default=0.1,
    show_default=True, help="Share of the captions whose videos are only measured.",
)  # fmt: skip
@click.option(
    "--fps", type=click.FloatRange(min=0, min_open=True), default=8.0, show_default=True,
    help="Frames a second to draw from.",
)  # fmt: skip
@click.option(
    "--frames-per-video", type=click.IntRange(min=1), default=8, show_default=True,
    help="Frames drawn from each video.",
)  # fmt: skip
@click.option(
    "--text-slots", type=click.IntRange(min=1), default=None, show_default="96, or what fits",
    help="Longest caption in tokens; more are cut off.",
)  # fmt: skip
@click.option(
    "--steps", type=click.IntRange(min=1), default=10_000, show_default=True,
    help="Optimizer steps.",
)  # fmt: skip
@click.option(
    "--batch", type=click.IntRange(min=1), default=16, show_default=True, help="Frames per step."
)
@options.learning_rate(1e-3)
@options.seed
@options.save_every
@click.option(
    "--preview", type=click.Path(dir_okay=False, path_type=Path),
    help="PNG of held-out frames: small, enlarged by the model, and real.",
)  # fmt: skip
@options.device
@options.reading_workers
def main(
    captions: Path,
    base: Path,
    text_tokenizer: Path,
    image_tokenizer: Path,
    out: Path,
    videos: Path | None,
    holdout: float,
    fps: float,
    frames_per_video: int,
    text_slots: int | None,
    steps: int,
    batch: int,
    learning_rate: float,
    seed: int,
    save_every: int,
    preview: Path | None,
    device: str,
    workers: int,
) -> None:
    """Train a model that turns a frame's tokens into those of a frame three times as large.

    CAPTIONS is a table as for `tokenize-videos`. Frames are drawn from its videos and tokenised in
    the base's size and in three times that. One process, one device: for demonstrations and small
    models; published models load as they are. An interrupted run continues from OUT's checkpoint
    when the same command is given again.

    \b
    Example:
      megavideo train-superres clips/captions.csv --base runs/base --out runs/superres \\
          --text-tokenizer text.model --image-tokenizer image.safetensors --steps 300
    """
    started = time.monotonic()
    # Narrow convolutions take a third less time on a CPU with channels last.
    image = ImageTokenizer.load(image_tokenizer).to(device)
    image = image.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    text = TextTokenizer(text_tokenizer, image.num_codes)
    config = direct_config(_model_of(base), text_slots)
    _check_tokenizers(config, image, text)
    side = config.coarse_side * image.config.compress_rate
    reading = Reading(side, FACTOR * side, fps, frames_per_video, seed)
    train, held_out = _load(captions, videos, holdout, reading, image, text, workers)
    weights = open_base_weights(base)
    model = new_model(config, {name: weights.read(name) for name in weights.tensors})
    trainer = DirectTrainer(
        model, Training(steps, batch, learning_rate, seed), torch.device(device)
    )
    checkpoint = out / "training.safetensors"
    train_with_checkpoints(trainer, train, checkpoint, save_every)
    score = trainer.evaluate(held_out)
    save(out, model, Origin(text.digest, image.digest, steps))
    if preview:
        write_preview(preview, trainer, image, held_out)
    checkpoint.unlink(missing_ok=True)
    click.echo(
        f"{out}: trained {steps} steps on {len(train)} frames; {len(held_out)} held-out frames: "
        f"{score}; {time.monotonic() - started:.1f} s"
    )


def write_preview(path: Path, trainer: DirectTrainer, image: ImageTokenizer, pairs: Pairs) -> None:
    """Held-out frames in three rows: small, enlarged by the model, and large as they are."""
    config = trainer.model.config
    chosen = np.linspace(0, len(pairs) - 1, PREVIEW_FRAMES, dtype=int)
    coarse, fine = (torch.from_numpy(t[chosen]).long() for t in (pairs.coarse, pairs.fine))
    strategy = direct_strategy(None)
    enlarged = torch.cat(
        [
            upsample(trainer.model, pairs.texts[row], frame[None], strategy, 0, f"preview/{row}")
            for row, frame in zip(chosen, coarse, strict=True)
        ]
    )
    rows = [
        image.decode_frames(tokens.unflatten(1, (side, side)))
        for tokens, side in (
            (coarse, config.coarse_side),
            (enlarged, config.fine_side),
            (fine, config.fine_side),
        )
    ]
    rows[0] = rows[0].repeat(FACTOR, 1).repeat(FACTOR, 2)
    labels = ["small", "enlarged by the model", "large, from its own tokens"]
    with atomic_path(path) as temporary:
        contact_sheet([list(row) for row in rows], labels).save(temporary, format="PNG")


def _model_of(base: Path) -> ModelConfig:
    checkpoint = find_checkpoint(base)
    if checkpoint is None:
        raise ValueError(f"--base {base} is no run of `megavideo train`, which says its sizes")
    return ModelConfig.model_validate(read_training(checkpoint).config["model"])


def _check_tokenizers(config: DirectConfig, image: ImageTokenizer, text: TextTokenizer) -> None:
    if image.num_codes != config.image_codes or text.vocab_size > config.vocab_size:
        raise ValueError(
            f"the base has {config.image_codes} image codes and {config.vocab_size} tokens, the "
            f"tokenizers {image.num_codes} and {text.vocab_size}: use those of its data"
        )


def _load(
    captions: Path,
    videos: Path | None,
    holdout: float,
    reading: Reading,
    image: ImageTokenizer,
    text: TextTokenizer,
    workers: int,
) -> tuple[Pairs, Pairs]:
    """Pairs to train on and pairs to measure, apart by their captions as in tokenize-videos."""
    table = read_captions(captions)
    parts = [[c for c in table if is_held_out(c.text, holdout) == held] for held in (False, True)]
    if not all(parts):
        raise ValueError(
            f"--holdout {holdout} puts {len(parts[1])} of {len(table)} videos aside (by their "
            "captions); choose another share so that neither part is empty"
        )
    folder = videos or captions.parent
    train, held_out = (load_pairs(p, folder, reading, image, text, workers) for p in parts)
    return train, held_out


if __name__ == "__main__":
    main()
