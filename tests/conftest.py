"""Settings of every test: one thread, as worlds of processes share two cores; no deadlines."""

import pytest
import torch
from hypothesis import settings

settings.register_profile("megavideo", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("megavideo")
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`gpu` is the only marker that skips, and only where there is no GPU."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
