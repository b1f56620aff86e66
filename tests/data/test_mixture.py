# SPDX-License-Identifier: Apache-2.0
"""Mixtures: shares that hold in every beginning, and no source that keeps a row."""

import numpy as np
import pytest

from lm_scale.data.mixture import FINEST, WINDOW, Mixture, parts_of
from lm_scale.errors import InputError

WEIGHTS = {
    "even": [1, 1],
    "tenths": [0.7, 0.2, 0.1],
    "thirds": [1, 1, 1],
    "one": [3.5],
    "tiny": [0.9995, 0.0003, 0.0002],
    "many": list(range(1, 30)),
    "awkward": [np.pi, np.e, 1e-9, 1000.5],
    "counts": [123_456_789, 98_765_431, 1_234],
}


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_beginning_has_each_source_s_share(name, seed):
    """To within one where windows end, and nowhere worse than is promised."""
    mixture = Mixture(WEIGHTS[name], seed=seed)
    places = np.arange(3 * FINEST if name == "awkward" else 70_000)
    sources, before = mixture.at(places)
    for source, share in enumerate(mixture.shares):
        here = sources == source
        off = np.abs(np.cumsum(here) - (places + 1) * share)
        ends = (places + 1) % WINDOW == 0
        assert off[ends].max() < 1
        assert off.max() < 1 + WINDOW * share * (1 - share)
        # 0, 1, 2 ...: each example of the source once, in order.
        np.testing.assert_array_equal(before[here], np.arange(here.sum()))
    far = 10**12 + np.arange(100)
    for n in (0, 1, 17, 40_000, 10**12):
        taken = mixture.taken(n)
        assert taken.sum() == n
        most = 1 + WINDOW * mixture.shares * (1 - mixture.shares)
        assert (np.abs(taken - n * mixture.shares) < most + 1e-3).all()  # of float64
    expected = mixture.taken(10**12)
    for source, number in zip(*mixture.at(far), strict=True):
        assert number == expected[source]
        expected[source] += 1


@pytest.mark.parametrize("name", WEIGHTS)
def test_shares_are_those_asked_for(name):
    weights = np.array(WEIGHTS[name], float)
    shares = Mixture(weights.tolist(), seed=0).shares
    error = np.abs(shares - weights / weights.sum()).max()
    if name in ("awkward", "counts"):  # finer than a 65,536th: rounded, but never to 0
        assert error < (len(weights) + 1) / FINEST and shares.min() >= 1 / FINEST
    else:
        assert error < 1e-12


def test_parts_are_small_where_they_can_be():
    assert parts_of([0.7, 0.2, 0.1]) == [7, 2, 1]
    assert parts_of([2, 4]) == [1, 2]
    assert parts_of([0.3333, 0.6667]) == [3333, 6667]
    assert sum(parts_of([np.pi, 1])) == FINEST


def test_any_subset_of_places_is_the_same():
    mixture = Mixture([5, 3, 2], seed=3)
    sources, before = mixture.at(np.arange(1000))
    rng = np.random.default_rng(0)
    for _ in range(10):
        some = rng.permutation(1000)[:50]
        again = Mixture([5, 3, 2], seed=3).at(some)  # made anew, as after a resume
        np.testing.assert_array_equal(again[0], sources[some])
        np.testing.assert_array_equal(again[1], before[some])


@pytest.mark.parametrize("weights", [[1, 1, 1], [7, 2, 1], [5, 2, 1]], ids=str)
@pytest.mark.parametrize("batch", [6, 8, 10, 64, 640])
def test_no_row_of_the_batches_belongs_to_a_source(batch, weights):
    """Each row gets each source about as often as its share says."""
    steps = 64_000 // batch
    mixture = Mixture(weights, seed=0)
    sources, _ = mixture.at(np.arange(steps * batch))
    counts = [np.bincount(rows, minlength=3) for rows in sources.reshape(steps, -1).T]
    expected = steps * mixture.shares
    chi = ((np.array(counts) - expected) ** 2 / expected).sum()
    # Chi-square of 2 * batch degrees: mean 2 b, standard deviation 2 sqrt(b).
    assert chi < 2 * batch + 5 * 2 * batch**0.5


@pytest.mark.parametrize(("batch", "most"), [(8, 2), (37, 1.8), (64, 0.1), (512, 0.1)])
def test_batches_are_more_even_than_by_chance(batch, most):
    """Drawn one by one, the chi-square of a batch would be 2 on average."""
    mixture = Mixture([0.7, 0.2, 0.1], seed=0)
    sources, _ = mixture.at(np.arange(100 * batch))
    chi = []
    for rows in sources.reshape(100, batch):
        expected = batch * mixture.shares
        counts = np.bincount(rows, minlength=3)
        if batch % WINDOW == 0:
            assert np.abs(counts - expected).max() < 2  # within one at both ends
        chi.append(((counts - expected) ** 2 / expected).sum())
    assert np.mean(chi) < most


def test_the_seed_decides_between_equals():
    patterns = {
        tuple(Mixture([1, 1], seed=s).at(np.arange(40))[0].tolist()) for s in range(5)
    }
    assert len(patterns) == 5


@pytest.mark.parametrize("weights", [[], [0.0, 1], [-1, 2], [np.nan], [np.inf, 1]])
def test_weights_that_are_none(weights):
    with pytest.raises(InputError, match="weight"):
        Mixture(weights, seed=0)
