"""A resumed engine is the one that was saved, bit for bit, in this layout and in others."""

import dataclasses
import errno
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megavideo.checkpoint import commit
from megavideo.checkpoint.commit import list_checkpoints
from megavideo.checkpoint.manifest import MANIFEST, read_manifest
from megavideo.checkpoint.sources import find_start
from megavideo.checkpoint.tokenizers import TokenizerDigests
from megavideo.config.schema import Config
from megavideo.engine.build import build_engine
from megavideo.engine.errors import RunFailed
from megavideo.engine.weights import new_model, start_weights
from megavideo.engine.world import World
from megavideo.log import log
from megavideo.model.build import canonical_parameters
from tests.engine.support import FINGERPRINT, config, micro_batches, save_checkpoint
from tests.engine.test_nonfinite import HOMES, assert_same_state

DROPOUT = {"hidden_dropout": 0.3, "attention_dropout": 0.3}


@pytest.fixture
def fp16_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed refuses fp16 on this CPU because it is slow; torch computes it all the same."""
    from megavideo.engine.quiet import deepspeed

    accelerator = type(deepspeed.get_accelerator())
    monkeypatch.setattr(accelerator, "is_fp16_supported", lambda self: True)


@pytest.mark.usefixtures("fp16_allowed")
@pytest.mark.parametrize(("precision", "zero"), [*HOMES, ("fp16", 1), ("fp16", 2), ("fp16", 3)])
def test_a_resume_is_exact(precision: str, zero: int, world: World, tmp_path: Path) -> None:
    settings = config(tmp_path, {"precision": precision, **DROPOUT}, parallel={"zero": zero})
    engine = build_engine(settings, world, FINGERPRINT)
    for _ in range(2):
        engine.train_batch(micro_batches(engine.progress.consumed_samples))
    if engine.loss_scaler:
        engine.loss_scaler.cur_scale = 128.0  # as if it had come down from where it starts
    save_checkpoint(engine, settings, FINGERPRINT)
    resumed = build_engine(settings, world, FINGERPRINT)
    assert resumed.progress == engine.progress
    assert_same_state(resumed, engine)
    for _ in range(2):
        expected = engine.train_batch(micro_batches(engine.progress.consumed_samples))
        result = resumed.train_batch(micro_batches(resumed.progress.consumed_samples))
        assert result.loss == expected.loss
        assert result.grad_norm == expected.grad_norm
        assert result.loss_scale == expected.loss_scale
    assert_same_state(resumed, engine)


def assert_resumes(world: World, settings: Config) -> None:
    """Two steps on the ranks of `world`, a save, and a resume that goes on bit for bit."""
    engine = build_engine(settings, world, FINGERPRINT)
    replica = world.mesh.dp
    batches = micro_batches(0, replica.rank, replica.size)
    for _ in range(2):
        engine.train_batch(batches)
    save_checkpoint(engine, settings, FINGERPRINT)
    resumed = build_engine(settings, world, FINGERPRINT)
    assert resumed.progress.updates == 2
    assert_same_state(resumed, engine)
    again = resumed.train_batch(micro_batches(16, replica.rank, replica.size))
    assert again.loss == engine.train_batch(batches).loss
    assert_same_state(resumed, engine)


@pytest.mark.usefixtures("fp16_allowed")
def test_fp16_without_a_loss_scale_to_fall_to_is_diverging(world: World, tmp_path: Path) -> None:
    engine = build_engine(config(tmp_path, {"precision": "fp16"}), world, FINGERPRINT)
    objective: Any = engine._home.objective
    losses = objective.losses
    objective.losses = lambda *inputs: losses(*inputs) * 1e30  # finite, but no fp16 gradient is
    engine.loss_scaler.cur_scale, engine.loss_scaler.cur_hysteresis = 2.0, 1
    results = [engine.train_batch(micro_batches(0)) for _ in range(2)]
    assert [result.loss_scale for result in results] == [1.0, 1.0]
    assert all(result.skipped and math.isfinite(result.loss) for result in results)
    assert [result.diverging for result in results] == [True, True]


def test_another_layout_goes_on_with_the_same_state(world: World, tmp_path: Path) -> None:
    saved = config(tmp_path, parallel={"zero": 3})
    engine = build_engine(saved, world, FINGERPRINT)
    engine.train_batch(micro_batches(0))
    save_checkpoint(engine, saved, FINGERPRINT)
    for zero in (0, 1, 2):
        other = build_engine(config(tmp_path, parallel={"zero": zero}), world, FINGERPRINT)
        assert_same_state(other, engine)


def test_a_damaged_checkpoint_is_redone_from_the_one_before(world: World, tmp_path: Path) -> None:
    settings = config(tmp_path)
    engine = build_engine(settings, world, FINGERPRINT)
    batches = micro_batches(0)
    for _ in range(2):
        engine.train_batch(batches)
        save_checkpoint(engine, settings, FINGERPRINT)
    moments = list_checkpoints(tmp_path)[0] / "optimizer.layers.1.tp-00-of-01.safetensors"
    content = bytearray(moments.read_bytes())
    content[-5] ^= 16
    moments.write_bytes(content)
    again = build_engine(settings, world, FINGERPRINT)
    assert again.progress.step == 1
    again.train_batch(micro_batches(again.progress.consumed_samples))
    assert_same_state(again, engine)
    save_checkpoint(again, settings, FINGERPRINT)
    assert build_engine(settings, world, FINGERPRINT).progress.step == 2


def test_a_checkpoint_that_cannot_be_read_now_is_not_passed_over(
    saved: Config, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stale(folder: Path, share: int = 0, shares: int = 1) -> None:
        raise OSError(errno.ESTALE, "Stale file handle", str(folder))

    monkeypatch.setattr(commit, "verify_checkpoint", stale)
    with pytest.raises(ValueError, match=r"step-00000000 could not be read, .* Stale file handle"):
        build_engine(saved, world, FINGERPRINT)
    with pytest.raises(OSError, match="Stale file handle"):
        commit.newest_whole(Path(saved.run.directory))


def test_a_damaged_another_or_missing_base_is_refused(world: World, tmp_path: Path) -> None:
    settings = config(tmp_path)
    save_checkpoint(build_engine(settings, world, FINGERPRINT), settings, FINGERPRINT)
    (base,) = (tmp_path / "base").iterdir()
    path = base / "layers.1.tp-00-of-01.safetensors"
    healthy = path.read_bytes()
    path.write_bytes(healthy[:-3] + bytes([healthy[-3] ^ 8]) + healthy[-2:])
    with pytest.raises(ValueError, match=r"layers\.1.*is damaged: layers\.1\.\S+ differs from its"):
        build_engine(settings, world, FINGERPRINT)
    path.write_bytes(healthy)
    other = config(tmp_path / "other", {"seed": 5})
    digest = build_engine(other, world, FINGERPRINT).frozen.digest
    base.rename(tmp_path / "kept")
    (tmp_path / "other" / "base" / str(digest)).rename(base)
    with pytest.raises(ValueError, match=f"holds another base, {digest}"):
        build_engine(settings, world, FINGERPRINT)
    base.rename(tmp_path / "not it")
    with pytest.raises(ValueError, match="copy it back"):
        build_engine(settings, world, FINGERPRINT)


def test_other_data_or_another_stage_is_refused(world: World, tmp_path: Path) -> None:
    settings = config(tmp_path)
    save_checkpoint(build_engine(settings, world, FINGERPRINT), settings, FINGERPRINT)
    with pytest.raises(ValueError, match=r"other data.*another run\.directory"):
        build_engine(settings, world, "other data")
    with pytest.raises(ValueError, match=r"recipe\.stage=keyframes, not image"):
        build_engine(config(tmp_path, {"stage": "image"}), world, FINGERPRINT)


@pytest.mark.parametrize(
    ("section", "change", "told"),
    [
        ("model", {"heads": 4}, r"trained with model\.heads=2, not 4; give it back"),
        ("recipe", {"window": 2}, r"trained with recipe\.window=0, not 2; give it back"),
        ("recipe", {"precision": "bf16"}, "go on with the precision that it was trained in"),
    ],
)
def test_a_setting_that_no_shape_tells_is_refused_when_it_changes(
    section: str, change: dict[str, Any], told: str, saved: Config, world: World
) -> None:
    changed = getattr(saved, section).model_copy(update=change)
    with pytest.raises(ValueError, match=told):
        build_engine(saved.model_copy(update={section: changed}), world, FINGERPRINT)


def test_other_changed_settings_are_told(
    saved: Config, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    base = str(Path(saved.run.directory) / "another")
    changed = saved.recipe.model_copy(update={"base": base, "batch": 4})
    caplog.set_level("INFO", logger="megavideo")
    log.propagate = True
    build_engine(saved.model_copy(update={"recipe": changed}), world, FINGERPRINT)
    assert f"recipe.base={base} has no effect: this run began with None" in caplog.text
    assert "recipe.batch is 4 from now on, it was 8" in caplog.text


@pytest.fixture
def saved(world: World, tmp_path: Path) -> Config:
    """The configuration of a run with a checkpoint."""
    settings = config(tmp_path)
    save_checkpoint(build_engine(settings, world, FINGERPRINT), settings, FINGERPRINT)
    return settings


def test_a_changed_frozen_weight_is_caught_before_saving(world: World, tmp_path: Path) -> None:
    settings = config(tmp_path)
    engine = build_engine(settings, world, FINGERPRINT)
    save_checkpoint(engine, settings, FINGERPRINT)
    engine.train_batch(micro_batches(0))
    name = "layers.1.mlp.up.weight"
    with torch.no_grad():
        canonical_parameters(engine._home.module)[name].view(-1)[7] += 1e-3
    with pytest.raises(RunFailed, match=f"changed during training: {name} on rank 0"):
        save_checkpoint(engine, settings, FINGERPRINT)
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["step-00000000"]


def test_stages_hand_over_base_and_temporal_channel(world: World, tmp_path: Path) -> None:
    base, first, second = (tmp_path / name for name in ("base", "first", "second"))
    image = config(base, {"stage": "image"})
    engine = build_engine(image, world, FINGERPRINT)
    engine.train_batch(micro_batches(0, frames=1))
    save_checkpoint(engine, image, FINGERPRINT)
    trained = engine.state.gather_weights()

    keyframes = config(first, {"base": str(base)})
    engine = build_engine(keyframes, world, FINGERPRINT)
    frozen = dict(engine.frozen.parts(engine.frozen.names))
    assert all(torch.equal(tensor, trained[name]) for name, tensor in frozen.items())
    inherited = engine.state.gather_weights()["layers.0.attention.temporal.qkv.weight"]
    assert torch.equal(inherited, trained["layers.0.attention.spatial.qkv.weight"])
    engine.train_batch(micro_batches(0))
    save_checkpoint(engine, keyframes, FINGERPRINT)

    recipe = {"stage": "interpolation", "window": 2, "start_from": str(first)}
    engine2 = build_engine(config(second, {**recipe, "base": str(first)}), world, FINGERPRINT)
    assert engine2.frozen.digest == engine.frozen.digest
    expected = engine.state.gather_weights()
    assert all(torch.equal(t, expected[n]) for n, t in engine2.state.gather_weights().items())
    with pytest.raises(ValueError, match=r"trained over the frozen base .* recipe\.base=None"):
        build_engine(config(tmp_path / "third", recipe), world, FINGERPRINT)


@pytest.mark.parametrize("kind", ["text", "image"])
def test_a_start_that_learned_from_other_tokens_is_refused(
    world: World, tmp_path: Path, kind: str
) -> None:
    ours = TokenizerDigests("a text tokenizer", "an image tokenizer")
    theirs = dataclasses.replace(ours, **{kind: "another"})
    base = config(tmp_path / "base", {"stage": "image"})
    engine = build_engine(base, world, FINGERPRINT, theirs)
    save_checkpoint(engine, base, FINGERPRINT, theirs)
    settings = config(tmp_path / "first", {"base": base.run.directory})
    with pytest.raises(ValueError, match=f"another {kind} tokenizer .* another recipe.base, or"):
        build_engine(settings, world, FINGERPRINT, ours)
    build_engine(settings, world, FINGERPRINT, theirs)


def test_all_ranks_start_from_what_was_found_once(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = config(tmp_path / "first")
    engine = build_engine(first, world, FINGERPRINT)
    engine.train_batch(micro_batches(0))
    save_checkpoint(engine, first, FINGERPRINT)
    saved = engine.state.gather_weights()
    read: list[Path] = []
    monkeypatch.setattr(commit, "verify_checkpoint", lambda folder, *share: read.append(folder))
    origin = {"base": first.run.directory, "start_from": first.run.directory}
    second = config(tmp_path / "second", {"stage": "interpolation", "window": 2, **origin})
    build_engine(second, world, FINGERPRINT)
    assert len(read) == 2, "recipe.base and recipe.start_from, once each, not once on each rank"

    found = find_start(second.recipe)
    engine.train_batch(micro_batches(8))
    save_checkpoint(engine, first, FINGERPRINT)  # the run goes on while others start from it
    model = new_model(second, torch.device("cpu"))
    start_weights(model, second, found)
    parameters = canonical_parameters(model)
    assert all(torch.equal(parameters[name], tensor) for name, tensor in saved.items())


def test_a_checkpoint_that_does_not_fit_lists_what_is_wrong(world: World, tmp_path: Path) -> None:
    settings = config(tmp_path, {"stage": "image"})
    save_checkpoint(build_engine(settings, world, FINGERPRINT), settings, FINGERPRINT)
    wider = settings.model.model_copy(update={"hidden": 32, "layers": 1})
    other = config(tmp_path / "b", {"base": str(tmp_path)}).model_copy(update={"model": wider})
    with pytest.raises(ValueError) as caught:
        build_engine(other, world, FINGERPRINT)
    assert "unexpected layers.1.mlp.up.weight" in str(caught.value)
    assert "embedding.word has shape [40, 16], this model needs [40, 32]" in str(caught.value)


def test_the_manifest_says_where_the_run_stands(world: World, tmp_path: Path) -> None:
    settings = config(tmp_path)
    engine = build_engine(settings, world, FINGERPRINT)
    engine.train_batch(micro_batches(0))
    save_checkpoint(engine, settings, FINGERPRINT)
    manifest = read_manifest(list_checkpoints(tmp_path)[0] / MANIFEST)
    assert manifest.training is not None
    assert manifest.training.progress.consumed_samples == 8
    assert manifest.training.data == FINGERPRINT
    assert manifest.training.base == engine.frozen.digest
    assert manifest.training.config == settings.model_dump(mode="json")
    state = engine.state.gather_weights() | engine.state.gather_moments()
    assert manifest.tensors.keys() == state.keys()
