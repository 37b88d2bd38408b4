"""Video files: frames are taken by time stamp, cut square; a bad file is one clear error."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from megavideo.data.video import CODECS, read_clip, read_comment, read_frames, write_video

SIZE = 32


def grey(level: int, height: int = SIZE, width: int = SIZE) -> np.ndarray:
    return np.full((height, width, 3), level, np.uint8)


def write_at(path: Path, milliseconds: Sequence[int], levels: Sequence[int]) -> Path:
    """A video with one grey frame per entry, shown from exactly that millisecond on."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=1000)
        stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, "yuv420p"
        stream.options = {"crf": "0", "bf": "0"}
        stream.codec_context.time_base = Fraction(1, 1000)
        for pts, level in zip(milliseconds, levels, strict=True):
            frame = av.VideoFrame.from_ndarray(grey(level), format="rgb24")
            frame.pts, frame.time_base = pts, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def levels_of(path: Path, fps: float, **options: float) -> list[int]:
    """Grey levels of the frames read, rounded to tens: the levels written are multiples of ten."""
    return [round(float(frame.mean()) / 10) * 10 for frame in read_frames(path, fps, **options)]


@pytest.mark.parametrize("codec", CODECS)
def test_what_is_written_is_read_back(tmp_path: Path, codec: str) -> None:
    levels = [20 * k for k in range(12)]
    write_video(tmp_path / "clip.mp4", [grey(level) for level in levels], 8, codec)
    clip = read_clip(tmp_path / "clip.mp4", 8)
    assert clip.frames.shape == (12, SIZE, SIZE, 3) and clip.frames.dtype == np.uint8
    assert clip.duration_s == 1.5
    assert [round(float(frame.mean()) / 20) * 20 for frame in clip.frames] == levels


@pytest.mark.parametrize("suffix", ["mkv", "mov", "mp4"])
def test_a_comment_is_found_again(tmp_path: Path, suffix: str) -> None:
    write_video(tmp_path / f"clip.{suffix}", [grey(9)] * 3, 8, comment="seed=7, clip 12")
    assert read_comment(tmp_path / f"clip.{suffix}") == "seed=7, clip 12"


def test_a_lower_rate_keeps_every_second_frame_and_a_higher_one_repeats(tmp_path: Path) -> None:
    path = write_at(tmp_path / "a.mkv", [0, 250, 500, 750], [0, 50, 100, 150])
    assert levels_of(path, 2) == [0, 100]
    assert levels_of(path, 8)[:6] == [0, 0, 50, 50, 100, 100]


def test_frames_are_chosen_by_time_stamp_under_a_variable_rate(tmp_path: Path) -> None:
    """Ten frames hurry through the first 100 ms, then two stay for half a second each."""
    path = write_at(
        tmp_path / "vfr.mkv", [*range(0, 100, 10), 100, 600], [*range(0, 100, 10), 150, 200]
    )
    assert levels_of(path, 10)[:7] == [0, 150, 150, 150, 150, 150, 200]


def test_time_stamps_need_not_start_at_zero(tmp_path: Path) -> None:
    early = write_at(tmp_path / "early.mkv", [0, 250, 500, 750], [0, 50, 100, 150])
    late = write_at(tmp_path / "late.mkv", [7000, 7250, 7500, 7750], [0, 50, 100, 150])
    assert levels_of(late, 4) == levels_of(early, 4) == [0, 50, 100, 150]


def test_time_stamps_rounded_to_milliseconds_hit_the_grid(tmp_path: Path) -> None:
    """1/6 s is stored as 167 ms: read on a 6 fps grid it must not slip to the frame before."""
    path = write_at(tmp_path / "ms.mkv", [0, 167, 333, 500, 667, 833], [0, 50, 100, 150, 200, 250])
    assert levels_of(path, 6) == [0, 50, 100, 150, 200, 250]


def test_max_seconds_stops_early(tmp_path: Path) -> None:
    path = write_at(tmp_path / "a.mkv", [0, 250, 500, 750], [0, 50, 100, 150])
    assert levels_of(path, 4, max_seconds=0.5) == [0, 50]


def test_the_short_side_is_scaled_and_the_long_side_cut_in_the_middle(tmp_path: Path) -> None:
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:64] = (0, 255, 0)  # only the middle third is green
    write_video(tmp_path / "wide.mp4", [wide] * 4, 4)
    frames = read_clip(tmp_path / "wide.mp4", 4, size=16).frames
    assert frames.shape == (4, 16, 16, 3)
    green = frames[:, :, 2:-2]
    assert green[..., 1].min() > 200 and green[..., [0, 2]].max() < 60


def test_pixels_that_are_not_square_are_made_square(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "dvd.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=4)
        stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(2)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(grey(50), format="rgb24")))
        container.mux(stream.encode(None))
    assert read_clip(tmp_path / "dvd.mkv", 4).frames.shape == (1, SIZE, 2 * SIZE, 3)


