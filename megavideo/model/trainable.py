"""What is frozen and what is trained: said here, once. Everything else reads `requires_grad`."""

from collections.abc import Mapping
from fnmatch import fnmatchcase

from torch import nn

# Stage -> globs over canonical parameter names; what matches none is frozen. A glob may match what
# only some models have; a test looks for those that match nothing in any.
TRAINABLE = {
    "image": ("*",),
    "keyframes": ("embedding.frame_position", "*.attention.temporal.*", "*.attention.mixture"),
    "interpolation": ("embedding.frame_position", "*.attention.temporal.*", "*.attention.mixture"),
}


def is_trainable(name: str, stage: str) -> bool:
    """Whether the parameter with canonical name `name` is trained in `stage`."""
    return any(fnmatchcase(name, glob) for glob in TRAINABLE[stage])


def mark_trainable(parameters: Mapping[str, nn.Parameter], stage: str) -> None:
    """Set `requires_grad` of every parameter."""
    for name, parameter in parameters.items():
        parameter.requires_grad_(is_trainable(name, stage))


def check_trainable(parameters: Mapping[str, nn.Parameter], stage: str) -> None:
    """Fail if anything changed `requires_grad` since `mark_trainable`."""
    for name, parameter in parameters.items():
        assert parameter.requires_grad == is_trainable(name, stage), name
