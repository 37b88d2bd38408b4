"""Doing what the settings say: load, generate in batches, write each video as it is finished."""

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megavideo.checkpoint.tokenizers import TokenizerDigests, check_tokenizers
from megavideo.config.schema import Config, ParallelConfig
from megavideo.data.image_tokenizer import ImageTokenizer, images_of
from megavideo.data.text_tokenizer import TextTokenizer
from megavideo.data.video import read_frames
from megavideo.engine.world import World
from megavideo.files import check_writable
from megavideo.generate.enlarge import Enlarger
from megavideo.generate.load import base_of, load_stage
from megavideo.generate.output import is_whole, write_video_folder
from megavideo.generate.pipeline import Stage, first_frames, interpolate, keyframes
from megavideo.generate.requests import Request
from megavideo.generate.settings import Settings
from megavideo.log import log, progress
from megavideo.model.execution import DTYPES
from megavideo.superres.checkpoint import origin_of
from megavideo.superres.upsample import direct_strategy

DECODED_FRAMES = 16  # frames that the image tokenizer turns into pixels at once


def generate(settings: Settings, world: World) -> str:
    """Make what is missing of `settings.requests`; a sentence about it, for rank 0.

    Data-parallel ranks share the requests; the tensor-parallel ranks of each make the same tokens,
    and the first of them writes the files.
    """
    for stage, rates in settings.untrained_rates().items():
        log.warning(
            "%s was not trained at %s frames a second (recipe.frame_rates)",
            stage, ", ".join(f"{rate:g}" for rate in rates),
        )  # fmt: skip
    described = settings.described()
    todo = world.from_rank_zero(
        lambda: [r for r in settings.requests if not is_whole(settings.output / r.name, described)]
    )
    there = len(settings.requests) - len(todo)
    if not todo:
        return f"all {there} videos are there already: {settings.output}"
    if there:
        log.info("%d of %d videos are there already; they are kept", there, there + len(todo))
    world.from_rank_zero(lambda: check_writable(settings.output))
    generation = _loaded(settings, world)
    mine = todo[world.mesh.dp.rank :: world.mesh.dp.size]
    total = len(mine) * settings.work(generation.given.shape[1]).tokens
    with progress("generating", total=total) as advance:
        clock = Clock(advance)
        for requests in _batches(mine, settings.batch):
            tokens, fps = generation.videos(requests, clock)
            if world.mesh.tp.is_first:
                for request, own in zip(requests, tokens, strict=True):
                    folder = settings.output / request.name
                    codes = generation.enlarged(request, own)
                    frames = generation.pixels(list(codes.values())[-1])
                    arrays = {name: array.cpu().numpy() for name, array in codes.items()}
                    write_video_folder(folder, request, described, arrays, frames, fps)
    return (
        f"{len(todo)} videos generated, {there} were there already; {clock.tokens:,} tokens at "
        f"{clock.rate:,.0f} a second on this rank: {settings.output}"
    )


class Clock:
    """Counts tokens, for the progress bar and for the figure at the end."""

    def __init__(self, advance: Callable[..., None]):
        self._advance = advance
        self._start = time.monotonic()
        self.tokens = 0

    def __call__(self, tokens: int) -> None:
        self.tokens += tokens
        self._advance(tokens, note=f"{self.rate:,.0f} tokens/s")

    @property
    def rate(self) -> float:
        """Tokens a second since the start."""
        return self.tokens / max(time.monotonic() - self._start, 1e-9)