def test_a_title_in_another_encoding_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "old.mkv"
    write_video(path, [grey(50)] * 4, 4, comment="<cafe>")
    path.write_bytes(path.read_bytes().replace(b"<cafe>", b"<caf\xe9>"))
    assert levels_of(path, 4) == [50] * 4
    assert read_comment(path) == "<caf\N{REPLACEMENT CHARACTER}>"


def test_an_unknown_codec_is_an_error_of_that_video(tmp_path: Path) -> None:
    path = tmp_path / "new.mp4"
    write_video(path, [grey(50)] * 4, 4)
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzz1"))
    with pytest.raises(ValueError, match=r"new\.mp4: is in a codec that PyAV .* does not decode"):
        read_clip(path, 4)


def test_a_small_video_is_enlarged(tmp_path: Path) -> None:
    write_video(tmp_path / "small.mp4", [grey(100, 16, 24)] * 2, 4)
    assert read_clip(tmp_path / "small.mp4", 4, size=64).frames.shape == (2, 64, 64, 3)


def test_a_video_recorded_sideways_is_turned_upright(tmp_path: Path) -> None:
    top_white = np.zeros((SIZE, SIZE, 3), np.uint8)
    top_white[: SIZE // 2] = 255
    path = tmp_path / "phone.mp4"
    write_video(path, [top_white] * 4, 4)
    data = bytearray(path.read_bytes())
    # Track header, version 0: the name, 40 bytes, then the 3x3 display matrix (16.16 fixed point).
    matrix = data.index(b"tkhd") + 4 + 40
    turn = [0, 1 << 16, 0, -1 << 16, 0, 0, SIZE << 16, 0, 1 << 30]  # shown a quarter turn clockwise
    data[matrix : matrix + 36] = b"".join(entry.to_bytes(4, "big", signed=True) for entry in turn)
    path.write_bytes(data)
    frame = read_clip(path, 4).frames[0]
    assert frame[:, SIZE // 2 + 4 :].min() > 200 and frame[:, : SIZE // 2 - 4].max() < 50


def test_a_single_frame_is_a_clip(tmp_path: Path) -> None:
    write_video(tmp_path / "one.mp4", [grey(90)], 8)
    assert len(read_clip(tmp_path / "one.mp4", 8).frames) == 1


@pytest.mark.parametrize("content", [b"", b"this is no video" * 100])
def test_a_file_that_is_no_video_is_one_error_with_its_path(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.mp4").write_bytes(content)
    with pytest.raises(ValueError, match=r"video .*bad\.mp4: "):
        read_clip(tmp_path / "bad.mp4", 8)


def test_a_missing_file_is_one_error_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.mp4: no such file"):
        read_clip(tmp_path / "none.mp4", 8)


def test_a_truncated_video_is_an_error_and_not_a_short_clip(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8) for _ in range(40)]
    path = tmp_path / "cut.mp4"
    write_video(path, noise, 8)
    moved = tmp_path / "faststart.mp4"  # header first, so that the cut leaves a readable file
    with (
        av.open(str(path)) as source,
        av.open(str(moved), "w", options={"movflags": "faststart"}) as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    assert len(read_clip(moved, 8).frames) == 40
    moved.write_bytes(moved.read_bytes()[: moved.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"faststart\.mp4: "):
        read_clip(moved, 8)


def test_a_sound_file_is_refused(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 800), np.int16), format="s16", layout="mono"
        )
        frame.sample_rate, frame.pts = 8000, 0
        container.mux(stream.encode(frame))
    with pytest.raises(ValueError, match="no video stream"):
        read_clip(tmp_path / "sound.wav", 8)


def test_frames_without_time_stamps_are_refused(tmp_path: Path) -> None:
    """A raw H.264 stream has no clock: the frame rate would have to be guessed."""
    write_video(tmp_path / "clip.mp4", [grey(50)] * 8, 8)
    with av.open(str(tmp_path / "raw.h264"), "w", format="h264") as target:
        stream = target.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, "yuv420p"
        for _ in range(8):
            target.mux(stream.encode(av.VideoFrame.from_ndarray(grey(50), format="rgb24")))
        target.mux(stream.encode(None))
    with pytest.raises(ValueError, match=r"raw\.h264: .*time stamp"):
        read_clip(tmp_path / "raw.h264", 8)


@pytest.mark.parametrize(
    ("name", "frames", "codec", "message"),
    [
        ("a.mp4", [grey(0)], "prores", "codec='prores' is not one of"),
        ("a.mp4", [], "mpeg4", "no frame to write"),
        ("a.mp4", [grey(0, 31, 32)], "mpeg4", "must be even"),
        ("a.avi", [grey(0)], "mpeg4", "must end in one of"),
    ],
)
def test_what_cannot_be_written_says_why_and_leaves_no_file(
    tmp_path: Path, name: str, frames: list[np.ndarray], codec: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_video(tmp_path / name, frames, 8, codec)
    assert not list(tmp_path.iterdir())


def test_a_codec_that_this_pyav_lacks_is_an_error_and_no_other_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(av, "codecs_available", {"mpeg4"})
    with pytest.raises(ValueError, match="not in this build of PyAV"):
        write_video(tmp_path / "a.mp4", [grey(0)], 8, "libx264")
