"""Batches: the same for every layout, resumable, exact for evaluation, from data that fits."""

import itertools
import logging
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megavideo.data.batch import Batch, BatchStream, check_alike, open_stream
from megavideo.data.index import build_index
from megavideo.data.prompt import build_text
from megavideo.data.shards import write_shard
from megavideo.data.text_tokenizer import TextTokenizer
from tests.unit.data.token_sets import (
    CAPTIONS,
    CODES,
    FPS,
    TEXT_SLOTS,
    data_config,
    flip,
    make_clip,
    making_of,
    model_config,
    recipe_config,
    write_set,
)


def open_small(folder: Path, tokenizer: TextTokenizer, **recipe: object) -> BatchStream:
    return open_stream(
        data_config(folder, tokenizer, window_shards=2, prefetch=6, max_bad_share=0.9),
        model_config(tokenizer), recipe_config(**recipe), str(folder),
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, tokenizer: TextTokenizer) -> Path:
    write_set(tmp_path / "train", 4, 5, tokenizer)
    return tmp_path / "train"


def take(stream: BatchStream, steps: int, consumed: int, rank: int, ranks: int) -> list[Batch]:
    batches = stream.micro_batches(consumed, rank, ranks)
    try:
        return list(itertools.islice(batches, steps))
    finally:
        batches.close()


def joined(batches: list[Batch]) -> list[torch.Tensor]:
    return [torch.cat([getattr(b, n) for b in batches]) for n in ("text", "text_length", "image")]


def same(a: list[Batch], b: list[Batch]) -> bool:
    return all(x.equal(y) for x, y in zip(joined(a), joined(b), strict=True))


def test_validation_by_another_image_tokenizer_is_refused(
    folder: Path, tmp_path: Path, tokenizer: TextTokenizer
) -> None:
    write_set(tmp_path / "alike", 1, 2, tokenizer)
    other = replace(making_of(tokenizer), image_tokenizer="another")
    clips = [("a", make_clip(0, tokenizer=tokenizer))]
    write_shard(tmp_path / "other" / "shard-000000.tar", clips, other)
    build_index(tmp_path / "other", 1, lambda: None)
    training = open_small(folder, tokenizer)
    check_alike(training, open_small(tmp_path / "alike", tokenizer))
    with pytest.raises(
        ValueError, match=r"other was made by image tokenizer another, .* by image:"
    ):
        check_alike(training, open_small(tmp_path / "other", tokenizer))


def test_a_batch_has_the_shapes_and_types_of_its_contract(
    folder: Path, tokenizer: TextTokenizer
) -> None:
    [batch] = take(open_small(folder, tokenizer), 1, 0, 0, 1)
    assert batch.text.shape == (2, TEXT_SLOTS) and batch.text_length.shape == (2,)
    assert batch.image.shape == (2, 5, 9)
    assert {tensor.dtype for tensor in vars(batch).values()} == {torch.int64}
    assert batch.image.max() < CODES


def test_text_is_left_padded_and_reads_duration_newline_caption(
    folder: Path, tokenizer: TextTokenizer
) -> None:
    [batch] = take(open_small(folder, tokenizer), 1, 0, 0, 1)
    for text, length in zip(batch.text, batch.text_length.tolist(), strict=True):
        assert (text[: TEXT_SLOTS - length] == tokenizer.pad).all()
        duration, caption = tokenizer.decode(text[TEXT_SLOTS - length :].tolist()).split("\n")
        assert duration.strip() == "4.0秒" and caption.strip() in CAPTIONS  # 33 frames, 8 fps


def test_an_image_has_no_duration(folder: Path, tokenizer: TextTokenizer) -> None:
    [batch] = take(open_small(folder, tokenizer, stage="image"), 1, 0, 0, 1)
    assert batch.image.shape == (2, 1, 9)
    length = int(batch.text_length[0])
    assert tokenizer.decode(batch.text[0, TEXT_SLOTS - length :].tolist()).strip() in CAPTIONS


@pytest.mark.parametrize(("seconds", "text"), [(4.0, "4.0秒"), (0.5, "0.5秒"), (2, "2.0秒")])
def test_a_duration_is_printed_as_a_float(
    tokenizer: TextTokenizer, seconds: float, text: str
) -> None:
    expected = [*tokenizer.encode(text), tokenizer.newline, 77, 78]
    assert build_text(tokenizer, seconds, [77, 78]) == expected
    assert build_text(tokenizer, None, [77, 78]) == [77, 78]


