"""The files of one generated video; a folder whose about.json is there and fits is whole.

    NAME/video.mp4 video.gif frames.png    the frames
    NAME/tokens.npy                        image codes, uint16 or uint32 [frames, tokens of a frame]
    NAME/enlarged.npy                      the same after super-resolution (and refinement), if any
    NAME/about.json                        prompt, settings, what made it; written last

Every file is written beside its name and renamed, so a job that is cut off leaves nothing half
written under a name that is read.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from PIL import Image

from megavideo.data.pictures import contact_sheet
from megavideo.data.video import write_video
from megavideo.files import atomic_path, atomic_write
from megavideo.generate.requests import Request
from megavideo.log import log

ABOUT = "about.json"
FORMAT = "megavideo-generated-1"
PICTURES = ("video.mp4", "video.gif", "frames.png")
SHEET_COLUMNS = 9


def write_video_folder(
    folder: Path,
    request: Request,
    settings: Mapping[str, Any],
    tokens: Mapping[str, np.ndarray],
    frames: np.ndarray,
    fps: float,
) -> None:
    """Write everything about one video.

    Args:
        settings: all that the tokens depend on besides prompt and number; see `is_whole`.
        tokens: [frames, N] each, by the name of their file.
        frames: uint8 [frames, H, W, 3] in RGB.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ABOUT).unlink(missing_ok=True)
    write_video(folder / "video.mp4", frames, fps, comment=request.prompt)
    _write_gif(folder / "video.gif", frames, fps)
    _write_sheet(folder / "frames.png", frames, request.prompt)
    files = {f"{name}.npy": codes for name, codes in tokens.items()}
    for name, codes in files.items():
        with atomic_write(folder / name) as file:
            np.save(file, codes.astype(np.uint16 if codes.max(initial=0) < 1 << 16 else np.uint32))
    about = {
        "format": FORMAT,
        "prompt": request.prompt,
        "number": request.number,
        "frames": len(frames),
        "fps": fps,
        "settings": dict(settings),
        "files": {name: _digest(folder / name) for name in (*PICTURES, *files)},
    }
    with atomic_write(folder / ABOUT) as file:
        file.write(json.dumps(about, indent=1, ensure_ascii=False).encode() + b"\n")


def is_whole(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Whether `folder` holds a whole video made with these settings.

    Raises: ValueError if it holds one that was made with others.
    """
    try:
        about = json.loads((folder / ABOUT).read_bytes())
        made_with, files = about["settings"], about["files"]
    except FileNotFoundError:
        return False
    except (ValueError, KeyError, TypeError) as error:
        log.warning("making %s again: its %s is damaged (%s)", folder, ABOUT, error)
        return False
    ours = json.loads(json.dumps(settings))
    odd = sorted(k for k in {**made_with, **ours} if made_with.get(k) != ours.get(k))
    if odd:
        raise ValueError(
            f"{folder} was made with other settings ({', '.join(odd)}); choose another --output, "
            "or remove it"
        )
    damaged = [name for name, digest in files.items() if _digest(folder / name) != digest]
    if damaged:
        log.warning("making %s again: %s missing or damaged", folder, ", ".join(damaged))
    return not damaged


@dataclass(frozen=True)
class FinishedVideo:
    """What about.json says of a folder."""

    folder: Path
    prompt: str
    fps: float
    enlarged: bool


def finished_videos(folder: Path) -> list[FinishedVideo]:
    """The videos in `folder` that have an about.json, by name."""
    found = []
    for path in sorted(folder.glob(f"*/{ABOUT}")):
        about = json.loads(path.read_bytes())
        enlarged = "enlarged.npy" in about["files"]
        found.append(FinishedVideo(path.parent, about["prompt"], about["fps"], enlarged))
    return found


def _digest(path: Path) -> str | None:
    return xxhash.xxh3_128_hexdigest(path.read_bytes()) if path.is_file() else None


def _write_gif(path: Path, frames: np.ndarray, fps: float) -> None:
    first, *others = (Image.fromarray(frame) for frame in frames)
    with atomic_path(path) as temporary:
        first.save(
            temporary, save_all=True, append_images=others, duration=round(1000 / fps), loop=0
        )


def _write_sheet(path: Path, frames: np.ndarray, prompt: str) -> None:
    rows: Sequence[Sequence[np.ndarray]] = [
        list(frames[first : first + SHEET_COLUMNS])
        for first in range(0, len(frames), SHEET_COLUMNS)
    ]
    labels = [prompt] + [""] * (len(rows) - 1)
    scale = max(1, 128 // frames.shape[1])
    with atomic_path(path) as temporary:
        contact_sheet(rows, labels, scale).save(temporary)
