"""Video files in and out, by PyAV: frames on a regular time grid, cut square, in bounded memory.

The frame of grid time t = start + k / fps is the one on screen at t: the last one whose
presentation time stamp (pts) is at or before t. Frames are never counted, so a variable frame rate,
a dropped frame or a stream that does not start at zero cannot shift what is read. Only frames that
are kept are converted to RGB and resized: that is the expensive part (1-3 ms a frame).
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from megavideo.files import atomic_path

CODECS = ("libx264", "mpeg4")
WRITABLE_SUFFIXES = (
    ".mkv",
    ".mov",
    ".mp4",
)  # not .avi: it stores no presentation times, which H.264 needs
VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")

# A file is called truncated when it ends this much before the duration that its header declares.
# Real headers are off by a frame or two, or by an audio track that is a little longer.
TRUNCATED_SECONDS = 0.5
TRUNCATED_SHARE = 0.05
MAX_PIXEL_ASPECT = 4  # of a pixel's sides; real ones are below 2.2


@dataclass(frozen=True)
class Clip:
    """Decoded frames, uint8 [n, H, W, 3] in RGB, `1 / fps` seconds apart, `duration_s` in all."""

    frames: np.ndarray
    fps: float
    duration_s: float


def read_clip(
    path: Path | str, fps: float, size: int | None = None, max_seconds: float | None = None
) -> Clip:
    """All frames of `read_frames` in one array.

    Raises ValueError as `read_frames` does. `duration_s` is the number of frames divided by `fps`.
    """
    frames = np.stack(list(read_frames(path, fps, size, max_seconds)))
    return Clip(frames, fps, len(frames) / fps)


def read_frames(
    path: Path | str, fps: float, size: int | None = None, max_seconds: float | None = None
) -> Iterator[np.ndarray]:
    """Yield the frames of a video on a grid of `fps` frames a second from its first frame on.

    Args:
        path: any file that ffmpeg reads.
        fps: frames per second of the grid; frames are repeated where the video is slower.
        size: side in pixels: the short side is scaled to it, the long side cut in the middle.
            None keeps the size, with square pixels.
        max_seconds: stop after this much of the video.

    Yields: uint8 [H, W, 3], RGB. At least one.
    Raises: ValueError naming the path and the cause if the file is missing, is no video, is empty,
        damaged or truncated.
    """
    if not 0 < fps < math.inf or math.isinf(max_seconds or 0):
        raise ValueError(f"fps={fps}, max_seconds={max_seconds}: use finite numbers above 0")
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"video {path}: no such file")
    try:
        # Titles and the like may be in any encoding; nothing here depends on them.
        with av.open(str(path), metadata_errors="replace") as container:
            stream = _video_stream(container)
            to_array = _Converter(size, _pixel_aspect(stream))
            for frame in _on_grid(_timed_frames(container, stream), Fraction(fps), max_seconds):
                yield to_array(frame)
    except (av.error.FFmpegError, _Unreadable) as error:
        raise ValueError(f"video {path}: {_reason(error)}") from error


class _Unreadable(Exception):
    """Why a video cannot be used; becomes the ValueError that names the path."""


def _reason(error: Exception) -> str:
    return (isinstance(error, av.error.FFmpegError) and error.strerror) or str(error)


@dataclass(frozen=True)
class _Shown:
    """A frame and the seconds, counted from the first frame, between which it is on screen.

    `slack` is half a tick of the container's clock: pts are rounded to ticks, so a frame meant for
    1/6 s may be stamped 0.167 s and still belongs to the grid time 1/6.
    """

    frame: av.VideoFrame
    start: Fraction
    end: Fraction
    slack: Fraction


def _video_stream(container: av.container.InputContainer) -> av.VideoStream:
    if not container.streams.video:
        raise _Unreadable("has no video stream")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise _Unreadable(f"is in a codec that PyAV {av.__version__} does not decode")
    stream.codec_context.thread_count = 1  # parallel work is over files, one a process
    return stream


def _pixel_aspect(stream: av.VideoStream) -> Fraction:
    """Width by height of a pixel: tapes and DVDs have some that are not square."""
    aspect = stream.sample_aspect_ratio or Fraction(1)  # 0 where the file does not say
    if not 1 / MAX_PIXEL_ASPECT <= aspect <= MAX_PIXEL_ASPECT:
        raise _Unreadable(f"is damaged: its pixels are {aspect} times as wide as high")
    return aspect


def _timed_frames(
    container: av.container.InputContainer, stream: av.VideoStream
) -> Iterator[_Shown]:
    """Frames in the order shown; each one's end is the next one's start."""
    clock = _Clock(stream)
    waiting: av.VideoFrame | None = None
    for frame in container.decode(stream):
        if waiting is not None:
            yield clock.shown(waiting, until=frame)
        waiting = frame
    if waiting is None:
        raise _Unreadable("holds no decodable frame")
    last = clock.shown(waiting, until=None)
    _check_whole(clock.offset + last.end, stream)
    yield last


def _check_whole(end: Fraction, stream: av.VideoStream) -> None:
    """`end` is a time stamp, not a length: Matroska declares that, and MP4 starts at zero."""
    if stream.duration is None or stream.time_base is None:
        return  # nothing is declared, as in raw streams
    declared = stream.duration * stream.time_base
    if declared - end > max(TRUNCATED_SECONDS, declared * TRUNCATED_SHARE):
        raise _Unreadable(
            f"is truncated or damaged: only {float(end):.2f} s of {float(declared):.2f} s decode"
        )


class _Clock:
    """Turns the pts of one stream into exact seconds since its first frame."""

    def __init__(self, stream: av.VideoStream):
        assert stream.time_base is not None
        self.tick = stream.time_base
        rate = stream.average_rate
        self.mean_length = 1 / rate if rate else Fraction(0)
        self.first_pts: int | None = None

    @property
    def offset(self) -> Fraction:
        """The first frame's time stamp in seconds."""
        return (self.first_pts or 0) * self.tick

    def shown(self, frame: av.VideoFrame, until: av.VideoFrame | None) -> _Shown:
        start = self._seconds(frame)
        end = start + self._length(frame) if until is None else self._seconds(until)
        if end < start:
            raise _Unreadable(f"time stamps run backwards after {float(start):.2f} s")
        return _Shown(frame, start, end, slack=self.tick / 2)

    def _seconds(self, frame: av.VideoFrame) -> Fraction:
        if frame.pts is None:
            raise _Unreadable(
                "has a frame without a time stamp; convert it with `ffmpeg -i FILE NEW.mp4`"
            )
        if self.first_pts is None:
            self.first_pts = frame.pts
        return (frame.pts - self.first_pts) * self.tick

    def _length(self, frame: av.VideoFrame) -> Fraction:
        """Seconds that the last frame stays: as the file says, else a mean frame's."""
        return frame.duration * self.tick if frame.duration else self.mean_length


