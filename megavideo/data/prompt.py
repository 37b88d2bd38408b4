"""The text of a sample: the seconds that its frames span, a line break, and the caption."""

from collections.abc import Sequence
from functools import lru_cache

from megavideo.data.text_tokenizer import TextTokenizer
from megavideo.log import log


def build_text(
    tokenizer: TextTokenizer, seconds: float | None, caption: Sequence[int]
) -> list[int]:
    """Token ids of a sample's text.

    Args:
        seconds: what the frames of a video span, (F - 1) / fps; None for a single image, which has
            no duration.
        caption: ids of the caption.
    """
    if seconds is None:
        return list(caption)
    return [*tokenizer.encode(f"{float(seconds)}秒"), tokenizer.newline, *caption]


class Prompter:
    """`build_text`, cut to `slots` ids. Counts the texts that were cut and logs the first."""

    def __init__(self, tokenizer: TextTokenizer, slots: int):
        self.slots = slots
        self.num_cut = 0
        self._prefix = lru_cache(lambda seconds: build_text(tokenizer, seconds, ()))

    def __call__(self, seconds: float | None, caption: Sequence[int]) -> list[int]:
        text = [*self._prefix(seconds), *caption]
        if len(text) > self.slots:
            self._count(len(text))
        return text[: self.slots]

    def _count(self, length: int) -> None:
        self.num_cut += 1
        if self.num_cut == 1:
            log.warning(
                "a text of %d tokens is cut to model.text_slots=%d; others are only counted",
                length, self.slots,
            )  # fmt: skip