def test_interpolation_says_the_duration_of_the_rate_it_drew(
    folder: Path, tokenizer: TextTokenizer
) -> None:
    stream = open_small(folder, tokenizer, stage="interpolation", window=3, frame_rates=(2.0, 8.0))
    durations = set()
    for batch in take(stream, 12, 0, 0, 1):
        for text, length, image in zip(*vars(batch).values(), strict=True):
            said = tokenizer.decode(text[TEXT_SLOTS - int(length) :].tolist()).split("秒")[0]
            stride = int(image[1, 1] - image[0, 1])  # the second token counts frames
            assert float(said) == 4 * stride / FPS
            durations.add(said.strip())
    assert durations == {"2.0", "0.5"}


def test_any_number_of_ranks_gives_the_same_global_batches(
    folder: Path, tokenizer: TextTokenizer
) -> None:
    one = take(open_small(folder, tokenizer), 6, 0, 0, 1)
    ranks = [take(open_small(folder, tokenizer), 2, 0, rank, 3) for rank in range(3)]
    assert same(one, [ranks[rank][step] for step in range(2) for rank in range(3)])
    larger = take(open_small(folder, tokenizer, micro_batch=4), 3, 0, 0, 1)
    assert same(one, larger)


def test_resuming_goes_on_where_it_was(folder: Path, tokenizer: TextTokenizer) -> None:
    through = take(open_small(folder, tokenizer), 30, 0, 0, 1)  # three epochs of 20
    assert same(through[17:], take(open_small(folder, tokenizer), 13, 34, 0, 1))


def test_threads_and_prefetch_do_not_matter(folder: Path, tokenizer: TextTokenizer) -> None:
    batches = []
    for threads, prefetch in ((1, 1), (4, 50)):
        data = data_config(folder, tokenizer, threads=threads, prefetch=prefetch)
        stream = open_stream(data, model_config(tokenizer), recipe_config(), str(folder))
        batches.append(take(stream, 12, 0, 0, 1))
    assert same(*batches)


def test_closing_stops_the_threads(folder: Path, tokenizer: TextTokenizer) -> None:
    before = threading.active_count()
    batches = open_small(folder, tokenizer).micro_batches(0, 0, 1)
    next(batches)
    assert threading.active_count() > before
    batches.close()
    assert threading.active_count() == before


@pytest.mark.parametrize(("ranks", "micro_batch"), [(1, 4), (2, 3), (3, 2), (4, 4), (8, 4)])
@pytest.mark.parametrize("num_samples", [1, 13, 99])
def test_every_held_out_sample_counts_once_on_any_number_of_ranks(
    folder: Path, tokenizer: TextTokenizer, ranks: int, micro_batch: int, num_samples: int
) -> None:
    stream = open_small(folder, tokenizer)
    parts = [
        list(stream.held_out_batches(num_samples, micro_batch, rank, ranks))
        for rank in range(ranks)
    ]
    assert len({len(part) for part in parts}) == 1, "ranks would wait for each other"
    assert all(count in (0, len(batch.image)) for part in parts for batch, count in part)
    counted = [
        sample[0, 0].item() for part in parts for b, count in part for sample in b.image[:count]
    ]
    expected = [stream.samples.order[p].sample for p in range(min(num_samples, 20))]
    assert sorted(counted) == sorted(expected)


def test_shuffled_captions_are_all_wrong_and_all_else_is_right(
    folder: Path, tokenizer: TextTokenizer
) -> None:
    stream = open_small(folder, tokenizer)
    right = joined([batch for batch, _ in stream.held_out_batches(16, 4, 0, 1)])
    wrong = joined(
        [batch for batch, _ in stream.held_out_batches(16, 4, 0, 1, shuffle_captions=True)]
    )
    assert right[2].equal(wrong[2])
    assert (right[0] != wrong[0]).any(dim=1).all()
    texts = [tokenizer.decode(row.tolist()).strip() for row in wrong[0]]
    assert all(
        text.startswith("4.0秒") and text.split("\n")[1].strip() in CAPTIONS for text in texts
    )


