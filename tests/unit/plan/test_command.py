"""`megavideo plan`: in seconds, without processes, and what it writes can be trained with."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from megavideo.config.layout_names import parse_layout
from megavideo.config.load import load_config
from megavideo.model.recompute import SPANS, computed_again
from megavideo.plan.command import UNUSED, main
from megavideo.plan.hardware import load_hardware
from megavideo.plan.predict import GIB, Predictor
from megavideo.plan.search import search
from tests.unit.model.test_model import CONFIGS, config

ROOT = Path(__file__).parents[3]
PUBLISHED = (str(CONFIGS / "model/cogvideo-9b.yaml"), str(CONFIGS / "recipe/stage1.yaml"))
DEMO = (str(CONFIGS / "model/demo.yaml"), str(CONFIGS / "recipe/demo-stage1.yaml"))

# Runs a plan in a process of its own and ends with an error if it joined or built any world.
ALONE = """
import sys
from megavideo.cli import main
try:
    main()
finally:
    import torch
    assert not torch.distributed.is_initialized()
    assert "deepspeed" not in sys.modules
"""


def plan(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, catch_exceptions=False)


@pytest.mark.parametrize(("gpus", "gpu"), [("104", "a100-40"), ("64", "h100-80")])
def test_the_published_model_is_planned_in_seconds(gpus: str, gpu: str) -> None:
    """Seconds of the processor, so that whatever else runs on the machine does not count."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", ALONE, "plan", *PUBLISHED, "--gpus", gpus, "--gpu", gpu],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert "  10  " in done.stdout and "rates assumed, not measured" in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5


def test_the_best_layout_can_be_trained_with_as_it_is_written(tmp_path: Path) -> None:
    out = tmp_path / "planned.yaml"
    result = plan(*DEMO, "--set", "recipe.precision=bf16", "--gpus", "4", "--gpu", "h100-80",
                  "--nodes", "2", "--out", str(out))  # fmt: skip
    assert "4 x NVIDIA H100 SXM5 80GB, 2 nodes of 2" in result.output
    settled = load_config([*DEMO, out], UNUSED)
    assert settled.parallel.world_size == 4
    name = next(line.split()[1] for line in result.output.splitlines() if line.startswith("  1 "))
    layout = parse_layout(name)
    assert layout.world_size == 4
    for key, value in layout.settings.items():
        assert getattr(settled.parallel, key) == value, key
    assert Image.open(out.with_suffix(".png")).format == "PNG"


def test_layouts_are_those_that_training_allows_and_fastest_comes_first() -> None:
    settled = config("demo", "demo-stage1", "recipe.precision=bf16")
    found = search(settled, 8, load_hardware("h100-80"))
    seconds = [candidate.prediction.step_s for candidate in found.fitting[:10]]
    assert seconds == sorted(seconds)
    parallels = [candidate.config.parallel for candidate in found.fitting]
    assert {p.tp for p in parallels} == {1, 2, 4}  # 8 does not divide 4 heads
    assert {p.zero for p in parallels} == {1, 2, 3}  # 0 would add up in bf16
    assert all(p.zero == 1 for p in parallels if p.pp > 1)
    assert any("does not divide model.heads" in reason for reason in found.refused)


def test_only_what_does_not_fit_otherwise_is_recomputed() -> None:
    settled = config("demo", "demo-stage1", "recipe.precision=bf16")
    roomy = load_hardware("h100-80")
    assert all(c.config.parallel.recompute == "none" for c in search(settled, 2, roomy).fitting)
    tight = roomy.model_copy(update={"reserve_gib": 0.0, "memory_gib": 0.04})
    found, predictor = search(settled, 2, tight), Predictor(tight)
    assert {c.config.parallel.recompute for c in found.fitting} == set(SPANS)
    for candidate in found.fitting:
        parallel = candidate.config.parallel
        assert candidate.prediction.fullest.total <= 0.04 * GIB
        for less in SPANS:
            if computed_again(less) < computed_again(parallel.recompute):
                other = parallel.model_copy(update={"recompute": less})
                settled = candidate.config.model_copy(update={"parallel": other})
                assert predictor.fullest(settled, 2) > 0.04 * GIB


def test_a_model_that_fits_nowhere_is_refused_with_the_least_that_it_needs() -> None:
    with pytest.raises(ValueError, match=r"nothing fits 39.4 GiB .* the smallest, .* needs"):
        plan(*PUBLISHED, "--set", "recipe.batch=1", "--gpus", "1", "--gpu", "a100-40")


def test_unequal_nodes_are_refused() -> None:
    with pytest.raises(ValueError, match="--nodes 3 does not divide --gpus 4"):
        plan(*DEMO, "--gpus", "4", "--gpu", "h100-80", "--nodes", "3")
