"""From a checkpoint's folder to a stage that decodes; and the text-to-image model inside one."""

import json
from pathlib import Path

import torch
import xxhash

from megavideo.checkpoint.manifest import MANIFEST, check_learned_from, read_training
from megavideo.checkpoint.sources import find_checkpoint
from megavideo.checkpoint.tokenizers import TokenizerDigests
from megavideo.config.schema import Config, ParallelConfig
from megavideo.data.text_tokenizer import TextTokenizer
from megavideo.engine.weights import load_model
from megavideo.engine.world import World
from megavideo.generate.pipeline import Stage
from megavideo.generate.work import base_recipe
from megavideo.model.build import build_model, canonical_parameters


def open_checkpoint(path: Path, stage: str, bare: Config | None) -> tuple[Path, Config]:
    """The checkpoint at `path` (a run's newest), and the configuration that it was trained with.

    Args:
        bare: for bare weights, which do not say what they were trained with.

    Raises:
        FileNotFoundError: if there is none, and no configuration for bare weights.
        ValueError: if it is damaged, or of another stage than `stage`.
    """
    checkpoint = find_checkpoint(path)
    if checkpoint is None:
        if bare is None:
            raise FileNotFoundError(
                f"{path} holds no checkpoint of a run; for other weights (SAT, Hugging Face's "
                "layout, ours) say their sizes with --model FILE"
            )
        return path, bare
    config = Config.model_validate_json(json.dumps(read_training(checkpoint).config))
    if config.recipe.stage != stage:
        raise ValueError(
            f"{path} was trained as stage {config.recipe.stage}; a checkpoint of stage {stage} is "
            "needed here"
        )
    return checkpoint, config


def folder_digest(folder: Path, manifest: str = MANIFEST) -> str:
    """What tells a folder of weights from another: XXH3-128 of its manifest, which seals it.

    A published one has none: names and sizes of its files stand in for it.
    """
    if (folder / manifest).is_file():
        return xxhash.xxh3_128_hexdigest((folder / manifest).read_bytes())
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    seen = [(str(path.relative_to(folder)), path.stat().st_size) for path in files]
    return xxhash.xxh3_128_hexdigest(repr(seen).encode())


def load_stage(
    checkpoint: Path, config: Config, parallel: ParallelConfig, world: World, image_digest: str
) -> Stage:
    """Load a checkpoint's model, in recipe.precision, onto this process's device.

    Args:
        image_digest: of the image tokenizer, whose tokens the model is to read and write.

    Raises: ValueError if the model learned from other tokenizers, or the text tokenizer has other
        ids; before anything large is read.
    """
    config = config.model_copy(update={"parallel": parallel})
    text = TextTokenizer(config.data.text_tokenizer, config.model.image_codes)
    ids = (text.pad, text.newline, text.begin_of_image)
    known = (config.model.pad, config.model.newline, config.model.begin_of_image)
    if ids != known:
        raise ValueError(
            f"{text.path} has padding, line break and the first id after text at {ids}, the model "
            f"of {checkpoint} at {known}; name the tokenizer of its training by --text-tokenizer"
        )
    if (checkpoint / MANIFEST).is_file():  # bare weights do not say
        ours = TokenizerDigests(text.digest, image_digest)
        remedy = "name that one, by --text-tokenizer or --image-tokenizer"
        check_learned_from(checkpoint, ours, remedy)
    model = load_model(config, checkpoint, world.device, world.mesh)
    return Stage(model, config, text, world.mesh)


def base_of(stage: Stage) -> Stage:
    """The text-to-image model that a text-to-video model holds: the same weights, not copied."""
    config = stage.config.model_copy(update={"recipe": base_recipe(stage.config.recipe)})
    with torch.device("meta"):
        base = build_model(config.model, config.recipe, mesh=stage.mesh)
    weights = canonical_parameters(stage.model)
    shared = {parameter: weights[name] for name, parameter in canonical_parameters(base).items()}
    for module in base.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, shared[parameter])
    return Stage(base.eval(), config, stage.text, stage.mesh)
