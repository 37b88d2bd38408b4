"""train-superres: from captioned videos and a base run to a model that loads and enlarges."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from megavideo.checkpoint.tokenizers import TokenizerDigests
from megavideo.data.image_tokenizer import ImageTokenizer, ImageTokenizerConfig
from megavideo.data.text_tokenizer import TextTokenizer
from megavideo.sampling.strategy import Strategy
from megavideo.superres.checkpoint import Origin, load, origin_of
from megavideo.superres.command import main
from megavideo.superres.model import DirectSuperResolution, IterativeSuperResolution
from megavideo.superres.upsample import refine, upsample
from tests.unit.superres.samples import write_base, write_clips, write_tokenizers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("superres")
    write_clips(folder / "clips")
    write_tokenizers(folder)
    write_base(folder / "base")
    return folder


def train(folder: Path, out: str, *options: str) -> str:
    paths = {"base": "base", "out": out, "text-tokenizer": "text.model"}
    paths["image-tokenizer"] = "image.safetensors"
    arguments = [str(folder / "clips" / "captions.csv"), "--steps=4", "--batch=4", "--holdout=0.3"]
    arguments += [f"--{name}={folder / path}" for name, path in paths.items()]
    arguments += ["--frames-per-video=3", "--workers=1", "--device=cpu", *options]
    result = CliRunner().invoke(main, arguments)
    if isinstance(result.exception, ValueError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_a_trained_model_enlarges_a_clip_and_says_what_it_was_made_with(folder: Path) -> None:
    files = [f"--preview={folder / 'preview.png'}", f"--json={folder / 'score.json'}"]
    output = train(folder, "model", *files)
    score = json.loads((folder / "score.json").read_text())
    assert 0 <= score["accuracy"] < 1 and 0 < score["commonest"] < 1 < score["loss"]
    assert f"{score['frames']} held-out frames: loss {score['loss']:.3f}" in output
    assert Image.open(folder / "preview.png").height > 3 * 48
    image = ImageTokenizer.load(folder / "image.safetensors")
    text = TextTokenizer(folder / "text.model", image.num_codes)
    origin = origin_of(folder / "model")
    assert origin == Origin(TokenizerDigests(text.digest, image.digest), 4)
    model = load(folder / "model")
    assert isinstance(model, DirectSuperResolution)
    frames = torch.randint(16, (3, 4))
    fine = upsample(model, text.encode("a red circle"), frames, Strategy(), seed=0)
    assert image.decode_frames(fine.unflatten(1, (6, 6))).shape == (3, 48, 48, 3)
    assert sorted(path.name for path in (folder / "model").iterdir()) == [
        "base", "superres.json", "weights.safetensors",
    ]  # fmt: skip


def test_a_trained_refinement_draws_enlarged_frames_anew(folder: Path) -> None:
    output = train(folder, "iterative", "--kind=iterative", f"--preview={folder / 'other.png'}")
    assert "tokens right" in output
    assert Image.open(folder / "other.png").height > 3 * 48
    model = load(folder / "iterative")
    assert isinstance(model, IterativeSuperResolution)
    assert refine(model, [17, 18], torch.randint(16, (2, 36)), seed=0).shape == (2, 36)


def test_an_interrupted_run_goes_on_to_the_same_weights(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(folder, "whole")
    with monkeypatch.context() as patch:
        patch.setattr("megavideo.superres.command.save", lambda *_: 1 / 0)
        with pytest.raises(AssertionError):
            train(folder, "cut", "--save-every=3")
    assert (folder / "cut" / "training.safetensors").exists()
    train(folder, "cut", "--save-every=3")
    whole, cut = (load(folder / name).state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_tokenizers_of_other_data_and_a_base_that_is_no_run_are_refused(folder: Path) -> None:
    config = ImageTokenizerConfig(channels=4, z_channels=8, num_codes=32, rates=(8,))
    ImageTokenizer(config).save(folder / "other.safetensors")
    with pytest.raises(ValueError, match="the base has 16 image codes and 337 tokens"):
        train(folder, "x", f"--image-tokenizer={folder / 'other.safetensors'}")
    with pytest.raises(ValueError, match="is no run of `megavideo train`"):
        train(folder, "x", f"--base={folder / 'clips'}")