class Generation:
    """What one call needs, loaded once: models, tokenizers, frames to start from."""

    def __init__(self, settings: Settings, world: World):
        self.settings = settings
        self.how = settings.drawing()
        self.tokenizer = load_tokenizer(settings).to(world.device)
        self.image_digest = self.tokenizer.digest
        self.stage1 = self._stage(settings.keyframe_stage, world)
        self.stage2 = self._stage(settings.interpolation_stage, world)
        self.base = None if self.stage1 is None else base_of(self.stage1)
        self.enlarge = self._enlarger()
        self.given = self._encode(given_frames(settings, self.tokenizer)).to(world.device)

    def videos(
        self, requests: Sequence[Request], advance: Callable[[int], None]
    ) -> tuple[Tensor, float]:
        """Tokens int64 [B, frames, N] of the requests, and the rate of these frames."""
        fps = self.settings.fps
        frames = self.given.expand(len(requests), -1, -1)
        if self.stage1 is not None:
            assert self.base is not None
            if not frames.shape[1]:
                frames = first_frames(self.base, requests, self.how, advance)[:, None]
            frames = keyframes(self.stage1, requests, frames[:, 0], fps, self.how, advance)
        for _ in range(self.settings.doublings):
            assert self.stage2 is not None
            fps *= 2
            frames = interpolate(
                self.stage2, requests, frames, fps, self.settings.batch, self.how, advance
            )
        return frames, fps

    def enlarged(self, request: Request, tokens: Tensor) -> dict[str, Tensor]:
        """The tokens [frames, N] of a video, and with super-resolution the larger ones."""
        if self.enlarge is None:
            return {"tokens": tokens}
        text = self._text.encode(request.prompt)
        return {"tokens": tokens, "enlarged": self.enlarge(text, tokens, request.key)}

    @property
    def _text(self) -> TextTokenizer:
        stage = self.stage1 or self.stage2
        assert stage is not None
        return stage.text

    def _stage(self, stage: tuple[Path, Config] | None, world: World) -> Stage | None:
        if stage is None:
            return None
        parallel = ParallelConfig(tp=self.settings.tp, recompute="none")
        return load_stage(*stage, parallel, world, self.image_digest)

    def _enlarger(self) -> Enlarger | None:
        settings = self.settings
        if settings.superres is None:
            return None
        ours = TokenizerDigests(self._text.digest, self.image_digest)
        for folder, _ in settings.superres_stages.values():
            origin = origin_of(folder)
            remedy = "use that one, or train super-resolution anew"
            check_tokenizers(folder, None if origin is None else origin.tokenizers, ours, remedy)
        precision = DTYPES[settings.any_config.recipe.precision]
        device = self.tokenizer.quantize.embed.weight.device
        strategy = direct_strategy(settings.labels, settings.superres_temperature)
        return Enlarger(
            settings.superres, settings.refine, strategy, settings.seed, device, precision
        )

    def pixels(self, tokens: Tensor) -> np.ndarray:
        """uint8 [frames, H, W, 3] of tokens [frames, N]."""
        side = round(tokens.shape[1] ** 0.5)
        return self.tokenizer.decode_frames(tokens.unflatten(1, (side, side)), DECODED_FRAMES)

    def _encode(self, frames: np.ndarray) -> Tensor:
        """Tokens int64 [1, m, N] of frames; m may be 0."""
        if not len(frames):
            return torch.zeros(1, 0, 0, dtype=torch.int64)
        device = self.tokenizer.quantize.embed.weight.device
        return self.tokenizer.encode(images_of(frames).to(device)).flatten(1)[None]


def _loaded(settings: Settings, world: World) -> Generation:
    """Every rank loads at the same time; a mistake is told once."""
    own: list[Generation] = []
    world.together(lambda: own.append(Generation(settings, world)))
    return own[0]


def load_tokenizer(settings: Settings) -> ImageTokenizer:
    """The image tokenizer.

    Raises: ValueError if the models know another number of codes.
    """
    tokenizer = ImageTokenizer.load(settings.image_tokenizer)
    codes = settings.any_config.model.image_codes
    if tokenizer.num_codes != codes:
        raise ValueError(
            f"{settings.image_tokenizer} has {tokenizer.num_codes} codes, the model "
            f"{codes}; name the image tokenizer that the training data was made with"
        )
    return tokenizer


def given_frames(settings: Settings, tokenizer: ImageTokenizer) -> np.ndarray:
    """Frames to start from, uint8 [m, H, W, 3], cut square as in training; none, one, or a video.

    Raises: ValueError naming the file if it cannot be read.
    """
    size = settings.any_config.model.side * tokenizer.config.compress_rate
    if settings.first_frame is not None:
        return np.stack(list(islice(read_frames(settings.first_frame, settings.fps, size), 1)))
    if settings.interpolate is not None:
        return np.stack(list(read_frames(settings.interpolate, settings.fps, size)))
    return np.zeros((0, size, size, 3), np.uint8)


def _batches(requests: Sequence[Request], size: int) -> Iterator[Sequence[Request]]:
    for first in range(0, len(requests), size):
        yield requests[first : first + size]
