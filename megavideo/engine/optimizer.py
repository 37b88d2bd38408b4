"""The optimizer: which parameters decay, and which implementation of AdamW this machine has."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from megavideo.config.schema import OptimizerConfig
from megavideo.log import log


def parameter_groups(
    parameters: Mapping[str, nn.Parameter], weight_decay: float
) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: those that decay and those that do not.

    Biases never decay, nor do LayerNorms (which only the image stage trains). The channels' mixture
    and the frame positions do, as in the published code.
    """
    trainable = {name: p for name, p in parameters.items() if p.requires_grad}
    decaying = [p for name, p in trainable.items() if decays(name)]
    others = [p for name, p in trainable.items() if not decays(name)]
    groups = [
        {"params": decaying, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def decays(name: str) -> bool:
    """Whether weight decay applies to the parameter with canonical name `name`."""
    return not name.endswith((".bias", "norm.weight"))


def build_optimizer(
    groups: list[dict[str, Any]], config: OptimizerConfig, device: torch.device
) -> torch.optim.Optimizer:
    """AdamW (NVIDIA apex's where GPU and apex are there, else torch's fused one), or plain SGD.

    DeepSpeed's FusedAdam is not tried: all three are one multi-tensor pass that reads gradient,
    weight and both moments and writes all but the gradient, 28 bytes an element, and DeepSpeed's is
    compiled by nvcc when training starts. For state in host memory neither is its CPU Adam, which
    is compiled then, too: torch's fused one also runs on a CPU.
    """
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr)
    fused_adam = _apex_adam() if device.type == "cuda" else None
    settings: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if fused_adam is not None:
        log.info("optimizer: NVIDIA apex FusedAdam, decoupled weight decay")
        return fused_adam(groups, adam_w_mode=True, **settings)
    log.info("optimizer: torch AdamW, fused for %s", device.type)
    return torch.optim.AdamW(groups, fused=True, **settings)


def _apex_adam() -> Any:
    try:
        from apex.optimizers import FusedAdam
    except ImportError:  # also where `apex` is PyPI's package of that name, another program
        return None
    return FusedAdam
