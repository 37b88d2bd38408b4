"""A checkpoint goes through any format and cut and comes back bit for bit, or not at all."""

import ctypes
import json
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megavideo.checkpoint.commit import list_checkpoints
from megavideo.checkpoint.convert import Conversion, convert, select
from megavideo.checkpoint.convert_command import main
from megavideo.checkpoint.files import opened
from megavideo.checkpoint.formats.detect import open_checkpoint
from megavideo.checkpoint.formats.interface import Reader, Writer
from megavideo.checkpoint.formats.sharded import ShardedReader, ShardedWriter
from megavideo.checkpoint.manifest import MANIFEST, read_manifest
from megavideo.checkpoint.sources import open_base_weights
from megavideo.config.schema import RecipeConfig
from megavideo.model.table import parameter_table, shard_named
from megavideo.parallel.shard import cut
from tests.unit.checkpoint.samples import Held, model, weights, write_run, write_split_sat

FORMATS = ("megavideo", "sat", "huggingface", "megatron", "universal")
WITH_OPTIMIZER = ("megavideo", "run", "megatron", "universal")
TP, PP, LAYERS = (1, 2, 4, 8), (1, 2, 4), 4


def command(*arguments: object) -> Result:
    """`megavideo convert`, its errors raised."""
    return CliRunner().invoke(main, list(map(str, arguments)), catch_exceptions=False)


def layouts(target: str) -> st.SearchStrategy[list[object]]:
    """Options for a target: its cut, or its files."""
    to = ["--to", target]
    if target == "universal":
        return st.just(to)
    if target == "huggingface":
        return st.integers(900, 20_000).map(lambda n: [*to, "--max-file-size", n])
    if target == "megatron":
        cuts = st.tuples(st.sampled_from(TP), st.sampled_from(PP))
        return cuts.map(lambda cut: [*to, "--tp", cut[0], "--pp", cut[1]])
    return st.sampled_from(TP).map(lambda n: [*to, "--tp", n])


def hold(folder: Path, tensors: dict[str, Tensor], tp: int = 1) -> Path:
    """A weights folder of ours with `tensors`."""
    reader = Held(tensors)
    convert(Conversion(reader, ShardedWriter(tp, None), folder, reader.tensors), verify=False)
    return folder


def assert_holds(folder: Path, tensors: dict[str, Tensor]) -> None:
    reader = open_checkpoint(folder)
    assert reader.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        read = reader.read(name)
        assert read.dtype == tensor.dtype and torch.equal(read, tensor), name


def contents(folder: Path) -> dict[Path, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder): path.read_bytes() for path in files}


@pytest.mark.parametrize("first", FORMATS)
@pytest.mark.parametrize("second", FORMATS)
@settings(max_examples=1, phases=[Phase.generate])  # shrinking would take minutes
@given(st.data())
def test_there_and_back_gives_the_same_files(first: str, second: str, data: st.DataObject) -> None:
    """Weights of a model that eight ranks and, but for SAT, an odd vocabulary fit."""
    tensors = weights(words=40 if "sat" in (first, second) else 41, layers=LAYERS)
    a, b = data.draw(layouts(first)), data.draw(layouts(second))
    with tempfile.TemporaryDirectory() as name:
        tmp = Path(name)
        hold(tmp / "source", tensors, tp=2)
        for source, target, options in (("source", "a", a), ("a", "b", b), ("b", "again", a)):
            convert_to(tmp / source, tmp / target, options)
        assert_holds(tmp / "b", tensors)
        assert contents(tmp / "again") == contents(tmp / "a")


@pytest.mark.parametrize("first", WITH_OPTIMIZER)
@pytest.mark.parametrize("second", WITH_OPTIMIZER)
@settings(max_examples=1, phases=[Phase.generate])  # shrinking would take minutes
@given(st.data())
def test_a_run_with_its_optimizer_goes_there_and_back(
    first: str, second: str, data: st.DataObject
) -> None:
    a, b = data.draw(layouts(first)), data.draw(layouts(second))
    with tempfile.TemporaryDirectory() as name:
        tmp = Path(name)
        tensors = write_run(tmp / "source", words=41, layers=LAYERS)
        for source, target, options in (("source", "a", a), ("a", "b", b), ("b", "again", a)):
            command(tmp / source, tmp / target, *options)
        assert_holds(tmp / "b", tensors)
        assert contents(tmp / "again") == contents(tmp / "a")
        assert open_checkpoint(tmp / "b").training == open_checkpoint(tmp / "source").training


