"""`megavideo plan`: which layout would train fastest, before any machine is there."""

from pathlib import Path

import click

from megavideo.config.command import config_arguments
from megavideo.config.load import load_config
from megavideo.files import atomic_write
from megavideo.log import log
from megavideo.plan.hardware import load_hardware
from megavideo.plan.predict import Predictor
from megavideo.plan.report import describe, layout_file, smallest
from megavideo.plan.search import Candidate, search

# Sections that a configuration must have and this command does not read.
UNUSED = ("data.train=unused", "data.text_tokenizer=unused", "run.directory=unused")


@click.command()
@config_arguments
@click.option("--gpus", required=True, type=click.IntRange(1), help="Devices in all.")
@click.option(
    "--gpu", "profile", required=True,
    help="Hardware: a name in configs/hardware, or the path of what `megavideo calibrate` wrote.",
)  # fmt: skip
@click.option(
    "--nodes", type=click.IntRange(1),
    help="Nodes that the devices are spread over; by default nodes are full.",
)  # fmt: skip
@click.option(
    "--out", type=click.Path(path_type=Path),
    help="Write the best layout here, as YAML for `megavideo train`, and beside it (.png) a "
    "picture of its pipeline schedule.",
)  # fmt: skip
def main(
    files: tuple[str, ...],
    assignments: tuple[str, ...],
    gpus: int,
    profile: str,
    nodes: int | None,
    out: Path | None,
) -> None:
    """Predict every legal layout of a configuration on GPUS devices and print the best ten.

    Of FILES, model and recipe count; tensor, sequence and pipeline parallelism, virtual stages,
    ZeRO, recomputation and micro-batch are searched, the batch stays. Nothing is started and no GPU
    is needed.

    \b
    Example:
      megavideo plan configs/model/cogvideo-9b.yaml configs/recipe/stage1.yaml \\
          --gpus 104 --gpu a100-40 --out configs/parallel/planned.yaml
    """
    config = load_config(files, [*UNUSED, *assignments])
    hardware = load_hardware(profile)
    if nodes is not None:
        if gpus % nodes:
            raise ValueError(f"--nodes {nodes} does not divide --gpus {gpus}; nodes must be equal")
        hardware = hardware.model_copy(update={"devices_per_node": gpus // nodes})
    found = search(config, gpus, hardware)
    if not found.fitting:
        raise ValueError(smallest(found, hardware))
    click.echo(describe(found, hardware, gpus))
    if out is not None:
        _write(found.fitting[0], gpus, Predictor(hardware), out)


def _write(best: Candidate, gpus: int, predictor: Predictor, out: Path) -> None:
    from megavideo.plan.gantt import draw  # matplotlib takes longer to import than a plan to make

    with atomic_write(out) as file:
        file.write(layout_file(best, gpus, predictor.hardware).encode())
    picture = out.with_suffix(".png")
    bars = predictor.timeline(best.config, gpus)
    draw(bars, best.config.parallel.pp, f"{best.name} on {predictor.hardware.name}", picture)
    log.info("wrote %s and %s", out, picture)


if __name__ == "__main__":
    main()
