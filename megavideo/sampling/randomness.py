"""The numbers that decide a draw: a function of the seed and of what is drawn, of nothing else.

Not one stream that all samples share: a frame has its own numbers, so a video is the same alone
or in a batch, on one rank or many, and when frames after it are drawn first.
"""

import numpy as np
import xxhash


def uniforms(seed: int, purpose: str, count: int) -> np.ndarray:
    """Two numbers of [0, 1) for each of `count` draws, float64 [count, 2].

    Only `Philox.random_raw` is used, which numpy promises to keep across versions.

    Args:
        purpose: says what is drawn, as "a red circle/0/keyframes/2"; another one is independent.
    """
    key = xxhash.xxh3_128_intdigest(f"{seed}/{purpose}".encode())
    words = [key & 0xFFFFFFFFFFFFFFFF, key >> 64]
    raw = np.random.Philox(key=words).random_raw(2 * count)
    return ((raw >> np.uint64(11)) * 2.0**-53).reshape(count, 2)
