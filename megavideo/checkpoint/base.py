"""The frozen base of a run: stored once, named by its content, referred to by every checkpoint."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from megavideo.checkpoint.files import (
    TensorEntry,
    combined_digest,
    opened,
    tensor_entry,
    write_tensors,
)
from megavideo.files import atomic_path


def base_path(run: Path, digest: str) -> Path:
    """Where a run keeps the base with this digest."""
    return run / "base" / f"{digest}.safetensors"


def describe(tensors: Mapping[str, Tensor]) -> dict[str, TensorEntry]:
    """Entries of `tensors`; `combined_digest` of them is the base's name."""
    return {name: tensor_entry(tensor) for name, tensor in tensors.items()}


def store_base(run: Path, tensors: Mapping[str, Tensor], digest: str) -> None:
    """Write the base into the run's folder."""
    with atomic_path(base_path(run, digest)) as temporary:
        write_tensors(temporary, tensors)


def load_base(run: Path, digest: str) -> dict[str, Tensor]:
    """Read the base named `digest` from a run's folder and check that it is that one.

    Raises:
        FileNotFoundError, ValueError: if it is missing, damaged or another.
    """
    path = base_path(run, digest)
    if not path.is_file():
        raise FileNotFoundError(
            f"the frozen base {path} is missing; checkpoints refer to it: copy it back"
        )
    with opened(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if combined_digest(describe(tensors)) != digest:
        raise ValueError(f"{path} is damaged: its content does not have the digest in its name")
    return tensors
