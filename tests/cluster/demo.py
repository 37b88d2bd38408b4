"""Data and settings with which the demo's model trains a few steps, without any video."""

from pathlib import Path

import numpy as np
from ruamel.yaml import YAML

from megavideo.config.load import load_config
from megavideo.config.schema import ModelConfig
from megavideo.data.index import build_index
from megavideo.data.sample import TokenClip
from megavideo.data.scenes import make_scene
from megavideo.data.shards import Making, write_shard
from megavideo.data.text_tokenizer import TextTokenizer, train_text_model

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "configs" / "model" / "demo.yaml"
NUM_CLIPS, NUM_CAPTIONS, FPS = 48, 480, 4.0
BATCH = 12  # divides by 1, 2, 3 and 4 ranks: losing one changes no batch


def make_demo(folder: Path) -> list[str]:
    """Write shards, index, tokenizer and settings; the configuration files of a run."""
    folder.mkdir(parents=True)
    sizes = YAML(typ="safe", pure=True).load(MODEL)["model"]
    model = ModelConfig.model_validate(sizes)
    captions = [make_scene(0, number).caption for number in range(NUM_CAPTIONS)]
    text_model = folder / "text.model"
    num_pieces = model.begin_of_image - model.image_codes
    text_model.write_bytes(train_text_model(captions, num_pieces))
    tokenizer = TextTokenizer(text_model, model.image_codes)
    making = Making(tokenizer.digest, "made up", model.image_codes, model.side, FPS)
    (folder / "train").mkdir()
    clips = [_clip(number, captions[number], tokenizer, model) for number in range(NUM_CLIPS)]
    write_shard(folder / "train" / "clips-0000.tar", clips, making)
    build_index(folder / "train", 1, lambda: None)
    settings = folder / "settings.yaml"
    YAML(typ="safe", pure=True).dump(_settings(folder), settings)
    files = [str(MODEL), str(ROOT / "configs" / "parallel" / "laptop.yaml"), str(settings)]
    load_config(files, ["run.directory=unused"])
    return files


def _clip(
    number: int, caption: str, tokenizer: TextTokenizer, model: ModelConfig
) -> tuple[str, TokenClip]:
    shape = (12, model.side * model.side)
    frames = np.random.default_rng(number).integers(0, model.image_codes, shape, np.uint16)
    text = np.array(tokenizer.encode(caption), np.uint32)
    return f"{number:04d}", TokenClip(frames, FPS, text, caption)


def _settings(folder: Path) -> dict[str, object]:
    return {
        "recipe": {
            "stage": "keyframes", "frame_rates": [1.0, 2.0, 4.0], "steps": 10, "batch": BATCH,
            "micro_batch": 1, "precision": "fp32",
            "schedule": {"hold_steps": 0, "horizon": 100, "warmup": 0.0},
            "optimizer": {"lr": 0.001, "clip": 1.0},
        },
        "data": {"train": str(folder / "train"), "text_tokenizer": str(folder / "text.model")},
        "run": {"log_every": 1, "save_every": 3, "timeout_minutes": 0.25},
    }  # fmt: skip