def _on_grid(
    shown: Iterable[_Shown], fps: Fraction, max_seconds: float | None
) -> Iterator[av.VideoFrame]:
    """The frame on screen at 0, 1/fps, 2/fps, ...; the first frame is always among them."""
    limit = None if max_seconds is None else Fraction(max_seconds)
    kept = 0
    for item in shown:
        while kept == 0 or kept / fps < item.end - item.slack:
            if kept and limit is not None and kept / fps >= limit:
                return
            if item.frame.is_corrupt:
                raise _Unreadable(f"is damaged at {float(item.start):.2f} s")
            yield item.frame
            kept += 1


class _Converter:
    """Decoded frame -> RGB array, upright, scaled and cut to size x size; repeats cost nothing.

    pixel_aspect: width by height of the decoded pixels; those of the array are square.
    """

    def __init__(self, size: int | None, pixel_aspect: Fraction):
        self.size = size
        self.pixel_aspect = pixel_aspect
        self.reformatter = VideoReformatter()  # keeps its swscale context between frames
        self.source: av.VideoFrame | None = None
        self.array: np.ndarray | None = None

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        if self.array is None or frame is not self.source:
            self.source, self.array = frame, self._convert(frame)
        return self.array

    def _convert(self, frame: av.VideoFrame) -> np.ndarray:
        width, height = self._scaled_size(frame)
        shrinks = width * height < frame.width * frame.height
        interpolation = Interpolation.AREA if shrinks else Interpolation.BICUBIC
        rgb = self.reformatter.reformat(frame, width, height, "rgb24", interpolation=interpolation)
        array = _centre_crop(rgb.to_ndarray(), self.size)
        # Phones record sideways and say so; the angle is counter-clockwise, as in numpy.
        return np.ascontiguousarray(np.rot90(array, frame.rotation // 90))

    def _scaled_size(self, frame: av.VideoFrame) -> tuple[int, int]:
        width, height = round(frame.width * self.pixel_aspect), frame.height
        if self.size is None:
            return width, height
        scale = self.size / min(width, height)
        return max(self.size, round(width * scale)), max(self.size, round(height * scale))


def _centre_crop(array: np.ndarray, size: int | None) -> np.ndarray:
    """The middle size x size pixels of [H, W, 3]; everything if `size` is None."""
    if size is None:
        return array
    top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[top : top + size, left : left + size]


def write_video(
    path: Path | str,
    frames: Iterable[np.ndarray],
    fps: float,
    codec: str = "libx264",
    comment: str = "",
) -> None:
    """Encode uint8 RGB frames [H, W, 3] (H and W even) to `path`, which appears only when complete.

    Args:
        path: the suffix chooses the container: .mkv, .mov or .mp4.
        codec: "libx264" (H.264) or "mpeg4" (MPEG-4 part 2); no other is tried if it is missing.
        comment: kept in the file's metadata, where `read_comment` finds it.
    Raises: ValueError on another suffix, a codec that is unknown or not in this PyAV, an odd size,
        or no frame.
    """
    path = Path(path)
    if path.suffix not in WRITABLE_SUFFIXES:
        raise ValueError(
            f"video {path}: the name must end in one of {', '.join(WRITABLE_SUFFIXES)}"
        )
    _check_codec(codec)
    frames = iter(frames)
    first = next(frames, None)
    if first is None:
        raise ValueError(f"video {path}: there is no frame to write")
    height, width = first.shape[:2]
    if height % 2 or width % 2:
        raise ValueError(
            f"video {path}: {width}x{height} must be even in both directions (4:2:0 colour)"
        )
    with atomic_path(path) as temporary, av.open(str(temporary), "w") as container:
        container.metadata["comment"] = comment
        stream = _add_stream(container, codec, fps, width, height)
        for array in chain([first], frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode(None))


def read_comment(path: Path | str) -> str:
    """The comment that `write_video` put into the file, "" without one.

    Raises: ValueError naming the path if the file is no video.
    """
    try:
        with av.open(str(path), metadata_errors="replace") as container:
            tags = {name.lower(): value for name, value in container.metadata.items()}
    except av.error.FFmpegError as error:
        raise ValueError(f"video {path}: {_reason(error)}") from error
    return tags.get("comment", "")


def _check_codec(codec: str) -> None:
    if codec not in CODECS:
        raise ValueError(f"codec={codec!r} is not one of {', '.join(CODECS)}")
    if codec not in av.codecs_available:
        raise ValueError(
            f"codec={codec!r} is not in this build of PyAV {av.__version__}; choose another of "
            f"{', '.join(CODECS)} or install PyAV from PyPI, which bundles both"
        )


def _add_stream(
    container: av.container.OutputContainer, codec: str, fps: float, width: int, height: int
) -> av.VideoStream:
    stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
    assert isinstance(stream, av.VideoStream)
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    stream.codec_context.thread_count = 1
    if codec == "libx264":
        # With macroblock trees x264 (core 165) made 6 % of files differ from one run to the next.
        stream.options = {"crf": "18", "preset": "veryfast", "x264-params": "mbtree=0"}
    else:
        # Two bits a pixel keep small clips of flat colours clean.
        stream.codec_context.bit_rate = round(2 * width * height * fps)
    return stream
