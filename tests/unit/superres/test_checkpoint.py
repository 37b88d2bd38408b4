"""Super-resolution models on disk: ours whole or refused, published ones by their own names."""

import json
from pathlib import Path

import pytest
import torch

from megavideo.checkpoint.tokenizers import TokenizerDigests
from megavideo.superres.checkpoint import Origin, load, origin_of, published_config, save
from megavideo.superres.config import DirectConfig, IterativeConfig
from megavideo.superres.model import DirectSuperResolution, IterativeSuperResolution
from megavideo.superres.start import is_new
from tests.unit.checkpoint.samples import weights, write_split_sat
from tests.unit.superres.samples import direct, drawn

ORIGIN = Origin(TokenizerDigests("text", "image"), 7)


def saved(folder: Path) -> DirectSuperResolution:
    model = direct().float()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_new(name))
    save(folder, model, ORIGIN)
    return model


def test_a_saved_model_is_the_same_model(tmp_path: Path) -> None:
    model = saved(tmp_path)
    loaded = load(tmp_path)
    assert loaded.config == model.config
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert origin_of(tmp_path) == ORIGIN
    assert load(tmp_path, dtype=torch.bfloat16).embedding.word.dtype == torch.bfloat16


def test_a_save_that_was_cut_off_leaves_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = saved(tmp_path)
    monkeypatch.setattr("megavideo.superres.checkpoint.write_sealed", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(tmp_path, model, ORIGIN)
    with pytest.raises(FileNotFoundError, match="is no super-resolution model"):
        load(tmp_path)


@pytest.mark.parametrize("pattern", ["superres.json", "weights.safetensors", "base/*"])
def test_damage_is_found(tmp_path: Path, pattern: str) -> None:
    saved(tmp_path)
    (path,) = tmp_path.glob(pattern)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        load(tmp_path)


def video_name(name: str) -> str:
    return name.replace(".fine.", ".temporal.").replace("fine_position", "frame_position")


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", ["direct", "iterative"])
def test_a_published_checkpoint_split_or_whole_loads_under_our_names(
    tmp_path: Path, kind: str, ranks: int
) -> None:
    sizes = {"hidden": 4, "heads": 2, "layers": 2, "fine_side": 6}
    model: DirectSuperResolution | IterativeSuperResolution = (
        DirectSuperResolution(DirectConfig(**sizes, coarse_side=2))
        if kind == "direct"
        else IterativeSuperResolution(IterativeConfig(**sizes))
    )
    drawn(model, 1)
    tensors = {video_name(name): tensor for name, tensor in model.state_dict().items()}
    write_split_sat(tmp_path, tensors, ranks)
    (tmp_path / "model_config.json").write_text(json.dumps({"num_attention_heads": 2}))
    loaded = load(tmp_path, dtype=torch.float64)
    assert loaded.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_the_published_sizes_are_read_from_the_tensors() -> None:
    with torch.device("meta"):
        direct_tensors = DirectSuperResolution(DirectConfig()).state_dict()
        iterative_tensors = IterativeSuperResolution(IterativeConfig()).state_dict()
    assert published_config(direct_tensors, {}) == DirectConfig()
    assert published_config(iterative_tensors, {}) == IterativeConfig()
    assert published_config(direct_tensors, {"num_attention_heads": 24}).heads == 24
    own = sum(t.numel() for name, t in direct_tensors.items() if is_new(name))
    assert own == 48 * (4 * 3072**2 + 4 * 3072) + 3600 * 3072


def test_a_folder_that_is_no_super_resolution_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no super-resolution model"):
        load(tmp_path / "missing")
    write_split_sat(tmp_path, weights("image"), 1)
    with pytest.raises(ValueError, match="no positions of fine tokens"):
        load(tmp_path)