def convert_to(source: Path, target: Path, options: list[object]) -> None:
    """Convert, with the number of heads where Megatron's format asks for it."""
    known = open_checkpoint(source).heads is not None
    heads = ["--heads", 8] if "megatron" in options and not known else []
    command(source, target, *options, *heads)


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_a_trained_run_comes_back_with_optimizer_and_progress(tp: int, tmp_path: Path) -> None:
    tensors = write_run(tmp_path / "run")
    command(tmp_path / "run", tmp_path / "cut", "--to", "megavideo", "--tp", tp, "--verify")
    assert_holds(tmp_path / "cut", tensors)
    command(tmp_path / "cut", tmp_path / "back", "--to", "run", "--verify")
    before, after = (list_checkpoints(tmp_path / name)[0] for name in ("run", "back"))
    assert read_manifest(after / MANIFEST) == read_manifest(before / MANIFEST)
    assert_holds(tmp_path / "back", tensors)


def test_a_base_run_without_frozen_weights_comes_back_too(tmp_path: Path) -> None:
    tensors = write_run(tmp_path / "run", stage="image")
    command(tmp_path / "run", tmp_path / "cut", "--to", "megavideo", "--tp", 2)
    command(tmp_path / "cut", tmp_path / "back", "--to", "run", "--verify")
    assert_holds(tmp_path / "back", tensors)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_split_sat_checkpoint_of_others_is_read(ranks: int, tmp_path: Path) -> None:
    tensors = weights()
    write_split_sat(tmp_path / "sat", tensors, ranks)
    command(tmp_path / "sat", tmp_path / "ours", "--to", "megavideo", "--tp", 8, "--verify")
    assert_holds(tmp_path / "ours", tensors)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_sat_gets_what_it_would_have_written(ranks: int, tmp_path: Path) -> None:
    """Name by name, rank by rank what torch.load gives of a file that SAT's rules make."""
    tensors = weights()
    hold(tmp_path / "ours", tensors)
    command(tmp_path / "ours", tmp_path / "sat", "--to", "sat", "--tp", ranks)
    write_split_sat(tmp_path / "theirs", tensors, ranks)
    assert (tmp_path / "sat" / "latest").read_text() == "0"
    for rank in range(ranks):
        file = f"mp_rank_{rank:02d}_model_states.pt"
        ours = torch.load(tmp_path / "sat" / "0" / file, weights_only=True)["module"]
        theirs = torch.load(tmp_path / "theirs" / "100" / file, weights_only=True)["module"]
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_old_sat_names_are_read(tmp_path: Path) -> None:
    tensors = weights()
    path = write_split_sat(tmp_path / "sat", tensors, 1) / "100" / "mp_rank_00_model_states.pt"
    content = torch.load(path, weights_only=True)
    names = (("mixins.extra_position_embedding", "mixins.0"), ("mixins.attention_plus", "mixins.1"))
    for new, old in names:
        content["module"] = {k.replace(new, old): t for k, t in content["module"].items()}
    torch.save(content, path)
    command(tmp_path / "sat", tmp_path / "ours", "--to", "huggingface")
    assert_holds(tmp_path / "ours", tensors)


