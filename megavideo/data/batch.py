"""Batches for training and evaluation: `open_stream` is the way in.

A sample's way: position -> which sample (order.py) -> its clip (stream.py, source.py) -> which
frames (frames.py) -> text (prompt.py) -> tensors.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import webdataset as wds
import xxhash
from torch import Tensor

from megavideo.config.schema import DataConfig, ModelConfig, RecipeConfig
from megavideo.data.frames import FrameChooser, frame_chooser
from megavideo.data.index import INDEX_FILE, SHARDS_FILE, ClipIndex, open_index
from megavideo.data.order import Order, micro_step_positions
from megavideo.data.prompt import Prompter
from megavideo.data.shards import Making
from megavideo.data.source import (
    FetchedShards,
    LocalShards,
    ShardReader,
    ShardStore,
    fetch,
    with_retries,
)
from megavideo.data.stream import DamageLog, SampleStream, Visit, read_ahead
from megavideo.data.text_tokenizer import TextTokenizer
from megavideo.data.urls import resolve
from megavideo.files import atomic_path
from megavideo.log import log, rank

ORDER_VERSION = 1  # changes when the same settings would give another order


@dataclass(frozen=True)
class Batch:
    """Samples for the model, which shifts tokens and makes labels itself.

    text: int64 [B, T], left-padded. text_length: int64 [B], ids that are not padding, at least 1.
    image: int64 [B, F, N], raster order, frames in time order.
    """

    text: Tensor
    text_length: Tensor
    image: Tensor


def collate(
    texts: Sequence[Sequence[int]], frames: Sequence[np.ndarray], slots: int, pad: int
) -> Batch:
    """Batch of B texts (at most `slots` ids each) and B arrays [F, N]."""
    text = np.full((len(texts), slots), pad, np.int64)
    for row, ids in zip(text, texts, strict=True):
        row[slots - len(ids) :] = ids
    lengths = np.array([len(ids) for ids in texts], np.int64)
    image = np.stack(frames).astype(np.int64)
    return Batch(*map(torch.from_numpy, (text, lengths, image)))


class BatchStream:
    """Batches of one data set for one recipe.

    fingerprint: equal for two streams that give the same sample at every position.
    num_samples: in an epoch, after leaving out clips that are too short.
    """

    def __init__(
        self,
        samples: SampleStream,
        damage: DamageLog,
        prompter: Prompter,
        pad: int,
        micro_batch: int,
        threads: int,
        prefetch: int,
        fingerprint: str,
    ):
        self.samples = samples
        self.damage = damage
        self.prompter = prompter
        self.pad = pad
        self.micro_batch = micro_batch
        self.threads = threads
        self.prefetch = prefetch
        self.fingerprint = fingerprint
        self.num_samples = len(samples.order)

    @property
    def making(self) -> Making:
        """How all tokens were made."""
        return self.samples.index.making

    @property
    def bad_samples(self) -> int:
        """Damaged samples that this rank met and replaced."""
        return self.damage.damaged

    @property
    def cut_texts(self) -> int:
        """Texts that this rank cut to the model's text slots."""
        return self.prompter.num_cut

    def micro_batches(self, consumed_samples: int, dp_rank: int, dp_size: int) -> Iterator[Batch]:
        """This rank's micro-batches after `consumed_samples` of the whole run, without end.

        Closing the iterator stops its threads. It raises ValueError when too many samples are
        damaged, OSError when reading fails again and again.
        """
        groups = (
            micro_step_positions(consumed_samples, step, self.micro_batch, dp_rank, dp_size)
            for step in itertools.count()
        )
        yield from self._pipeline(groups, self.micro_batch, self._own_captions)

    def held_out_batches(
        self,
        num_samples: int,
        micro_batch: int,
        dp_rank: int,
        dp_size: int,
        shuffle_captions: bool = False,
    ) -> Iterator[tuple[Batch, int]]:
        """This rank's part of the first `num_samples` samples, or of all if there are fewer.

        The samples are the same for every `dp_size`, each counts exactly once, and every rank gets
        as many batches as the others, as collectives need.

        Args:
            shuffle_captions: give every sample, beside its own duration, the caption of another
                one that reads differently.
        Yields: (batch, samples that count): all in it, or 0 where a rank has nothing left and gets
            one sample again. The mean loss of all is sum(count * loss) / sum(count).
        """
        total = min(num_samples, self.num_samples)
        captions = partial(self._other_captions, total) if shuffle_captions else self._own_captions
        steps = range(-(-total // (micro_batch * dp_size)))
        parts = [micro_step_positions(0, step, micro_batch, dp_rank, dp_size) for step in steps]
        real = [range(part.start, min(part.stop, total)) for part in parts]
        batches = self._pipeline((part or [total - 1] for part in real), micro_batch, captions)
        yield from zip(batches, map(len, real), strict=True)

    def _pipeline(
        self, groups: Iterable[Sequence[int]], group_size: int, captions: "Captions"
    ) -> Iterator[Batch]:
        """A batch for each group of positions; `captions` gives the text of every sample in it."""

        def read(group: Sequence[int]) -> tuple[list[Visit], list[np.ndarray]]:
            self.samples.expect(group[-1])
            visits = [self.samples.clip_at(position) for position in group]
            return visits, captions(visits)

        ahead = -(-self.prefetch // group_size)
        with ThreadPoolExecutor(self.threads, thread_name_prefix="reader") as pool:
            pipeline = wds.DataPipeline(
                lambda: read_ahead(pool, read, groups, ahead), wds.map(self._make_batch)
            )
            with closing(iter(pipeline)) as batches:
                yield from batches

    def _make_batch(self, group: tuple[list[Visit], list[np.ndarray]]) -> Batch:
        visits, captions = group
        for visit in visits:
            self.damage.account(visit)
        texts = [
            self.prompter(visit.window.seconds, caption.tolist())
            for visit, caption in zip(visits, captions, strict=True)
        ]
        return collate(texts, [visit.frames for visit in visits], self.prompter.slots, self.pad)

    def _own_captions(self, visits: list[Visit]) -> list[np.ndarray]:
        return [visit.clip.text for visit in visits]

    def _other_captions(self, total: int, visits: list[Visit]) -> list[np.ndarray]:
        """For each visit the caption of another one of the first `total` samples."""
        return [self._other_caption(total, visit) for visit in visits]

    def _other_caption(self, total: int, visit: Visit) -> np.ndarray:
        """The one half the set further on, or the next one after it that reads differently."""
        for distance in range(total // 2, total + total // 2):
            other = self.samples.clip_at((visit.position + distance) % total).clip
            if other.caption != visit.clip.caption:
                return other.text
        raise ValueError(
            f"all {total} held-out samples have the caption {visit.clip.caption!r}; "
            "there is nothing to shuffle"
        )


def check_alike(training: BatchStream, validation: BatchStream) -> None:
    """ValueError if the tokens of the two were made by different image tokenizers.

    Everything else about them is compared with the model when they are opened.
    """
    streams = (training, validation)
    of_training, of_validation = (stream.making.image_tokenizer for stream in streams)
    folders = [stream.samples.index.folder for stream in streams]
    if of_training != of_validation:
        raise ValueError(
            f"{folders[1]} was made by image tokenizer {of_validation}, {folders[0]} "
            f"by {of_training}: their tokens do not mean the same; tokenise one of them again"
        )


Captions = Callable[[list[Visit]], list[np.ndarray]]


# --- open --------------------------------------------------------------------


def open_stream(
    data: DataConfig,
    model: ModelConfig,
    recipe: RecipeConfig,
    folder: str,
    quarantine: Path | None = None,
) -> BatchStream:
    """The batches of one data set.

    Args:
        folder: `data.train` or `data.validation`; a folder, or a URL to which `/index.parquet` can
            be appended.
        quarantine: JSON lines about damaged samples are appended here; None only logs them.
    Raises:
        ValueError: the data set is missing, damaged, made for another model or tokenizer, or has no
            clip long enough.
    """
    index, store = _open_data(data, folder)
    tokenizer = TextTokenizer(data.text_tokenizer, model.image_codes)
    _check_fits(index, tokenizer, data, model, folder)
    chooser = frame_chooser(recipe, model.frames)
    order = _order(index, chooser, recipe.seed, data.window_shards, folder)
    samples = SampleStream(
        index, ShardReader(store, data.retries), order, chooser, data.max_bad_in_row
    )
    return BatchStream(
        samples,
        DamageLog(data.max_bad_share, data.max_bad_in_row, quarantine),
        Prompter(tokenizer, model.text_slots),
        model.pad, recipe.micro_batch, data.threads, data.prefetch,
        _fingerprint(index, order, chooser),
    )  # fmt: skip


def _open_data(data: DataConfig, folder: str) -> tuple[ClipIndex, ShardStore]:
    place = resolve(folder, data.allow_commands)
    cache = Path(data.cache) if data.cache else None
    if isinstance(place, Path):
        index = open_index(place, cache)
        store = LocalShards(place, index.shards)
        store.check_sizes()
        return index, store
    if cache is None:
        raise ValueError(f"{folder} is a URL: set data.cache to a folder on a local disk")
    local = cache / xxhash.xxh3_64_hexdigest(place.encode())
    for name in (SHARDS_FILE, INDEX_FILE):
        with atomic_path(local / name) as temporary:
            source = f"{place}/{name}"
            with_retries(partial(fetch, source, temporary, data.allow_commands), data.retries)
    index = open_index(local)
    return index, FetchedShards(place, index.shards, cache, data.allow_commands)


def _check_fits(
    index: ClipIndex, tokenizer: TextTokenizer, data: DataConfig, model: ModelConfig, folder: str
) -> None:
    """ValueError that lists everything in which data, tokenizer and model disagree."""
    made = index.making
    pairs = {
        f"text tokenizer ({data.text_tokenizer})": (made.text_tokenizer, tokenizer.digest),
        "tokens per row of a frame (model.side)": (made.side, model.side),
        "image codes (model.image_codes)": (made.image_codes, model.image_codes),
        "padding id (model.pad)": (tokenizer.pad, model.pad),
        "line break id (model.newline)": (tokenizer.newline, model.newline),
        "id after text (model.begin_of_image)": (tokenizer.begin_of_image, model.begin_of_image),
    }  # fmt: skip
    wrong = [f"{what}: {has}, not {wants}" for what, (has, wants) in pairs.items() if has != wants]
    if wrong:
        raise ValueError(f"{folder} does not fit the model: {'; '.join(wrong)}")


def _order(
    index: ClipIndex, chooser: FrameChooser, seed: int, window_shards: int, folder: str
) -> Order:
    """The order of the clips that are long enough."""
    fps = index.making.fps
    shortest = chooser.shortest(fps)
    samples = np.flatnonzero(index.columns["n_frames"] >= shortest)
    left_out = len(index) - len(samples)
    reason = (
        f"{left_out} of {len(index)} clips in {folder} are shorter than the {shortest} frames at "
        f"{fps} fps that stage {chooser.stage} needs"
    )
    if not len(samples):
        raise ValueError(f"{reason}; add a higher rate to recipe.frame_rates, or use longer clips")
    if left_out and rank() == 0:
        log.warning("%s; they are left out", reason)
    return Order(index.columns["shard"][samples], samples, seed, window_shards)


def _fingerprint(index: ClipIndex, order: Order, chooser: FrameChooser) -> str:
    parts = (ORDER_VERSION, index.fingerprint, order.window_shards, chooser)
    return xxhash.xxh3_128_hexdigest(repr(parts).encode())
