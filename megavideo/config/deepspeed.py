"""Our settings in DeepSpeed's words. No other file spells DeepSpeed's keys."""

from typing import Any

from megavideo.config.schema import ParallelConfig, RecipeConfig


def accumulation_steps(recipe: RecipeConfig, dp_size: int) -> int:
    """Micro-batches that each of `dp_size` ranks adds up before one optimizer step.

    Raises:
        ValueError: if batch is not a multiple of micro_batch x ranks, with values that are.
    """
    at_once = recipe.micro_batch * dp_size
    if recipe.batch % at_once == 0:
        return recipe.batch // at_once
    fits = [m for m in range(1, recipe.batch + 1) if recipe.batch % (m * dp_size) == 0]
    batches = sorted(
        {max(1, recipe.batch // at_once) * at_once, -(-recipe.batch // at_once) * at_once}
    )
    raise ValueError(
        f"recipe.batch={recipe.batch} is not a multiple of recipe.micro_batch={recipe.micro_batch} "
        f"x {dp_size} data-parallel ranks; use recipe.batch={_either(batches)}"
        + (f", or recipe.micro_batch={_either(fits)}" if fits else "")
    )


def check_schedule(parallel: ParallelConfig, micro_batches: int) -> None:
    """Refuse a number of micro-batches that the interleaved schedule cannot arrange.

    It takes them in equal rounds of at least pp each (or in one).

    Raises:
        ValueError: with numbers that can be arranged.
    """
    if parallel.virtual_stages == 1 or _arrangeable(micro_batches, parallel.pp):
        return
    near = [m for m in range(1, 2 * micro_batches) if _arrangeable(m, parallel.pp)]
    below, above = (
        max(m for m in near if m < micro_batches),
        min(m for m in near if m > micro_batches),
    )
    raise ValueError(
        f"parallel.virtual_stages={parallel.virtual_stages} cannot arrange {micro_batches} "
        f"micro-batches over parallel.pp={parallel.pp}; change recipe.batch or recipe.micro_batch "
        f"to make them {below} or {above} (any multiple of {parallel.pp} works), or set "
        "parallel.virtual_stages=1"
    )


def _arrangeable(micro_batches: int, pp: int) -> bool:
    return micro_batches % max(1, micro_batches // pp) == 0


def check_world(parallel: ParallelConfig, world_size: int) -> None:
    """Refuse to run with another number of processes than the layout is meant for.

    Raises:
        ValueError: naming both numbers and how to start the right one.
    """
    if parallel.world_size not in (0, world_size):
        raise ValueError(
            f"parallel.world_size={parallel.world_size}, but {world_size} "
            f"process{'es were' if world_size > 1 else ' was'} started; start it with torchrun "
            f"--nproc-per-node, or set parallel.world_size=0 to take what is started"
        )
    if world_size % (parallel.pp * parallel.tp):
        raise ValueError(
            f"parallel.pp={parallel.pp} x parallel.tp={parallel.tp} does not divide the "
            f"{world_size} process{'es' if world_size > 1 else ''} that were started; start a "
            f"multiple of {parallel.pp * parallel.tp}, or choose another layout"
        )


def check_precision(recipe: RecipeConfig, parallel: ParallelConfig, fp16_works: bool) -> None:
    """Refuse combinations of precision and ZeRO stage that DeepSpeed 0.19.8 cannot train well.

    Args:
        fp16_works: whether the device computes in fp16, as DeepSpeed's accelerator says.

    Raises:
        ValueError: with the reason and the remedy.
    """
    if recipe.precision == "fp16" and not fp16_works:
        raise ValueError(
            "recipe.precision=fp16 needs a GPU (this processor has no fp16 arithmetic); "
            "use recipe.precision=fp32 or bf16"
        )
    if recipe.precision != "fp32" and parallel.zero == 0:
        harm = {
            "bf16": "add up bf16 gradients in bf16 itself, which loses small ones",
            "fp16": "train fp16 wrongly under tensor parallelism (DeepSpeed 0.19.8)",
        }
        raise ValueError(
            f"parallel.zero=0 would {harm[recipe.precision]}; use parallel.zero=1 (it costs "
            "nothing, also on one process) or recipe.precision=fp32"
        )
    if recipe.precision != "fp32" and parallel.offload_optimizer and parallel.zero < 3:
        raise ValueError(
            f"parallel.offload_optimizer=true with parallel.zero={parallel.zero} would add up "
            f"{recipe.precision} gradients in {recipe.precision} itself, and keep those that are "
            "not finite; use parallel.zero=3, or remove it"
        )


def deepspeed_config(
    recipe: RecipeConfig, parallel: ParallelConfig, dp_size: int
) -> dict[str, Any]:
    """The dictionary that `deepspeed.initialize` takes.

    Without ZeRO, clipping is left to our engine: DeepSpeed would neither report the norm nor refuse
    a gradient that is not finite.
    """
    return {
        "train_batch_size": recipe.batch,
        "train_micro_batch_size_per_gpu": recipe.micro_batch,
        "gradient_accumulation_steps": accumulation_steps(recipe, dp_size),
        "gradient_clipping": recipe.optimizer.clip if parallel.zero else 0.0,
        "zero_optimization": _zero(parallel),
        "zero_allow_untested_optimizer": True,  # SGD, for parity checks
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW: DeepSpeed would compile its own
        "steps_per_print": None,
        **({"pipeline": _PIPELINE} if parallel.pp > 1 else {}),
        **_precision(recipe, parallel.zero),
    }


# With the defaults, activations are cut over tensor-parallel ranks a second time (wrong losses
# under sequence parallelism), and recomputing by reentrant calls drops gradients.
_PIPELINE = {"pipe_partitioned": False, "grad_partitioned": False, "use_reentrant": False}


def _zero(parallel: ParallelConfig) -> dict[str, Any]:
    offload = {"offload_optimizer": {"device": "cpu", "pin_memory": True}}
    return {
        "stage": parallel.zero,
        "reduce_bucket_size": parallel.reduce_bucket,
        "allgather_bucket_size": parallel.reduce_bucket,
        **(offload if parallel.offload_optimizer else {}),
    }


def _precision(recipe: RecipeConfig, zero: int) -> dict[str, Any]:
    if recipe.precision == "fp32":
        return {}
    if recipe.precision == "bf16":
        return {
            "bf16": {"enabled": True, "check_grad_overflow": True},
            "data_types": {"grad_accum_dtype": "fp32"},
            # Else what was added up in fp32 would be summed over replicas in bf16 (and copied for
            # it). Higher stages sum each micro-batch's gradients, which are bf16 to begin with.
            **({"communication_data_type": "fp32"} if zero == 1 else {}),
        }
    return {
        "fp16": {
            "enabled": True,
            "loss_scale": 0,  # dynamic
            "initial_scale_power": 16,
            "loss_scale_window": 400,
            "hysteresis": 2,
            "min_loss_scale": 1,
        }
    }


def _either(values: list[int]) -> str:
    return " or ".join(map(str, values)) if len(values) < 3 else ", ".join(map(str, values))
