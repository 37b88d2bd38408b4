"""Megatron-LM's format: what the files hold is laid out as Megatron does it, and read back so."""

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from megavideo.checkpoint.convert_command import main
from megavideo.checkpoint.files import TensorEntry, tensor_entry
from megavideo.checkpoint.formats.detect import open_checkpoint
from megavideo.checkpoint.formats.interface import Reader
from tests.unit.checkpoint.samples import weights, write_run, write_split_sat

WORDS, LAYERS, HEADS, HIDDEN = 41, 4, 8, 16
TP, PP = 2, 2


def command(*arguments: object) -> str:
    return CliRunner().invoke(main, list(map(str, arguments)), catch_exceptions=False).output


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A run as TP 2 x PP 2, and its tensors."""
    folder = tmp_path_factory.mktemp("megatron")
    tensors = write_run(folder / "run", words=WORDS, layers=LAYERS)
    command(folder / "run", folder / "cut", "--to", "megatron", "--tp", TP, "--pp", PP)
    return folder / "cut", tensors


def load(folder: Path, tp: int, pp: int) -> dict[str, Any]:
    path = folder / "iter_0000020" / f"mp_rank_{tp:02d}_{pp:03d}" / "model_optim_rng.pt"
    with torch.serialization.safe_globals([Namespace]):
        return torch.load(path, weights_only=True)


def interleaved(whole: Tensor, rank: int, ranks: int) -> Tensor:
    """A rank's QKV by head first, told index by index."""
    size, share = HIDDEN // HEADS, HEADS // ranks
    rows = [
        whole[chunk * HIDDEN + head * size + row]
        for head in range(rank * share, (rank + 1) * share)
        for chunk in range(3)
        for row in range(size)
    ]
    return torch.stack(rows)


