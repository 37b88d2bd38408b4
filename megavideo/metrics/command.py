"""`megavideo evaluate-videos`: Fréchet video distance and Inception Score of folders of clips."""

from collections.abc import Sequence
from pathlib import Path

import click
import torch

from megavideo import options
from megavideo.figures import report_figures
from megavideo.metrics.clips import Cut, read_clips
from megavideo.metrics.frechet import fit, frechet_distance
from megavideo.metrics.inception import inception_score
from megavideo.metrics.network import RANGES, Network, is_torchscript, load_function

FILE = click.Path(dir_okay=False, path_type=Path)
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command()
@click.argument("real", type=FOLDER)
@click.argument("generated", type=FOLDER)
@click.option("--features", type=FILE, help="Network whose features FVD compares, as I3D.")
@click.option("--classifier", type=FILE, help="Network whose logits Inception Score takes, as C3D.")
@click.option(
    "--features-size", type=click.IntRange(min=1), default=224, show_default=True,
    help="Side in pixels of what the feature network sees.",
)  # fmt: skip
@click.option(
    "--classifier-size", type=click.IntRange(min=1), default=112, show_default=True,
    help="Side in pixels of what the classifier sees.",
)  # fmt: skip
@click.option(
    "--features-range", type=click.Choice(list(RANGES)), default="-1..1", show_default=True,
    help="Pixel values that the feature network expects.",
)  # fmt: skip
@click.option(
    "--classifier-range", type=click.Choice(list(RANGES)), default="0..255", show_default=True,
    help="Pixel values that the classifier expects.",
)  # fmt: skip
@click.option(
    "--argument", "arguments", multiple=True, metavar="NAME=true|false",
    help="Given to TorchScript networks, as return_features=true; may be repeated.",
)  # fmt: skip
@click.option(
    "--frames", type=click.IntRange(min=1), default=16, show_default=True, help="Frames of a clip."
)
@click.option(
    "--fps", type=click.FloatRange(min=0, min_open=True), default=8.0, show_default=True,
    help="Frames a second at which clips are read.",
)  # fmt: skip
@click.option("--limit", type=click.IntRange(min=2), help="Use only so many files of each folder.")
@click.option(
    "--splits", type=click.IntRange(min=1), default=10, show_default=True,
    help="Parts over which Inception Score is averaged.",
)  # fmt: skip
@click.option(
    "--batch", type=click.IntRange(min=1), default=8, show_default=True, help="Clips at once."
)
@options.device
@options.json_output
def main(
    real: Path,
    generated: Path,
    features: Path | None,
    classifier: Path | None,
    features_size: int,
    classifier_size: int,
    features_range: str,
    classifier_range: str,
    arguments: Sequence[str],
    frames: int,
    fps: float,
    limit: int | None,
    splits: int,
    batch: int,
    device: str,
    output: Path | None,
) -> None:
    """Compare the videos below folder GENERATED with those below REAL.

    FVD needs --features, Inception Score (of GENERATED) --classifier; networks are not shipped,
    see docs/metrics.md. A TorchScript file is a PROGRAM that this command RUNS: name only files
    that you trust. Weights of C3D (.safetensors, or a dictionary saved by torch) are only data.

    \b
    Example:
      megavideo evaluate-videos clips/test generated --features i3d_torchscript.pt \\
          --argument rescale=false --argument resize=false --argument return_features=true
    """
    if features is None and classifier is None:
        raise ValueError("name --features for FVD, or --classifier for Inception Score, or both")
    given, place = _parse(arguments), torch.device(device)
    # Both are loaded before anything is computed, which may take hours.
    eye = None if features is None else load_function(features, given, False, place)
    judge = None if classifier is None else load_function(classifier, given, True, place)
    if given and not any(path and is_torchscript(path) for path in (features, classifier)):
        raise ValueError(f"--argument {arguments[0]} has no effect: no network is a program")
    result: dict[str, str | int | float] = {"real": str(real), "generated": str(generated)}
    if eye is not None:
        network = Network(eye, features_range, place)
        cut = Cut(frames, fps, features_size)
        outputs = [network.outputs(read_clips(f, cut, limit), batch) for f in (real, generated)]
        result["real_clips"], result["generated_clips"] = map(len, outputs)
        result["fvd"] = frechet_distance(*map(fit, outputs))
    if judge is not None:
        network = Network(judge, classifier_range, place)
        cut = Cut(frames, fps, classifier_size)
        logits = network.outputs(read_clips(generated, cut, limit), batch)
        result["generated_clips"] = len(logits)
        result["inception_score"], result["inception_std"] = inception_score(logits, splits)
    report_figures(result, output)


def _parse(arguments: Sequence[str]) -> dict[str, bool]:
    values = {"true": True, "false": False}
    parsed = {}
    for argument in arguments:
        name, _, value = argument.partition("=")
        if value not in values:
            raise ValueError(f"--argument {argument}: write NAME=true or NAME=false")
        parsed[name] = values[value]
    return parsed


if __name__ == "__main__":
    main()
