"""DeepSpeed's universal format: its loader reads what we write; frozen weights are there too."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from deepspeed.checkpoint.universal_checkpoint import SubparamShape, load_hp_checkpoint_state
from torch import Tensor, nn

from megavideo.checkpoint.convert_command import main
from megavideo.checkpoint.formats.detect import open_checkpoint
from megavideo.model.table import shard_named
from megavideo.model.trainable import is_trainable
from megavideo.parallel.shard import cut
from tests.unit.checkpoint.samples import weights, write_run

STEP = "global_step20_universal"


def command(*arguments: object) -> None:
    CliRunner().invoke(main, list(map(str, arguments)), catch_exceptions=False)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("universal")
    tensors = write_run(folder / "run")
    command(folder / "run", folder / "converted", "--to", "universal")
    return folder / "converted", tensors


def restored(folder: Path, part: Tensor, rank: int, size: int) -> dict[str, Any]:
    """What DeepSpeed's loader gives a rank that holds such a `part`, the optimizer its middle."""
    start, count = part.numel() // 3, part.numel() // 2
    address = SimpleNamespace(start=start, numel=count)
    master = torch.zeros(count)
    mapping = SimpleNamespace(
        optim_fragment=None, lp_fragment_address=address, get_hp_fragment=lambda: master
    )
    parameter = nn.Parameter(torch.zeros_like(part))
    parameter._hp_mapping = mapping  # type: ignore[attr-defined]
    step = load_hp_checkpoint_state(parameter, str(folder), rank, size)
    return {"step": step, "": master, **{f".{k}": v for k, v in mapping.optim_fragment.items()}}


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("layers.1.attention.temporal.qkv.weight", "2.attention.temporal.qkv.weight"),
        ("layers.0.attention.temporal.qkv.bias", "1.attention.temporal.qkv.bias"),
        ("layers.0.attention.temporal.dense.weight", "1.attention.temporal.dense.weight"),
        ("layers.1.attention.mixture", "2.attention.mixture"),
        ("embedding.frame_position", "0.frame_position"),
    ],
)
def test_deepspeeds_loader_gives_every_rank_its_part(
    size: int, name: str, theirs: str, converted: tuple[Path, dict[str, Tensor]]
) -> None:
    folder, tensors = converted
    for rank in range(size):
        part = cut(tensors[name], shard_named(name), rank, size)
        found = restored(folder / STEP / "zero" / theirs, part, rank, size)
        assert found.pop("step") == 20
        for suffix, fragment in found.items():
            whole = cut(tensors[name + suffix], shard_named(name), rank, size).flatten()
            start = part.numel() // 3
            assert torch.equal(fragment, whole[start : start + part.numel() // 2]), suffix


def test_a_trained_word_table_is_filled_up_by_deepspeeds_loader(tmp_path: Path) -> None:
    tensors = write_run(tmp_path / "run", stage="image", words=41)
    command(tmp_path / "run", tmp_path / "converted", "--to", "universal")
    padded = torch.cat([tensors["embedding.word"], torch.zeros(7, 16)])
    part = padded[24:]
    found = restored(tmp_path / "converted" / STEP / "zero" / "0.word", part, 1, 2)
    start = part.numel() // 3
    assert torch.equal(found[""], part.flatten()[start : start + part.numel() // 2])
    command(tmp_path / "converted", tmp_path / "back", "--to", "run", "--verify")


def test_frozen_weights_are_there_in_their_own_type(
    converted: tuple[Path, dict[str, Tensor]],
) -> None:
    folder, tensors = converted
    path = folder / STEP / "mp_rank_00_model_states.pt"
    module = torch.load(path, weights_only=True)["module"]
    frozen = {name for name in weights() if not is_trainable(name, "keyframes")}
    assert len(module) == len(frozen) and "3.norm.weight" in module
    assert torch.equal(module["1.mlp.up.weight"], tensors["layers.0.mlp.up.weight"])
    assert module["1.mlp.up.weight"].dtype == torch.half


def test_what_deepspeeds_converter_writes_is_read(
    converted: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    """Frozen weights in `zero` too, in float32; canonical names; flat tensors, as of ZeRO 3; its
    own class in a file."""
    _, tensors = converted
    names = list(weights())
    trained = [name for name in names if is_trainable(name, "keyframes")]
    for name in names:
        place = tmp_path / STEP / "zero" / name
        place.mkdir(parents=True)
        if name not in trained:
            torch.save({"param": tensors[name].float()}, place / "fp32.pt")
            continue
        for state, suffix in (("fp32", ""), ("exp_avg", ".exp_avg"), ("exp_avg_sq", ".exp_avg_sq")):
            tensor: Any = tensors[name + suffix].flatten()
            if "qkv" in name:
                shape = SubparamShape([name], (3, -1), 0)
                tensor = {"param": tensors[name + suffix], "sub_param_shape": shape}
            torch.save(tensor, place / f"{state}.pt")
        torch.save(torch.tensor(20.0), place / "step.pt")
    module = {name: tensors[name].half() for name in names}
    shapes = [{name: tensors[name].shape for name in trained}]
    content = {"module": module, "param_shapes": shapes}
    torch.save(content, tmp_path / STEP / "mp_rank_00_model_states.pt")
    (tmp_path / "latest_universal").write_text(STEP)
    reader = open_checkpoint(tmp_path)
    assert reader.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        read = reader.read(name)
        assert read.dtype == tensor.dtype and torch.equal(read, tensor), name


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    command(tmp_path / "run", tmp_path / "converted", "--to", "universal")
    path = tmp_path / "converted" / STEP / "zero" / "0.frame_position" / "exp_avg.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"frame_position\.exp_avg: .* is damaged"):
        command(tmp_path / "converted", tmp_path / "back", "--to", "run")