def test_shuffling_equal_captions_is_an_error(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    clips = [("a", make_clip(1, tokenizer=tokenizer)), ("b", make_clip(25, tokenizer=tokenizer))]
    write_shard(tmp_path / "shard.tar", clips, making_of(tokenizer))
    build_index(tmp_path, 1, lambda: None)
    stream = open_small(tmp_path, tokenizer)
    with pytest.raises(ValueError, match="there is nothing to shuffle"):
        list(stream.held_out_batches(2, 2, 0, 1, shuffle_captions=True))


def test_damaged_samples_are_counted_when_they_are_used(
    folder: Path, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    quarantine = tmp_path / "quarantine.jsonl"
    clean = open_small(folder, tokenizer)
    row = clean.samples.index[clean.samples.order[3].sample]
    flip(folder / clean.samples.index.shards[row.shard].file, row.offset + 50)
    data = data_config(folder, tokenizer, window_shards=2)
    stream = open_stream(data, model_config(tokenizer), recipe_config(), str(folder), quarantine)
    batches = stream.micro_batches(0, 0, 1)
    next(batches)
    assert stream.bad_samples == 0, "read ahead, but not used yet"
    next(batches)
    batches.close()
    assert stream.bad_samples == 1 and len(quarantine.read_text().splitlines()) == 1


def test_long_texts_are_cut_counted_and_reported_once(
    folder: Path, tokenizer: TextTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    model = model_config(tokenizer, text_slots=9)
    stream = open_stream(data_config(folder, tokenizer), model, recipe_config(), str(folder))
    with caplog.at_level(logging.WARNING, "megavideo"):
        batches = take(stream, 4, 0, 0, 1)
    assert stream.cut_texts == 8 and len(caplog.records) == 1
    assert batches[0].text.shape == (2, 9) and batches[0].text_length.tolist() == [9, 9]


def test_clips_that_are_too_short_are_left_out_and_counted(
    tmp_path: Path, tokenizer: TextTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    lengths = (33, 4, 32, 40, 5)
    clips = [(f"c{n}", make_clip(n, length, tokenizer)) for n, length in enumerate(lengths)]
    write_shard(tmp_path / "shard.tar", clips, making_of(tokenizer))
    build_index(tmp_path, 1, lambda: None)
    with caplog.at_level(logging.WARNING, "megavideo"):
        stream = open_small(tmp_path, tokenizer, frame_rates=(1.0,))
    assert stream.num_samples == 2
    assert "3 of 5 clips" in caplog.text and "shorter than the 33 frames" in caplog.text
    with pytest.raises(ValueError, match=r"5 of 5 clips .* use longer clips"):
        open_small(tmp_path, tokenizer, frame_rates=(0.25,), min_fps=0.25)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"side": 2}, r"model\.side\): 3, not 2"),
        ({"image_codes": 49}, r"model\.image_codes\): 50, not 49"),
        ({"pad": 7}, r"model\.pad\): 53, not 7"),
        ({"newline": 7}, r"model\.newline\): 54, not 7"),
        ({"begin_of_image": 7}, r"model\.begin_of_image\): 380, not 7"),
    ],
)
def test_data_for_another_model_is_refused(
    folder: Path, tokenizer: TextTokenizer, change: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model = model_config(tokenizer, **change)
        open_stream(data_config(folder, tokenizer), model, recipe_config(), str(folder))


def test_data_made_with_another_text_tokenizer_is_refused(
    tmp_path: Path, tokenizer: TextTokenizer
) -> None:
    write_set(tmp_path, 1, 4)  # its shards say "text" instead of a digest
    with pytest.raises(ValueError, match=rf"text tokenizer \(.*\): text, not {tokenizer.digest}"):
        open_small(tmp_path, tokenizer)


def test_a_folder_without_index_says_how_to_make_one(
    tmp_path: Path, tokenizer: TextTokenizer
) -> None:
    with pytest.raises(ValueError, match="run `megavideo build-index"):
        open_small(tmp_path, tokenizer)


def test_a_command_instead_of_a_folder_is_refused(tokenizer: TextTokenizer) -> None:
    with pytest.raises(ValueError, match="would run a command"):
        open_stream(
            data_config("x", tokenizer), model_config(tokenizer), recipe_config(), "pipe:rm x"
        )


def test_the_fingerprint_changes_with_all_that_changes_the_batches(
    folder: Path, tokenizer: TextTokenizer
) -> None:
    same_twice = [open_small(folder, tokenizer).fingerprint for _ in range(2)]
    others = [
        open_small(folder, tokenizer, seed=1), open_small(folder, tokenizer, stage="image"),
        open_small(folder, tokenizer, frame_rates=(2.0,)),
        open_stream(data_config(folder, tokenizer, window_shards=3), model_config(tokenizer),
                    recipe_config(), str(folder)),
    ]  # fmt: skip
    assert same_twice[0] == same_twice[1]
    assert len({same_twice[0], *(stream.fingerprint for stream in others)}) == 5
    assert open_small(folder, tokenizer, micro_batch=7).fingerprint == same_twice[0]
