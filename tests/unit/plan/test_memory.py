"""Memory by rank: exact parameters, DeepSpeed's buffers, and what layouts change."""

import pytest

from megavideo.config.schema import Config
from megavideo.plan.activations import Ledger
from megavideo.plan.memory import Memory, layer_parameters, memory_by_stage
from tests.unit.model.test_model import config

FROZEN, TRAINED = 5_902_307_328, 1_818_820_608


def memory(dp: int, *settings: str, recipe: str = "stage1") -> list[Memory]:
    settled = config("cogvideo-9b", recipe, *settings)
    return memory_by_stage(settled, dp, ledger_of(settled))


def ledger_of(settled: Config) -> Ledger:
    return Ledger(settled, "library", on_gpu=True)


def test_eight_replicas_hold_25_gb_and_not_58() -> None:
    """Frozen weights have no gradient, no master copy and no moments."""
    (found,) = memory(8, "parallel.zero=1", "recipe.micro_batch=1")
    assert found.parameters == 2 * (FROZEN + TRAINED)
    assert found.gradients == 4 * TRAINED
    assert found.optimizer == 12 * -(-TRAINED // 8)
    held = found.parameters + found.gradients + found.optimizer
    assert held / 1e9 == pytest.approx(25.4, abs=0.1)


@pytest.mark.parametrize("tp", [1, 2, 8])
def test_tensor_parallel_ranks_hold_every_parameter_once(tp: int) -> None:
    """And replicated ones on each: norms, biases of what is summed, positions, mixtures."""
    held = layer_parameters(config("cogvideo-9b", "stage1", f"parallel.tp={tp}"))
    h, layers = 3072, 48
    per_layer = 8 * h + h + h + 3 * h  # four norms, three biases after sums, two of them frozen
    frozen_copies = layers * (8 * h + 2 * h) + 1024 * h + 2 * h
    trained_copies = layers * 2 * h + 2000 * h  # temporal dense's bias, mixture; positions
    assert per_layer == 13 * h
    padding = -(-150_010 // tp) * tp - 150_010
    frozen = sum(layer.frozen for layer in held)
    trained = sum(layer.trained for layer in held)
    assert tp * (frozen - frozen_copies) + frozen_copies == FROZEN + padding * h
    assert tp * (trained - trained_copies) + trained_copies == TRAINED


def test_pipeline_stages_together_hold_the_model_and_the_head_its_rows() -> None:
    stages = memory(4, "parallel.pp=4", "recipe.micro_batch=2")
    assert sum(stage.parameters for stage in stages) == 2 * (FROZEN + TRAINED)
    assert stages[-1].buffers - stages[1].buffers == pytest.approx(2 * 20_000 * 3072, rel=0.01)
    assert stages[0].activations > stages[1].activations > stages[2].activations


def test_zero_stages_cut_what_they_say() -> None:
    """As counted in DeepSpeed 0.19.8 by its tensors, in bytes of a trained element at dp 2."""
    found = {
        zero: memory(2, f"parallel.zero={zero}", "recipe.micro_batch=1")[0] for zero in (1, 2, 3)
    }
    per_element = {zero: (m.gradients + m.optimizer) / TRAINED for zero, m in found.items()}
    assert per_element == pytest.approx({1: 4 + 6, 2: 2 + 6, 3: 2 + 6})
    assert found[3].parameters == FROZEN + TRAINED


def test_recomputation_keeps_inputs_only_and_needs_a_layer_at_work() -> None:
    (kept,) = memory(8, "parallel.recompute=none")
    (again,) = memory(8, "parallel.recompute=layer")
    assert again.activations < 0.15 * kept.activations
    assert again.working >= kept.working
