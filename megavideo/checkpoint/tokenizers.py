"""Which tokenizers a model learned from: of others, the same numbers mean other things."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


class Made(Protocol):
    """Tokens that say what made them, as a data set's `Making`."""

    @property
    def text_tokenizer(self) -> str: ...

    @property
    def image_tokenizer(self) -> str: ...


@dataclass(frozen=True)
class TokenizerDigests:
    """Digests of a text tokenizer and of an image tokenizer, as data/ computes them."""

    text: str
    image: str

    @classmethod
    def of(cls, made: Made) -> "TokenizerDigests":
        """Those of the tokenizers that made a data set."""
        return cls(made.text_tokenizer, made.image_tokenizer)


def check_tokenizers(
    trained: Path, theirs: TokenizerDigests | None, ours: TokenizerDigests, remedy: str
) -> None:
    """Refuse tokens that the model in the folder `trained` did not learn from.

    Args:
        theirs: what it was trained with; None if nobody knows, as of published weights.
        remedy: what to do about it, the end of the message.

    Raises:
        ValueError: naming the kind of tokenizer, both digests and the remedy.
    """
    if theirs is None:
        return
    for kind, was, given in (
        ("text", theirs.text, ours.text),
        ("image", theirs.image, ours.image),
    ):
        if was != given:
            raise ValueError(
                f"{trained} was trained with another {kind} tokenizer (digest {was}, not {given}); "
                f"{remedy}"
            )
