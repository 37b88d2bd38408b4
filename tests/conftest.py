"""Settings of every test: one thread, as worlds of processes share two cores; no deadlines."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from megavideo.log import log

settings.register_profile("megavideo", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("megavideo")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def the_log_as_it_was() -> Iterator[None]:
    """Commands set up the log of their process; here that is the process of all tests."""
    before = log.handlers[:], log.propagate, log.level
    yield
    log.handlers[:], log.propagate = before[:2]
    log.setLevel(before[2])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`gpu` is the only marker that skips, and only where there is no GPU."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
