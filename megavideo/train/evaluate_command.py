"""`megavideo evaluate`: a checkpoint on held-out data, with right or with shuffled captions."""

from functools import partial
from pathlib import Path

import click
import torch
from torch import Tensor, nn

from megavideo import options
from megavideo.checkpoint.manifest import check_learned_from
from megavideo.checkpoint.sources import find_checkpoint
from megavideo.checkpoint.tokenizers import TokenizerDigests
from megavideo.config.command import config_arguments
from megavideo.config.schema import Config
from megavideo.data.batch import Batch, BatchStream, open_stream
from megavideo.engine.objective import Objective
from megavideo.engine.weights import load_model
from megavideo.engine.world import World, join_world
from megavideo.figures import report_figures
from megavideo.train.command import load_on_all_ranks
from megavideo.train.evaluate import frame_accuracies, held_out_means
from megavideo.train.metrics import by_frame


@click.command()
@config_arguments
@click.option(
    "--checkpoint", required=True, type=click.Path(path_type=Path),
    help="A checkpoint's folder, or a run's, of which the newest is taken.",
)  # fmt: skip
@click.option(
    "--shuffle-captions", is_flag=True,
    help="Give every sample another one's caption: a model that reads text gets worse.",
)  # fmt: skip
@options.json_output
def main(
    files: tuple[str, ...],
    assignments: tuple[str, ...],
    checkpoint: Path,
    shuffle_captions: bool,
    output: Path | None,
) -> None:
    """Measure a checkpoint on run.evaluate_samples samples of data.validation.

    Prints, for all frames that carry loss in the recipe's stage and for each, the cross-entropy in
    nats and the share of tokens whose likeliest code is right. `megavideo evaluate-videos` measures
    videos.

    \b
    Example:
      megavideo evaluate runs/stage1/config.yaml --checkpoint runs/stage1 \\
          --set data.validation=data/validation --shuffle-captions --json shuffled.json
    """
    config = load_on_all_ranks(files, assignments)
    world = join_world(config.run.timeout_minutes)
    folder = world.from_rank_zero(lambda: _find(checkpoint))
    stream = world.first_on_rank_zero(lambda: _open_stream(config, folder))
    scores = evaluate_checkpoint(config, folder, stream, shuffle_captions, world)
    result = {
        "checkpoint": str(folder),
        "stage": config.recipe.stage,
        "captions": "shuffled" if shuffle_captions else "right",
        **scores,
    }
    if world.rank == 0:
        report_figures(result, output)
    torch.distributed.destroy_process_group()


def evaluate_checkpoint(
    config: Config, checkpoint: Path, stream: BatchStream, shuffle_captions: bool, world: World
) -> dict[str, int | float]:
    """Samples, loss and accuracy of `checkpoint`, computed in recipe.precision, and by frame."""
    model = load_model(config, checkpoint, world.device)
    objective = Objective(config.model, config.recipe, world.device)
    batches = stream.held_out_batches(
        config.run.evaluate_samples,
        config.recipe.micro_batch,
        world.rank,
        world.size,
        shuffle_captions,
    )
    with torch.no_grad():
        means, samples = held_out_means(partial(_measure, objective, model), batches, world)
    count = len(objective.frames)
    scores: dict[str, int | float] = {"samples": samples}
    for name, values in (("loss", means[:count]), ("accuracy", means[count:])):
        scores |= {name: sum(values) / count, **by_frame(name, objective.frames, values)}
    return scores


def _measure(objective: Objective, model: nn.Module, batch: Batch) -> Tensor:
    """Losses of the frames that carry loss, then their accuracies."""
    text, text_length, image = objective.inputs(batch)
    logits = model((text, text_length, image))
    accuracies = frame_accuracies(logits, image, objective.frames)
    return torch.cat([objective.losses(logits, image), accuracies])


def _find(path: Path) -> Path:
    checkpoint = find_checkpoint(path)
    if checkpoint is None:
        raise FileNotFoundError(f"{path} holds no checkpoint")
    return checkpoint


def _open_stream(config: Config, checkpoint: Path) -> BatchStream:
    if config.data.validation is None:
        raise ValueError("data.validation is not set: name a folder of held-out shards")
    stream = open_stream(config.data, config.model, config.recipe, config.data.validation)
    ours = TokenizerDigests.of(stream.making)
    check_learned_from(checkpoint, ours, "tokenise data.validation with that one")
    return stream


if __name__ == "__main__":
    main()
