# SPDX-License-Identifier: Apache-2.0
"""Rows of different lengths, one after the other in a flat array."""

import numpy as np


def count_up(counts: np.ndarray) -> np.ndarray:
    """0, 1 ... count - 1 for each of the counts [n], one after the other."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
