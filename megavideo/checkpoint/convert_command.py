"""`megavideo convert SRC DST --to FORMAT`: a checkpoint in another format or cut."""

import re
import shutil
from math import prod
from pathlib import Path

import click
import torch

from megavideo.checkpoint.convert import Conversion, convert, refuse_existing, select
from megavideo.checkpoint.formats.detect import open_checkpoint
from megavideo.checkpoint.formats.huggingface import HuggingFaceWriter
from megavideo.checkpoint.formats.interface import Reader, Writer, check_whole, is_moment
from megavideo.checkpoint.formats.megatron_writer import MegatronWriter
from megavideo.checkpoint.formats.run import RunWriter
from megavideo.checkpoint.formats.sat_writer import SatWriter
from megavideo.checkpoint.formats.sharded import ShardedWriter
from megavideo.checkpoint.formats.universal_writer import UniversalWriter
from megavideo.checkpoint.manifest import Training
from megavideo.log import log

FORMATS = ("megavideo", "run", "sat", "huggingface", "megatron", "universal")
HOLD_MOMENTS = ("megavideo", "run", "megatron", "universal")
DTYPES = {"keep": None, "fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# Options that only some targets have a use for.
USED_BY = {
    "tp": ("megavideo", "run", "sat", "megatron"),
    "pp": ("megatron",),
    "heads": ("megatron",),
    "weights_only": ("megavideo", "megatron", "universal"),
    "max_file_size": ("huggingface",),
}
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


class FileSize(click.ParamType):
    """A number of bytes, as 5GB or 500MB (powers of ten)."""

    name = "size"

    def convert(
        self, value: str | int, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        found = re.fullmatch(r"(\d+(?:\.\d+)?)(|KB|MB|GB)", str(value).upper())
        if not found or float(found[1]) == 0:
            self.fail(f"{value!r} is no size; write 5GB or 500MB", param, ctx)
        return int(float(found[1]) * UNITS[found[2]])


@click.command()
@click.argument("source", type=click.Path(path_type=Path), metavar="SRC")
@click.argument("destination", type=click.Path(path_type=Path), metavar="DST")
@click.option("--to", "target", required=True, type=click.Choice(FORMATS), help="Format of DST.")
@click.option(
    "--tp",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Tensor-parallel ranks to cut for (megavideo, run, sat, megatron).",
)
@click.option(
    "--pp",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Pipeline stages to cut for (megatron); our own files do not depend on them.",
)
@click.option(
    "--heads",
    type=click.IntRange(min=1),
    help="Attention heads (megatron), where SRC does not say it. [default: SRC's]",
)
@click.option(
    "--vocab-size",
    type=click.IntRange(min=1),
    help="Rows of the word table that are no padding, where a Megatron SRC does not say it.",
)
@click.option(
    "--dtype",
    type=click.Choice(list(DTYPES)),
    default="keep",
    show_default=True,
    help="Type of the weights in DST. Optimizer state does not go with another type.",
)
@click.option(
    "--weights-only",
    is_flag=True,
    help="Leave out optimizer state and progress (megavideo, megatron, universal).",
)
@click.option(
    "--max-file-size",
    type=FileSize(),
    default="5GB",
    show_default=True,
    help="Largest file (huggingface); a larger tensor has a file of its own.",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    help="Tensors converted at a time.",
)
@click.option("--verify", is_flag=True, help="Read DST back and compare digests of whole tensors.")
@click.option("--dry-run", is_flag=True, help="Check SRC and print what would be written.")
def main(
    source: Path,
    destination: Path,
    target: str,
    tp: int,
    pp: int,
    heads: int | None,
    vocab_size: int | None,
    dtype: str,
    weights_only: bool,
    max_file_size: int,
    threads: int,
    verify: bool,
    dry_run: bool,
) -> None:
    """Write the checkpoint in folder SRC as another one in the new folder DST.

    \b
    SRC may be, and is recognised as
      megavideo    our weights folder, cut for any number of ranks (holds weights.json)
      run          a run of `megavideo train`, or one of its checkpoints
      sat          SAT, CogView2 or CogVideo, of any model-parallel size
      huggingface  safetensors files with model.safetensors.index.json
      megatron     Megatron-LM's mp_rank_XX_YYY folders, of any TP x PP
      universal    DeepSpeed's universal checkpoint

    DST gets the same tensors, bit for bit unless --dtype changes their type. `megavideo`,
    `megatron` and `universal` keep a run's optimizer state and progress, and `run` makes of them a
    folder that training goes on from.

    Needs no GPU, and memory for at most three times the largest tensor, whatever the format.
    If it is interrupted, the same command goes on after the files that were finished.

    \b
    Example:
      megavideo convert cogvideo-stage1 weights --to megavideo --tp 2 --verify
      megavideo convert weights shared --to huggingface --dtype bf16
      megavideo convert runs/stage1 for-megatron --to megatron --tp 8 --pp 4
    """
    _refuse_ineffective(target)
    refuse_existing(destination)
    reader = open_checkpoint(source, vocab_size)
    if vocab_size is not None and reader.format != "megatron":
        raise ValueError(f"--vocab-size has no effect: {source} is no Megatron checkpoint")
    check_whole(reader)
    moments = target in HOLD_MOMENTS and not weights_only
    if moments and reader.training and dtype != "keep":
        raise ValueError(
            f"--dtype {dtype} changes the weights of {source}, which its optimizer state would no "
            "longer fit; add --weights-only"
        )
    if reader.training and not moments:
        log.info("the optimizer state and progress of %s are left out", source)
    training = reader.training if moments else None
    if target == "megatron":
        writer: Writer = MegatronWriter(tp, pp, _heads(reader, heads), training)
    elif target == "universal":
        writer = UniversalWriter(training)
    else:
        writer = _writer(reader, target, tp, training, max_file_size)
    tensors = select(reader, DTYPES[dtype], moments)
    conversion = Conversion(reader, writer, destination, tensors, threads)
    click.echo(_summary(conversion))
    if not dry_run:
        convert(conversion, verify)
        click.echo(f"wrote {destination}{' and read it back' if verify else ''}")


def _refuse_ineffective(target: str) -> None:
    """An option that was given and that this target has no use for is a mistake."""
    context = click.get_current_context()
    for option, targets in USED_BY.items():
        given = context.get_parameter_source(option) is click.core.ParameterSource.COMMANDLINE
        if given and target not in targets:
            flag = option.replace("_", "-")
            raise ValueError(f"--{flag} has no effect with --to {target}; leave it out")


def _heads(reader: Reader, given: int | None) -> int:
    """The model's heads, as the source or the user says it."""
    if given is None and reader.heads is None:
        raise ValueError(
            f"{reader.path} does not say how many attention heads it has: give --heads"
        )
    if given is not None and reader.heads not in (None, given):
        raise ValueError(f"--heads {given}: {reader.path} has {reader.heads}; leave it out")
    heads = given or reader.heads
    assert heads is not None
    hidden = reader.tensors["head.norm.weight"].shape[0]
    if hidden % heads:
        raise ValueError(f"--heads {heads} does not divide the model's width {hidden}")
    return heads


def _writer(
    reader: Reader, target: str, tp: int, training: Training | None, max_file_size: int
) -> Writer:
    if reader.heads and reader.heads % tp:
        raise ValueError(f"--tp {tp} does not divide the model's {reader.heads} heads")
    if target == "run":
        if reader.training is None:
            raise ValueError(
                f"--to run needs the progress and configuration of a training run, which "
                f"{reader.path} ({reader.format}) does not have; use --to megavideo and name the "
                "result as recipe.base"
            )
        return RunWriter(tp, reader.training)
    if target == "megavideo":
        return ShardedWriter(tp, training)
    if target == "sat":
        return SatWriter(tp, reader.training.progress.step if reader.training else 0)
    return HuggingFaceWriter(max_file_size)


def _summary(conversion: Conversion) -> str:
    reader, tensors = conversion.reader, conversion.tensors
    weights = [spec for name, spec in tensors.items() if not is_moment(name)]
    files = [file for group in conversion.writer.groups(tensors) for file in group.files]
    needed = sum(spec.nbytes for spec in tensors.values())
    parent = next(p for p in conversion.destination.absolute().parents if p.exists())
    return "\n".join(
        (
            f"from     {reader.path} ({reader.format}, {len(reader.files)} files)",
            f"to       {conversion.destination} ({conversion.writer.format}, {len(files)} files)",
            f"weights  {len(weights)} tensors, {sum(prod(s.shape) for s in weights):,} parameters",
            f"moments  {len(tensors) - len(weights)} tensors",
            f"bytes    {needed:,}; free {shutil.disk_usage(parent).free:,}",
        )
    )


if __name__ == "__main__":
    main()
