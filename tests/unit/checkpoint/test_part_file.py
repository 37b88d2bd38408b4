"""A file of parts gives any rows or columns, checks what it gives, and reads little more."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megavideo.checkpoint import part_file
from megavideo.checkpoint.files import TensorSpec
from megavideo.checkpoint.part_file import BLOCK, PartFile, read_part_file, write_part_file

ROWS, COLUMNS = 1000, 1300  # of float32: nearly five blocks, none of which ends with a row


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "matrix": torch.randn(ROWS, COLUMNS, generator=generator),
        "half": torch.randn(7, 3, generator=generator).bfloat16(),
        "empty": torch.empty(0, 5),
        "scalar": torch.tensor(3.0),
    }


def specs(tensors: dict[str, Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in tensors.items()}


def test_any_reader_of_safetensors_reads_it(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    seal = write_part_file(tmp_path / "file", tensors)
    for read in (load_file(tmp_path / "file"), read_part_file(tmp_path / "file", seal)):
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("start", "stop"), [(0, ROWS), (0, 1), (201, 202), (150, 820), (999, 1000)]
)
def test_rows_and_columns_are_those_of_the_tensor(
    start: int,
    stop: int,
    tensors: dict[str, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(part_file, "BAND", BLOCK)
    seal = write_part_file(tmp_path / "file", tensors)
    file, matrix = PartFile(tmp_path / "file", seal, specs(tensors)), tensors["matrix"]
    assert torch.equal(file.read("matrix", start, stop), matrix[start:stop])
    columns = file.read_columns("matrix", 400, 1299, start, stop)
    assert torch.equal(columns, matrix[start:stop, 400:1299])


def test_a_read_that_gives_less_than_was_asked_for_is_no_damage(
    tensors: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seal = write_part_file(tmp_path / "file", tensors)
    whole = os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda file, buffers, at: whole(file, [buffers[0][:100_000]], at)
    )
    read = read_part_file(tmp_path / "file", seal)
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_rows_are_read_without_the_rest(
    tensors: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seal = write_part_file(tmp_path / "file", tensors)
    file = PartFile(tmp_path / "file", seal, specs(tensors))
    counts = []

    def counted(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        counts.append(len(buffers[0]))
        return preadv(descriptor, buffers, offset)

    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", counted)
    file.read("matrix", 500, 510)
    assert sum(counts) <= 2 * BLOCK < tensors["matrix"].nbytes / 2


def test_a_flipped_bit_is_found_by_whoever_reads_it_and_only_then(
    tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "file"
    seal = write_part_file(path, tensors)
    content = bytearray(path.read_bytes())
    start = content.index(tensors["matrix"][900].numpy().tobytes())
    content[start + 1] ^= 1
    path.write_bytes(content)
    file = PartFile(path, seal, specs(tensors))
    assert torch.equal(file.read("matrix", 0, 600), tensors["matrix"][:600])
    with pytest.raises(ValueError, match="matrix differs from its digest"):
        file.read("matrix", 898, 899)  # another row of the block: nothing of it is trusted
    with pytest.raises(ValueError, match="matrix differs from its digest"):
        file.verify()


def test_another_file_or_length_is_refused(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "file"
    seal = write_part_file(path, tensors)
    with pytest.raises(ValueError, match="other tensors than its manifest says"):
        PartFile(path, seal, specs({**tensors, "empty": torch.empty(0, 6)}))
    whole = path.read_bytes()
    for content in (whole[:-1], whole + b"\0", whole[:5], b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is damaged"):
            PartFile(path, seal, specs(tensors))
    write_part_file(path, {**tensors, "scalar": torch.tensor(4.0)})
    with pytest.raises(ValueError, match="or another file"):
        PartFile(path, seal, specs(tensors))
