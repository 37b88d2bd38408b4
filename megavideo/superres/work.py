"""FLOPs of enlarging and refining a frame, before anything is loaded; a multiply-add is 2."""

from megavideo.superres.config import DirectConfig, IterativeConfig, SuperResolutionConfig
from megavideo.superres.upsample import TOP_K, round_mask


def direct_flops(config: DirectConfig) -> int:
    """Of one frame's only forward pass; text and coarse slots compute every pair."""
    coarse = config.text_slots + config.coarse_tokens
    seen = _window(config) + config.coarse_window**2
    pairs = coarse * coarse + config.fine_tokens * seen
    slots = coarse + config.fine_tokens
    return config.layers * _layer(config, slots, pairs) + _head(config, config.fine_tokens)


def iterative_flops(config: IterativeConfig) -> int:
    """Of one frame's rounds; logits are made of unknown slots only."""
    text, fine = config.text_slots, config.fine_tokens
    pairs = text * text + fine * (text + _window(config))
    drawn = [int(round_mask(config.fine_side, n).sum()) for n in range(1, len(TOP_K) + 1)]
    layers = config.layers * _layer(config, text + fine, pairs)
    return len(TOP_K) * layers + _head(config, sum(drawn))


def _window(config: SuperResolutionConfig) -> int:
    """Fine slots that one sees, away from borders."""
    return (2 * config.window - 1) * config.window


def _layer(config: SuperResolutionConfig, slots: int, pairs: int) -> int:
    """QKV (3 h), output projection (h) and MLP (8 h) of each slot; two products of each pair."""
    return 2 * slots * 12 * config.hidden**2 + 4 * pairs * config.hidden


def _head(config: SuperResolutionConfig, slots: int) -> int:
    return 2 * slots * config.hidden * config.image_codes
