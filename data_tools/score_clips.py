"""`megavideo score-clips`: do generated clips show the colour and motion that their prompts name?

For captions of `megavideo render-clips` only, whose scenes can be rendered without end: a small
classifier learns colour and motion from rendered keyframes, and then judges generated ones. Its own
accuracy on real clips that passed the image tokenizer stands beside, as the most that can be hoped.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavideo import options
from megavideo.data.image_tokenizer import ImageTokenizer, images_of
from megavideo.data.scenes import COLORS, MOTIONS, draw_scene, make_scene
from megavideo.files import write_json
from megavideo.log import log

COLOR_NAMES, MOTION_NAMES = list(COLORS), list(MOTIONS)
DIRECTIONS = ["moves to the left", "moves to the right", "moves up", "moves down"]
KEYFRAMES = 5  # of a clip of five seconds: one a second
GRID = 16  # pixels per side that the classifier sees
SCENES, EPOCHS, BATCH, WIDTH, RATE = 3072, 12, 64, 256, 2e-3
FIRST_SCENE = 1_000_000  # far from those that a data set was rendered from
REAL = 120  # real clips that the classifier is measured on


class Judge(nn.Module):
    """Logits of colour and of motion from keyframes, float [B, 5, 3, H, W] in [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Linear(KEYFRAMES * 3 * GRID * GRID, WIDTH),
            nn.ReLU(),
            nn.Linear(WIDTH, WIDTH),
            nn.ReLU(),
        )
        self.color = nn.Linear(WIDTH, len(COLOR_NAMES))
        self.motion = nn.Linear(WIDTH, len(MOTION_NAMES))

    def forward(self, clips: Tensor) -> tuple[Tensor, Tensor]:
        small = F.adaptive_avg_pool2d(clips.flatten(0, 1), GRID).reshape(len(clips), -1)
        state = self.trunk(small - 0.5)
        return self.color(state), self.motion(state)


@dataclass(frozen=True)
class Clips:
    """Keyframes [B, 5, 3, H, W], and the colour and motion that the captions name, int64 [B]."""

    frames: Tensor
    color: Tensor
    motion: Tensor


def named_in(caption: str) -> tuple[int, int] | None:
    """Colour and motion that a caption of ours names; None if it is no such caption."""
    words = caption.replace(",", "").split()
    colors = [i for i, name in enumerate(COLOR_NAMES) if name in words]
    motions = [i for i, name in enumerate(MOTION_NAMES) if f" {name} " in f" {' '.join(words)} "]
    return (colors[0], motions[0]) if len(colors) == 1 and len(motions) == 1 else None


def rendered(numbers: Sequence[int], size: int) -> Clips:
    """Scenes of a seed of their own."""
    scenes = [make_scene(0, number) for number in numbers]
    frames = np.stack([draw_scene(scene, size, KEYFRAMES) for scene in scenes])
    pixels = images_of(frames.reshape(-1, *frames.shape[2:]))
    return Clips(
        pixels.unflatten(0, (len(scenes), KEYFRAMES)),
        torch.tensor([COLOR_NAMES.index(scene.color) for scene in scenes]),
        torch.tensor([MOTION_NAMES.index(scene.motion) for scene in scenes]),
    )


