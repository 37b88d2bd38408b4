"""A tiny model of every stage, whose every part matters, and prompts for it."""

from zlib import crc32

import torch
from torch import Tensor, nn

from megavideo.config.schema import ModelConfig, RecipeConfig
from megavideo.generate.decode import Decoding, Prompts, decode
from megavideo.layout.rules import loss_frames
from megavideo.model.build import build_model, stage_grid
from megavideo.model.places import places
from megavideo.parallel.mesh import Mesh

MODEL = ModelConfig(
    hidden=16,
    heads=2,
    layers=2,
    text_slots=6,
    frames=5,
    side=4,
    vocab_size=60,
    image_codes=31,  # does not divide by two ranks
    pad=33,
    newline=34,
    begin_of_image=59,
    position_rows=32,
    image_position=16,
    frame_position_rows=64,
)

PLAIN = Decoding()
SINGLE = Mesh.single()


def recipe(stage: str, window: int = 0) -> RecipeConfig:
    return RecipeConfig(stage=stage, window=window, steps=1)  # type: ignore[arg-type]


def tiny_model(stage: str, window: int = 0, mesh: Mesh = SINGLE) -> nn.Sequential:
    return draw_weights(MODEL, recipe(stage, window), mesh)


def draw_weights(config: ModelConfig, recipe: RecipeConfig, mesh: Mesh = SINGLE) -> nn.Sequential:
    """Weights large enough that a wrong mask or position changes the likeliest token."""
    model = build_model(config, recipe, mesh=mesh).eval()
    for place in places(model):
        generator = torch.Generator().manual_seed(crc32(place.name.encode()))
        drawn = torch.randn(place.shape, generator=generator)
        place.fill(drawn if drawn.dim() == 1 else drawn / drawn.shape[-1] ** 0.5)
    return model


def prompts(rows: int, width: int, seed: int = 0) -> Prompts:
    """Texts of different lengths, the first one `width` long."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(35, 59, (rows, width), generator=generator)
    length = torch.tensor([width - row % width for row in range(rows)])
    return Prompts(text, length)


def frames_of(stage: str) -> tuple[list[int], list[int]]:
    """Frames that are given, and those that are decoded."""
    frames = stage_grid(MODEL, stage).frames
    wanted = list(loss_frames(stage, frames))
    return [frame for frame in range(frames) if frame not in wanted], wanted


def given_image(stage: str, rows: int) -> Tensor:
    """int64 [rows, F, N]: given frames; what is to be decoded is -1, which no table has."""
    grid = stage_grid(MODEL, stage)
    shape = (rows, grid.frames, grid.tokens_per_frame)
    image = torch.randint(30, shape, generator=torch.Generator().manual_seed(7))
    image[:, frames_of(stage)[1]] = -1
    return image


def decode_greedily(
    model: nn.Sequential, stage: str, rows: int, how: Decoding = PLAIN, width: int = 6
) -> tuple[Tensor, Tensor]:
    """The image [rows, F, N], and the logits of every step, [rows, wanted frames, N, codes]."""
    kept: list[Tensor] = []

    def likeliest(logits: Tensor, frame: int, position: int) -> Tensor:
        kept.append(logits)
        return logits.argmax(-1)

    given, wanted = frames_of(stage)
    image = decode(
        model, prompts(rows, width), given_image(stage, rows), given, wanted, likeliest, how
    )
    return image, torch.stack(kept, 1).unflatten(1, (len(wanted), -1))
