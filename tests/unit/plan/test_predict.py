"""Predictions: their parts, and how they answer to layouts, links and hardware."""

import pytest

from megavideo.model.flops import block_work
from megavideo.plan.hardware import Hardware, Rate, load_hardware
from megavideo.plan.predict import Prediction, predict
from megavideo.plan.time import LayerTimes, Machine
from tests.unit.model.test_model import config

H100 = load_hardware("h100-80")


def predicted(world: int, *settings: str, hardware: Hardware = H100) -> Prediction:
    return predict(config("cogvideo-9b", "stage1", *settings), world, hardware)


def test_products_are_the_linear_work_of_a_block() -> None:
    for recipe in ("stage1", "base"):
        settled = config("cogvideo-9b", recipe, "recipe.micro_batch=1")
        times = LayerTimes(settled, H100, Machine(H100, 1, 1, 1))
        products = times.products("attention") + times.products("mlp")
        flops = [2 * p.rows * p.columns * p.depth for p in products]
        backward = [
            f * (p.input_gradient + p.weight_gradient) for f, p in zip(flops, products, strict=True)
        ]
        work = [
            part
            for part in block_work(settled.model, settled.recipe, 0)
            if not part.part.endswith("attention")
        ]
        assert sum(flops) == sum(part.forward for part in work)
        assert sum(backward) == sum(p.input_gradient + p.weight_gradient for p in work)


def test_parts_add_up_and_utilisations_are_in_order() -> None:
    found = predicted(26, "parallel.recompute=layer")
    assert found.step_s == pytest.approx(sum(found.parts.values()))
    assert 0 < found.mfu < found.mfu_6n < found.hfu < 0.7
    assert found.peak_tflops == 989
    assert found.limit[0] == "recompute"


def test_only_what_a_layout_has_costs_time() -> None:
    alone = predicted(1, "recipe.batch=4").parts
    assert alone["tensor parallel"] == alone["pipeline"] == alone["reduction"] == 0
    assert predicted(2, "recipe.batch=4", "parallel.tp=2").parts["tensor parallel"] > 0
    assert predicted(2, "recipe.batch=4", "parallel.pp=2").parts["pipeline"] > 0
    assert predicted(2, "recipe.batch=8").parts["reduction"] > 0


def test_slower_links_and_devices_cost_time_where_they_are_used() -> None:
    slow = H100.model_copy(update={"network": H100.network.model_copy(update={"gb_per_s": 1.0})})
    inside = predicted(8)
    assert predicted(8, hardware=slow).parts == inside.parts
    assert predicted(26, hardware=slow).step_s > predicted(26).step_s
    assert predicted(8, hardware=load_hardware("a100-80")).step_s > 1.5 * inside.step_s


def test_interleaving_shortens_the_bubble_and_more_micro_batches_too() -> None:
    few = ("recipe.batch=64", "recipe.micro_batch=1", "parallel.pp=8")
    plain = predicted(8, *few)
    interleaved = predicted(8, *few, "parallel.virtual_stages=3")
    more = predicted(8, "recipe.batch=256", *few[1:])
    assert interleaved.parts["pipeline"] < plain.parts["pipeline"]
    assert more.parts["pipeline"] / more.step_s < plain.parts["pipeline"] / plain.step_s


@pytest.mark.parametrize(
    ("world", "settings", "message"),
    [
        (6, ("parallel.tp=4",), "does not divide the 6 processes"),
        (8, ("parallel.zero=3", "parallel.offload_optimizer=true"), "cannot be predicted"),
        (5, (), "recipe.batch=416 is not a multiple"),
        (4, ("parallel.pp=4", "parallel.virtual_stages=2", "recipe.batch=9", "recipe.micro_batch=1")
         , "cannot arrange"),
    ],
)  # fmt: skip
def test_what_training_refuses_is_refused(
    world: int, settings: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        predicted(world, *settings)


def test_sequence_parallelism_costs_what_its_two_collectives_take() -> None:
    """Where only all-reduces are known, as much as one of them."""
    settings = ("recipe.batch=4", "parallel.tp=2", "parallel.recompute=layer")
    plain = predicted(2, *settings).parts["tensor parallel"]
    slots = (*settings, "parallel.sequence_parallel=true")
    assumed = predicted(2, *slots).parts["tensor parallel"]
    assert 0.99 * plain < assumed < plain  # words are left cut
    link = H100.node_link
    slow = Rate(latency_us=link.latency_us, gb_per_s=link.gb_per_s / 3)
    for name, times in {"all_gather": 2, "reduce_scatter": 2, "both": 3}.items():
        rates = {n: slow for n in ("all_gather", "reduce_scatter") if name in (n, "both")}
        hardware = H100.model_copy(update={"node_link": link.model_copy(update=rates)})
        found = predicted(2, *slots, hardware=hardware).parts["tensor parallel"]
        assert found == pytest.approx(times * assumed, rel=0.06), name  # latencies stay
        assert predicted(2, *settings, hardware=hardware).parts["tensor parallel"] == plain
