"""Hardware profiles: the shipped ones are whole, and rates lie between what was measured."""

from pathlib import Path

import pytest

from megavideo.plan.hardware import PROFILES, load_hardware

SHIPPED = sorted(path.stem for path in PROFILES.glob("*.yaml"))


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_profile_loads_and_says_that_it_was_not_measured(name: str) -> None:
    hardware = load_hardware(name)
    assert hardware.name == name and not hardware.measured
    assert hardware.source.startswith("https://")
    assert all(rate < hardware.peak_tflops["bf16"] for *_, rate in hardware.gemm["bf16"])


def test_the_announced_devices_are_shipped() -> None:
    assert {"a100-40", "a100-80", "h100-80", "h200"} <= set(SHIPPED)


def test_rates_of_products_lie_between_measured_ones() -> None:
    hardware = load_hardware("h100-80")
    m, n, k, rate = hardware.gemm["bf16"][0]
    assert hardware.gemm_flops_per_s("bf16", m, n, k) == rate * 1e12
    rates = [point[3] * 1e12 for point in hardware.gemm["bf16"]]
    for shape in ((100, 100, 100), (4000, 9216, 3072), (10**6, 10**4, 10**4)):
        assert min(rates) <= hardware.gemm_flops_per_s("bf16", *shape) <= max(rates)
    small, large = (hardware.gemm_flops_per_s("bf16", rows, 3072, 3072) for rows in (128, 16384))
    assert small < 0.7 * large


def test_a_precision_without_rates_is_refused() -> None:
    with pytest.raises(ValueError, match=r"h100-80 has no matrix products in fp32, only bf16"):
        load_hardware("h100-80").gemm_flops_per_s("fp32", 8, 8, 8)


def test_a_wrong_profile_is_named_with_its_key(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no hardware profile b200; use a100-40, .*calibrate"):
        load_hardware("b200")
    text = (PROFILES / "h200.yaml").read_text().replace("memory_gib: ", "memory_gib: -")
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"mine\.yaml: memory_gib: Input should be greater"):
        load_hardware(str(tmp_path / "mine.yaml"))
