"""`megavideo cluster-codes`: group the codes of an image tokenizer, for cluster sampling."""

from pathlib import Path

import click

from megavideo.data.image_tokenizer import ImageTokenizer
from megavideo.sampling.clusters import cluster_codes, save_labels


@click.command()
@click.argument("image_tokenizer", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@click.option(
    "--clusters",
    type=click.IntRange(min=1),
    default=500,
    show_default=True,
    help="Number of groups; CogView2 has 500 for 20,000 codes.",
)
@click.option("--seed", default=0, show_default=True, help="Of the first centres.")
def main(image_tokenizer: Path, output: Path, clusters: int, seed: int) -> None:
    """Group the codes of IMAGE_TOKENIZER by k-means and write each code's group to OUTPUT (.npy).

    `megavideo generate --clusters OUTPUT` then draws a group first and a code inside it second.

    \b
    Example:
      megavideo cluster-codes image.safetensors clusters.npy --clusters 32
    """
    codebook = ImageTokenizer.load(image_tokenizer).quantize.embed.weight
    labels = cluster_codes(codebook, clusters, seed)
    save_labels(output, labels)
    sizes = labels.bincount()
    click.echo(
        f"{output}: {len(labels)} codes in {clusters} clusters of {int(sizes.min())} to "
        f"{int(sizes.max())}"
    )


if __name__ == "__main__":
    main()
