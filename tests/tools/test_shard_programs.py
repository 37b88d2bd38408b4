"""From video files to verified shards by the programs that a user types."""

import fcntl
import json
import shutil
from pathlib import Path

import megavideo.data_tools.tokenize_videos as tokenize_videos
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from megavideo.data_tools import build_index, inspect_shards, verify_shards
from PIL import Image

from megavideo.data.captions import Caption, write_captions
from megavideo.data.image_tokenizer import ImageTokenizer, ImageTokenizerConfig, images_of
from megavideo.data.index import open_index
from megavideo.data.shards import write_shard
from megavideo.data.source import LocalShards, ShardReader
from megavideo.data.stream import read_clip
from megavideo.data.text_tokenizer import TextTokenizer, train_text_model
from megavideo.data.tokenizing import is_held_out
from megavideo.data.video import read_clip as read_video
from megavideo.data.video import write_video

CAPTIONS = [f"a {colour} {thing}" for colour in ("red", "blue") for thing in ("cat", "dog", "cow")]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven videos, one of them broken and one missing, with captions and both tokenizers."""
    folder = tmp_path_factory.mktemp("work")
    rng = np.random.default_rng(0)
    rows = [Caption(f"v{n}.mp4", CAPTIONS[n % 6]) for n in range(7)]
    for number, row in enumerate(rows[:5]):
        frames = rng.integers(0, 255, (8 + number, 20, 16, 3), np.uint8)
        write_video(folder / row.video, frames, 8.0)
    (folder / rows[5].video).write_text("this is no video")
    write_captions(folder / "captions.csv", rows)
    (folder / "text.model").write_bytes(train_text_model(CAPTIONS, 300))
    torch.manual_seed(0)
    config = ImageTokenizerConfig(channels=4, z_channels=4, num_codes=64, rates=(8,))
    ImageTokenizer(config).save(folder / "image.safetensors")
    return folder


def run_tokenize(work: Path, output: Path, *options: str, table: Path | None = None) -> Result:
    arguments = [
        str(table or work / "captions.csv"), str(output), "--videos", str(work), "--size", "16",
        "--clips-per-shard", "2", "--text-tokenizer", str(work / "text.model"), "--workers", "1",
        "--image-tokenizer", str(work / "image.safetensors"), *options,
    ]  # fmt: skip
    return CliRunner().invoke(tokenize_videos.main, arguments)


def run(program: object, *arguments: object) -> Result:
    return CliRunner().invoke(program.main, list(map(str, arguments)))


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")}


@pytest.fixture
def tokens(work: Path, tmp_path: Path) -> Path:
    assert run_tokenize(work, tmp_path / "tokens").exit_code == 0
    assert run(build_index, tmp_path / "tokens" / "train").exit_code == 0
    return tmp_path / "tokens"


def test_shards_hold_the_tokens_and_texts_of_the_videos(work: Path, tokens: Path) -> None:
    index = open_index(tokens / "train")
    reader = ShardReader(LocalShards(index.folder, index.shards), 0)
    image = ImageTokenizer.load(work / "image.safetensors")
    text = TextTokenizer(work / "text.model", 64)
    assert [index.key(sample) for sample in range(5)] == [f"0000000{n}-v{n}" for n in range(5)]
    for sample in range(5):
        clip = read_clip(index, reader, sample)
        frames = read_video(work / f"v{sample}.mp4", 8.0, 16).frames
        expected = image.encode(images_of(frames)).flatten(1).numpy()
        assert clip.frames.shape == (8 + sample, 4)
        assert (clip.frames == expected).mean() > 0.98  # another layout in memory, other rounding
        assert (clip.caption, clip.text.tolist()) == (
            CAPTIONS[sample],
            text.encode(CAPTIONS[sample]),
        )


def test_broken_videos_are_recorded_and_skipped(work: Path, tmp_path: Path) -> None:
    result = run_tokenize(work, tmp_path)
    assert result.exit_code == 0
    assert "tokenised 5 of 7 videos (2 broken, see" in result.output
    rows = [json.loads(line) for line in (tmp_path / "failed.jsonl").read_text().splitlines()]
    assert {row["key"] for row in rows} == {"00000005-v5", "00000006-v6"}
    assert any("no such file" in row["reason"] for row in rows)


def test_a_caption_without_tokens_is_recorded(work: Path, tmp_path: Path) -> None:
    write_captions(tmp_path / "c.csv", [Caption("v0.mp4", "\u200b"), Caption("v1.mp4", "a cat")])
    result = run_tokenize(work, tmp_path / "out", table=tmp_path / "c.csv")
    assert result.exit_code == 0 and "tokenised 1 of 2 videos" in result.output
    assert "has no tokens" in (tmp_path / "out" / "failed.jsonl").read_text()


def test_a_job_without_any_good_video_fails(work: Path, tmp_path: Path) -> None:
    result = run_tokenize(work, tmp_path / "out", "--videos", str(tmp_path))
    assert isinstance(result.exception, ValueError) and result.exit_code != 0
    assert "none of the 7 videos could be used" in str(result.exception)
    assert len((tmp_path / "out" / "failed.jsonl").read_text().splitlines()) == 7


def test_a_job_that_was_cut_off_goes_on_to_the_same_bytes(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_tokenize(work, tmp_path / "through")
    written: list[Path] = []

    def killed_in_the_second_shard(path: Path, *arguments: object) -> object:
        if written:
            (path.parent / f".{path.stem}.tmp-1234.tar").write_bytes(b"half")
            raise KeyboardInterrupt
        written.append(path)
        return write_shard(path, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(tokenize_videos, "write_shard", killed_in_the_second_shard)
        assert run_tokenize(work, tmp_path / "cut").exit_code != 0
    [first] = (tmp_path / "cut" / "train").glob("*.json")
    stamp = first.stat().st_mtime_ns
    assert run_tokenize(work, tmp_path / "cut").exit_code == 0
    assert content(tmp_path / "cut") == content(tmp_path / "through")
    assert first.stat().st_mtime_ns == stamp, "a finished shard was made again"


def test_a_second_job_for_the_same_shards_is_refused(work: Path, tmp_path: Path) -> None:
    for lock, refused, free in (
        (".lock", "1/1", None),
        (".lock", "1/2", None),
        (".lock-1-of-2", "1/2", "2/2"),
    ):
        with open(tmp_path / lock, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            result = run_tokenize(work, tmp_path, "--part", refused)
            assert f"another tokenize-videos holds {file.name}" in str(result.exception)
            assert free is None or run_tokenize(work, tmp_path, "--part", free).exit_code == 0


def test_jobs_that_share_the_work_make_the_shards_of_one(work: Path, tmp_path: Path) -> None:
    assert run_tokenize(work, tmp_path / "one").exit_code == 0
    for part in ("2/2", "1/2"):
        result = run_tokenize(work, tmp_path / "two", "--part", part)
        assert result.exit_code == 0
    assert "tokenised 3 of 4 videos (1 broken, see" in result.output
    one, two = (content(tmp_path / folder / "train") for folder in ("one", "two"))
    assert one == two
    failed = [path.read_text() for path in (tmp_path / "two").glob("failed-*-of-2.jsonl")]
    assert sorted("".join(failed).splitlines()) == sorted(
        (tmp_path / "one" / "failed.jsonl").read_text().splitlines()
    )
    assert run_tokenize(work, tmp_path / "two", "--part", "3/2").exit_code == 2
    result = run_tokenize(work, tmp_path / "two", "--part", "3/5")
    assert "there are only 4 shards" in str(result.exception)


def test_a_job_with_too_many_broken_videos_stops(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenize_videos, "MIN_BROKEN", 1)
    result = run_tokenize(work, tmp_path, "--max-broken", "0.2")
    assert "2 of 7 videos could not be used, the last because: " in str(result.exception)
    assert run_tokenize(work, tmp_path, "--max-broken", "0.3").exit_code == 0


@pytest.mark.slow
def test_two_processes_write_the_bytes_of_one(work: Path, tmp_path: Path) -> None:
    for workers in ("1", "2"):
        assert run_tokenize(work, tmp_path / workers, "--workers", workers).exit_code == 0
    assert content(tmp_path / "1") == content(tmp_path / "2")


def test_a_finished_shard_that_was_damaged_is_made_again(work: Path, tokens: Path) -> None:
    shard = tokens / "train" / "shard-000001.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + b"x")
    assert run_tokenize(work, tokens).exit_code == 0
    assert shard.read_bytes() == whole


def test_a_video_that_was_repaired_costs_its_shard_only(work: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(work, tmp_path / "work"))
    assert run_tokenize(copy, tmp_path / "out").exit_code == 0
    shutil.copy(copy / "v4.mp4", copy / "v5.mp4")
    result = run_tokenize(copy, tmp_path / "out")
    assert "shard-000002.tar was made from other videos" in str(result.exception)
    assert "delete it and its .json to make it again" in str(result.exception)
    for suffix in ("tar", "json"):
        (tmp_path / "out" / "train" / f"shard-000002.{suffix}").unlink()
    result = run_tokenize(copy, tmp_path / "out")
    assert "tokenised 6 of 7 videos (1 broken" in result.output


def test_shards_of_another_job_are_not_overwritten(work: Path, tokens: Path) -> None:
    before = content(tokens)
    result = run_tokenize(work, tokens, "--video-fps", "4")
    assert "was made from other videos, captions or settings" in str(result.exception)
    result = run_tokenize(work, tokens, "--clips-per-shard", "9")
    assert "is not part of this job" in str(result.exception)
    assert content(tokens) == before


def test_no_caption_is_on_both_sides_of_the_split(work: Path, tmp_path: Path) -> None:
    table = [Caption(f"v{n % 5}.mp4", f"a clip of kind {n % 9}") for n in range(5)]
    write_captions(tmp_path / "split.csv", table)
    result = run_tokenize(work, tmp_path, "--holdout", "0.5", table=tmp_path / "split.csv")
    assert result.exit_code == 0
    sides = {}
    for side in ("train", "validation"):
        assert run(build_index, tmp_path / side).exit_code == 0
        index = open_index(tmp_path / side)
        reader = ShardReader(LocalShards(index.folder, index.shards), 0)
        sides[side] = {read_clip(index, reader, sample).caption for sample in range(len(index))}
    assert sides["train"] and sides["validation"] and not sides["train"] & sides["validation"]


def test_the_split_takes_its_share_and_reads_words_only() -> None:
    held_out = sum(is_held_out(f"caption {n}", 0.1) for n in range(5000))
    assert 400 < held_out < 600
    assert is_held_out("A red  Cat ", 0.5) == is_held_out("a red cat", 0.5)
    assert not any(is_held_out(f"caption {n}", 0.0) for n in range(99))


def test_a_split_with_an_empty_side_is_refused(work: Path, tmp_path: Path) -> None:
    result = run_tokenize(work, tmp_path, "--holdout", "0.000001")
    assert "neither part is empty" in str(result.exception)


def test_a_dry_run_says_what_is_to_do_and_does_nothing(work: Path, tmp_path: Path) -> None:
    result = run_tokenize(work, tmp_path, "--dry-run")
    assert result.exit_code == 0 and not list(tmp_path.iterdir())
    assert "shard-000003.tar: 1 videos, to do" in result.output
    assert "4 shards, 2x2 tokens a frame at 8.0 fps, 1 videos are missing" in result.output


def test_whole_shards_verify(work: Path, tokens: Path) -> None:
    result = run(verify_shards, tokens / "train", "--text-tokenizer", work / "text.model")
    assert result.exit_code == 0 and "5 clips in 3 shards" in result.output


def test_verify_lists_everything_that_is_damaged(work: Path, tokens: Path) -> None:
    folder = tokens / "train"
    index = open_index(folder)
    damaged = bytearray((folder / "shard-000000.tar").read_bytes())
    damaged[index[1].offset + 40] ^= 1
    (folder / "shard-000000.tar").write_bytes(damaged)
    (folder / "shard-000001.tar").unlink()
    (folder / "shard-000002.tar").write_bytes((folder / "shard-000002.tar").read_bytes()[:600])
    (folder / "stray.tar").write_bytes(b"")
    result = run(verify_shards, folder)
    assert result.exit_code == 1
    *problems, summary = result.output.splitlines()
    assert [Path(problem.split(": ")[0]).name for problem in problems] == [
        "stray.tar", "shard-000000.tar", "shard-000000.tar", "shard-000001.tar",
        "shard-000002.tar", "shard-000002.tar",
    ]  # fmt: skip
    assert "sample 00000001-v1 at byte" in problems[2] and "CRC-32" in problems[2]
    assert "is missing, with 2 samples" in problems[3] and "6 problems" in summary


def test_verify_checks_the_text_against_its_tokenizer(work: Path, tokens: Path) -> None:
    (tokens / "other.model").write_bytes(train_text_model(CAPTIONS, 290))
    result = run(verify_shards, tokens / "train", "--text-tokenizer", tokens / "other.model")
    assert "was made by" in str(result.exception)


def test_inspecting_prints_samples_and_draws_them(work: Path, tokens: Path) -> None:
    picture = tokens / "sheet.png"
    result = run(
        inspect_shards, tokens / "train", "--count", 3, "--png", picture,
        "--image-tokenizer", work / "image.safetensors", "--frames", 4,
        "--text-tokenizer", work / "text.model",
    )  # fmt: skip
    assert result.exit_code == 0
    assert "5 clips in 3 shards; 8-12 frames of 2x2 tokens at 8.0 fps" in result.output
    assert result.output.count("'a red cat'") == 2  # the caption, and what its ids say
    assert "reads as" in result.output and "of 64 codes" in result.output
    with Image.open(picture) as sheet:
        assert sheet.width > 4 * 32 and sheet.height > 3 * 32


def test_inspecting_with_the_wrong_tokenizer_is_refused(work: Path, tokens: Path) -> None:
    config = ImageTokenizerConfig(channels=4, z_channels=4, num_codes=64, rates=(8,))
    ImageTokenizer(config).save(tokens / "other.safetensors")
    result = run(
        inspect_shards, tokens / "train", "--image-tokenizer", tokens / "other.safetensors",
        "--png", tokens / "sheet.png",
    )  # fmt: skip
    assert "were made by" in str(result.exception) and not (tokens / "sheet.png").exists()
    assert run(inspect_shards, tokens / "train", "--png", "x.png").exit_code == 2


def test_building_an_index_over_damage_names_shard_and_byte(tokens: Path) -> None:
    shard = tokens / "train" / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[:1100])
    (tokens / "train" / "index.parquet").unlink()
    result = run(build_index, tokens / "train")
    assert "shard-000001.tar is damaged at byte 1024: the file ends 436 bytes early" in str(
        result.exception
    )
