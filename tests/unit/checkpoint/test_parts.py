"""Any rank of any layout reads any rows of its part, whatever the cut on disk."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megavideo.checkpoint.commit import list_checkpoints
from megavideo.checkpoint.formats.interface import shard_for
from megavideo.checkpoint.formats.run import RunReader
from megavideo.checkpoint.manifest import MANIFEST, read_manifest
from megavideo.checkpoint.parts import Parts, files_of, open_parts
from megavideo.parallel.shard import cut
from tests.unit.checkpoint.samples import weights, write_parts, write_run


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Parts]:
    """The same weights cut for 1, 2 and 4 ranks; 41 words, which none of these divides."""
    folder = tmp_path_factory.mktemp("parts")
    for tp in (1, 2, 4):
        write_parts(folder / str(tp), weights(words=41), tp)
    return {tp: open_parts(folder / str(tp) / "weights.json") for tp in (1, 2, 4)}


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_rows_of_a_part_are_those_of_the_cut_tensor(
    folders: dict[int, Parts], data: st.DataObject
) -> None:
    tensors = weights(words=41)
    name = data.draw(st.sampled_from(sorted(tensors)))
    size = data.draw(st.sampled_from([1, 2, 4, 8]))
    rank = data.draw(st.integers(0, size - 1))
    part = cut(tensors[name], shard_for(name), rank, size)
    start = data.draw(st.integers(0, len(part)))
    stop = data.draw(st.integers(start, len(part)))
    for parts in folders.values():
        assert torch.equal(parts.read_part(name, rank, size), part)
        assert torch.equal(parts.read_part(name, rank, size, start, stop), part[start:stop])


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_a_checkpoint_cut_for_any_ranks_reads_the_same(tp: int, tmp_path: Path) -> None:
    tensors = write_run(tmp_path, tp=tp)
    (checkpoint,) = list_checkpoints(tmp_path)
    reader = RunReader(checkpoint)
    assert reader.tensors.keys() == tensors.keys()
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in tensors.items())
    manifest = read_manifest(checkpoint / MANIFEST)
    found = {path.name for path in checkpoint.iterdir()} - {MANIFEST}
    assert found == files_of(manifest.tensors, tp).keys() == manifest.seals.keys()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    write_run(tmp_path, tp=2)
    (checkpoint,) = list_checkpoints(tmp_path)
    (checkpoint / "optimizer.layers.1.tp-01-of-02.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"optimizer\.layers\.1\.tp-01-of-02"):
        open_parts(checkpoint / MANIFEST)
