"""train-text-tokenizer: from any kind of captions file to a model, whole or not at all."""

from pathlib import Path

import pytest
from click.testing import CliRunner
from megavideo.data_tools.train_text_tokenizer import evenly, main

from megavideo.data.captions import Caption, write_captions
from megavideo.data.text_tokenizer import TextTokenizer

TEXTS = [
    f"a {color} cat runs on the {where}" for color in ("red", "blue") for where in ("sea", "sun")
]


def train(*arguments: object) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if isinstance(result.exception, ValueError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "txt"])
def test_every_kind_of_file_gives_the_same_model(tmp_path: Path, kind: str) -> None:
    source, out = tmp_path / f"texts.{kind}", tmp_path / "text.model"
    if kind == "txt":
        source.write_text("\n\n".join(TEXTS))
    else:
        write_captions(source, [Caption(f"{n}.mp4", text) for n, text in enumerate(TEXTS)])
    assert "trained 310 pieces on 4 texts" in train(source, "--vocab-size=310", "--out", out)
    (tmp_path / "lines.txt").write_text("\n".join(TEXTS))
    train(tmp_path / "lines.txt", "--vocab-size=310", "--out", tmp_path / "other.model")
    assert out.read_bytes() == (tmp_path / "other.model").read_bytes()
    assert (
        TextTokenizer(out, 256).decode(TextTokenizer(out, 256).encode("4.0秒 cat")) == "4.0秒 cat"
    )


def test_a_failure_leaves_the_older_model_in_place(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("\n".join(TEXTS))
    (tmp_path / "text.model").write_bytes(b"older")
    with pytest.raises(ValueError, match=r"num_pieces=9000: .*too high"):
        train(tmp_path / "lines.txt", "--vocab-size=9000", "--out", tmp_path / "text.model")
    assert (tmp_path / "text.model").read_bytes() == b"older"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_limit_takes_texts_from_everywhere() -> None:
    assert evenly(list("abcdefgh"), 4) == list("aceg")
    assert evenly(list("ab"), 4) == list("ab")
