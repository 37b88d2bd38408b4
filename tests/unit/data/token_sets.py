"""Small folders of real shards for the tests of the loader."""

from pathlib import Path

import numpy as np

from megavideo.config.schema import DataConfig, ModelConfig, RecipeConfig
from megavideo.data.index import ClipIndex, build_index
from megavideo.data.sample import TokenClip
from megavideo.data.shards import Making, write_shard
from megavideo.data.text_tokenizer import TextTokenizer

CODES, SIDE, FPS, FRAMES, TEXT_SLOTS = 50, 3, 8.0, 5, 40
SHAPES = ("circle", "square", "star", "ring")
CAPTIONS = [
    f"a {colour} {shape} moves {way}"
    for colour in ("red", "green", "blue")
    for shape in SHAPES
    for way in ("left", "right")
]


def make_clip(number: int, n_frames: int = 33, tokenizer: TextTokenizer | None = None) -> TokenClip:
    """Clip `number`; its first token says its number, so that a batch shows what is in it."""
    frames = np.random.default_rng(number).integers(0, CODES, (n_frames, SIDE * SIDE), np.uint16)
    frames[:, 0], frames[:, 1] = number % CODES, np.arange(n_frames) % CODES
    caption = CAPTIONS[number % len(CAPTIONS)]
    text = tokenizer.encode(caption) if tokenizer else [CODES + 5 + number % 7, CODES + 6]
    return TokenClip(frames, FPS, np.array(text, np.uint32), caption)


def making_of(tokenizer: TextTokenizer | None = None) -> Making:
    """How `make_clip` makes clips."""
    return Making(tokenizer.digest if tokenizer else "text", "image", CODES, SIDE, FPS)


def write_set(
    folder: Path, shards: int, per_shard: int, tokenizer: TextTokenizer | None = None
) -> ClipIndex:
    """`shards` shards of `per_shard` clips, numbered through, with their index."""
    for shard in range(shards):
        numbers = range(shard * per_shard, (shard + 1) * per_shard)
        clips = [(f"clip{number}", make_clip(number, tokenizer=tokenizer)) for number in numbers]
        write_shard(folder / f"shard-{shard:06d}.tar", clips, making_of(tokenizer))
    return build_index(folder, 1, lambda: None)


def flip(path: Path, offset: int, bit: int = 0) -> None:
    """Flip one bit of a file in place."""
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))


def data_config(folder: Path | str, tokenizer: TextTokenizer, **changes: object) -> DataConfig:
    """Settings for a set that was made with `tokenizer`."""
    return DataConfig(train=str(folder), text_tokenizer=str(tokenizer.path), **changes)


def model_config(tokenizer: TextTokenizer, **changes: object) -> ModelConfig:
    """A model that fits the sets of this file."""
    sizes: dict[str, object] = dict(
        hidden=8, heads=2, layers=1, text_slots=TEXT_SLOTS, frames=FRAMES, side=SIDE,
        vocab_size=tokenizer.vocab_size, image_codes=CODES, pad=tokenizer.pad,
        newline=tokenizer.newline, begin_of_image=tokenizer.begin_of_image,
        position_rows=64, image_position=48, frame_position_rows=64,
    )  # fmt: skip
    return ModelConfig(**(sizes | changes))


def recipe_config(**changes: object) -> RecipeConfig:
    """A recipe of stage 1."""
    return RecipeConfig(**(dict(stage="keyframes", steps=1, micro_batch=2) | changes))
