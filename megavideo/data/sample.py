"""One captioned clip as tokens, and the bytes that hold it: the `.clip` member of a shard.

A record is a 32-byte little-endian header, the image tokens as uint16 [n_frames, N], the caption's
token ids as uint32 [n_text], and the caption itself in UTF-8. Tokens are not compressed: they are
close to uniform, and zlib saves 4 %. The checksum covers everything else in the record, so that a
record proves itself wherever it is read.
"""

import struct
import zlib
from dataclasses import dataclass

import numpy as np

MAGIC = b"MVCL"
VERSION = 1
# magic, version, side, n_frames, 1000 * fps, n_text, bytes of caption, reserved (0), CRC-32 of all
# other bytes
HEADER = struct.Struct("<4sHHIIIIII")
CHECKSUM_BYTES = 4
CHECKSUM_START = HEADER.size - CHECKSUM_BYTES
LARGEST_CODE = np.iinfo(np.uint16).max
assert HEADER.size == 32


@dataclass(frozen=True)
class TokenClip:
    """A video as image tokens on a regular time grid, with its caption.

    frames: uint16 [n_frames, N], N = side * side, raster order, `1 / fps` seconds apart.
    text: uint32 [n_text], the caption's ids as the text tokenizer gave them (no duration, no
        padding).
    """

    frames: np.ndarray
    fps: float
    text: np.ndarray
    caption: str

    @property
    def side(self) -> int:
        """Tokens per row and per column of a frame."""
        return exact_sqrt(self.frames.shape[1])


def exact_sqrt(number: int) -> int:
    """The side of a square frame of `number` tokens; ValueError if no integer is."""
    side = round(number**0.5)
    if side * side != number:
        raise ValueError(f"{number} tokens a frame are no square")
    return side


def pack(clip: TokenClip) -> bytes:
    """The record of `clip`; ValueError if something in it cannot be held exactly."""
    frames = _as_unsigned(clip.frames, np.uint16, "image tokens", dims=2)
    text = _as_unsigned(clip.text, np.uint32, "text ids", dims=1)
    caption = clip.caption.encode()
    if not caption:
        raise ValueError("the caption is empty")
    body = frames.tobytes() + text.tobytes() + caption
    sizes = (exact_sqrt(frames.shape[1]), len(frames), _milli(clip.fps), len(text), len(caption))
    header = HEADER.pack(MAGIC, VERSION, *sizes, 0, 0)[:CHECKSUM_START]
    return header + struct.pack("<I", zlib.crc32(body, zlib.crc32(header))) + body


def unpack(record: bytes) -> TokenClip:
    """The clip in `record`, its arrays being read-only views; ValueError says what is wrong."""
    side, n_frames, milli, n_text, caption_bytes = _read_header(record)
    frames_end = HEADER.size + 2 * n_frames * side * side
    text_end = frames_end + 4 * n_text
    if len(record) != text_end + caption_bytes:
        raise ValueError(
            f"record has {len(record)} bytes, its header says {text_end + caption_bytes}"
        )
    if checksum(record) != stored_checksum(record):
        raise ValueError(
            f"record has CRC-32 {checksum(record):08x}, its header says "
            f"{stored_checksum(record):08x}"
        )
    frames = np.frombuffer(record, "<u2", n_frames * side * side, HEADER.size)
    text = np.frombuffer(record, "<u4", n_text, frames_end)
    caption = record[text_end:].decode()
    return TokenClip(frames.reshape(n_frames, side * side), milli / 1000, text, caption)


def checksum(record: bytes) -> int:
    """CRC-32 of `record` without its checksum field."""
    view = memoryview(record)
    return zlib.crc32(view[HEADER.size :], zlib.crc32(view[:CHECKSUM_START]))


def stored_checksum(record: bytes) -> int:
    """The CRC-32 that the header of `record` holds."""
    return int.from_bytes(record[CHECKSUM_START : HEADER.size], "little")


def _read_header(record: bytes) -> tuple[int, int, int, int, int]:
    if len(record) < HEADER.size:
        raise ValueError(f"record has {len(record)} bytes, less than its {HEADER.size}-byte header")
    magic, version, *sizes, reserved, _ = HEADER.unpack_from(record)
    if magic != MAGIC:
        raise ValueError(f"record starts with {magic!r}, not {MAGIC!r}")
    if version != VERSION or reserved:
        raise ValueError(f"record has version {version}, this program reads version {VERSION}")
    if not all(sizes):
        raise ValueError("record's header has a size of zero")
    return tuple(sizes)


def _as_unsigned(array: np.ndarray, dtype: type, what: str, dims: int) -> np.ndarray:
    """`array` as little-endian `dtype`, refused if a value would change or nothing is in it."""
    array = np.asarray(array)
    if array.ndim != dims or not array.size or array.dtype.kind not in "iu":
        raise ValueError(
            f"{what} of shape {array.shape} and type {array.dtype}: need a non-empty integer array "
            f"of {dims} dimension{'s' * (dims > 1)}"
        )
    largest = np.iinfo(dtype).max
    if array.min() < 0 or array.max() > largest:
        raise ValueError(f"{what} span {array.min()}..{array.max()}, the record holds 0..{largest}")
    return np.ascontiguousarray(array, np.dtype(dtype).newbyteorder("<"))


def _milli(fps: float) -> int:
    """Frames per 1000 seconds: exact for every usual rate (29.97 -> 29970)."""
    milli = round(fps * 1000)
    if milli < 1 or abs(milli - fps * 1000) > 1e-6:
        raise ValueError(f"fps={fps} is not a positive multiple of 0.001")
    return milli
