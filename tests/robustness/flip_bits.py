"""Random bit flips in the files of a run: none may be loaded without a word.

    python -m tests.robustness.flip_bits --flips 200

The run has two checkpoints, cut for two ranks. One bit after another is flipped in the newer one's
weights, moments and manifest, in the base, or in `latest`, and the run is read as a resume reads
it, every tensor. It must be refused, or the older checkpoint be taken with a warning, or, where
`latest` is what was hit, the newer with a warning; and what was loaded must be what was saved.
"""

import logging
import random
import tempfile
from collections import Counter
from pathlib import Path

import click
import torch
from torch import Tensor

from megavideo.checkpoint.commit import newest_whole, step_of
from megavideo.checkpoint.formats.run import RunReader
from megavideo.log import log
from tests.unit.checkpoint.samples import write_run

KINDS = {
    "weights": "checkpoints/step-00000003/[el]*.safetensors",
    "optimizer": "checkpoints/step-00000003/optimizer.*",
    "manifest": "checkpoints/step-00000003/manifest.json",
    "base": "base/*/*",
    "latest": "checkpoints/latest",
}


class Said(logging.Handler):
    """Keeps warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@click.command()
@click.option("--flips", default=200, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(flips: int, seed: int) -> None:
    """Print what became of the flips in each kind of file."""
    outcomes = flip_and_load(flips, seed)
    for kind in KINDS:
        counts = {what: n for (k, what), n in sorted(outcomes.items()) if k == kind}
        print(f"{kind:<10} {sum(counts.values()):>4} flips: {counts}")
    silent = count_silent(outcomes)
    print(f"{flips} flips, {silent} loaded silently")
    assert not silent


def count_silent(outcomes: Counter[tuple[str, str]]) -> int:
    """Flips that nothing was said about."""
    return sum(n for (_, what), n in outcomes.items() if what in ("silent", "no effect"))


def flip_and_load(flips: int, seed: int) -> Counter[tuple[str, str]]:
    """How many flips in files of each kind ended how."""
    chosen, outcomes = random.Random(seed), Counter[tuple[str, str]]()
    with tempfile.TemporaryDirectory() as name:
        run = Path(name) / "run"
        saved = {step: write_run(run, step, tp=2) for step in (2, 3)}
        for _ in range(flips):
            kind = chosen.choice(sorted(KINDS))
            path = chosen.choice(sorted(run.glob(KINDS[kind])))
            healthy = path.read_bytes()
            content = bytearray(healthy)
            content[chosen.randrange(len(content))] ^= 1 << chosen.randrange(8)
            path.write_bytes(content)
            outcomes[kind, outcome(run, saved)] += 1
            path.write_bytes(healthy)
        assert outcome(run, saved) == "no effect", "the last flip was not taken back"
    return outcomes


def outcome(run: Path, saved: dict[int, dict[str, Tensor]]) -> str:
    """Load the run as a resume does and compare it with what was saved."""
    said = Said()
    log.addHandler(said)
    try:
        checkpoint = newest_whole(run)
        assert checkpoint is not None
        reader = RunReader(checkpoint)
        loaded = {name: reader.read(name) for name in reader.tensors}
    except (ValueError, OSError):
        return "refused"
    finally:
        log.removeHandler(said)
    step = step_of(checkpoint)
    same = loaded.keys() == saved[step].keys() and all(
        torch.equal(tensor, saved[step][name]) for name, tensor in loaded.items()
    )
    if not same or reader.training.progress.step != step:
        return "silent"
    if step != max(saved):
        return "older one loaded, told" if said.messages else "silent"
    return "newest loaded, told" if said.messages else "no effect"


if __name__ == "__main__":
    main()
