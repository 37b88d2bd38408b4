"""Fixtures of the loader's tests."""

from pathlib import Path

import pytest

from megavideo.data.text_tokenizer import TextTokenizer, train_text_model
from tests.unit.data.token_sets import CAPTIONS, CODES


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    """A text tokenizer for the captions of `token_sets`."""
    path: Path = tmp_path_factory.mktemp("tokenizer") / "text.model"
    path.write_bytes(train_text_model(CAPTIONS, 330))
    return TextTokenizer(path, CODES)
