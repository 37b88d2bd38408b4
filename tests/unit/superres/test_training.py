"""Training super-resolution: it learns from coarse tokens, repeats and resumes exactly."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from megavideo.config.schema import ModelConfig
from megavideo.superres.checkpoint import Config
from megavideo.superres.pairs import Pairs
from megavideo.superres.start import direct_config, is_new, iterative_config, new_model
from megavideo.superres.training import Trainer, Training
from megavideo.superres.upsample import round_mask
from tests.unit.superres.samples import DIRECT, ITERATIVE, direct

CPU = torch.device("cpu")
TRAINING = Training(steps=12, batch=4, learning_rate=5e-3, seed=0)


def pairs(count: int = 24) -> Pairs:
    """Fine frames repeat each coarse token 3 x 3; captions differ in length."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(20, size=(count, 2, 2)).astype(np.uint16)
    fine = coarse.repeat(3, 1).repeat(3, 2)
    texts = [[21 + number % 5] * (1 + number % 7) for number in range(count)]
    return Pairs(coarse.reshape(count, 4), fine.reshape(count, 36), texts)


def base() -> dict[str, Tensor]:
    """Random, but passing on what it is given, as a trained one does."""
    generator = torch.Generator().manual_seed(0)
    weights = {n: p for n, p in direct().state_dict().items() if not is_new(n)}
    for name, tensor in weights.items():
        if "norm" in name or name.endswith(".bias"):
            weights[name] = torch.full(tensor.shape, float(name.endswith(".weight")))
        else:
            weights[name] = torch.empty(tensor.shape).normal_(0, 0.3, generator=generator)
    return weights


def trained(
    training: Training = TRAINING, until: int | None = None, config: Config = DIRECT
) -> Trainer:
    trainer = Trainer(new_model(config, base(), 8), training, CPU)
    run_until(trainer, until)
    return trainer


class Interrupted(Exception):
    pass


def run_until(trainer: Trainer, until: int | None) -> None:
    def stop(_: float) -> None:
        if trainer.step == until:
            raise Interrupted

    with suppress(Interrupted):
        trainer.train(pairs(), stop)


def weights(trainer: Trainer) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in trainer.trained.values()])


def test_fine_tokens_that_follow_from_coarse_ones_are_learned_with_a_frozen_base() -> None:
    trainer = trained(replace(TRAINING, steps=120, batch=8, learning_rate=2e-2))
    score = trainer.evaluate(pairs())
    assert score.accuracy > 0.3 > 3 * score.commonest, score
    for name, tensor in base().items():
        assert torch.equal(trainer.model.state_dict()[name], tensor), name


def test_masked_tokens_are_learned_from_their_neighbours() -> None:
    trainer = trained(replace(TRAINING, steps=60, batch=8, learning_rate=2e-2), config=ITERATIVE)
    score = trainer.evaluate(pairs())
    assert score.accuracy > 0.5 > 3 * score.commonest, score
    assert trainer.trained.keys() == trainer.model.state_dict().keys()
    inherited = new_model(ITERATIVE, base(), 8).state_dict()
    assert all(torch.equal(inherited[name], tensor) for name, tensor in base().items())


def test_only_masked_tokens_count_and_none_is_seen() -> None:
    """What stands at masked slots changes what is asked for, not what the model says."""
    trainer, shown = trained(until=0, config=ITERATIVE), pairs(4)
    unknown = round_mask(ITERATIVE.fine_side, 2).numpy()
    other = replace(shown, fine=np.where(unknown, shown.fine[::-1], shown.fine))
    rows = np.arange(4)
    (logits, wanted), (same, others) = (trainer._predicted(p, rows, 2) for p in (shown, other))
    assert torch.equal(logits, same) and len(wanted) == 4 * unknown.sum()
    assert torch.equal(wanted.view(4, -1), torch.from_numpy(shown.fine[:, unknown]).long())
    assert not torch.equal(wanted, others)


def test_a_fresh_model_inherits_from_the_base() -> None:
    state = new_model(DIRECT, base(), 8).state_dict()
    for part in ("qkv.weight", "qkv.bias", "dense.weight", "dense.bias"):
        spatial, fine = (state[f"layers.1.attention.{name}.{part}"] for name in ("spatial", "fine"))
        assert torch.equal(spatial, fine)
    frame = base()["embedding.position"][8:12].view(2, 2, -1)
    grid = state["embedding.fine_position"].view(6, 6, -1)
    assert torch.equal(grid[:2, :2], frame) and torch.equal(grid[4:, 2:4], frame)


def test_training_repeats_and_resumes_exactly(tmp_path: Path) -> None:
    whole = weights(trained())
    interrupted = trained(until=5)
    interrupted.save(tmp_path / "training.safetensors")
    resumed = Trainer(new_model(DIRECT, base(), 8), TRAINING, CPU)
    resumed.resume(tmp_path / "training.safetensors")
    assert resumed.step == 5
    run_until(resumed, None)
    assert torch.equal(weights(resumed), whole)
    other = Trainer(new_model(DIRECT, base(), 8), replace(TRAINING, seed=1), CPU)
    with pytest.raises(ValueError, match="belongs to other settings"):
        other.resume(tmp_path / "training.safetensors")


def test_another_base_is_refused() -> None:
    lacking = {name: tensor for name, tensor in base().items() if name != "head.norm.bias"}
    with pytest.raises(ValueError, match=r"head\.norm\.bias is missing or differs"):
        new_model(DIRECT, lacking, 8)


def test_a_base_without_a_position_for_the_last_token_is_refused() -> None:
    sizes = {"hidden": 16, "heads": 2, "layers": 2, "text_slots": 8, "side": 4}
    ids = {"vocab_size": 40, "image_codes": 20, "pad": 23, "newline": 24, "begin_of_image": 39}
    model = ModelConfig(**sizes, **ids, image_position=16, position_rows=32)
    with pytest.raises(ValueError, match="the base needs at least 33"):
        direct_config(model)
    larger = model.model_copy(update={"position_rows": 33})
    config = direct_config(larger)
    assert (config.text_slots, config.coarse_position, config.fine_side) == (16, 17, 12)
    assert (iterative_config(larger).text_slots, iterative_config(larger).fine_side) == (16, 12)
