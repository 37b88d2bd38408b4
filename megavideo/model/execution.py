"""How this process executes a model: what flops.py needs to count what is really computed."""

import torch

from megavideo.config.schema import Config
from megavideo.layout.rules import Family
from megavideo.layout.tiles import Attention
from megavideo.model.flops import Execution
from megavideo.ops.backends import atomic_backward, choose

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Backend of ops/backends.py -> how it goes over the pairs.
TILES: dict[str, Attention] = {
    "library": "library",
    "flex": "flex",
    "sdpa": "blocks",
    "reference": "blocks",
}


def program(backend: str) -> Attention:
    """What `backend` does backward too, as this process is set."""
    return "atomic" if backend == "library" and atomic_backward() else TILES[backend]


def execution_here(config: Config) -> Execution:
    """With the attention backends that this machine's training uses."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = DTYPES[config.recipe.precision]
    dropout = config.recipe.attention_dropout > 0
    temporal: Family = "windows" if config.recipe.window else "everything"

    def of(family: Family) -> Attention:
        return program(choose(device, dtype, config.model.head_size, dropout, family))

    return Execution(of(temporal), config.parallel.recompute, of("frames"))
