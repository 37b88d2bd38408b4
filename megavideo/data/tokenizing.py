"""From captioned videos to shards: what goes where, and the work on one video.

The plan is a function of the captions table and the settings: which shard a clip belongs to does
not depend on how many processes work or on which videos turn out to be broken, so a job that was
cut off goes on to the same bytes.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import xxhash

from megavideo.data.captions import Caption
from megavideo.data.image_tokenizer import ImageTokenizer, images_of
from megavideo.data.sample import TokenClip
from megavideo.data.shards import (
    Making,
    Sidecar,
    file_sha256,
    list_shards,
    read_sidecar,
    sidecar_path,
)
from megavideo.data.text_tokenizer import TextTokenizer
from megavideo.data.video import read_frames

TRAIN, VALIDATION = "train", "validation"
NAME_LETTERS = 48  # of the video's name in a key; a tar holds names of up to 100


@dataclass(frozen=True)
class Settings:
    """How videos become tokens.

    fps: of the time grid that is stored. size: pixels per side of a frame. batch: frames encoded at
        once.
    max_seconds: what is read of a video; None reads all of it.
    """

    text_tokenizer: Path
    image_tokenizer: Path
    fps: float
    size: int
    device: str
    batch: int
    max_seconds: float | None


@dataclass(frozen=True)
class Item:
    """One video to tokenise; `key` names its clip in the shards."""

    key: str
    video: Path
    caption: str


@dataclass(frozen=True)
class Failure:
    """A video that could not be used, and why."""

    key: str
    video: str
    reason: str


@dataclass(frozen=True)
class ShardPlan:
    """A shard to be made of `items`, as `settings` and `making` say."""

    path: Path
    items: tuple[Item, ...]
    settings: Settings
    making: Making

    @cached_property
    def source(self) -> str:
        """Digest of all that could change the shard's bytes; a video counts by size and time of
        change, so this looks at every one of them.
        """
        settings = self.settings
        device = torch.device(settings.device).type  # cuda:0 and cuda:1 are alike
        parts = [self.making, settings.size, settings.max_seconds, device, settings.batch]
        stamps = [(item.key, item.caption, _stamp(item.video)) for item in self.items]
        return xxhash.xxh3_128_hexdigest(repr((parts, stamps)).encode())


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:  # what is wrong with it is said when it is read
        return None
    return status.st_size, status.st_mtime_ns


class Tokenizers:
    """Both tokenizers, loaded, with what they make of a video."""

    def __init__(self, settings: Settings):
        self.settings = settings
        image = ImageTokenizer.load(settings.image_tokenizer).to(settings.device)
        # Narrow convolutions take a third less time on a CPU with channels last. (Torch's stub of
        # Module.to leaves memory_format out.)
        self.image = image.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.text = TextTokenizer(settings.text_tokenizer, self.image.num_codes)

    @property
    def making(self) -> Making:
        """What all shards of this job will say of themselves."""
        side = self.image.tokens_side(self.settings.size)
        return Making(
            self.text.digest, self.image.digest, self.image.num_codes, side, self.settings.fps
        )

    def clip(self, item: Item) -> TokenClip:
        """Decode, encode. ValueError if the video is broken."""
        settings = self.settings
        frames = read_frames(item.video, settings.fps, settings.size, settings.max_seconds)
        parts = []
        while batch := list(islice(frames, settings.batch)):
            tokens = self.image.encode(images_of(np.stack(batch)).to(settings.device))
            parts.append(tokens.flatten(1).cpu().numpy())
        text = self.text.encode(item.caption)
        if not text:
            raise ValueError(f"video {item.video}: its caption {item.caption!r} has no tokens")
        return TokenClip(
            np.concatenate(parts).astype(np.uint16), settings.fps, np.array(text), item.caption
        )


@lru_cache(maxsize=1)
def load_tokenizers(settings: Settings) -> Tokenizers:
    """The tokenizers of this process, which uses one thread: processes are the parallelism."""
    torch.set_num_threads(1)
    return Tokenizers(settings)


def tokenize(settings: Settings, item: Item) -> TokenClip | Failure:
    """The work on one video; runs in any process."""
    tokenizers = load_tokenizers(settings)
    try:
        return tokenizers.clip(item)
    except (ValueError, OSError) as error:
        return Failure(item.key, str(item.video), str(error))


# --- plan --------------------------------------------------------------------


def make_plan(
    captions: Sequence[Caption],
    videos: Path,
    output: Path,
    clips_per_shard: int,
    holdout: float,
    settings: Settings,
    making: Making,
) -> list[ShardPlan]:
    """All shards of a job, those for training first.

    Raises: ValueError if `holdout` is more than 0 and leaves one of the two parts empty.
    """
    parts: dict[str, list[Item]] = {TRAIN: [], VALIDATION: []}
    for number, caption in enumerate(captions):
        item = Item(_key(number, caption.video), videos / caption.video, caption.text)
        parts[VALIDATION if is_held_out(caption.text, holdout) else TRAIN].append(item)
    if not parts[TRAIN] or (holdout and not parts[VALIDATION]):
        raise ValueError(
            f"--holdout {holdout} puts {len(parts[VALIDATION])} of {len(captions)} videos aside "
            "(by their captions); choose another share so that neither part is empty"
        )
    return [
        ShardPlan(path, items, settings, making)
        for part, all_items in parts.items()
        for path, items in _cut(output / part, all_items, clips_per_shard)
    ]


def is_held_out(caption: str, share: float) -> bool:
    """Whether a clip is for validation: by its caption, so that none is on both sides.

    Held-out loss then tells whether the model reads texts it has not seen, not whether it remembers
    a text it has.
    """
    words = " ".join(caption.lower().split())
    return xxhash.xxh3_64_intdigest(words.encode()) < share * 2**64


def _cut(folder: Path, items: list[Item], size: int) -> Iterator[tuple[Path, tuple[Item, ...]]]:
    for number, start in enumerate(range(0, len(items), size)):
        yield folder / f"shard-{number:06d}.tar", tuple(items[start : start + size])


def _key(number: int, video: str) -> str:
    """Unique by its number, and telling by the video's name; a dot would end a key in a tar."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(video).stem)[:NAME_LETTERS]
    return f"{number:08d}-{name}"


# --- resume ------------------------------------------------------------------


def finished(plan: ShardPlan) -> Sidecar | None:
    """The sidecar of `plan`'s shard if that is there and whole, else None.

    Raises: ValueError if the shard was made from something else: it is not ours to replace.
    """
    source = plan.source  # of the videos as they are before any is read
    if not sidecar_path(plan.path).exists():
        return None
    sidecar = read_sidecar(plan.path)
    if sidecar.source != source:
        raise ValueError(
            f"{plan.path} was made from other videos, captions or settings; choose another output "
            f"folder, or delete it and its .json to make it again (after a change of settings, all "
            f"of {plan.path.parent})"
        )
    whole = plan.path.exists() and file_sha256(plan.path) == sidecar.sha256
    return sidecar if whole else None


def check_no_strangers(plans: Sequence[ShardPlan]) -> None:
    """ValueError if a folder holds a shard that is not planned: training would take it too."""
    planned = {plan.path for plan in plans}
    for folder in {path.parent for path in planned}:
        strangers = [path for path in list_shards(folder) if path not in planned]
        if strangers:
            raise ValueError(
                f"{strangers[0]} is not part of this job; delete it, or choose another folder"
            )
