"""Text tokens: any text survives, special ids sit where icetk has them, training is repeatable."""

from itertools import product
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from megavideo.data.text_tokenizer import TextTokenizer, train_text_model

IMAGE_CODES = 256
CAPTIONS = [
    f"a {color} {shape} moves to the {side}"
    for color, shape, side in product(
        ("red", "green", "blue"), ("circle", "square", "star"), ("left", "right")
    )
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    path = tmp_path_factory.mktemp("text") / "text.model"
    path.write_bytes(train_text_model(CAPTIONS, 350))
    return TextTokenizer(path, IMAGE_CODES)


def test_special_ids_follow_the_layout_of_icetk(tokenizer: TextTokenizer) -> None:
    assert tokenizer.num_pieces == 350
    assert (tokenizer.pad, tokenizer.newline) == (IMAGE_CODES + 3, IMAGE_CODES + 4)
    assert tokenizer.begin_of_image == IMAGE_CODES + 350
    assert tokenizer.vocab_size == IMAGE_CODES + 351
    assert TextTokenizer(tokenizer.path).pad == 20003


@pytest.mark.parametrize("text", [*CAPTIONS[:3], "4.0秒", "你好,世界", "🎬 café", "0.25秒"])
def test_text_survives_the_round_trip(tokenizer: TextTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
@settings(max_examples=200, deadline=None)
def test_no_text_encodes_to_the_unknown_piece(tokenizer: TextTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert IMAGE_CODES not in ids
    assert all(IMAGE_CODES < token < tokenizer.begin_of_image for token in ids)


def test_the_second_is_one_piece_and_digits_are_split(tokenizer: TextTokenizer) -> None:
    """The duration text must not depend on which durations the captions happened to hold."""
    assert len(tokenizer.encode("12.5秒")) == len("▁12.5秒")


def test_frequent_words_become_one_piece(tokenizer: TextTokenizer) -> None:
    assert len(tokenizer.encode("a red circle moves to the left")) == 7


def test_padding_disappears_and_the_newline_breaks_the_line(tokenizer: TextTokenizer) -> None:
    ids = [tokenizer.pad] * 3 + tokenizer.encode("4.0秒") + [tokenizer.newline]
    assert tokenizer.decode(ids + tokenizer.encode("a red star")) == "4.0秒\n a red star"


def test_an_image_token_is_not_decoded_as_text(tokenizer: TextTokenizer) -> None:
    with pytest.raises(ValueError, match=r"token 7 is not text: text ids of .* are 256\.\.605"):
        tokenizer.decode([7])


def test_training_twice_gives_the_same_file_and_digest(
    tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    (tmp_path / "again.model").write_bytes(train_text_model(CAPTIONS, 350))
    assert TextTokenizer(tmp_path / "again.model", IMAGE_CODES).digest == tokenizer.digest
    (tmp_path / "other.model").write_bytes(train_text_model(CAPTIONS, 340))
    assert TextTokenizer(tmp_path / "other.model", IMAGE_CODES).digest != tokenizer.digest


def test_too_many_pieces_for_the_texts_says_how_many_fit() -> None:
    with pytest.raises(ValueError, match=r"num_pieces=9000: .*too high.*<= \d+"):
        train_text_model(CAPTIONS, 9000)
    with pytest.raises(ValueError, match="no text"):
        train_text_model(["", " "], 300)


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.model").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"x\.model is not a sentencepiece model"):
        TextTokenizer(tmp_path / "x.model")


def test_a_model_with_other_special_pieces_says_which(tmp_path: Path) -> None:
    path = tmp_path / "plain.model"
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CAPTIONS), model_writer=file, vocab_size=25, minloglevel=2
        )
    with pytest.raises(ValueError, match=r"piece 3 is .*, expected '<pad>'"):
        TextTokenizer(path)


def test_a_long_text_counts_and_one_that_is_too_long_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "text.model").write_bytes(train_text_model([*CAPTIONS, "zebra " * 1000], 350))
    assert len(TextTokenizer(tmp_path / "text.model", 50).encode("zebra")) == 1
    assert not caplog.records
    train_text_model([*CAPTIONS, "a" * 70_000], 350)
    assert "1 texts of more than 65535 bytes are left out" in caplog.text
