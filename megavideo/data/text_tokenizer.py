"""Text <-> token ids by sentencepiece, in the id layout of icetk.

Ids [0, image_codes) are image codes and text piece p has the id image_codes + p; pieces 3 and 4 are
<pad> and <n> (line break). The first id after all text pieces is begin_of_image.
"""

import io
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import sentencepiece
import xxhash

from megavideo.log import log

PAD_PIECE = 3
NEWLINE_PIECE = 4
SPECIAL_PIECES = {PAD_PIECE: "<pad>", NEWLINE_PIECE: "<n>"}

# The prompt's first line is a duration such as "4.0秒"; these are in every vocabulary we train.
REQUIRED_CHARACTERS = "0123456789.秒"

# sentencepiece leaves out longer texts (4192 by default); it counts letters of a word in 16 bits.
MAX_TEXT_BYTES = 65535


class TextTokenizer:
    """A sentencepiece model whose ids start at `image_codes`.

    Args:
        path: a `.model` file, ours or the published `ice_text.model`.
        image_codes: number of image codes, which take the ids before the text (20000 in icetk).
    Raises: ValueError if the file is no sentencepiece model or its special pieces sit elsewhere.
    """

    def __init__(self, path: Path | str, image_codes: int = 20000):
        self.path = Path(path)
        self.image_codes = image_codes
        self._model = self.path.read_bytes()
        self._processor = _load(self._model, self.path)

    @cached_property
    def digest(self) -> str:
        """xxh3_128 of the model file: tokens made with another digest do not mix."""
        return xxhash.xxh3_128_hexdigest(self._model)

    @property
    def num_pieces(self) -> int:
        return self._processor.get_piece_size()

    @property
    def pad(self) -> int:
        return self.image_codes + PAD_PIECE

    @property
    def newline(self) -> int:
        return self.image_codes + NEWLINE_PIECE

    @property
    def begin_of_image(self) -> int:
        """The first id after all text pieces."""
        return self.image_codes + self.num_pieces

    @property
    def vocab_size(self) -> int:
        """The smallest vocabulary that holds every id, begin_of_image included."""
        return self.begin_of_image + 1

    def encode(self, text: str) -> list[int]:
        """Token ids of one text; no special token is added."""
        return [self.image_codes + piece for piece in self._processor.encode(text)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids: padding disappears, <n> becomes a line break.

        Raises: ValueError on an id that is not text.
        """
        for token in ids:
            if not self.image_codes <= token < self.begin_of_image:
                raise ValueError(
                    f"token {token} is not text: text ids of {self.path} are "
                    f"{self.image_codes}..{self.begin_of_image - 1}"
                )
        pieces = [int(token) - self.image_codes for token in ids]
        text = self._processor.decode([piece for piece in pieces if piece != PAD_PIECE])
        return text.replace(SPECIAL_PIECES[NEWLINE_PIECE], "\n")


def _load(model: bytes, path: Path) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.load_from_serialized_proto(model)
    except RuntimeError as error:
        raise ValueError(f"{path} is not a sentencepiece model: {error}") from error
    for piece, name in SPECIAL_PIECES.items():
        found = processor.id_to_piece(piece) if piece < processor.get_piece_size() else None
        if found != name:
            raise ValueError(
                f"{path}: piece {piece} is {found!r}, expected {name!r}; use ice_text.model or a "
                "model made by `megavideo train-text-tokenizer`"
            )
    return processor


def train_text_model(texts: Iterable[str], num_pieces: int) -> bytes:
    """Train a BPE sentencepiece model; returns the contents of a `.model` file.

    Digits are split, bytes stand in for characters that the texts lack (so that nothing becomes
    <unk>), and the same texts give the same bytes on every run. BPE, because on a few hundred
    captions made of a hundred words it finds the words, while unigram stops at letters.

    Raises: ValueError if there is no text, or `num_pieces` is more or less than the texts allow.
    """
    lines = [text for text in texts if text.strip()]
    if not lines:
        raise ValueError("there is no text to train a tokenizer on")
    if too_long := sum(len(line.encode()) > MAX_TEXT_BYTES for line in lines):
        log.warning("%d texts of more than %d bytes are left out", too_long, MAX_TEXT_BYTES)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=num_pieces,
            max_sentence_length=MAX_TEXT_BYTES,
            character_coverage=1.0,
            byte_fallback=True,
            split_digits=True,
            required_chars=REQUIRED_CHARACTERS,
            pad_id=PAD_PIECE,
            user_defined_symbols=[SPECIAL_PIECES[NEWLINE_PIECE]],
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(f"num_pieces={num_pieces}: {_cause(error)}") from error
    return model.getvalue()


def _cause(error: RuntimeError) -> str:
    """sentencepiece's own sentence without the C++ file, line and condition before it."""
    return str(error).rpartition("] ")[2].strip() or str(error)
