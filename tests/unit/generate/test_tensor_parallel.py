"""Two ranks that share a model decode what one decodes; replicas share prompts."""

from pathlib import Path

import numpy as np
import pytest
import torch

from megavideo.config.schema import ParallelConfig
from megavideo.engine.world import join_world
from megavideo.generate.command import main
from megavideo.generate.decode import Decoding, Guidance
from megavideo.generate.requests import Request
from megavideo.generate.run import generate
from megavideo.generate.settings import Settings
from tests.unit.generate.models import decode_greedily, prompts, tiny_model
from tests.unit.generate.runs import PROMPTS, both_stages, make_runs
from tests.unit.generate.runs import generate as generate_alone
from tests.world import run_world

CASES = [("image", 0, False), ("keyframes", 0, True), ("keyframes", 2, False)]
CASES += [("interpolation", 2, False), ("interpolation", 4, True)]


def guidance(guided: bool) -> Decoding:
    return Decoding(guidance=Guidance(prompts(3, 2, seed=1), 3.0) if guided else None)


def options(runs: Path, output: Path, *more: str) -> list[str]:
    words = [*both_stages(runs), "--rounds", "1", "--guidance", "2", *more]
    return [*words, *(word for prompt in PROMPTS[:2] for word in ("--prompt", prompt))]


def settings(runs: Path, output: Path, tp: int) -> Settings:
    files = ["--image-tokenizer", str(runs / "image.safetensors"), "--output", str(output)]
    words = [*files, *options(runs, output, "--tp", str(tp))]
    return Settings(**main.make_context("generate", words).params)


def two_ranks(rank: int, folder: Path) -> None:
    shared = join_world(1.0, ParallelConfig(tp=2))
    for number, (stage, window, guided) in enumerate(CASES):
        model = tiny_model(stage, window, shared.mesh)
        image, logits = decode_greedily(model, stage, 3, guidance(guided))
        torch.save((image, logits), folder / f"{number}-{rank}.pt")
    generate(settings(folder, folder / "tp2", tp=2), shared)
    generate(settings(folder, folder / "dp2", tp=1), join_world(1.0, ParallelConfig()))


@pytest.mark.slow
def test_any_number_of_processes_makes_the_same_videos(tmp_path: Path) -> None:
    make_runs(tmp_path)
    run_world(two_ranks, 2, tmp_path)
    for number, (stage, window, guided) in enumerate(CASES):
        alone, steps = decode_greedily(tiny_model(stage, window), stage, 3, guidance(guided))
        for rank in range(2):
            image, logits = torch.load(tmp_path / f"{number}-{rank}.pt", weights_only=True)
            assert torch.equal(image, alone)
            assert torch.allclose(logits, steps, rtol=0, atol=1e-5)
    generate_alone(tmp_path, tmp_path / "one", *options(tmp_path, tmp_path / "one"))
    for prompt in PROMPTS[:2]:
        name = Request(prompt).name
        wanted = np.load(tmp_path / "one" / name / "tokens.npy")
        for made in ("tp2", "dp2"):
            assert np.array_equal(np.load(tmp_path / made / name / "tokens.npy"), wanted)
            assert (tmp_path / made / name / "about.json").is_file()
