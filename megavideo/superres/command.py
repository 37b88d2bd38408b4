"""`megavideo train-superres`: a small super-resolution model, from captioned videos."""

import time
from collections.abc import Callable, Sequence
from math import isqrt
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor

from megavideo import options
from megavideo.checkpoint import manifest
from megavideo.checkpoint.sources import find_checkpoint, open_base_weights
from megavideo.checkpoint.tokenizers import TokenizerDigests, check_tokenizers
from megavideo.config.schema import ModelConfig
from megavideo.data.captions import read_captions
from megavideo.data.image_tokenizer import ImageTokenizer
from megavideo.data.pictures import contact_sheet
from megavideo.data.text_tokenizer import TextTokenizer
from megavideo.data.tokenizing import is_held_out
from megavideo.data.trainer_file import train_with_checkpoints
from megavideo.files import atomic_path, write_json
from megavideo.superres.checkpoint import Config, Origin, SuperResolution, save
from megavideo.superres.model import DirectSuperResolution
from megavideo.superres.pairs import Pairs, Reading, load_pairs
from megavideo.superres.start import FACTOR, direct_config, iterative_config, new_model
from megavideo.superres.training import Trainer, Training
from megavideo.superres.upsample import direct_strategy, refine, upsample

PREVIEW_FRAMES = 6
CONFIGS: dict[str, Callable[[ModelConfig, int | None], Config]] = {
    "direct": direct_config,
    "iterative": iterative_config,
}


@click.command()
@click.argument("captions", type=click.Path(path_type=Path))
@click.option(
    "--base", type=click.Path(path_type=Path), required=True,
    help="A run of stage image: its weights are kept frozen.",
)  # fmt: skip
@click.option(
    "--kind", type=click.Choice(["direct", "iterative"]), default="direct", show_default=True,
    help="direct enlarges frames; iterative refines enlarged ones.",
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
    "--text-slots", type=click.IntRange(min=1), default=None,
    show_default="as published, or what fits",
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
    help="PNG of held-out frames: small, made by the model, and real.",
)  # fmt: skip
@options.json_output
@options.device
@options.reading_workers
def main(
    captions: Path,
    base: Path,
    kind: str,
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
    output: Path | None,
    device: str,
    workers: int,
) -> None:
    """Train a model that turns a frame's tokens into those of a frame three times as large, or
    (--kind iterative) one that draws a part of such a frame's tokens anew, given the others.

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
    trained = _training_of(base)
    video = ModelConfig.model_validate(trained.config["model"])
    config = CONFIGS[kind](video, text_slots)
    digests = TokenizerDigests(text.digest, image.digest)
    _check_sizes(config, image, text)
    check_tokenizers(base, trained.tokenizers, digests, "use that one, or another --base")
    side = video.side * image.config.compress_rate
    reading = Reading(side, FACTOR * side, fps, frames_per_video, seed)
    train, held_out = _load(captions, videos, holdout, reading, image, text, workers)
    weights = open_base_weights(base)
    tensors = {name: weights.read(name) for name in weights.tensors}
    model = new_model(config, tensors, video.image_position)
    trainer = Trainer(model, Training(steps, batch, learning_rate, seed), torch.device(device))
    checkpoint = out / "training.safetensors"
    train_with_checkpoints(trainer, train, checkpoint, save_every)
    score = trainer.evaluate(held_out)
    save(out, model, Origin(digests, steps))
    if preview:
        write_preview(preview, trainer, image, held_out)
    if output:
        write_json(output, {"frames": len(held_out), **score._asdict()})
    checkpoint.unlink(missing_ok=True)
    click.echo(
        f"{out}: trained {steps} steps on {len(train)} frames; {len(held_out)} held-out frames: "
        f"{score}; {time.monotonic() - started:.1f} s"
    )


def write_preview(path: Path, trainer: Trainer, image: ImageTokenizer, pairs: Pairs) -> None:
    """Held-out frames in three rows: small, made by the model, and large as they are."""
    chosen = np.linspace(0, len(pairs) - 1, PREVIEW_FRAMES, dtype=int)
    coarse, fine = (torch.from_numpy(t[chosen]).long() for t in (pairs.coarse, pairs.fine))
    made, label = _made(trainer.model, [pairs.texts[row] for row in chosen], coarse, fine)
    rows = [_pixels(image, tokens) for tokens in (coarse, made, fine)]
    rows[0] = rows[0].repeat(FACTOR, 1).repeat(FACTOR, 2)
    labels = ["small", label, "large, from its own tokens"]
    with atomic_path(path) as temporary:
        contact_sheet([list(row) for row in rows], labels).save(temporary, format="PNG")


def _made(
    model: SuperResolution, texts: Sequence[Sequence[int]], coarse: Tensor, fine: Tensor
) -> tuple[Tensor, str]:
    """What the model makes of frames [n, N] and [n, M], each with its text; and its name."""
    frames = list(enumerate(zip(texts, coarse[:, None], fine[:, None], strict=True)))
    if isinstance(model, DirectSuperResolution):
        how = direct_strategy(None)
        made = [
            upsample(model, text, small, how, 0, f"preview/{n}") for n, (text, small, _) in frames
        ]
        return torch.cat(made), "enlarged by the model"
    made = [refine(model, text, large, 0, f"preview/{n}") for n, (text, _, large) in frames]
    return torch.cat(made), "large, partly drawn anew by the model"


def _pixels(image: ImageTokenizer, tokens: Tensor) -> np.ndarray:
    side = isqrt(tokens.shape[1])
    return image.decode_frames(tokens.unflatten(1, (side, side)))


def _training_of(base: Path) -> manifest.Training:
    checkpoint = find_checkpoint(base)
    if checkpoint is None:
        raise ValueError(f"--base {base} is no run of `megavideo train`, which says its sizes")
    return manifest.read_training(checkpoint)


def _check_sizes(config: Config, image: ImageTokenizer, text: TextTokenizer) -> None:
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
