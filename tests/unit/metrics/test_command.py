"""evaluate-videos: folders of clips through networks from files, and what is said without them."""

import json
import pickle
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import Tensor, nn

from megavideo.data.video import write_video
from megavideo.metrics.c3d import C3D, c3d_from
from megavideo.metrics.command import main
from megavideo.metrics.network import is_torchscript, load_function

CPU = torch.device("cpu")
C3D_VALUES = 78_409_573  # with 101 classes


class Means(nn.Module):
    """Features: mean and extremes of each colour, and with `motion` its mean change."""

    def forward(self, clips: Tensor, motion: bool = False) -> Tensor:
        x = clips.flatten(3)
        parts = [x.mean(3).mean(2), x.amax(3).amax(2), x.amin(3).amin(2)]
        if motion:
            parts.append((x[:, :, 1:] - x[:, :, :-1]).abs().mean(3).mean(2))
        return torch.cat(parts, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`real` clips, `other` clips that are darker, a short one and a broken one; a network."""
    folder = tmp_path_factory.mktemp("videos")
    rng = np.random.default_rng(0)
    for name, brightest in (("real", 255), ("other", 120)):
        for number in range(8):
            frames = rng.integers(0, brightest, (10, 16, 16, 3)).astype(np.uint8)
            write_video(folder / name / f"{number}.mp4", list(frames), 8)
    write_video(folder / "other" / "short.mp4", list(frames[:3]), 8)
    (folder / "other" / "broken.mp4").write_bytes(b"nothing")
    torch.jit.script(Means()).save(folder / "means.pt")
    return folder


def evaluate(folder: Path, real: str, generated: str, *options: str) -> dict[str, float]:
    arguments = [str(folder / real), str(folder / generated), "--frames=8", "--device=cpu"]
    arguments += ["--features-size=16", "--classifier-size=16", f"--json={folder / 'out.json'}"]
    result = CliRunner().invoke(main, [*arguments, *options])
    if isinstance(result.exception, ValueError | FileNotFoundError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return json.loads((folder / "out.json").read_text())


def test_clips_are_at_no_distance_from_themselves_and_at_some_from_others(folder: Path) -> None:
    network = f"--features={folder / 'means.pt'}"
    assert evaluate(folder, "real", "real", network)["fvd"] < 1e-6
    found = evaluate(folder, "real", "other", network, "--batch=3")
    assert found["real_clips"] == found["generated_clips"] == 8  # short and broken ones left out
    # The range is 2 wide, of 255: means and extremes differ by about 0.5, 1 and 0 in each colour.
    assert 2 < found["fvd"] < 6
    wide = evaluate(folder, "real", "other", network, "--features-range=0..255")
    assert wide["fvd"] == pytest.approx(found["fvd"] * 127.5**2, rel=1e-3)


def test_arguments_reach_the_program_and_a_classifier_gives_a_score(folder: Path) -> None:
    network = f"--classifier={folder / 'means.pt'}"
    options = [network, "--splits=2", "--limit=6", "--classifier-range=-1..1"]
    plain = evaluate(folder, "real", "real", *options)
    moving = evaluate(folder, "real", "real", *options, "--argument=motion=true")
    assert 1 <= plain["inception_score"] < 9 and plain["generated_clips"] == 6
    assert plain["inception_score"] != moving["inception_score"]
    with pytest.raises(ValueError, match="write NAME=true or NAME=false"):
        evaluate(folder, "real", "real", *options, "--argument=motion=1")


def test_missing_networks_and_files_that_are_none_are_explained(folder: Path) -> None:
    with pytest.raises(ValueError, match="name --features for FVD, or --classifier"):
        evaluate(folder, "real", "other")
    with pytest.raises(FileNotFoundError, match=r"not shipped; docs/metrics\.md says which"):
        evaluate(folder, "real", "other", f"--features={folder / 'i3d.pt'}")
    save_file({"x": torch.zeros(1)}, folder / "x.safetensors")
    with pytest.raises(ValueError, match="neither a TorchScript program nor weights of C3D"):
        evaluate(folder, "real", "other", f"--features={folder / 'x.safetensors'}")
    (folder / "cut.safetensors").write_bytes(b"\x08")
    with pytest.raises(ValueError, match="neither a TorchScript program nor weights of C3D"):
        evaluate(folder, "real", "other", f"--features={folder / 'cut.safetensors'}")
    with ZipFile(folder / "means.pt") as whole, ZipFile(folder / "cut.pt", "w") as cut:
        cut.writestr("means/code/x.py", whole.read(whole.namelist()[0]))
    with pytest.raises(ValueError, match=r"TorchScript program .*cut\.pt: "):
        evaluate(folder, "real", "other", f"--features={folder / 'cut.pt'}")
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no video"):
        evaluate(folder, "empty", "other", f"--features={folder / 'means.pt'}")


def test_a_program_that_makes_no_row_of_each_clip_is_refused(folder: Path) -> None:
    torch.jit.script(nn.Flatten(0)).save(folder / "flat.pt")
    with pytest.raises(ValueError, match=r"made \[\d+\] of 8 clips; it must make one row"):
        evaluate(folder, "real", "other", f"--features={folder / 'flat.pt'}")


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("ran",)


def test_weights_are_data_and_never_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "c3d.pickle").write_bytes(pickle.dumps({"fc8.weight": Evil()}))
    torch.save({"fc8.weight": Evil()}, tmp_path / "c3d.pt")
    for name in ("c3d.pickle", "c3d.pt"):
        assert not is_torchscript(tmp_path / name)
        with pytest.raises(ValueError, match="neither a TorchScript program nor weights"):
            load_function(tmp_path / name, {}, True, CPU)
    assert "ran" not in capsys.readouterr().out


def test_c3d_has_its_published_shape() -> None:
    with torch.device("meta"):
        network = C3D(101)
        clips = torch.empty(2, 3, 16, 112, 112)
    assert sum(p.numel() for p in network.parameters()) == C3D_VALUES
    assert network.features(clips).shape == (2, 4096) and network(clips).shape == (2, 101)
    loaded = c3d_from(network.state_dict())
    assert loaded.state_dict().keys() == network.state_dict().keys()
    with pytest.raises(ValueError, match=r"no fc8\.weight"):
        c3d_from({})


def test_arguments_for_weights_have_no_effect_and_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megavideo.metrics.command.load_function", lambda *_: None)
    weights = f"--features={folder / 'c3d.safetensors'}"
    with pytest.raises(ValueError, match="--argument motion=true has no effect"):
        evaluate(folder, "real", "real", weights, "--argument=motion=true")
