"""render-clips: the files depend on seed and number only, and an interrupted run continues."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from megavideo.data_tools.render_clips import main

from megavideo.data.captions import read_captions
from megavideo.data.scenes import draw_scene, make_scene
from megavideo.data.video import CODECS, read_clip


def render(out: Path, *options: str, count: int = 3, workers: int = 1) -> Result:
    arguments = [f"--out={out}", f"--count={count}", f"--workers={workers}", "--seconds=1"]
    result = CliRunner().invoke(main, [*arguments, "--size=32", *options])
    if isinstance(result.exception, ValueError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("codec", CODECS)
def test_the_files_show_the_scenes_of_their_captions(tmp_path: Path, codec: str) -> None:
    result = render(tmp_path, f"--codec={codec}")
    assert "rendered 3 clips, kept 0: 3 s of video" in result.output
    for number, caption in enumerate(read_captions(tmp_path / "captions.csv")):
        scene = make_scene(0, number)
        assert caption.text == scene.caption
        clip = read_clip(tmp_path / caption.video, 8)
        error = clip.frames.astype(int) - draw_scene(scene, 32, 8)
        assert clip.frames.shape == (8, 32, 32, 3) and np.abs(error).mean() < 8


def test_any_number_of_processes_gives_the_same_files(tmp_path: Path) -> None:
    render(tmp_path / "one", count=10)
    render(tmp_path / "two", count=10, workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(contents(tmp_path / "one")) == 11


def test_another_seed_gives_other_clips(tmp_path: Path) -> None:
    render(tmp_path / "zero")
    render(tmp_path / "one", "--seed=1")
    zero, one = (read_captions(tmp_path / seed / "captions.csv") for seed in ("zero", "one"))
    assert [caption.text for caption in zero] != [caption.text for caption in one]


def test_a_second_run_keeps_what_is_whole_and_mends_the_rest(tmp_path: Path) -> None:
    render(tmp_path, count=4)
    before = contents(tmp_path)
    (tmp_path / "clip-000001.mp4").write_bytes(before["clip-000001.mp4"][:500])
    (tmp_path / "clip-000002.mp4").unlink()
    assert "rendered 2 clips, kept 2" in render(tmp_path, count=4).output
    assert contents(tmp_path) == before


def test_clips_of_other_settings_are_not_overwritten(tmp_path: Path) -> None:
    render(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"clip-000000\.mp4 was made with other settings .*seed=0"):
        render(tmp_path, "--seed=1")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_captions_table_comes_in_other_kinds(tmp_path: Path, kind: str) -> None:
    render(tmp_path, f"--captions={kind}")
    assert len(read_captions(tmp_path / f"captions.{kind}")) == 3


def test_a_clip_shorter_than_a_frame_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="less than one frame"):
        render(tmp_path, "--fps=0.1")
