"""`megavideo checkpoint` says what is there, what is damaged, what differs, and removes the old."""

from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from megavideo.checkpoint.command import main
from megavideo.checkpoint.commit import list_checkpoints
from megavideo.checkpoint.convert_command import main as convert
from megavideo.checkpoint.parts import Parts
from tests.unit.checkpoint.samples import weights, write_run, write_split_sat

MOMENTS = "optimizer.layers.1.tp-00-of-01.safetensors"


def command(*arguments: object) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)


def test_inspect_prints_stage_progress_parameters_and_base(tmp_path: Path) -> None:
    tensors = write_run(tmp_path / "run")
    output = command("inspect", tmp_path / "run", "--config").output
    parameters = sum(t.numel() for name, t in tensors.items() if ".exp_avg" not in name)
    base = next((tmp_path / "run" / "base").iterdir()).name
    for expected in ("keyframes", "step 20", "160 samples", f"{parameters:,}", base, '"heads": 8'):
        assert expected in output
    counted = [line.split(" tensors")[0] for line in output.splitlines() if " tensors" in line]
    lines = {line[2:19].strip(): line.split()[-1] for line in counted}
    parts = ("embedding", "spatial channel", "temporal channel", "MLP", "LayerNorm")
    assert sum(int(lines[part]) for part in parts) == int(lines["all weights"]), "no part is missed"


def test_verify_reads_every_checkpoint_and_exits_with_1(tmp_path: Path) -> None:
    write_run(tmp_path / "run", step=10)
    write_run(tmp_path / "run", step=20)
    write_split_sat(tmp_path / "sat", weights(), 2)
    result = command("verify", tmp_path / "run", tmp_path / "sat")
    assert result.exit_code == 0 and result.output.count(": whole, ") == 3
    flip(tmp_path / "run" / "checkpoints" / "step-00000010" / MOMENTS)
    result = command("verify", tmp_path / "run", tmp_path / "sat")
    assert result.exit_code == 1
    assert result.output.count(": whole, ") == 2 and "step-00000010: DAMAGED" in result.output
    flip(next((tmp_path / "run" / "base").glob("*/layers.0.*")))
    assert command("verify", tmp_path / "run").output.count("DAMAGED") == 2


def test_verify_reads_a_base_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (10, 20, 30):
        tensors = write_run(tmp_path, step=step)
    reads = Counter[tuple[Path, str]]()
    read = Parts.read
    monkeypatch.setattr(
        Parts, "read", lambda self, name: reads.update([(self.path, name)]) or read(self, name)
    )
    result = command("verify", tmp_path)
    assert result.output.count(f": whole, {len(tensors)} tensors") == 3
    assert set(reads.values()) == {1}
    names = [name for _, name in reads]
    assert set(names) == set(tensors) and "embedding.word" in names
    assert len(names) < 3 * len(tensors)


def test_diff_counts_tensors_and_measures_them(tmp_path: Path) -> None:
    a, b = weights(), weights()
    b["head.norm.bias"][3] += 2
    b["layers.0.attention.mixture"][0] = -a["layers.0.attention.mixture"][0]
    write_split_sat(tmp_path / "a", a, 1)
    write_split_sat(tmp_path / "b", b, 2)
    result = command("diff", tmp_path / "a", tmp_path / "b")
    assert result.exit_code == 1
    assert "head.norm.bias: max abs difference 2.0" in result.output
    assert f"2 of {len(a)} tensors differ" in result.output
    assert command("diff", tmp_path / "a", tmp_path / "a").exit_code == 0
    base = {name: t for name, t in a.items() if name in weights("image")}
    write_split_sat(tmp_path / "base", base, 1)
    output = command("diff", tmp_path / "a", tmp_path / "base").output
    assert "embedding.frame_position: only in the first" in output


def test_a_changed_type_is_a_difference(tmp_path: Path) -> None:
    write_split_sat(tmp_path / "a", weights(), 1)
    options = ["--to", "sat", "--dtype", "fp32"]
    CliRunner().invoke(convert, [str(tmp_path / "a"), str(tmp_path / "b"), *options])
    result = command("diff", tmp_path / "a", tmp_path / "b")
    assert "head.norm.bias: max abs difference 0.000e+00, torch.float16 then" in result.output
    assert result.exit_code == 1


def test_prune_keeps_the_last_and_every_nth(tmp_path: Path) -> None:
    for step in (10, 15, 20, 25, 30):
        write_run(tmp_path, step)
    (tmp_path / "checkpoints" / "latest").write_text("step-00000015\n")
    options = ["--keep-last", 1, "--keep-every", 20]
    output = command("prune", tmp_path, *options, "--dry-run").output
    assert output.count("would remove") == 2 and len(list_checkpoints(tmp_path)) == 5
    command("prune", tmp_path, *options)
    assert [int(f.name[-2:]) for f in list_checkpoints(tmp_path)] == [30, 20, 15]


@pytest.mark.parametrize("name", ["inspect", "verify", "diff", "prune"])
def test_every_command_explains_itself(name: str) -> None:
    assert command(name, "--help").exit_code == 0


def test_prune_refuses_a_folder_without_checkpoints(tmp_path: Path) -> None:
    result = command("prune", tmp_path, "--keep-last", 1)
    assert isinstance(result.exception, ValueError)
