"""What follows what: a first frame, keyframes, then again and again frames between frames.

The first frame is drawn by the text-to-image base alone. Stage 1 draws the other keyframes. Stage 2
takes runs of frames that overlap by one, puts a frame between each two, and does so again at twice
the rate: 5, 9, 17, 33 frames. (CogVideo, section 3.1; docs/generate.md 3.)

B videos, F frames of a sample, N tokens per frame.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megavideo.config.schema import Config
from megavideo.data.prompt import Prompter
from megavideo.data.text_tokenizer import TextTokenizer
from megavideo.generate.decode import Decoding, Draw, Guidance, Prompts, decode
from megavideo.generate.requests import Request
from megavideo.parallel.mesh import Mesh
from megavideo.sampling.randomness import uniforms
from megavideo.sampling.strategy import Strategy

# Told the number of tokens after each step.
Advance = Callable[[int], None]


@dataclass(frozen=True, eq=False)
class Drawing:
    """How tokens are drawn, in all stages.

    Attributes:
        first: strategy for the first frame; `later`: for all others.
        guidance: scale for keyframes; 1 is the prompt alone, and computes no guider.
        text_weight: log-weight of text keys wherever there is no guidance.
        image_suffix, video_suffix: appended to the prompt for the first frame, and for keyframes;
            the guider is given the latter alone. The published model has " 高清摄影", " 视频".
        reference_compat: as in `Decoding`.
    """

    seed: int
    first: Strategy
    later: Strategy
    guidance: float = 1.0
    text_weight: float = 0.0
    image_suffix: str = ""
    video_suffix: str = ""
    reference_compat: bool = False


class Stage:
    """A model ready to decode, with the text tokenizer that it was trained with.

    `mesh` says over which ranks it is cut; they decode the same videos together.
    """

    def __init__(self, model: nn.Sequential, config: Config, text: TextTokenizer, mesh: Mesh):
        self.model = model
        self.mesh = mesh
        self.config = config
        self.grid = config.model.grid
        self.text = text
        self.prompter = Prompter(text, config.model.text_slots)
        self.device = next(model.parameters()).device

    def prompts(self, captions: Sequence[str], seconds: float | None) -> Prompts:
        """Each caption with its duration, as in training; no padding but to equal length."""
        texts = [self.prompter(seconds, self.text.encode(caption)) for caption in captions]
        if not all(texts):
            raise ValueError("an empty prompt says nothing to draw a first frame from")
        width, pad = max(map(len, texts)), self.config.model.pad
        padded = [[pad] * (width - len(text)) + text for text in texts]
        lengths = [len(text) for text in texts]
        return Prompts(torch.tensor(padded).to(self.device), torch.tensor(lengths).to(self.device))

    def empty(self, rows: int, frames: int) -> Tensor:
        """int64 [rows, frames, N] to be filled in."""
        shape = (rows, frames, self.grid.tokens_per_frame)
        return torch.zeros(shape, dtype=torch.int64, device=self.device)


def first_frames(
    base: Stage, requests: Sequence[Request], how: Drawing, advance: Advance
) -> Tensor:
    """Tokens int64 [B, N], by the text-to-image model."""
    prompts = base.prompts([request.prompt + how.image_suffix for request in requests], None)

    def purpose(row: int, frame: int) -> str:
        return f"{requests[row].key}/first frame"

    draw = _draw(how.first, how.seed, purpose, len(requests), base, advance)
    settings = Decoding(how.text_weight, reference_compat=how.reference_compat)
    return decode(base.model, prompts, base.empty(len(requests), 1), [], [0], draw, settings)[:, 0]


def keyframes(
    stage: Stage,
    requests: Sequence[Request],
    first: Tensor,
    fps: float,
    how: Drawing,
    advance: Advance,
) -> Tensor:
    """Tokens int64 [B, F, N] that begin with the frames `first`, [B, N], `fps` frames a second."""
    frames = stage.grid.frames
    seconds = (frames - 1) / fps
    prompts = stage.prompts([request.prompt + how.video_suffix for request in requests], seconds)
    image = stage.empty(len(requests), frames)
    image[:, 0] = first

    def purpose(row: int, frame: int) -> str:
        return f"{requests[row].key}/keyframe {frame}"

    draw = _draw(how.later, how.seed, purpose, len(requests), stage, advance)
    guidance, weight = None, how.text_weight
    if how.guidance != 1:
        guider = stage.prompts([how.video_suffix.strip()] * len(requests), seconds)
        guidance, weight = Guidance(guider, how.guidance), 0.0
    settings = Decoding(weight, guidance, how.reference_compat)
    return decode(stage.model, prompts, image, [0], range(1, frames), draw, settings)


def interpolate(
    stage: Stage,
    requests: Sequence[Request],
    frames: Tensor,
    fps: float,
    rows: int,
    how: Drawing,
    advance: Advance,
) -> Tensor:
    """Tokens int64 [B, 2m-1, N] with a new frame between each two of `frames`, [B, m, N].

    Args:
        fps: of the result.
        rows: runs of frames that are decoded at once.
    """
    count, given = frames.shape[1], (stage.grid.frames + 1) // 2
    result = stage.empty(len(requests), 2 * count - 1)
    result[:, ::2] = frames
    runs = [(video, start) for video in range(len(requests)) for start in starts(count, given)]
    drawn = [
        image
        for first in range(0, len(runs), rows)
        for image in _between(
            stage, requests, frames, fps, runs[first : first + rows], how, advance
        )
    ]
    for (video, start), image in reversed(list(zip(runs, drawn, strict=True))):
        result[video, 2 * start + 1 : 2 * (start + given - 1) : 2] = image[1::2]
    return result


def starts(count: int, given: int) -> list[int]:
    """First frames of runs of `given` that share their ends and cover `count` frames.

    The last run reaches back where the number does not fit; of what two runs draw, the first's
    counts.

    Raises: ValueError if there are fewer frames than a run has.
    """
    if count < given:
        raise ValueError(f"{count} frames are fewer than the {given} that interpolation starts at")
    regular = list(range(0, count - given + 1, given - 1))
    return regular if regular[-1] == count - given else [*regular, count - given]


def _between(
    stage: Stage,
    requests: Sequence[Request],
    frames: Tensor,
    fps: float,
    runs: Sequence[tuple[int, int]],
    how: Drawing,
    advance: Advance,
) -> Tensor:
    """Tokens [len(runs), F, N] of (video, first frame) runs: given frames and those between."""
    count = stage.grid.frames
    even, odd = range(0, count, 2), range(1, count, 2)
    captions = [requests[video].prompt for video, _ in runs]
    prompts = stage.prompts(captions, (count - 1) / fps)
    image = stage.empty(len(runs), count)
    for row, (video, start) in enumerate(runs):
        image[row, ::2] = frames[video, start : start + len(even)]

    def purpose(row: int, frame: int) -> str:
        video, start = runs[row]
        return f"{requests[video].key}/{fps} fps/{2 * start + frame}"

    draw = _draw(how.later, how.seed, purpose, len(runs), stage, advance)
    settings = Decoding(how.text_weight, reference_compat=how.reference_compat)
    return decode(stage.model, prompts, image, even, odd, draw, settings)


def _draw(
    strategy: Strategy,
    seed: int,
    purpose: Callable[[int, int], str],
    rows: int,
    stage: Stage,
    advance: Advance,
) -> Draw:
    """Draws with numbers that are a frame's own: `purpose(row, frame)` names them."""
    numbers: dict[int, Tensor] = {}

    def numbers_of(frame: int) -> Tensor:
        per_frame = stage.grid.tokens_per_frame
        own = [uniforms(seed, purpose(row, frame), per_frame) for row in range(rows)]
        return torch.stack([torch.from_numpy(x) for x in own], 1).to(stage.device)

    def draw(logits: Tensor, frame: int, position: int) -> Tensor:
        if frame not in numbers:
            numbers[frame] = numbers_of(frame)
        advance(rows)
        return strategy(logits, numbers[frame][position])

    return draw
