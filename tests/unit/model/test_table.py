"""The table says of every parameter where it lies, how it is cut and whether it is trained."""

import fnmatch

import pytest
import torch

from megavideo.config.schema import RecipeConfig
from megavideo.engine.weights import new_model
from megavideo.model.build import canonical_parameters
from megavideo.model.table import expected_shapes, parameter_table, shard_named
from megavideo.model.trainable import TRAINABLE
from megavideo.parallel.part import part_of
from megavideo.parallel.shard import REPLICATED, Shard, part_shape
from tests.engine.support import MODEL, config

QKV, COLUMNS = Shard(0, chunks=3), Shard(1)
CUT = {
    "embedding.word": Shard(0, padded=True),
    "attention.spatial.qkv.weight": QKV,
    "attention.spatial.qkv.bias": QKV,
    "attention.temporal.qkv.weight": QKV,
    "attention.temporal.qkv.bias": QKV,
    "attention.spatial.dense.weight": COLUMNS,
    "attention.temporal.dense.weight": COLUMNS,
    "mlp.up.weight": Shard(0),
    "mlp.up.bias": Shard(0),
    "mlp.down.weight": COLUMNS,
}
VIDEO = RecipeConfig(stage="keyframes", steps=1)


def test_the_table_cuts_what_tensor_parallelism_cuts_and_nothing_else() -> None:
    rows = parameter_table(MODEL, VIDEO)
    assert {row.layer for row in rows} == {"embedding", "layers.0", "layers.1", "head"}
    for row in rows:
        assert row.shard == CUT.get(row.name.split("layers.")[-1].lstrip("01."), REPLICATED), row
        assert row.trainable == (
            "temporal" in row.name or row.name.endswith(("mixture", "frame_position"))
        )
        assert shard_named(row.name) == row.shard
        part_shape(row.shape, row.shard, rank=1, size=2)


@pytest.mark.parametrize("stage", TRAINABLE)
def test_every_glob_of_what_is_trained_matches_a_parameter(stage: str) -> None:
    recipe = RecipeConfig(stage=stage, steps=1, window=0 if stage == "image" else 2)
    names = [row.name for row in parameter_table(MODEL, recipe)]
    for glob in TRAINABLE[stage]:
        assert fnmatch.filter(names, glob), f"{glob} matches nothing"


def test_a_model_with_memory_knows_its_cuts_too(tmp_path) -> None:  # type: ignore[no-untyped-def]
    parameters = canonical_parameters(new_model(config(tmp_path), torch.device("cpu")))
    assert all(
        part_of(parameter).shard == shard_named(name) for name, parameter in parameters.items()
    )


@pytest.mark.parametrize("stage", ["image", "keyframes"])
def test_the_whole_model_follows_from_a_few_of_its_shapes(stage: str) -> None:
    rows = parameter_table(MODEL, RecipeConfig(stage=stage, steps=1))
    shapes = {row.name: row.shape for row in rows}
    few = {name: shape for name, shape in shapes.items() if not name.startswith("layers.0")}
    assert expected_shapes(few) == shapes


def test_a_foreign_name_and_a_missing_size_are_errors() -> None:
    with pytest.raises(ValueError, match="decoder"):
        shard_named("decoder.weight")
    with pytest.raises(ValueError, match=r"head\.norm\.weight"):
        expected_shapes({"embedding.word": (3, 2)})