def train_judge(size: int) -> Judge:
    """A judge that has learned from rendered scenes."""
    torch.manual_seed(0)
    judge = Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=RATE, weight_decay=0.1)
    steps = EPOCHS * SCENES // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    clips = rendered(range(FIRST_SCENE, FIRST_SCENE + SCENES), size)
    small = F.adaptive_avg_pool2d(clips.frames.flatten(0, 1), GRID).view(
        SCENES, KEYFRAMES, 3, GRID, GRID
    )
    for _ in range(EPOCHS):
        for rows in torch.randperm(SCENES).split(BATCH):
            color, motion = judge(small[rows])
            loss = F.cross_entropy(color, clips.color[rows])
            loss = loss + F.cross_entropy(motion, clips.motion[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return judge.eval()


def through_tokenizer(clips: Clips, tokenizer: ImageTokenizer) -> Clips:
    """The same clips as a perfect model of tokens would show them."""
    flat = clips.frames.flatten(0, 1)
    decoded = torch.cat([tokenizer.decode(tokenizer.encode(part)) for part in flat.split(64)])
    return Clips(decoded.view_as(clips.frames), clips.color, clips.motion)


def generated(folder: Path, tokenizer: ImageTokenizer) -> Clips:
    """Keyframes of every finished video in `folder` whose prompt is such a caption.

    How many others there are is logged.

    Raises: ValueError if there is none.
    """
    frames, named = [], []
    found = sorted(folder.glob("*/about.json"))
    for about in found:
        prompt = json.loads(about.read_bytes())["prompt"]
        names = named_in(prompt)
        tokens = torch.from_numpy(np.load(about.parent / "tokens.npy").astype(np.int64))
        if names is None or (len(tokens) - 1) % (KEYFRAMES - 1):
            continue
        tokens = tokens[:: (len(tokens) - 1) // (KEYFRAMES - 1)]
        side = round(tokens.shape[1] ** 0.5)
        frames.append(tokenizer.decode(tokens.unflatten(1, (side, side))))
        named.append(names)
    if not frames:
        raise ValueError(
            f"{folder} holds no video of `megavideo generate` whose prompt reads as those of "
            "`megavideo render-clips`"
        )
    if left_out := len(found) - len(frames):
        log.warning("%d of %d videos are left out: other prompts or lengths", left_out, len(found))
    color, motion = torch.tensor(named).unbind(1)
    return Clips(torch.stack(frames), color, motion)


@torch.no_grad()
def accuracies(judge: Judge, clips: Clips) -> dict[str, tuple[float, int]]:
    """Share that the judge recognises, and of how many clips, for each attribute that they have."""
    color, motion = judge(clips.frames)
    straight = torch.tensor([MOTION_NAMES.index(name) for name in DIRECTIONS])
    is_straight = torch.isin(clips.motion, straight)
    direction = straight[motion[is_straight][:, straight].argmax(-1)]
    right = {
        "color": color.argmax(-1) == clips.color,
        "motion": motion.argmax(-1) == clips.motion,
        "direction": direction == clips.motion[is_straight],
    }
    return {
        name: (float(hits.double().mean()), len(hits)) for name, hits in right.items() if len(hits)
    }


@dataclass(frozen=True)
class Score:
    """Shares of clips whose attribute the judge recognises."""

    attribute: str
    clips: int
    generated: float
    real: float

    @property
    def chance(self) -> float:
        """Of as many classes as there are."""
        return 1 / {"color": len(COLORS), "motion": len(MOTIONS), "direction": 4}[self.attribute]


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@options.image_tokenizer
@options.json_output
def main(folder: Path, image_tokenizer: Path, output: Path | None) -> None:
    """Judge the videos in FOLDER (of `megavideo generate`) by their prompts.

    Prompts must read as the captions of `megavideo render-clips`. Prints, for colour (of 6), motion
    (of 21) and direction (of 4, where the prompt names one), how often the classifier recognises
    what the prompt says, in generated and in real clips, beside chance.

    \b
    Example:
      megavideo score-clips videos --image-tokenizer image.safetensors
    """
    tokenizer = ImageTokenizer.load(image_tokenizer)
    clips = generated(folder, tokenizer)
    size = clips.frames.shape[-1]
    judge = train_judge(size)
    real = through_tokenizer(rendered(range(FIRST_SCENE - REAL, FIRST_SCENE), size), tokenizer)
    ours, best = accuracies(judge, clips), accuracies(judge, real)
    rows = [Score(name, count, share, best[name][0]) for name, (share, count) in ours.items()]
    click.echo(f"{'attribute':<10} {'clips':>5} {'generated':>9} {'real':>6} {'chance':>6}")
    for row in rows:
        click.echo(
            f"{row.attribute:<10} {row.clips:>5} {row.generated:>9.1%} {row.real:>6.1%} "
            f"{row.chance:>6.1%}"
        )
    if output is not None:
        write_json(output, [asdict(row) | {"chance": row.chance} for row in rows])


if __name__ == "__main__":
    main()
