"""Reading SAT's format: names old and new, random states, and what is refused."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from megavideo.checkpoint.formats.sat import canonical_name, is_sat, read_sat
from tests.unit.checkpoint.samples import weights, write_split_sat

VECTORS = Path(__file__).parents[2] / "reference" / "vectors"


def write_sat(
    folder: Path, module: dict[str, torch.Tensor], ranks: int = 1, **rest: object
) -> Path:
    (folder / "100").mkdir(parents=True)
    (folder / "latest").write_text("100")
    for rank in range(ranks):
        path = folder / "100" / f"mp_rank_{rank:02d}_model_states.pt"
        torch.save({"module": module, **rest}, path)
    return folder


def test_a_checkpoint_with_random_states_is_read_without_pickle(tmp_path: Path) -> None:
    weight = torch.randn(3, 4).half()
    folder = write_sat(
        tmp_path,
        {"transformer.final_layernorm.weight": weight},
        random_rng_state=random.getstate(),
        np_rng_state=np.random.get_state(),
        torch_rng_state=torch.get_rng_state(),
        ds_config=None,
    )
    assert is_sat(folder) and is_sat(folder / "100")
    tensors = read_sat(folder)
    assert torch.equal(tensors["head.norm.weight"], weight)


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("executed",)


def test_code_in_a_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = write_sat(tmp_path, {}, trap=Harmful())
    with pytest.raises(ValueError, match="more than tensors and random states"):
        read_sat(folder)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_split_checkpoint_is_joined(ranks: int, tmp_path: Path) -> None:
    tensors = weights()
    write_split_sat(tmp_path, tensors, ranks)
    read = read_sat(tmp_path)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_ranks_that_do_not_fit_each_other_are_refused(tmp_path: Path) -> None:
    tensors = weights()
    write_split_sat(tmp_path / "a", tensors, 2)
    one = tmp_path / "a" / "100" / "mp_rank_01_model_states.pt"
    content = torch.load(one, weights_only=True)
    content["module"]["transformer.final_layernorm.bias"] += 1
    torch.save(content, one)
    with pytest.raises(ValueError, match=r"head\.norm\.bias: ranks hold different values"):
        read_sat(tmp_path / "a")
    del content["module"]["transformer.final_layernorm.bias"]
    torch.save(content, one)
    with pytest.raises(ValueError, match=r"differ in having head\.norm\.bias"):
        read_sat(tmp_path / "a")
    one.rename(one.with_name("mp_rank_02_model_states.pt"))
    with pytest.raises(ValueError, match="mp_rank_01_model_states"):
        read_sat(tmp_path / "a")


def test_a_truncated_file_is_damaged(tmp_path: Path) -> None:
    folder = write_sat(tmp_path, {"transformer.final_layernorm.weight": torch.ones(4)})
    path = folder / "100" / "mp_rank_00_model_states.pt"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match="is damaged"):
        read_sat(folder)


def test_a_folder_without_checkpoint_says_what_is_missing(tmp_path: Path) -> None:
    assert not is_sat(tmp_path)
    with pytest.raises(ValueError, match="mp_rank_00_model_states"):
        read_sat(tmp_path)


@pytest.mark.parametrize(
    ("sat", "ours"),
    [
        ("transformer.word_embeddings.weight", "embedding.word"),
        ("transformer.layers.12.third_layernorm.bias", "layers.12.attention_norm.bias"),
        ("mixins.0.position_embeddings.weight", "embedding.frame_position"),
        ("mixins.1.query_key_value.3.bias", "layers.3.attention.temporal.qkv.bias"),
        ("mixins.attention_plus.attn_distribution.47", "layers.47.attention.mixture"),
    ],
)
def test_names_of_every_age_have_one_canonical_form(sat: str, ours: str) -> None:
    assert canonical_name(sat) == ours


def test_a_foreign_tensor_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"transformer\.something"):
        canonical_name("transformer.something.weight")
