"""`megavideo benchmark generate`: tokens a second of cached decoding beside recomputing.

Recomputing is what one does without a cache: the training model's forward pass over the whole
sample for every token. Both take the likeliest token, and a case whose tokens differ is an error.
The figure is the ratio in one process; random weights do.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from megavideo import options
from megavideo.benchmark.harness import environment, time_interleaved
from megavideo.config.schema import ModelConfig, RecipeConfig
from megavideo.files import atomic_write
from megavideo.generate.decode import Prompts, decode
from megavideo.layout.rules import loss_frames
from megavideo.log import progress
from megavideo.model.build import build_model, canonical_parameters

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RECOMPUTED = 8  # tokens of a frame that recomputing is timed on; each costs the same


@dataclass(frozen=True)
class Case:
    """A stage at one size."""

    stage: str
    window: int
    batch: int
    model: ModelConfig
    dtype: torch.dtype

    def build(self, device: torch.device) -> nn.Sequential:
        """The model with random weights."""
        recipe = RecipeConfig(stage=self.stage, window=self.window, steps=1)  # type: ignore[arg-type]
        torch.manual_seed(0)
        with torch.device(device):
            model = build_model(self.model, recipe).eval()
        for parameter in canonical_parameters(model).values():
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        return model.to(self.dtype)


class Problem:
    """Given frames and prompts, and the two ways to go on from them."""

    def __init__(self, case: Case, device: torch.device):
        self.model = case.build(device)
        config, frames = case.model, case.model.frames
        self.wanted = loss_frames(case.stage, frames)
        self.given = [frame for frame in range(frames) if frame not in self.wanted]
        shape = (case.batch, frames, config.grid.tokens_per_frame)
        self.image = torch.randint(config.image_codes, shape, device=device)
        text = torch.randint(config.image_codes, (case.batch, config.text_slots), device=device)
        length = torch.full((case.batch,), config.text_slots, device=device)
        self.prompts = Prompts(text, length)
        self.cached_tokens = case.batch * len(self.wanted) * shape[2]
        self.recomputed_tokens = case.batch * min(RECOMPUTED, shape[2])

    def cached(self) -> Tensor:
        """All wanted frames."""
        return decode(
            self.model, self.prompts, self.image, self.given, self.wanted,
            lambda logits, frame, position: logits.argmax(-1),
        )  # fmt: skip

    @torch.no_grad()
    def recomputed(self) -> Tensor:
        """The first tokens of the first wanted frame, int64 [B, RECOMPUTED]."""
        image, frame = self.image.clone(), self.wanted[0]
        count = min(RECOMPUTED, image.shape[2])
        for position in range(count):
            logits = self.model((self.prompts.text, self.prompts.length, image))
            image[:, frame, position] = logits[:, 0, position].argmax(-1)
        return image[:, frame, :count]

    def agree(self) -> bool:
        """Whether both ways take the same tokens."""
        ours = self.cached()[:, self.wanted[0]]
        theirs = self.recomputed()
        return torch.equal(ours[:, : theirs.shape[1]], theirs)


def measure(case: Case, device: torch.device, rounds: int) -> Iterator[dict[str, Any]]:
    """A row for each way.

    Raises: ValueError in fp32 if their tokens differ; in half precision rounding may decide.
    """
    problem = Problem(case, device)
    same = problem.agree()
    if not same and case.dtype == torch.float32:
        raise ValueError(f"cached and recomputed tokens differ in {case}; please report this")
    calls: dict[str, list[Callable[[], object]]] = {
        "cached": [problem.cached],
        "recomputing": [problem.recomputed],
    }
    times = time_interleaved(calls, rounds, warmup=1, device=device)
    tokens = {"cached": problem.cached_tokens, "recomputing": problem.recomputed_tokens}
    rates = {name: tokens[name] / times[name].median * 1e6 for name in calls}
    for name in calls:
        yield {
            "stage": case.stage,
            "window": case.window,
            "batch": case.batch,
            "contender": name,
            "tokens_per_s": round(rates[name], 1),
            "tokens_per_s_p20": round(tokens[name] / times[name].p80 * 1e6, 1),
            "tokens_per_s_p80": round(tokens[name] / times[name].p20 * 1e6, 1),
            "times_recomputing": round(rates[name] / rates["recomputing"], 2),
            "same_tokens": same,
        }


@click.command()
@options.results_folder
@options.cpu_or_cuda
@click.option("--batch", multiple=True, default=(1, 8), show_default=True, help="Repeatable.")
@click.option("--hidden", default=128, show_default=True)
@click.option("--heads", default=4, show_default=True)
@click.option("--layers", default=4, show_default=True)
@click.option("--frames", default=5, show_default=True)
@click.option("--side", default=8, show_default=True, help="Tokens along a frame's side.")
@click.option("--window", default=4, show_default=True, help="Of stage 2; stage 1 sees all.")
@click.option("--text", default=32, show_default=True, help="Text slots, all real.")
@click.option("--codes", default=256, show_default=True, help="Image codes.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="fp32", show_default=True)
@click.option("--rounds", default=5, show_default=True, help="Timed rounds; medians are of these.")
def main(
    output: Path,
    device: str,
    batch: tuple[int, ...],
    hidden: int,
    heads: int,
    layers: int,
    frames: int,
    side: int,
    window: int,
    text: int,
    codes: int,
    dtype: str,
    rounds: int,
) -> None:
    """Time cached decoding beside recomputing the whole sample for each token.

    The default sizes are the demo's. Writes generation.json into OUTPUT and prints it as a table.

    \b
    Example:
      megavideo benchmark generate --output runs/benchmark
      megavideo benchmark generate --output runs/benchmark --device cuda --dtype bf16 \\
          --hidden 3072 --heads 48 --layers 12 --side 20 --window 10 --text 64 --codes 20000
    """
    per_frame = side * side
    model = ModelConfig(
        hidden=hidden, heads=heads, layers=layers, text_slots=text, frames=frames, side=side,
        vocab_size=codes + 2, image_codes=codes, pad=codes, newline=codes,
        begin_of_image=codes + 1, position_rows=text + per_frame, image_position=text,
        frame_position_rows=frames * per_frame,
    )  # fmt: skip
    cases = [
        Case(stage, size, rows, model, DTYPES[dtype])
        for stage, size in (("keyframes", 0), ("interpolation", window))
        for rows in batch
    ]
    results = []
    with progress("measuring", total=len(cases)) as advance:
        for case in cases:
            results += list(measure(case, torch.device(device), rounds))
            advance()
    record = {
        "environment": environment(torch.device(device)) | {"threads": torch.get_num_threads()},
        "model": model.model_dump(),
        "dtype": dtype,
        "rows": results,
    }
    with atomic_write(output / "generation.json") as file:
        file.write(json.dumps(record, indent=1).encode() + b"\n")
    click.echo(table(results))


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as Markdown."""
    heads = ["stage", "window", "batch", "contender", "tokens_per_s", "times_recomputing"]
    lines = [heads, ["---"] * len(heads), *([str(row[head]) for head in heads] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
