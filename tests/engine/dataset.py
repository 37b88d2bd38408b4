"""A tiny data set of real shards, and a configuration that trains on it."""

from pathlib import Path

import numpy as np
from ruamel.yaml import YAML

from megavideo.data.index import build_index
from megavideo.data.sample import TokenClip
from megavideo.data.shards import Making, write_shard
from megavideo.data.text_tokenizer import TextTokenizer, train_text_model

CODES, SIDE, FPS = 20, 2, 4.0
CAPTIONS = [
    f"a {colour} {shape} moves {way}"
    for colour in ("red", "green", "blue")
    for shape in ("circle", "square")
    for way in ("up", "down")
]


def make_dataset(folder: Path, num_clips: int = 24) -> Path:
    """Write shards, index, tokenizer and `config.yaml` into `folder`; the configuration's path."""
    model_file = folder / "text.model"
    model_file.write_bytes(train_text_model(CAPTIONS, 320))
    tokenizer = TextTokenizer(model_file, CODES)
    making = Making(tokenizer.digest, "made up", CODES, SIDE, FPS)
    for split in ("train", "validation"):
        (folder / split).mkdir()
        clips = [_clip(number, tokenizer) for number in range(num_clips)]
        write_shard(folder / split / "clips-0000.tar", clips, making)
        build_index(folder / split, 1, lambda: None)
    path = folder / "config.yaml"
    YAML(typ="safe", pure=True).dump(_config(folder, tokenizer), path)
    return path


def _clip(number: int, tokenizer: TextTokenizer) -> tuple[str, TokenClip]:
    caption = CAPTIONS[number % len(CAPTIONS)]
    frames = np.random.default_rng(number).integers(0, CODES, (12, SIDE * SIDE), np.uint16)
    text = np.array(tokenizer.encode(caption), np.uint32)
    return f"{number:04d}", TokenClip(frames, FPS, text, caption)


def _config(folder: Path, tokenizer: TextTokenizer) -> dict[str, object]:
    return {
        "model": {
            "hidden": 16, "heads": 2, "layers": 2, "text_slots": 16, "frames": 5, "side": SIDE,
            "vocab_size": tokenizer.vocab_size, "image_codes": CODES, "pad": tokenizer.pad,
            "newline": tokenizer.newline, "begin_of_image": tokenizer.begin_of_image,
            "position_rows": 24, "image_position": 16, "frame_position_rows": 20,
        },
        "recipe": {
            "stage": "keyframes", "frame_rates": [1.0, 2.0, 4.0], "steps": 20, "batch": 4,
            "micro_batch": 2, "precision": "fp32", "nonfinite_limit": 3,
            "schedule": {"hold_steps": 0, "horizon": 100, "warmup": 0.0},
            "optimizer": {"lr": 0.01, "clip": 0.1},
        },
        "parallel": {"zero": 1, "reduce_bucket": 4096},
        "data": {
            "train": str(folder / "train"), "validation": str(folder / "validation"),
            "text_tokenizer": str(tokenizer.path),
        },
        "run": {
            "directory": str(folder / "run"), "log_every": 5, "evaluate_every": 10,
            "evaluate_samples": 10, "save_every": 10,
        },
    }  # fmt: skip
