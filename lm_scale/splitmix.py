# SPDX-License-Identifier: Apache-2.0
"""SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number
generators"): even bits for many keys at once, each by its number, no state kept."""

import numpy as np

_GAMMA = np.uint64(0x9E3779B97F4A7C15)  # 2**64 over the golden ratio, made odd


def mixed(values: np.ndarray) -> np.ndarray:
    """The generator's finalizer, a permutation of the 64-bit numbers; uint64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


def streams(keys: tuple[int | np.ndarray, ...], width: int) -> np.ndarray:
    """The first `width` numbers of the stream that each row of keys starts, [n width].

    keys: whole numbers from 0 to below 2**64, arrays [n] or one for all rows; at least
    one array. A number does not depend on `width`, nor on the other rows.
    """
    state = np.zeros(1, np.uint64)
    for key in keys:
        # Mixed after each, so that (1, 0) and (0, 1) start streams far apart.
        state = mixed(state + np.asarray(key).astype(np.uint64) + _GAMMA)
    places = np.arange(1, width + 1, dtype=np.uint64) * _GAMMA
    return mixed(state[:, None] + places)
