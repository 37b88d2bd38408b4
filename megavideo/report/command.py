"""`megavideo report`: loss curves, predicted frames and one page of figures about finished runs."""

from collections.abc import Sequence
from pathlib import Path

import click

from megavideo.data.image_tokenizer import ImageTokenizer
from megavideo.files import atomic_path, atomic_write
from megavideo.log import log
from megavideo.report.curves import draw_losses
from megavideo.report.generated import draw_generated, enlarging, judgement
from megavideo.report.predictions import draw_predictions
from megavideo.report.runs import FinishedRun, open_run

FOLDER = click.Path(path_type=Path)
GENERATED = "generated.png"


@click.command()
@click.argument("runs", nargs=-1, required=True, type=FOLDER)
@click.option("--output", required=True, type=FOLDER, help="Folder for report.md and pictures.")
@click.option(
    "--image-tokenizer", type=FOLDER, help="Draws predicted frames of runs with held-out data."
)
@click.option("--samples", default=4, show_default=True, help="Held-out samples to draw per run.")
@click.option("--generated", type=FOLDER, help="Videos of `megavideo generate` to show.")
@click.option("--captions", type=FOLDER, help="Table of real clips, shown beside those.")
@click.option("--scores", type=FOLDER, help="What `megavideo score-clips --json` wrote.")
@click.option("--superres", type=FOLDER, help="What `megavideo train-superres --json` wrote.")
def main(
    runs: tuple[Path, ...],
    output: Path,
    image_tokenizer: Path | None,
    samples: int,
    generated: Path | None,
    captions: Path | None,
    scores: Path | None,
    superres: Path | None,
) -> None:
    """Write a report about RUNS (folders of `megavideo train`) into a folder.

    It holds loss curves, what each run reached and how fast, whether its frozen weights are what
    they were, and the held-out loss with right and with shuffled captions where `megavideo evaluate
    --json RUN/held-out-right.json` (and -shuffled) was run before; with --generated and
    --captions, generated videos under real clips of the same caption, and where frames were
    enlarged, what they were before.

    \b
    Example:
      megavideo report runs/stage1 runs/stage2 --output runs/report \\
          --image-tokenizer data/image.safetensors
    """
    opened = [open_run(folder) for folder in runs]
    draw_losses(opened, output / "losses.png")
    pictures = {}
    tokenizer = None if image_tokenizer is None else ImageTokenizer.load(image_tokenizer).eval()
    if tokenizer is not None:
        for run in opened:
            if run.config.data.validation is not None:
                pictures[run.name] = f"predictions-{run.name}.png"
                with atomic_path(output / pictures[run.name]) as temporary:
                    draw_predictions(run, tokenizer, samples).save(temporary)
    if (generated is None) != (captions is None):
        raise ValueError("--generated and --captions go together")
    if generated is not None and captions is not None:
        with atomic_path(output / GENERATED) as temporary:
            draw_generated(generated, captions, tokenizer).save(temporary)
    shown = _generated(generated is not None, scores, superres)
    with atomic_write(output / "report.md") as file:
        file.write(_page(opened, pictures, shown).encode())
    log.info("wrote %s", output / "report.md")


def _page(runs: Sequence[FinishedRun], pictures: dict[str, str], generated: str) -> str:
    sections = ["# Training report", "![loss curves](losses.png)", _figures(runs)]
    sections += [_utilisation(runs), _captions(runs), _frozen(runs), generated]
    sections += [
        f"## Predicted frames: {name}\n\n![{name}]({file})" for name, file in pictures.items()
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _figures(runs: Sequence[FinishedRun]) -> str:
    rows = [
        [
            run.name,
            run.config.recipe.stage,
            f"{run.training.progress.step}",
            f"{run.last('loss'):.3f}",
            f"{run.typical('tokens_per_s'):,.0f}",
            f"{run.typical('clips_per_s'):.1f}",
            f"{run.typical('data_wait_share'):.1%}",
        ]
        for run in runs
    ]
    heads = ["run", "stage", "steps", "training loss", "tokens/s", "clips/s", "waiting for data"]
    return "## Figures\n\n" + _table(heads, rows)


def _utilisation(runs: Sequence[FinishedRun]) -> str:
    rows = [
        [
            run.name,
            f"{run.typical('mfu'):.1%}",
            f"{run.typical('mfu_6n'):.1%}",
            f"{run.typical('hfu'):.1%}",
            f"{run.last('peak_tflops'):g}",
        ]
        for run in runs
        if run.has("peak_tflops")
    ]
    if not rows:
        return ""
    about = (
        "MFU counts useful work: visible attention pairs, no gradients of frozen weights. Papers' "
        "6N charges every parameter as trained. HFU counts all that was executed, recomputation "
        "included."
    )
    heads = ["run", "MFU", "MFU (naive 6N)", "HFU", "peak TFLOP/s of a device"]
    return f"## Utilisation\n\n{about}\n\n" + _table(heads, rows)


def _captions(runs: Sequence[FinishedRun]) -> str:
    rows = []
    for run in runs:
        if {"right", "shuffled"} <= run.evaluations.keys():
            right, shuffled = (run.evaluations[key]["loss"] for key in ("right", "shuffled"))
            samples = str(run.evaluations["right"]["samples"])
            difference = f"{shuffled - right:+.4f}"
            rows.append([run.name, samples, f"{right:.4f}", f"{shuffled:.4f}", difference])
    if not rows:
        return ""
    heads = ["run", "samples", "right captions", "shuffled captions", "difference"]
    about = "A model that reads its text loses when every sample gets another one's caption."
    return f"## Held-out loss\n\n{about}\n\n" + _table(heads, rows)


def _frozen(runs: Sequence[FinishedRun]) -> str:
    rows = []
    for run in runs:
        before, after = run.base_digest_before(), run.training.base
        if before is not None:
            verdict = "equal" if before == after else "**CHANGED**"
            rows.append([run.name, f"`{before}`", f"`{after}`", verdict])
    if not rows:
        return ""
    about = "Digest (xxh3-128) of all frozen weights, before training and at the last save."
    return f"## Frozen weights\n\n{about}\n\n" + _table(["run", "before", "after", ""], rows)


def _generated(shown: bool, scores: Path | None, superres: Path | None) -> str:
    parts = [f"![generated videos]({GENERATED})"] if shown else []
    if superres is not None:
        parts.append(enlarging(superres))
    if scores is not None:
        parts.append(
            "How often a classifier, trained on real clips, sees in a clip what its caption says: "
            "in generated clips, and in real ones that passed the image tokenizer."
        )
        heads = ["attribute", "clips", "generated", "real", "chance"]
        parts.append(_table(heads, judgement(scores)))
    return "\n\n".join(["## Generated videos", *parts]) if parts else ""


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
