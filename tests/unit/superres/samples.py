"""A tiny super-resolution model, and what training one needs: clips, tokenizers, a base."""

from pathlib import Path

import torch

from megavideo.checkpoint.manifest import Progress, Training
from megavideo.config.schema import ModelConfig, RecipeConfig
from megavideo.data.captions import Caption, write_captions
from megavideo.data.image_tokenizer import ImageTokenizer, ImageTokenizerConfig
from megavideo.data.scenes import draw_scene, make_scene
from megavideo.data.text_tokenizer import train_text_model
from megavideo.data.video import write_video
from megavideo.model.build import build_model, canonical_parameters
from megavideo.model.init import initialise
from megavideo.model.places import places
from megavideo.superres.config import DirectConfig, IterativeConfig
from megavideo.superres.model import DirectSuperResolution, IterativeSuperResolution
from tests.unit.checkpoint.samples import write_checkpoint

SIZES = {
    "hidden": 16, "heads": 2, "layers": 2, "fine_side": 6, "vocab_size": 40, "image_codes": 20,
    "begin_of_image": 39, "position_rows": 16,
}  # fmt: skip
DIRECT = DirectConfig(**SIZES, text_slots=5, coarse_side=2, coarse_position=9)
ITERATIVE = IterativeConfig(**SIZES, text_slots=5)


def direct(seed: int = 0) -> DirectSuperResolution:
    return drawn(DirectSuperResolution(DIRECT), seed)


def iterative(seed: int = 0) -> IterativeSuperResolution:
    return drawn(IterativeSuperResolution(ITERATIVE), seed)


def drawn(model, seed: int):  # type: ignore[no-untyped-def]
    """`model` in float64 with noise for every parameter, large enough that each matters."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.double().parameters():
        parameter.data.normal_(0, 0.5, generator=generator)
    return model.eval()


def write_clips(folder: Path, count: int = 8, size: int = 48) -> None:
    """Clips of a second and a half, and their table."""
    scenes = [make_scene(0, number) for number in range(count)]
    for number, scene in enumerate(scenes):
        write_video(folder / f"{number}.mp4", list(draw_scene(scene, size, 8))[:12], 8)
    rows = [Caption(f"{number}.mp4", scene.caption) for number, scene in enumerate(scenes)]
    write_captions(folder / "captions.csv", rows)


def write_tokenizers(folder: Path, codes: int = 16) -> None:
    """`text.model` with 320 pieces, and an untrained `image.safetensors`."""
    captions = [make_scene(0, number).caption for number in range(40)]
    (folder / "text.model").write_bytes(train_text_model(captions, 320))
    torch.manual_seed(0)
    config = ImageTokenizerConfig(channels=4, z_channels=8, num_codes=codes, rates=(8,))
    ImageTokenizer(config).save(folder / "image.safetensors")


def write_base(run: Path, codes: int = 16, side: int = 2) -> None:
    """A run of stage image for those tokenizers, and frames of `side` x `side` tokens."""
    model = ModelConfig(
        hidden=16, heads=2, layers=2, text_slots=16, frames=3, side=side,
        vocab_size=codes + 321, image_codes=codes, pad=codes + 3, newline=codes + 4,
        begin_of_image=codes + 320, position_rows=16 + side * side + 1, image_position=16,
        frame_position_rows=2 * side * side,
    )  # fmt: skip
    base = build_model(model, RecipeConfig(stage="image", steps=1))
    initialise(places(base), model, seed=0)
    config = {"recipe": {"stage": "image"}, "model": model.model_dump(mode="json")}
    tensors = {name: parameter.data for name, parameter in canonical_parameters(base).items()}
    write_checkpoint(run, tensors, Training(Progress(1, 1, 8), config, "data", None, None))
