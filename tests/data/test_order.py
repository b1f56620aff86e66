# SPDX-License-Identifier: Apache-2.0
"""The order is a permutation, the same for any part of it, and looks like a random one.

Bounds are 4 standard deviations of each statistic for a true random permutation, 5
where a test looks at many; keys are fixed, so that nothing here fails by chance.
"""

import functools
import itertools
import math

import numpy as np
import pytest

from lm_scale.data.order import shuffled

SIZES = (100, 1_009, 10_000, 99_991, 1_000_000)


KEYS = ((42, 0), (42, 1), (43, 0))  # seed, epoch


@functools.cache
def order(size, *key):
    return shuffled(np.arange(size), size, key)


def correlation(a, b):
    """In units of its standard deviation for independent orders."""
    return np.corrcoef(a, b)[0, 1] * np.sqrt(a.size)


def deviation(counts, expected, degrees):
    """Chi-square of the counts, in standard deviations from its mean."""
    chi_square = np.sum((counts - expected) ** 2 / expected)
    return (chi_square - degrees) / math.sqrt(2 * degrees)


@pytest.mark.parametrize("size", [*range(1, 40), 99, 100, 101, 4095, 4096, 4097])
def test_each_number_comes_once(size):
    for epoch in range(3):
        assert sorted(order(size, 7, epoch)) == list(range(size))


def test_any_part_of_the_order_is_that_of_the_whole():
    whole = order(1000, 5, 2)
    for places in ([999], [3, 3, 0], range(700, 703), np.arange(6).reshape(2, 3)):
        found = shuffled(np.asarray(places), 1000, (5, 2))
        np.testing.assert_array_equal(found, whole[np.asarray(places)])
        assert found.dtype == np.int64
    assert shuffled(np.empty(0, np.int64), 1000, (5, 2)).size == 0


@pytest.mark.parametrize("size", [100, 10_000, 3 * 2**40 + 1])
def test_many_places_of_a_block_are_what_they_are_one_by_one(size):
    """Within a block, at its edges, in the last and shorter one, and in several."""
    rng = np.random.default_rng(size)
    last = min(size, 10_000)
    for first in (0, size - last):
        places = first + rng.integers(0, last, 200)
        found = shuffled(places.reshape(2, 100), size, (3, 1))
        alone = [shuffled(np.array([place]), size, (3, 1))[0] for place in places]
        np.testing.assert_array_equal(found.ravel(), alone)


def test_sizes_and_seeds_beyond_32_bits():
    size = 3 * 2**40 + 1
    places = np.array([0, 1, size // 2, size - 1])
    found = shuffled(places, size, (2**63 - 1, 0))
    assert len(set(found.tolist())) == 4 and ((0 <= found) & (found < size)).all()
    assert found.max() > 2**33
    assert (found != shuffled(places, size, (2**63 - 2, 0))).all()


@pytest.mark.parametrize("size", SIZES)
def test_from_which_part_of_the_text_to_which_part_of_the_epoch(size):
    """All transitions of bins are as often: 9² degrees of freedom, over some keys.

    A true permutation's chi-square has (n - 1) / n of the spread of independent draws.
    """
    keys = [*KEYS, *((seed, 0) for seed in range(5000 // size))]
    counts, place = np.zeros(100), np.arange(size) * 10 // size
    for key in keys:
        to = order(size, *key) * 10 // size
        counts += np.bincount(place * 10 + to, minlength=100)
    sizes = np.bincount(place)
    table, expected = counts.reshape(10, 10), len(keys) * np.outer(sizes, sizes) / size
    assert abs(deviation(table, expected, 81)) < 4


@pytest.mark.parametrize("size", SIZES)
def test_how_far_examples_move(size):
    """Spearman's footrule, whose mean and variance Diaconis and Graham (1977) give."""
    for key in KEYS:
        footrule = np.abs(order(size, *key) - np.arange(size)).sum()
        sigma = math.sqrt((size + 1) * (2 * size**2 + 7) / 45)
        assert abs(footrule - (size**2 - 1) / 3) < 4 * sigma


@pytest.mark.parametrize("size", SIZES)
def test_one_place_tells_nothing_of_another(size):
    """Not of the next, nor of the next epoch's, nor of another seed's."""
    found, place = order(size, 42, 0), np.arange(size)
    # Neighbours in the text stay neighbours twice in a random order (Poisson).
    assert np.sum(np.abs(np.diff(found)) == 1) <= 2 + 4 * math.sqrt(2)
    for a, b in (
        (found, place),
        (found[1:], found[:-1]),
        (found, order(size, 42, 1)),
        (found, order(size, 43, 0)),
        (order(size, 42, 1), order(size, 43, 0)),
    ):
        assert abs(correlation(a, b)) < 4


def test_a_distance_in_the_text_is_kept_by_no_pair():
    """Differences of what stands 1, 2, 3 places apart are as even as they should be."""
    size = 100_000
    found = order(size, 42, 0)
    for apart in (1, 2, 3, 256, 317):  # 317: the side of the box
        steps = (found[apart:] - found[:-apart]) % size
        counts = np.bincount(steps * 100 // size, minlength=100)
        assert abs(deviation(counts, counts.sum() / 100, 99)) < 4


def test_all_orders_of_few_examples_are_as_likely():
    """The hardest case for a Feistel network: its halves have two values each."""
    counts = dict.fromkeys(itertools.permutations(range(4)), 0)
    for seed in range(960):
        counts[tuple(order(4, seed).tolist())] += 1
    assert abs(deviation(np.array(list(counts.values())), 40, 23)) < 4


def test_the_first_batches_of_a_huge_epoch_come_from_all_of_it():
    size, drawn = 30_000_000, 10_000
    found = shuffled(np.arange(drawn), size, (42, 0))
    assert len(set(found.tolist())) == drawn
    counts = np.bincount(found * 50 // size, minlength=50)
    assert abs(deviation(counts, drawn / 50, 49)) < 4
    assert abs(correlation(found[1:], found[:-1])) < 4


def test_a_small_epoch_starts_anywhere():
    first = [shuffled(np.array([0]), 70, (42, epoch))[0] for epoch in range(700)]
    counts = np.bincount(np.array(first) // 10, minlength=7)
    assert abs(deviation(counts, 100, 6)) < 4
