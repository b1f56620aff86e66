# SPDX-License-Identifier: Apache-2.0
"""A shuffled order that is never stored: a keyed permutation of the numbers below n.

A Feistel network over pairs of digits (Black and Rogaway 2002, "Ciphers with arbitrary
finite domains", section 5): a number is (left, right) in a box of a × b >= n pairs that
is nearly square, each round adds a hash of one half to the other, and what lands
outside the n numbers is sent through again. It is computed for many places at once.
"""

import functools

import numpy as np

from lm_scale.splitmix import mixed

# Four would do for large n. Where the halves have a few values only, each round mixes
# less; with these even the 120 orders of 5 examples come equally often.
ROUNDS = 12
# A few places take as long as a hundred. So where at least so many of a block of places
# are asked for, the order of all of it is reckoned: the next batches want the others.
BLOCK, MANY = 4096, 32


def shuffled(places: np.ndarray, size: int, key: tuple[int, ...]) -> np.ndarray:
    """What stands at these places of the order of 0 ... size - 1 with this key.

    places: whole numbers from 0 to below `size`, of any shape; int64 of that shape.
    Over all places each number comes once. `key`: not negative, of any size.
    """
    wanted = np.asarray(places).astype(np.int64).ravel()
    blocks = np.unique(wanted // BLOCK)
    if wanted.size == 0 or blocks.size * MANY > wanted.size:
        return _reckoned(wanted, size, key).reshape(np.shape(places))
    known = np.concatenate([_block(int(block), size, key) for block in blocks])
    # All blocks but the last of all are whole.
    within = np.searchsorted(blocks, wanted // BLOCK) * BLOCK + wanted % BLOCK
    return known[within].reshape(np.shape(places))


@functools.lru_cache(maxsize=64)  # of some sources of a mixture, of a few epochs
def _block(block: int, size: int, key: tuple[int, ...]) -> np.ndarray:
    start = block * BLOCK
    return _reckoned(np.arange(start, min(start + BLOCK, size)), size, key)


def _reckoned(places: np.ndarray, size: int, key: tuple[int, ...]) -> np.ndarray:
    """`shuffled`, of places [n]."""
    left_size = np.uint64(max(1, int(np.ceil(np.sqrt(size)))))
    right_size = np.uint64(-(-size // int(left_size)))
    keys = _round_keys(key)
    numbers = places.astype(np.uint64)
    outside = np.arange(numbers.size)
    while outside.size:  # a share below 1 / sqrt(n) comes here a second time
        again = _rounds(numbers[outside], left_size, right_size, keys)
        numbers[outside] = again
        outside = outside[again >= np.uint64(size)]
    return numbers.astype(np.int64)


@functools.lru_cache(maxsize=16)
def _round_keys(key: tuple[int, ...]) -> np.ndarray:
    return np.random.SeedSequence(key).generate_state(ROUNDS, np.uint64)


def _rounds(numbers, left_size, right_size, keys) -> np.ndarray:
    right, left = np.divmod(numbers, left_size)
    for number, key in enumerate(keys):
        if number % 2:
            right = (right + mixed(left + key) % right_size) % right_size
        else:
            left = (left + mixed(right + key) % left_size) % left_size
    return right * left_size + left
