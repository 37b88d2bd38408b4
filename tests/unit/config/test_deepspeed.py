"""What DeepSpeed is told, and what is refused before it is asked."""

import pytest

from megavideo.config.deepspeed import (
    accumulation_steps,
    check_precision,
    check_schedule,
    check_world,
    deepspeed_config,
)
from megavideo.config.schema import ParallelConfig, RecipeConfig


def recipe(**settings: object) -> RecipeConfig:
    return RecipeConfig.model_validate({"stage": "keyframes", "steps": 1, **settings})


def test_accumulation_fills_up_the_batch() -> None:
    assert accumulation_steps(recipe(batch=416, micro_batch=4), 104) == 1
    assert accumulation_steps(recipe(batch=416, micro_batch=4), 1) == 104


def test_a_batch_that_does_not_divide_names_values_that_do() -> None:
    with pytest.raises(ValueError) as caught:
        accumulation_steps(recipe(batch=24, micro_batch=5), 3)
    assert "use recipe.batch=15 or 30, or recipe.micro_batch=1, 2, 4, 8" in str(caught.value)
    with pytest.raises(ValueError, match=r"use recipe\.batch=408 or 432$"):
        accumulation_steps(recipe(batch=416, micro_batch=4), 6)
    with pytest.raises(ValueError, match=r"recipe\.batch=8 is .* use recipe\.batch=16$"):
        accumulation_steps(recipe(batch=8, micro_batch=1), 16)


def test_a_wrong_world_size_is_one_clear_error() -> None:
    check_world(ParallelConfig(), 7)
    check_world(ParallelConfig(world_size=2), 2)
    with pytest.raises(
        ValueError, match=r"parallel\.world_size=4, but 1 process was started.*torchrun"
    ):
        check_world(ParallelConfig(world_size=4), 1)


def test_combinations_that_cannot_train_are_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"fp16 needs a GPU.*fp32 or bf16"):
        check_precision(recipe(precision="fp16"), ParallelConfig(zero=1), fp16_works=False)
    # fp16 is added up in fp16 with any ZeRO stage, as published: that is no reason against 0.
    for precision, harm in (("bf16", "in bf16 itself"), ("fp16", "fp16 wrongly under tensor")):
        with pytest.raises(ValueError, match=rf"parallel\.zero=0 .*{harm}.* use parallel\.zero=1"):
            check_precision(recipe(precision=precision), ParallelConfig(zero=0), fp16_works=True)
    check_precision(recipe(precision="fp32"), ParallelConfig(zero=0), fp16_works=False)


def test_offloading_is_refused_where_deepspeed_would_add_up_in_low_precision() -> None:
    for zero in (1, 2):
        offloaded = ParallelConfig(zero=zero, offload_optimizer=True)
        check_precision(recipe(precision="fp32"), offloaded, True)
        with pytest.raises(ValueError, match=r"offload_optimizer=true with .* use parallel.zero=3"):
            check_precision(recipe(precision="bf16"), offloaded, True)
    check_precision(recipe(precision="bf16"), ParallelConfig(zero=3, offload_optimizer=True), True)


def test_fp16_scales_the_loss_as_published() -> None:
    fp16 = deepspeed_config(recipe(precision="fp16"), ParallelConfig(), 1)["fp16"]
    assert fp16["loss_scale_window"] == 400
    assert fp16["hysteresis"] == 2
    assert fp16["min_loss_scale"] == 1
    assert fp16["initial_scale_power"] == 16


def test_bf16_adds_gradients_up_in_fp32() -> None:
    settings = deepspeed_config(recipe(precision="bf16"), ParallelConfig(), 1)
    assert settings["data_types"]["grad_accum_dtype"] == "fp32"
    assert settings["communication_data_type"] == "fp32", "over replicas, too"


def test_the_batch_and_the_clip_reach_deepspeed() -> None:
    settings = deepspeed_config(
        recipe(batch=48, micro_batch=4, optimizer={"clip": 0.5}), ParallelConfig(zero=2), 3
    )
    assert settings["train_batch_size"] == 48
    assert settings["gradient_accumulation_steps"] == 4
    assert settings["gradient_clipping"] == 0.5
    assert settings["zero_optimization"]["stage"] == 2


def test_a_layout_that_does_not_divide_the_world_is_one_clear_error() -> None:
    check_world(ParallelConfig(tp=2, pp=2), 8)
    with pytest.raises(ValueError, match=r"parallel\.pp=2 x parallel\.tp=2 does not divide the 6"):
        check_world(ParallelConfig(tp=2, pp=2), 6)


def test_interleaving_names_micro_batches_that_it_can_arrange() -> None:
    interleaved = ParallelConfig(pp=4, virtual_stages=2)
    for micro_batches in (1, 3, 4, 7, 8, 10, 12):
        check_schedule(interleaved, micro_batches)
    with pytest.raises(ValueError, match=r"cannot arrange 9 micro-batches .* make them 8 or 10"):
        check_schedule(interleaved, 9)
    check_schedule(ParallelConfig(pp=4), 9)