def test_a_hugging_face_folder_is_as_its_readers_expect(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tensors = weights()
    hold(tmp_path / "ours", tensors)
    command(tmp_path / "ours", tmp_path / "hf", "--to", "huggingface", "--max-file-size", "5KB")
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors" and len(files) > 3
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    for file in files:
        for name, tensor in load_file(tmp_path / "hf" / file).items():
            assert index["weight_map"][name] == file
            assert torch.equal(tensor, tensors[name])
        with opened(tmp_path / "hf" / file) as handle:
            assert handle.metadata() == {"format": "pt"}


@pytest.mark.parametrize("held", [1, 2, 8])
def test_any_rank_reads_its_part_whatever_the_cut_on_disk(held: int, tmp_path: Path) -> None:
    tensors = weights(words=41)  # which no number of ranks divides
    reader = ShardedReader(hold(tmp_path / "ours", tensors, held))
    for name, tensor in tensors.items():
        for rank in range(4):
            part = cut(tensor, shard_named(name), rank, 4)
            assert torch.equal(reader.read_part(name, rank, 4), part), name


def test_files_hold_no_padding_and_nothing_twice(tmp_path: Path) -> None:
    tensors = weights(words=41)
    reader = ShardedReader(hold(tmp_path / "ours", tensors, 8))
    rows = 0
    count = 0
    for file in reader.files[:-1]:
        with opened(reader.path / file) as handle:
            for name in handle.keys():  # noqa: SIM118
                count += handle.get_tensor(name).nbytes
                rows += len(handle.get_tensor(name)) if name == "embedding.word" else 0
    assert rows == 41
    assert count == sum(tensor.nbytes for tensor in tensors.values())


def test_another_type_is_a_cast_of_weights_alone(tmp_path: Path) -> None:
    tensors = write_run(tmp_path / "run")
    with pytest.raises(ValueError, match="add --weights-only"):
        command(tmp_path / "run", tmp_path / "a", "--to", "megavideo", "--dtype", "bf16")
    options = ["--to", "megavideo", "--dtype", "bf16", "--weights-only", "--verify"]
    command(tmp_path / "run", tmp_path / "a", *options)
    bare = {name: t.bfloat16() for name, t in tensors.items() if ".exp_avg" not in name}
    assert_holds(tmp_path / "a", bare)


def test_a_number_that_a_type_cannot_hold_is_refused_not_made_infinite(tmp_path: Path) -> None:
    held = weights("image")
    held["head.norm.weight"] = torch.full_like(held["head.norm.weight"], 1e5, dtype=torch.float32)
    source = hold(tmp_path / "source", held)
    with pytest.raises(ValueError, match=r"head\.norm\.weight has numbers that fp16 cannot hold"):
        command(source, tmp_path / "half", "--to", "huggingface", "--dtype", "fp16")
    command(source, tmp_path / "brain", "--to", "huggingface", "--dtype", "bf16")
    assert open_checkpoint(tmp_path / "brain").read("head.norm.weight").isfinite().all()


def test_converted_weights_are_a_base_to_train_on(tmp_path: Path) -> None:
    tensors = weights()
    base = {n: t for n, t in tensors.items() if "temporal" not in n and "mixture" not in n}
    del base["embedding.frame_position"]
    hold(tmp_path / "ours", tensors, 2)
    command(tmp_path / "ours", tmp_path / "hf", "--to", "huggingface")
    command(tmp_path / "ours", tmp_path / "sat", "--to", "sat", "--tp", 2)
    convert_to(tmp_path / "ours", tmp_path / "megatron", ["--to", "megatron", "--tp", 2])
    command(tmp_path / "ours", tmp_path / "universal", "--to", "universal")
    for folder in ("ours", "hf", "sat", "megatron", "universal"):
        source = open_base_weights(tmp_path / folder)
        assert source.tensors.keys() == base.keys()
        assert all(torch.equal(source.read(name), tensor) for name, tensor in base.items())


# What is refused.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--to", "sat", "--tp", "3"), "40 rows, which --tp 3 does not divide"),
        (("--to", "megavideo", "--tp", "3"), "does not fit --tp 3"),
        (("--to", "huggingface", "--tp", "2"), "--tp has no effect with --to huggingface"),
        (("--to", "sat", "--max-file-size", "1GB"), "--max-file-size has no effect"),
        (("--to", "run"), "needs the progress and configuration"),
    ],
)
def test_an_impossible_target_is_refused(
    options: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    hold(tmp_path / "ours", weights())
    with pytest.raises(ValueError, match=message):
        command(tmp_path / "ours", tmp_path / "dst", *options)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_heads_that_ranks_cannot_share_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    with pytest.raises(ValueError, match="--tp 16 does not divide the model's 8 heads"):
        command(tmp_path / "run", tmp_path / "dst", "--to", "megavideo", "--tp", "16")


def test_sat_refuses_words_that_its_ranks_cannot_share(tmp_path: Path) -> None:
    hold(tmp_path / "ours", weights(words=41))
    with pytest.raises(ValueError, match="has 41 rows, which --tp 2 does not divide"):
        command(tmp_path / "ours", tmp_path / "dst", "--to", "sat", "--tp", 2)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    hold(tmp_path / "ours", weights())
    (tmp_path / "dst").mkdir()
    with pytest.raises(FileExistsError, match="remove it"):
        command(tmp_path / "ours", tmp_path / "dst", "--to", "sat")


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    hold(tmp_path / "ours", weights())
    before = contents(tmp_path)
    result = command(tmp_path / "ours", tmp_path / "dst", "--to", "sat", "--tp", 2, "--dry-run")
    assert "(sat, 2 files)" in result.output
    assert contents(tmp_path) == before


Damage = Callable[[dict[str, Tensor]], None]
DAMAGES: list[tuple[Damage, str]] = [
    (lambda t: t.pop("layers.1.mlp.up.bias"), r"missing layers\.1\.mlp\.up\.bias"),
    (lambda t: t.pop("head.norm.weight"), r"missing head\.norm\.weight"),
    (lambda t: t.update({"embedding.position": torch.zeros(16, 8).half()}), "has shape"),
    (lambda t: t.pop("layers.0.attention.mixture"), "missing layers.0.attention.mixture"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
@pytest.mark.parametrize("form", ["sat", "megavideo"])
def test_an_incomplete_source_is_refused(
    damage: Damage, message: str, form: str, tmp_path: Path
) -> None:
    tensors = weights()
    damage(tensors)
    folder = tmp_path / "source"
    write_split_sat(folder, tensors, 1) if form == "sat" else hold(folder, tensors)
    with pytest.raises(ValueError, match=message):
        command(folder, tmp_path / "dst", "--to", "huggingface")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_every_flipped_bit_of_a_source_with_digests_is_noticed(tmp_path: Path) -> None:
    """Of SAT's files too, by the checksums of zip, but for the ignored rest of their headers."""
    run, ours, sat = tmp_path / "run", tmp_path / "ours", tmp_path / "sat"
    write_run(run)
    hold(ours, weights(), 2)
    chosen = random.Random(0)
    for folder in (run, ours):
        paths = [path for path in sorted(folder.rglob("*.*")) if path.is_file()]
        for _ in range(20):
            path = chosen.choice(paths)
            healthy = path.read_bytes()
            content = bytearray(healthy)
            content[chosen.randrange(len(content))] ^= 1 << chosen.randrange(8)
            path.write_bytes(content)
            with pytest.raises((ValueError, FileNotFoundError)):
                command(folder, tmp_path / "dst", "--to", "sat")
            path.write_bytes(healthy)
            assert not (tmp_path / "dst").exists()
    path = write_split_sat(sat, weights(), 1) / "100" / "mp_rank_00_model_states.pt"
    content = bytearray(path.read_bytes())
    content[content.index(weights()["embedding.word"].numpy().tobytes()) + 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"embedding\.word: .* is damaged: a tensor's checksum"):
        command(sat, tmp_path / "dst", "--to", "megavideo")


@pytest.mark.parametrize("damage", ["file", "manifest"])
def test_a_half_copied_source_is_refused(damage: str, tmp_path: Path) -> None:
    hold(tmp_path / "ours", weights(), 2)
    name = "weights.json" if damage == "manifest" else "layers.1.tp-01-of-02.safetensors"
    (tmp_path / "ours" / name).unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=r"no whole checkpoint|is missing"):
        command(tmp_path / "ours", tmp_path / "dst", "--to", "sat")


# Interruptions.


class Stopping(Reader):
    """Reads like another reader, but stops after some tensors."""

    def __init__(self, reader: Reader, after: int):
        self.__dict__.update(vars(reader))
        self.reader, self.left, self.count = reader, after, 0

    def blocks(self, name: str) -> Iterator[Tensor]:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        self.count += 1
        return self.reader.blocks(name)


def stopped(writer: Writer, folder: Path, after: int) -> tuple[bool, int]:
    """Convert folder/ours to folder/dst; whether it was finished, and tensors read."""
    reader = Stopping(open_checkpoint(folder / "ours"), after)
    tensors = select(reader, None, True)
    conversion = Conversion(reader, writer, folder / "dst", tensors, threads=1)
    try:
        convert(conversion, verify=True)
    except KeyboardInterrupt:
        assert not (folder / "dst").exists()
        return False, reader.count
    return True, reader.count


def test_an_interrupted_conversion_goes_on_where_it_was(tmp_path: Path) -> None:
    tensors = weights()
    hold(tmp_path / "ours", tensors)
    reads = []
    for _ in range(2):  # the second time, less than a layer short of the end is enough
        done, count = stopped(ShardedWriter(4, None), tmp_path, after=30)
        reads.append(count)
    assert done and reads[0] == 30
    assert sum(reads) < 2 * len(tensors), "finished layers are not read again"
    assert_holds(tmp_path / "dst", tensors)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dst", "ours"]
    assert not (tmp_path / "dst" / "journal").exists()


def test_finished_files_are_checked_before_they_are_kept(tmp_path: Path) -> None:
    tensors = weights()
    hold(tmp_path / "ours", tensors)
    stopped(ShardedWriter(2, None), tmp_path, after=25)
    kept = tmp_path / ".dst.partial" / "layers.0.tp-01-of-02.safetensors"
    assert (kept.parent / "journal" / "layers.0.tp-00-of-02.safetensors.json").is_file()
    content = bytearray(kept.read_bytes())
    content[-1] ^= 1
    kept.write_bytes(content)
    assert stopped(ShardedWriter(2, None), tmp_path, after=-1)[0]
    assert_holds(tmp_path / "dst", tensors)


def test_what_another_conversion_began_is_discarded(tmp_path: Path) -> None:
    tensors = weights()
    hold(tmp_path / "ours", tensors)
    stopped(ShardedWriter(2, None), tmp_path, after=25)
    done, count = stopped(ShardedWriter(4, None), tmp_path, after=-1)
    assert done and count == len(tensors)
    assert ShardedReader(tmp_path / "dst").tp == 4
    assert not list((tmp_path / "dst").glob("*of-02*"))
    shutil.rmtree(tmp_path / "dst")
    stopped(ShardedWriter(2, None), tmp_path, after=25)
    shutil.rmtree(tmp_path / "ours")
    other = weights(seed=1)
    hold(tmp_path / "ours", other)
    assert stopped(ShardedWriter(2, None), tmp_path, after=-1)[0]
    assert_holds(tmp_path / "dst", other)


# Memory.

ROUTES = [
    ("large", "sat", ["--to", "sat", "--tp", "2"]),
    ("sat", "ours", ["--to", "megavideo", "--tp", "4"]),
    ("ours", "hf", ["--to", "huggingface", "--max-file-size", "100MB"]),
    ("hf", "sat1", ["--to", "sat"]),
    ("sat1", "ours1", ["--to", "megavideo"]),
]


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


@pytest.mark.slow
def test_memory_is_bounded_by_the_largest_tensor_not_by_the_model(tmp_path: Path) -> None:
    """Weights of 330 MB, the largest 25 MB, through every reader and writer, peak by the kernel."""
    for limit in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):  # what malloc keeps for later is not held
        ctypes.CDLL(None).mallopt(limit, 1 << 20)
    sizes = model(words=24_000, hidden=512, layers=30)
    table = parameter_table(sizes, RecipeConfig(stage="keyframes", steps=1))
    tensors = {row.name: torch.zeros(row.shape, dtype=torch.half) for row in table}
    largest = max(tensor.nbytes for tensor in tensors.values())
    assert sum(tensor.nbytes for tensor in tensors.values()) > 10 * largest
    hold(tmp_path / "large", tensors)
    del tensors
    for source, target, options in ROUTES:
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
        command(tmp_path / source, tmp_path / target, *options)
        grown = (memory("VmHWM") - before) / largest
        assert grown <= 3, f"{source} -> {target} took {grown:.1f} times the largest tensor"
        print(f"{source} -> {target}: {grown:.2f} times the largest tensor")


def memory(field: str) -> int:
    """Bytes of this process, as the kernel counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
