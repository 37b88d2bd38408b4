"""A folder with a run of each stage, tokenizers for them, and `megavideo generate` on it."""

from dataclasses import replace
from pathlib import Path

import torch
from click.testing import CliRunner

from megavideo.checkpoint.base import base_path
from megavideo.checkpoint.files import combined_digest, tensor_entry
from megavideo.checkpoint.manifest import Progress, Training
from megavideo.checkpoint.tokenizers import TokenizerDigests
from megavideo.config.schema import Config, ModelConfig
from megavideo.data.image_tokenizer import ImageTokenizer, ImageTokenizerConfig
from megavideo.data.text_tokenizer import TextTokenizer, train_text_model
from megavideo.generate.command import main
from megavideo.model.build import canonical_parameters
from megavideo.model.trainable import is_trainable
from megavideo.superres.checkpoint import Origin, SuperResolution, save
from megavideo.superres.config import DirectConfig, IterativeConfig
from megavideo.superres.model import DirectSuperResolution, IterativeSuperResolution
from tests.unit.checkpoint.samples import write_checkpoint, write_parts
from tests.unit.generate.models import draw_weights
from tests.unit.superres.samples import drawn

PROMPTS = ["a red circle moves up", "a blue square does not move", "a star grows"]
CODES = 32


def make_runs(folder: Path) -> None:
    """`folder`/stage1, stage2 (with windows), text.model and image.safetensors."""
    (folder / "text.model").write_bytes(train_text_model(PROMPTS, 300))
    torch.manual_seed(0)
    config = ImageTokenizerConfig(channels=4, z_channels=4, num_codes=CODES, rates=(8,))
    ImageTokenizer(config).save(folder / "image.safetensors")
    write_run(folder, "stage1", "keyframes", window=0)
    write_run(folder, "stage2", "interpolation", window=2)


def write_run(folder: Path, name: str, stage: str, window: int) -> None:
    text = TextTokenizer(folder / "text.model", CODES)
    model = ModelConfig(
        hidden=16,
        heads=2,
        layers=2,
        text_slots=24,
        frames=5,
        side=4,
        vocab_size=text.vocab_size,
        image_codes=CODES,
        pad=text.pad,
        newline=text.newline,
        begin_of_image=text.begin_of_image,
        position_rows=64,
        image_position=32,
        frame_position_rows=64,
    )
    config = Config.model_validate(
        {
            "model": model,
            "recipe": {"stage": stage, "window": window, "steps": 1, "precision": "fp32"},
            "data": {"train": "nowhere", "text_tokenizer": str(folder / "text.model")},
            "run": {"directory": str(folder / name)},
        }
    )
    _save(folder / name, config)


def _save(run: Path, config: Config) -> None:
    parameters = canonical_parameters(draw_weights(config.model, config.recipe))
    stage = config.recipe.stage
    trained = {n: p.data for n, p in parameters.items() if is_trainable(n, stage)}
    frozen = {n: p.data for n, p in parameters.items() if n not in trained}
    digest = combined_digest({name: tensor_entry(tensor) for name, tensor in frozen.items()})
    write_parts(base_path(run, digest), frozen, tp=1)
    whole = config.model_dump(mode="json")
    tokenizers = tokenizers_in(run.parent)
    training = Training(Progress(1, 1, 1), whole, "data", digest, None, tokenizers)
    write_checkpoint(run, trained, training)


def tokenizers_in(folder: Path) -> TokenizerDigests:
    """Digests of text.model and image.safetensors."""
    text = TextTokenizer(folder / "text.model", CODES)
    return TokenizerDigests(text.digest, ImageTokenizer.load(folder / "image.safetensors").digest)


def generate(folder: Path, output: Path, *options: str) -> str:
    """Call the program on both stages of `make_runs`; what it printed.

    Raises: whatever it raised.
    """
    arguments = ["--image-tokenizer", str(folder / "image.safetensors"), "--output", str(output)]
    result = CliRunner().invoke(main, [*arguments, *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def both_stages(folder: Path) -> list[str]:
    """The options that name both."""
    return ["--checkpoint", str(folder / "stage1"), "--stage2", str(folder / "stage2")]


def make_superres(folder: Path, name: str = "superres", image_digest: str | None = None) -> None:
    """`folder`/`name`: frames of 4 x 4 tokens become frames of 12 x 12."""
    config = DirectConfig(
        **_superres_sizes(folder), coarse_side=4, text_slots=8, coarse_position=33
    )
    _save_superres(folder, name, DirectSuperResolution(config), image_digest)


def make_refinement(folder: Path, name: str = "refinement", side: int = 12) -> None:
    """`folder`/`name`: frames of `side` x `side` tokens are drawn anew."""
    config = IterativeConfig(**_superres_sizes(folder) | {"fine_side": side}, text_slots=8)
    _save_superres(folder, name, IterativeSuperResolution(config), None)


def _superres_sizes(folder: Path) -> dict[str, int]:
    text = TextTokenizer(folder / "text.model", CODES)
    return {
        "hidden": 16, "heads": 2, "layers": 1, "fine_side": 12, "position_rows": 64,
        "vocab_size": text.vocab_size, "image_codes": CODES, "begin_of_image": text.begin_of_image,
    }  # fmt: skip


def _save_superres(
    folder: Path, name: str, model: SuperResolution, image_digest: str | None
) -> None:
    tokenizers = tokenizers_in(folder)
    if image_digest is not None:
        tokenizers = replace(tokenizers, image=image_digest)
    save(
        folder / name,
        drawn(model, seed=0).float(),
        Origin(tokenizers, 1),
    )
