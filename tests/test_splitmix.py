# SPDX-License-Identifier: Apache-2.0
"""The bits behind the noise and the order: the published generator, and even."""

import numpy as np
import pytest

from lm_scale.splitmix import mixed, streams


def test_it_is_the_published_generator():
    """Its first numbers from the seed 0, as other implementations give them."""
    places = np.arange(1, 4, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert mixed(places).tolist() == expected


def test_a_number_does_not_depend_on_what_is_asked_for_besides():
    numbers = np.arange(2**40, 2**40 + 50)
    whole = streams((2**63 + 5, 3, numbers), 70)
    assert whole.shape == (50, 70)
    np.testing.assert_array_equal(
        streams((2**63 + 5, np.array([3]), numbers[[7]]), 9), whole[[7], :9]
    )


# What the noise of small runs is keyed by: neighbouring seeds, epochs and examples.
KEYS = {
    "seeds": (np.arange(4096), 0, 0),
    "epochs": (0, np.arange(4096), 0),
    "examples": (0, 0, np.arange(4096)),
    "diagonal": (np.arange(4096), np.arange(4096), np.arange(4096)[::-1]),
}


@pytest.mark.parametrize("keys", KEYS.values(), ids=KEYS)
def test_neighbouring_keys_and_places_share_nothing(keys):
    """Each bit is set half of the time, and equals no neighbour's more often."""
    bits = np.unpackbits(streams(keys, 32).view(np.uint8)).reshape(4096, 32, 64)
    assert np.unique(streams(keys, 32)).size == 4096 * 32
    # Within five standard deviations, of a mean of so many.
    each = bits.mean(axis=0)
    assert abs(each - 0.5).max() < 5 * 0.5 / 4096**0.5
    for axis, other in ((0, 1), (0, 512), (1, 1), (1, 7), (2, 1), (2, 32)):
        equal = (bits == np.roll(bits, other, axis)).mean()
        assert abs(equal - 0.5) < 5 * 0.5 / bits.size**0.5


def test_keys_in_another_order_start_other_streams():
    pairs = np.indices((64, 64)).reshape(2, -1)
    first = streams((pairs[0], pairs[1], 0), 1)
    assert np.unique(np.concatenate([first, streams((0, *pairs), 1)])).size == 8192 - 64
