"""Names of layouts: what they stand for, and what is refused."""

from typing import get_args

import pytest

from megavideo.config.layout_names import layout_name, parse_layout
from megavideo.config.schema import ParallelConfig, Recompute


def test_a_name_says_sizes_zero_stage_and_switches() -> None:
    layout = parse_layout("pp2-tp4-dp2-vp3-zero1-sp")
    assert layout.world_size == 16
    assert layout.settings == {
        "pp": 2,
        "tp": 4,
        "virtual_stages": 3,
        "zero": 1,
        "sequence_parallel": True,
    }


def test_sizes_left_out_are_one_and_the_rest_is_left_to_the_configuration() -> None:
    assert parse_layout("dp4-zero0").settings == {"pp": 1, "tp": 1, "zero": 0}
    assert parse_layout("dp4-zero0").world_size == 4


@pytest.mark.parametrize(
    "name",
    [
        "zero1",
        "tp2-zero0-recompute",
        "pp2-tp4-dp11-vp3-sp-zero1-recompute-mlp",
        "dp2-zero3-recompute-attention-offload-compile",
    ],
)
def test_what_is_printed_is_read_as_the_same_layout(name: str) -> None:
    layout = parse_layout(name)
    parallel = ParallelConfig.model_validate({"recompute": "none"} | layout.settings)
    assert layout_name(parallel, layout.world_size // parallel.pp // parallel.tp) == name


def test_every_recompute_policy_has_a_name() -> None:
    named = {parse_layout(f"dp2-{word}").settings["recompute"] for word in RECOMPUTE}
    assert named == set(get_args(Recompute))


RECOMPUTE = ("recompute", "recompute-attention", "recompute-mlp", "recompute-none")


@pytest.mark.parametrize("name", ["tp", "tp0", "sp2", "fsdp2", "tp2_pp2", "tp2-mlp", ""])
def test_a_part_that_means_nothing_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=r"means nothing; join with '-' any of ppN"):
        parse_layout(name)
