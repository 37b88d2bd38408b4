"""C3D (Tran et al. 2015, arXiv:1412.0767), which video Inception Scores are made with.

Parameters are named as in the weights that circulate for PyTorch: conv1, conv2, conv3a, ..., fc8.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZE, FRAMES = 112, 16
BLOCKS = (("1",), ("2",), ("3a", "3b"), ("4a", "4b"), ("5a", "5b"))
CHANNELS = (3, 64, 128, 256, 512, 512)


class C3D(nn.Module):
    """Clips [B, 3, 16, 112, 112] -> logits [B, classes], or 4096 features."""

    def __init__(self, classes: int):
        super().__init__()
        for block, before, width in zip(BLOCKS, CHANNELS, CHANNELS[1:], strict=False):
            for number, name in enumerate(block):
                layer = nn.Conv3d(width if number else before, width, 3, padding=1)
                self.add_module(f"conv{name}", layer)
        self.fc6 = nn.Linear(512 * 4 * 4, 4096)
        self.fc7 = nn.Linear(4096, 4096)
        self.fc8 = nn.Linear(4096, classes)

    def features(self, clips: Tensor) -> Tensor:
        """Output of the second fully connected layer, [B, 4096]."""
        x = clips
        for number, block in enumerate(BLOCKS):
            for name in block:
                x = F.relu(self.get_submodule(f"conv{name}")(x))
            last = number == len(BLOCKS) - 1
            x = F.max_pool3d(x, 2 if number else (1, 2, 2), padding=(0, 1, 1) if last else 0)
        return F.relu(self.fc7(F.relu(self.fc6(x.flatten(1)))))

    def forward(self, clips: Tensor) -> Tensor:
        return self.fc8(self.features(clips))


def c3d_from(weights: Mapping[str, Tensor]) -> C3D:
    """The network with these weights.

    Raises: ValueError if they are not those of C3D.
    """
    last = weights.get("fc8.weight")
    if last is None:
        raise ValueError("it has no fc8.weight, so it is not C3D")
    with torch.device("meta"):
        network = C3D(len(last))
    try:
        network.load_state_dict(dict(weights), assign=True)
    except RuntimeError as error:
        raise ValueError(f"it does not fit C3D: {error}") from None
    return network.float()