def test_names_layers_and_cuts_are_megatrons(converted: tuple[Path, dict[str, Tensor]]) -> None:
    folder, tensors = converted
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == "20"
    for pp in range(PP):
        for tp in range(TP):
            content = load(folder, tp, pp)
            assert content["checkpoint_version"] == 3.0 and content["iteration"] == 20
            encoder = content["model"]["language_model"]["encoder"]
            for local in range(LAYERS // PP):
                ours = f"layers.{pp * LAYERS // PP + local}."
                qkv = tensors[f"{ours}attention.spatial.qkv.weight"]
                theirs = f"layers.{local}.self_attention."
                assert torch.equal(
                    encoder[f"{theirs}query_key_value.weight"], interleaved(qkv, tp, TP)
                )
                dense = tensors[f"{ours}attention.spatial.dense.weight"].chunk(TP, 1)[tp]
                assert torch.equal(encoder[f"{theirs}dense.weight"], dense)
            assert ("final_layernorm.weight" in encoder) == (pp == PP - 1)
            assert ("embedding" in content["model"]["language_model"]) == (pp == 0)


def test_the_word_table_is_filled_up_for_every_rank(
    converted: tuple[Path, dict[str, Tensor]],
) -> None:
    folder, tensors = converted
    words = tensors["embedding.word"]
    first = [
        load(folder, tp, 0)["model"]["language_model"]["embedding"]["word_embeddings"]["weight"]
        for tp in range(TP)
    ]
    assert [part.shape[0] for part in first] == [128, 128]
    table = torch.cat(first)
    assert torch.equal(table[:WORDS], words) and not table[WORDS:].any()
    last = [
        load(folder, tp, PP - 1)["model"]["word_embeddings_for_head"]["weight"] for tp in range(TP)
    ]
    assert torch.equal(torch.cat(last), table)
    assert load(folder, 0, 0)["args"].padded_vocab_size == 256


def test_moments_lie_under_named_parameters(converted: tuple[Path, dict[str, Tensor]]) -> None:
    folder, tensors = converted
    optimizer = load(folder, 1, 1)["optimizer"]["optimizer"]
    (group,) = optimizer["param_groups"]
    name = "language_model.encoder.layers.1.temporal_attention.query_key_value.weight"
    state = optimizer["state"][group["param_names"].index(name)]
    assert state["step"] == 20
    moment = tensors["layers.3.attention.temporal.qkv.weight.exp_avg_sq"]
    assert torch.equal(state["exp_avg_sq"], interleaved(moment, 1, TP))


@pytest.mark.parametrize("version", [0, 1.0, 2.0])
def test_older_orders_of_qkv_are_read(version: float, tmp_path: Path) -> None:
    """Files as Megatron writes them, of two ranks, with its own names before version 2."""
    tensors = weights("image", WORDS)
    write_theirs(tmp_path / "theirs", tensors, version)
    command(tmp_path / "theirs", tmp_path / "ours", "--to", "megavideo", "--vocab-size", WORDS)
    assert entries(open_checkpoint(tmp_path / "ours")) == {
        name: tensor_entry(tensor) for name, tensor in tensors.items()
    }


def write_theirs(folder: Path, tensors: dict[str, Tensor], version: float) -> None:
    size, share = HIDDEN // HEADS, HEADS // TP
    for rank in range(TP):
        encoder, embedding = {}, {}
        for name, theirs, cut in THEIRS:
            for layer in range(2) if "{i}" in name else [0]:
                whole = tensors[name.replace("{i}", str(layer))]
                if cut == "qkv":
                    part = whole.view(3, TP, share, size, -1)[:, rank]
                    order = {0: (0, 1, 2, 3), 1.0: (1, 2, 0, 3), 2.0: (1, 0, 2, 3)}[version]
                    whole = part.permute(*order).reshape(-1, *whole.shape[1:]).clone()
                elif cut == "words":
                    table = torch.cat([whole, torch.ones(256 - WORDS, HIDDEN).half()])
                    whole = table.chunk(TP)[rank].clone()
                elif cut is not None:
                    whole = whole.chunk(TP, cut)[rank].clone()
                if theirs.startswith("embedding."):
                    embedding[theirs.split(".")[1]] = {"weight": whole}
                else:
                    encoder[theirs.replace("{i}", str(layer))] = whole
        model = {"language_model": {"embedding": embedding, "transformer": encoder}}
        arguments = Namespace(num_attention_heads=HEADS, padded_vocab_size=256)
        path = folder / "release" / f"mp_rank_{rank:02d}" / "model_optim_rng.pt"
        path.parent.mkdir(parents=True)
        content = {"model": model, "args": arguments, "checkpoint_version": version}
        torch.save(content, path)
    (folder / "latest_checkpointed_iteration.txt").write_text("release")


def _theirs() -> Iterator[tuple[str, str, str | int | None]]:
    yield "embedding.word", "embedding.word_embeddings.weight", "words"
    yield "embedding.position", "embedding.position_embeddings.weight", None
    for part in ("weight", "bias"):
        layer = f"layers.{{i}}.{{}}.{part}".format
        columns = 1 if part == "weight" else None
        for ours, theirs, cut in (
            ("input_norm", "input_layernorm", None),
            ("attention.spatial.qkv", "attention.query_key_value", "qkv"),
            ("attention.spatial.dense", "attention.dense", columns),
            ("attention_norm", "third_layernorm", None),
            ("mlp_norm", "post_attention_layernorm", None),
            ("mlp.up", "mlp.dense_h_to_4h", 0),
            ("mlp.down", "mlp.dense_4h_to_h", columns),
            ("mlp_output_norm", "fourth_layernorm", None),
        ):
            yield layer(ours, i="{i}"), layer(theirs, i="{i}"), cut
        yield f"head.norm.{part}", f"final_layernorm.{part}", None


THEIRS = list(_theirs())


def entries(reader: Reader) -> dict[str, TensorEntry]:
    return {name: tensor_entry(reader.read(name)) for name in reader.tensors}


def test_what_the_files_do_not_say_is_asked_for(tmp_path: Path) -> None:
    tensors = weights("image", WORDS)
    write_theirs(tmp_path / "theirs", tensors, 2.0)
    with pytest.raises(ValueError, match="256 rows are no padding; give --vocab-size"):
        command(tmp_path / "theirs", tmp_path / "ours", "--to", "megavideo")
    write_split_sat(tmp_path / "sat", weights(), 1)
    with pytest.raises(ValueError, match="how many attention heads it has: give --heads"):
        command(tmp_path / "sat", tmp_path / "a", "--to", "megatron")
    with pytest.raises(ValueError, match="--vocab-size has no effect"):
        command(tmp_path / "sat", tmp_path / "a", "--to", "megavideo", "--vocab-size", 40)
    with pytest.raises(ValueError, match="--heads 5 does not divide"):
        command(tmp_path / "sat", tmp_path / "a", "--to", "megatron", "--heads", 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tp", 3), "--tp 3 does not divide the model's 8 heads"),
        (("--pp", 3), "--pp 3 does not divide the model's 4 layers"),
        (("--heads", 4), "--heads 4: .* has 8"),
    ],
)
def test_impossible_layouts_are_refused(
    options: tuple[str, int],
    message: str,
    converted: tuple[Path, dict[str, Tensor]],
    tmp_path: Path,
) -> None:
    with pytest.raises(ValueError, match=message):
        command(converted[0], tmp_path / "dst", "--to", "megatron", *options)
    assert not (tmp_path / "dst").exists()


def test_a_missing_rank_and_a_flipped_bit_are_noticed(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    command(tmp_path / "run", tmp_path / "cut", "--to", "megatron", "--tp", TP, "--pp", PP)
    path = tmp_path / "cut" / "iter_0000020" / "mp_rank_01_000" / "model_optim_rng.pt"
    healthy = path.read_bytes()
    for position in range(len(healthy) // 3, len(healthy) - 2000, len(healthy) // 9):
        content = bytearray(healthy)
        content[position] ^= 16
        path.write_bytes(content)
        before = content[position - 70 : position + 70]
        if b"ZZZ" in before or b"PK" in before:  # what fills the archive up has no checksum
            continue
        with pytest.raises(ValueError, match="damaged"):
            command(tmp_path / "cut", tmp_path / "dst", "--to", "run")
    path.unlink()
    with pytest.raises(ValueError, match="lacks rank 1 of pipeline stage 0"):
        command(tmp_path / "cut", tmp_path / "dst", "--to", "run")


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("executed",)


def test_code_in_a_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "cp" / "mp_rank_00" / "model_optim_rng.pt"
    path.parent.mkdir(parents=True)
    torch.save({"model": {}, "args": Harmful()}, path)
    with pytest.raises(ValueError, match="more than tensors and random states"):
        open_checkpoint(tmp_path / "cp")
    assert "executed" not in capsys.readouterr().out
