"""The dropout hash of kernels/common.cuh, restated in NumPy."""

import numpy as np

_MASK = np.uint64(0xFFFFFFFF)


def _mix(x: np.ndarray, key: np.ndarray) -> np.ndarray:
    """`mix` of common.cuh on uint64 arrays that hold 32-bit numbers."""
    x = (x ^ (x >> np.uint64(16))) * np.uint64(0x85EBCA6B) & _MASK
    x = (x ^ (x >> np.uint64(13)) ^ key) * np.uint64(0xC2B2AE35) & _MASK
    return x ^ (x >> np.uint64(16))


def _key(seed: int, heads: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    low, high = np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32 & 0xFFFFFFFF)
    heads = heads.astype(np.uint64)
    first = _mix(low ^ _mix(heads, np.uint64(0x9E3779B9)), high)
    return first, _mix(first ^ high, (low + heads) & _MASK)


def kept_bits(
    seed: int, heads: np.ndarray, query_slots: int, key_slots: int, threshold: int
) -> np.ndarray:
    """bool [len(heads), query_slots, key_slots]: which probabilities are kept.

    Args:
        heads: batch * H + head of each.
        threshold: of 256; a probability is dropped with probability threshold / 256.
    """
    first, second = (part[:, None, None] for part in _key(seed, heads))
    q = np.arange(query_slots, dtype=np.uint64)[:, None]
    k = np.arange(key_slots, dtype=np.uint64)
    index = (q & np.uint64(0xFFF7)) << np.uint64(16) | (k & np.uint64(0xFFF7))
    words = _mix(index ^ first, second)
    byte = np.uint64(2) * (q >> np.uint64(3) & np.uint64(1)) + (k >> np.uint64(3) & np.uint64(1))
    return (words >> (np.uint64(8) * byte) & np.uint64(0xFF)) >= threshold
