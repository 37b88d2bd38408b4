"""Names of layouts: what they stand for, and what is refused."""

import pytest

from megavideo.verify.layouts import parse_layout


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


@pytest.mark.parametrize("name", ["tp", "tp0", "sp2", "fsdp2", "tp2_pp2", ""])
def test_a_part_that_means_nothing_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=r"means nothing; join with '-' any of ppN"):
        parse_layout(name)
