"""Contact sheets: rows of small frames, each under its caption, as one picture to look at."""

from collections.abc import Sequence
from textwrap import wrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GAP = 4  # pixels between frames and around text
FONT_SIZE = 13
INK, PAPER = (20, 20, 20), (255, 255, 255)


def contact_sheet(
    rows: Sequence[Sequence[np.ndarray]], labels: Sequence[str], scale: int = 1
) -> Image.Image:
    """Draw each row of frames under its label.

    Args:
        rows: frames uint8 [H, W, 3] in RGB; rows may differ in length and size.
        labels: one text a row; long ones are wrapped to the sheet's width, "" takes no space.
        scale: each pixel becomes scale x scale, so that what a tiny tokenizer does can be seen.
    """
    strips = [_strip([_enlarged(frame, scale) for frame in row]) for row in rows]
    width = max(strip.width for strip in strips)
    return _stacked([_labelled(s, label, width) for s, label in zip(strips, labels, strict=True)])


def _enlarged(frame: np.ndarray, scale: int) -> Image.Image:
    image = Image.fromarray(frame)
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def _strip(frames: Sequence[Image.Image]) -> Image.Image:
    """Frames side by side."""
    width = GAP + sum(frame.width + GAP for frame in frames)
    strip = Image.new("RGB", (width, max(frame.height for frame in frames)), PAPER)
    left = GAP
    for frame in frames:
        strip.paste(frame, (left, 0))
        left += frame.width + GAP
    return strip


def _labelled(strip: Image.Image, label: str, width: int) -> Image.Image:
    font = ImageFont.load_default(FONT_SIZE)
    line_height = FONT_SIZE + GAP
    letters = max(8, int(width / font.getlength("n")))
    lines = wrap(label, letters)
    image = Image.new("RGB", (width, GAP + line_height * len(lines) + strip.height), PAPER)
    draw = ImageDraw.Draw(image)
    for number, line in enumerate(lines):
        draw.text((GAP, GAP // 2 + number * line_height), line, fill=INK, font=font)
    image.paste(strip, (0, GAP + line_height * len(lines)))
    return image


def _stacked(images: Sequence[Image.Image]) -> Image.Image:
    sheet = Image.new("RGB", (images[0].width, sum(i.height for i in images) + GAP), PAPER)
    top = 0
    for image in images:
        sheet.paste(image, (0, top))
        top += image.height
    return sheet
