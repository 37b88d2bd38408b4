"""`megavideo generate` on tiny runs: files, seeds, resumption, starting frames, mistakes."""

import json
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from ruamel.yaml import YAML

from megavideo.checkpoint.convert_command import main as convert
from megavideo.data.image_tokenizer import ImageTokenizer, images_of
from megavideo.data.text_tokenizer import train_text_model
from megavideo.data.video import read_clip, write_video
from megavideo.generate import run
from megavideo.generate.load import open_checkpoint
from megavideo.generate.requests import Request
from megavideo.superres.upsample import round_mask
from tests.unit.generate.runs import (
    PROMPTS,
    both_stages,
    generate,
    make_refinement,
    make_runs,
    make_superres,
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    make_runs(folder)
    return folder


def tokens(output: Path, prompt: str = PROMPTS[0], number: int = 0) -> np.ndarray:
    return np.load(output / Request(prompt, number).name / "tokens.npy")


def prompt_options(prompts: list[str]) -> list[str]:
    return [word for prompt in prompts for word in ("--prompt", prompt)]


def test_a_video_has_33_frames_in_every_file(runs: Path, tmp_path: Path) -> None:
    said = generate(runs, tmp_path, *both_stages(runs), *prompt_options(PROMPTS[:1]))
    assert "1 videos generated, 0 were there already; 528 tokens" in said
    (folder,) = tmp_path.iterdir()
    clip = read_clip(folder / "video.mp4", 8.0)
    assert clip.frames.shape == (33, 32, 32, 3) and clip.duration_s == 33 / 8
    with Image.open(folder / "video.gif") as gif:
        assert gif.n_frames <= 33 and gif.size == (32, 32)  # equal neighbours are merged
    assert tokens(tmp_path).shape == (33, 16) and tokens(tmp_path).dtype == np.uint16
    about = json.loads((folder / "about.json").read_text())
    assert about["prompt"] == PROMPTS[0] and about["fps"] == 8.0 and about["frames"] == 33
    assert about["settings"]["stage1"]["checkpoint"] == "step-00000001"
    assert about["files"].keys() == {"video.mp4", "video.gif", "frames.png", "tokens.npy"}
    with av.open(str(folder / "video.mp4")) as container:
        assert container.metadata["comment"] == PROMPTS[0]


def test_a_video_depends_on_prompt_and_seed_not_on_what_is_made_beside_it(
    runs: Path, tmp_path: Path
) -> None:
    stages = [*both_stages(runs), "--rounds", "1"]
    generate(runs, tmp_path / "a", *stages, *prompt_options(PROMPTS[1:]), "--samples", "2")
    generate(runs, tmp_path / "b", *stages, *prompt_options(PROMPTS[2:]), "--batch", "1")
    generate(runs, tmp_path / "c", *stages, *prompt_options(PROMPTS[2:]), "--seed", "1")
    alone = tokens(tmp_path / "b", PROMPTS[2])
    assert np.array_equal(tokens(tmp_path / "a", PROMPTS[2]), alone)
    assert not np.array_equal(tokens(tmp_path / "a", PROMPTS[2], 1), alone)
    assert not np.array_equal(tokens(tmp_path / "c", PROMPTS[2]), alone)


def test_a_list_that_was_cut_off_goes_on(runs: Path, tmp_path: Path) -> None:
    options = [*both_stages(runs), *prompt_options(PROMPTS), "--rounds", "0"]
    generate(runs, tmp_path, *options)
    first, second, third = (tmp_path / Request(prompt).name for prompt in PROMPTS)
    before = (first / "about.json").stat().st_mtime_ns
    (second / "about.json").unlink()  # it was being written
    (third / "tokens.npy").write_bytes(b"half")
    wanted = tokens(tmp_path, PROMPTS[1])
    assert "2 videos generated, 1 were there already" in generate(runs, tmp_path, *options)
    assert (first / "about.json").stat().st_mtime_ns == before
    assert np.array_equal(tokens(tmp_path, PROMPTS[1]), wanted)
    assert tokens(tmp_path, PROMPTS[2]).shape == (5, 16)
    assert "all 3 videos are there already" in generate(runs, tmp_path, *options)
    with pytest.raises(ValueError, match=r"other settings \(temperature\)"):
        generate(runs, tmp_path, *options, "--temperature", "0.5")


def test_guidance_clusters_and_published_windows_change_the_video(
    runs: Path, tmp_path: Path
) -> None:
    np.save(tmp_path / "labels.npy", np.arange(32) % 5)
    plain = ["--checkpoint", str(runs / "stage1"), *prompt_options(PROMPTS[:1])]
    made = {"plain": plain}
    made["guidance"] = [*plain, "--guidance", "3"]
    made["weight"] = [*plain, "--text-weight", "1.4"]
    made["clusters"] = [*plain, "--clusters", str(tmp_path / "labels.npy"), "--top-k", "2"]
    made["greedy"] = [*plain, "--first-temperature", "0", "--temperature", "0"]
    videos = {}
    for name, options in made.items():
        generate(runs, tmp_path / name, *options)
        videos[name] = tokens(tmp_path / name).tobytes()
    assert len(set(videos.values())) == len(videos)


def test_frames_are_enlarged(runs: Path, tmp_path: Path) -> None:
    make_superres(runs)
    options = ["--checkpoint", str(runs / "stage1"), *prompt_options(PROMPTS[:1])]
    generate(runs, tmp_path / "plain", *options)
    generate(runs, tmp_path / "large", *options, "--superres", str(runs / "superres"))
    (folder,) = (tmp_path / "large").iterdir()
    assert np.array_equal(tokens(tmp_path / "large"), tokens(tmp_path / "plain"))
    assert np.load(folder / "enlarged.npy").shape == (5, 144)
    assert read_clip(folder / "video.mp4", 1.0).frames.shape == (5, 96, 96, 3)
    assert "all 1 videos are there" in generate(
        runs, tmp_path / "large", *options, "--superres", str(runs / "superres")
    )
    with pytest.raises(ValueError, match=r"other settings \(superres, superres_temperature\)"):
        generate(runs, tmp_path / "large", *options)
    options += ["--superres", str(runs / "superres")]
    generate(runs, tmp_path / "cold", *options, "--superres-temperature", "0.01")
    cold, warm = (
        np.load(next((tmp_path / n).iterdir()) / "enlarged.npy") for n in ("cold", "large")
    )
    assert not np.array_equal(cold, warm)
    make_superres(runs, "stranger", image_digest="another")
    with pytest.raises(ValueError, match="was trained with another image tokenizer"):
        generate(runs, tmp_path / "x", *options[:-1], str(runs / "stranger"))


def test_enlarged_frames_are_refined(runs: Path, tmp_path: Path) -> None:
    make_superres(runs)
    make_refinement(runs)
    options = ["--checkpoint", str(runs / "stage1"), *prompt_options(PROMPTS[:1])]
    options += ["--superres", str(runs / "superres")]
    refine = ["--refine", str(runs / "refinement")]
    generate(runs, tmp_path / "large", *options)
    generate(runs, tmp_path / "refined", *options, *refine)
    (large,), (refined,) = ((tmp_path / name).iterdir() for name in ("large", "refined"))
    before, after = (np.load(folder / "enlarged.npy") for folder in (large, refined))
    drawn = round_mask(12, 1).numpy()  # what the first round leaves is never drawn anew
    assert np.array_equal(before[:, ~drawn], after[:, ~drawn])
    assert (before[:, drawn] != after[:, drawn]).mean() > 0.5
    about = json.loads((refined / "about.json").read_text())["settings"]
    assert about["refine"] and about["refine"] != about["superres"]
    (refined / "enlarged.npy").unlink()  # it was being written
    assert "1 videos generated" in generate(runs, tmp_path / "refined", *options, *refine)
    assert np.array_equal(np.load(refined / "enlarged.npy"), after)
    assert "all 1 videos are there" in generate(runs, tmp_path / "refined", *options, *refine)
    with pytest.raises(ValueError, match=r"other settings \(refine\)"):
        generate(runs, tmp_path / "refined", *options)
    said = generate(runs, tmp_path / "x", *options, *refine, "--dry-run")
    assert "5 frames to 12 x 12 tokens (96 x 96 pixels), then refined" in said


def test_a_given_video_is_enlarged(runs: Path, tmp_path: Path) -> None:
    make_superres(runs)
    frames = np.random.default_rng(0).integers(0, 255, (3, 32, 32, 3), np.uint8)
    write_video(tmp_path / "small.mp4", frames, 2.0)
    options = ["--stage2", str(runs / "stage2"), "--interpolate", str(tmp_path / "small.mp4")]
    options += ["--fps", "2", "--rounds", "0", *prompt_options(PROMPTS[:1])]
    generate(runs, tmp_path / "out", *options, "--superres", str(runs / "superres"))
    (folder,) = (tmp_path / "out").iterdir()
    assert np.load(folder / "enlarged.npy").shape == (3, 144)
    assert read_clip(folder / "video.mp4", 2.0).frames.shape == (3, 96, 96, 3)


def test_bare_weights_need_sizes_and_give_the_same_video(runs: Path, tmp_path: Path) -> None:
    options = [*prompt_options(PROMPTS[:1]), "--rounds", "1"]
    generate(runs, tmp_path / "run", *both_stages(runs), *options)
    sat = [tmp_path / stage for stage in ("stage1", "stage2")]
    for folder in sat:
        arguments = [str(runs / folder.name), str(folder), "--to", "sat"]
        assert CliRunner().invoke(convert, arguments, catch_exceptions=False).exit_code == 0
    bare = [*options, "--checkpoint", str(sat[0]), "--stage2", str(sat[1])]
    with pytest.raises(FileNotFoundError, match="--model FILE"):
        generate(runs, tmp_path / "bare", *bare)
    _, config = open_checkpoint(runs / "stage1", "keyframes", None)
    YAML(typ="safe", pure=True).dump({"model": config.model.model_dump()}, tmp_path / "model.yaml")
    bare += ["--model", str(tmp_path / "model.yaml"), "--precision", "fp32", "--window", "2"]
    with pytest.raises(ValueError, match="--text-tokenizer"):
        generate(runs, tmp_path / "bare", *bare)
    generate(runs, tmp_path / "bare", *bare, "--text-tokenizer", str(runs / "text.model"))
    assert np.array_equal(tokens(tmp_path / "bare"), tokens(tmp_path / "run"))


def test_a_given_first_frame_is_every_videos_first(runs: Path, tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 255, (48, 40, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "start.png")
    options = ["--checkpoint", str(runs / "stage1"), "--first-frame", str(tmp_path / "start.png")]
    generate(runs, tmp_path / "out", *options, *prompt_options(PROMPTS[:2]))
    tokenizer = ImageTokenizer.load(runs / "image.safetensors")
    square = read_clip(tmp_path / "start.png", 1.0, 32).frames
    expected = tokenizer.encode(images_of(square)).flatten().numpy()
    for prompt in PROMPTS[:2]:
        assert np.array_equal(tokens(tmp_path / "out", prompt)[0], expected)


def test_a_given_video_is_interpolated(runs: Path, tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (6, 32, 32, 3), np.uint8)
    write_video(tmp_path / "slow.mp4", frames, 2.0)
    options = ["--stage2", str(runs / "stage2"), "--interpolate", str(tmp_path / "slow.mp4")]
    options += ["--fps", "2", "--rounds", "1", *prompt_options(PROMPTS[:1])]
    generate(runs, tmp_path / "out", *options)
    made = tokens(tmp_path / "out")
    tokenizer = ImageTokenizer.load(runs / "image.safetensors")
    given = tokenizer.encode(images_of(read_clip(tmp_path / "slow.mp4", 2.0, 32).frames))
    assert made.shape == (11, 16)
    assert np.array_equal(made[::2], given.flatten(1).numpy())
    generate(runs, tmp_path / "one", *options, "--batch", "1")
    assert np.array_equal(tokens(tmp_path / "one"), made)


def test_a_rate_that_was_not_trained_is_said(
    runs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = [*both_stages(runs), *prompt_options(PROMPTS[:1]), "--fps", "4", "--rounds", "2"]
    with caplog.at_level("WARNING", "megavideo"):
        generate(runs, tmp_path, *options)
    assert "stage 2 was not trained at 16 frames a second" in caplog.text
    assert "stage 1" not in caplog.text


def test_another_text_tokenizer_is_refused(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "other.model").write_bytes(train_text_model(PROMPTS, 310))
    options = [*both_stages(runs), *prompt_options(PROMPTS[:1])]
    with pytest.raises(
        ValueError, match=r"other\.model has padding, .* at \(35, 36, 342\), the model"
    ):
        generate(runs, tmp_path, *options, "--text-tokenizer", str(tmp_path / "other.model"))


def test_tokenizers_that_the_stages_did_not_learn_from_are_refused(
    runs: Path, tmp_path: Path
) -> None:
    options = [*both_stages(runs), *prompt_options(PROMPTS[:1])]
    (tmp_path / "as-large.model").write_bytes(train_text_model([p[::-1] for p in PROMPTS], 300))
    with pytest.raises(ValueError, match=r"stage1/.* another text tokenizer .*--text-tokenizer"):
        generate(runs, tmp_path, *options, "--text-tokenizer", str(tmp_path / "as-large.model"))
    torch.manual_seed(1)
    other = ImageTokenizer(ImageTokenizer.load(runs / "image.safetensors").config)
    other.save(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"stage1/.* another image tokenizer .*--image-tokenizer"):
        generate(runs, tmp_path, *options, "--image-tokenizer", str(tmp_path / "other.safetensors"))


def test_an_output_that_cannot_be_written_is_told_before_models_are_loaded(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_loaded", lambda *_: pytest.fail("loaded"))
    (tmp_path / "file").touch()
    options = [*both_stages(runs), *prompt_options(PROMPTS[:1])]
    with pytest.raises(OSError, match="file"):
        generate(runs, tmp_path / "file" / "videos", *options)


def test_a_dry_run_counts_and_writes_nothing(runs: Path, tmp_path: Path) -> None:
    options = [*both_stages(runs), *prompt_options(PROMPTS), "--samples", "2", "--guidance", "3"]
    said = generate(runs, tmp_path / "out", *options, "--dry-run")
    assert "6 of 33 frames at 8 fps" in said
    assert "528 a video, 3,168 in all" in said  # 33 frames of 16 tokens
    assert "17 sequences a video" in said  # 1 first frame, 2 with guidance, 2 + 4 + 8 runs
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stage2", "stage2"], "--checkpoint"),
        (["--checkpoint", "stage2"], "trained as stage interpolation"),
        (["--checkpoint", "stage1", "--rounds", "1"], "needs --stage2"),
        (["--checkpoint", "nowhere"], "holds no checkpoint"),
        (["--checkpoint", "stage1", "--prompts", "text.model"], "either --prompt"),
        (["--interpolate", "text.model"], "needs --stage2"),
        (["--stage2", "stage2", "--interpolate", "text.model"], "video text.model"),
        (["--checkpoint", "stage1", "--clusters", "labels.npy"], "32 integers below 32"),
        (["--checkpoint", "stage1", "--top-p", "0"], "top_p=0"),
        (["--checkpoint", "stage1", "--image-tokenizer", "other.safetensors"], "has 16 codes"),
        (["--checkpoint", "stage1", "--refine", "refinement"], "--superres DIR made: name both"),
        (["--checkpoint", "stage1", "--superres", "refinement"], "give it to --refine"),
        (["--checkpoint", "stage1", "--superres", "stage1"], "no super-resolution model"),
        (
            ["--checkpoint", "stage1", "--superres", "superres", "--refine", "superres"],
            "give it to --superres",
        ),
        (
            ["--checkpoint", "stage1", "--superres", "superres", "--refine", "smaller"],
            "refines frames of 6 x 6 tokens of 32 codes; --superres makes 12 x 12 of 32",
        ),
    ],
)
def test_mistakes_are_named(
    runs: Path, tmp_path: Path, options: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs)
    np.save("labels.npy", np.zeros(3, np.int64))
    make_superres(runs)
    make_refinement(runs)
    make_refinement(runs, "smaller", side=6)
    from megavideo.data.image_tokenizer import ImageTokenizerConfig

    config = ImageTokenizerConfig(channels=4, z_channels=4, num_codes=16, rates=(8,))
    ImageTokenizer(config).save("other.safetensors")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        generate(runs, tmp_path, *options, *prompt_options(PROMPTS[:1]))
    assert not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1
