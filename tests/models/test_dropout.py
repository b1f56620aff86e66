# SPDX-License-Identifier: Apache-2.0
"""Dropout's masks: even, unrelated, as many as the rate says, the same on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lm_scale.models import dropout as module
from lm_scale.models.dropout import add_dropped, dropout, even_words, hashed, is_kept

ROWS, WIDTH = 512, 384


def draws(key, shape=(ROWS, WIDTH)) -> np.ndarray:
    """The halves of words that masks are made by."""
    words = even_words(key, shape, jax.typeof(jnp.zeros(shape)).sharding)
    return (np.asarray(words) >> 16).astype(np.uint16)


def bits(words: np.ndarray) -> np.ndarray:
    return np.unpackbits(words.view(np.uint8)).reshape(*words.shape, 16)


def is_half(found: np.ndarray) -> bool:
    """If five standard deviations allow it for this share of zeros and ones."""
    return abs(found.mean() - 0.5) < 5 * 0.5 / found.size**0.5


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_each_bit_is_even_and_tells_nothing_of_its_neighbours(seed):
    found = bits(draws(jax.random.key(seed)))
    assert abs(found.mean(axis=(0, 1)) - 0.5).max() < 5 * 0.5 / (ROWS * WIDTH) ** 0.5
    for axis, shift in ((0, 1), (0, 2), (0, 256), (1, 1), (1, 2), (1, 128), (2, 1),
                        (2, 5)):  # fmt: skip
        assert is_half(found == np.roll(found, shift, axis)), (axis, shift)


def test_masks_of_keys_have_nothing_in_common():
    """Of neighbouring seeds, of a key's parts, and of two shapes with one key."""
    key = jax.random.key(5)
    keys = [key, jax.random.key(4), *jax.random.split(key, 3)]
    found = [bits(draws(one)) for one in keys]
    for number, one in enumerate(found):
        for other in found[:number]:
            assert is_half(one == other)
            assert is_half(one == np.roll(other, 1, axis=1))


def test_a_chi_square_of_bytes():
    """The two bytes of a draw: 255 degrees of freedom each, within five deviations."""
    words = draws(jax.random.key(9), (1024, 1024))
    for byte in words.view(np.uint8).reshape(-1, 2).T:
        expected = byte.size / 256
        square = ((np.bincount(byte, minlength=256) - expected) ** 2 / expected).sum()
        assert abs(square - 255) < 5 * (2 * 255) ** 0.5


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.003])
def test_the_share_is_the_rate_and_the_mean_stays(rate):
    x = jnp.ones((1000, 1000))
    found = np.asarray(dropout(x, rate, jax.random.key(3)))
    zeros = np.mean(found == 0)
    assert abs(zeros - rate) < 5 * (rate * (1 - rate) / x.size) ** 0.5
    np.testing.assert_allclose(found[found != 0], 1 / (1 - rate), rtol=1e-6)
    # In every row and every column too, a mask of rows or columns would not do.
    for axis in (0, 1):
        means = np.mean(found == 0, axis=axis)
        assert abs(means - rate).max() < 6 * (rate * (1 - rate) / 1000) ** 0.5


def test_a_rate_of_nearly_one_drops_all_but_a_step():
    found = np.asarray(dropout(jnp.ones((1000, 1000)), 1 - 2**-20, jax.random.key(3)))
    assert abs(np.sum(found != 0) - 1e6 / 2**16) < 5 * (1e6 / 2**16) ** 0.5


def test_no_key_or_no_rate_changes_nothing():
    x = jnp.arange(6.0)
    assert dropout(x, 0.5, None) is x
    assert dropout(x, 0.0, jax.random.key(0)) is x


@pytest.mark.parametrize("spec", [P("a", None), P(None, "b"), P("b", "a"), P()])
def test_the_mesh_does_not_matter(spec):
    key, shape = jax.random.key(7), (8, 12)
    alone = draws(key, shape)
    mesh = jax.make_mesh((2, 4), ("a", "b"), (AxisType.Explicit,) * 2)
    sharding = NamedSharding(mesh, spec)
    with jax.set_mesh(mesh):
        found = jax.jit(lambda key: even_words(key, shape, sharding))(key)
    np.testing.assert_array_equal(np.asarray(found) >> 16, alone)


def test_a_bit_of_a_number_flips_each_bit_of_its_hash_half_of_the_time():
    """As often as the docstring says, by 2**18 words: five deviations are 0.5 %."""
    random = np.random.default_rng(0)
    words, first, second = jnp.asarray(
        random.integers(0, 2**32, (3, 2**18), dtype=np.uint32)
    )
    plain = np.asarray(hashed(words, first[0], second[0]))
    biases = []
    for bit in range(32):
        changed = np.asarray(hashed(words ^ np.uint32(1 << bit), first[0], second[0]))
        flipped = changed ^ plain
        biases.append([np.mean(flipped >> at & 1) - 0.5 for at in range(32)])
    assert np.abs(biases).max() < 0.02
    assert np.sqrt(np.mean(np.square(biases))) < 0.002


@pytest.mark.parametrize("rate", [0.5, 0.1])
@pytest.mark.parametrize("seed", [0, 1])
def test_no_pattern_of_rows_and_columns(rate, seed):
    """The largest singular value is that of a matrix of independent draws.

    Which for this shape is 0.99 to 1.01 of sqrt(rows) + sqrt(columns); with shifts and
    factors as `hashed` has them 1.1 to 1.6.
    """
    shape = 4096, 2048
    like = jax.typeof(jnp.ones(shape)).sharding
    words = even_words(jax.random.key(seed), shape, like)
    dropped = 1.0 - np.asarray(is_kept(words, rate), np.float32)
    mask = (dropped - rate) / (rate * (1 - rate)) ** 0.5
    edge = sum(n**0.5 for n in (shape[0], shape[1] // 2))
    for half in (mask[:, ::2], mask[:, 1::2], mask[:, ::2] * mask[:, 1::2]):
        assert np.linalg.norm(half, 2) < 1.04 * edge


@pytest.mark.parametrize("key", [None, jax.random.key(5)])
def test_what_is_added_to_a_residual_and_its_gradients(key):
    rng, rate = np.random.default_rng(0), 0.25
    x, y, d_sum = jnp.asarray(rng.standard_normal((3, 2, 5, 64)), jnp.float32)
    bias = jnp.asarray(rng.standard_normal(64), jnp.float32)

    def plain(x, y, bias):
        return x + dropout(y + bias, rate, key)

    with jax.set_mesh(jax.make_mesh((1,), ("a",), (AxisType.Explicit,))):
        found, pull = jax.vjp(lambda *xs: add_dropped(*xs, rate, key), x, y, bias)
        expected, pull_expected = jax.vjp(plain, x, y, bias)
        gradients = zip(pull(d_sum), pull_expected(d_sum), strict=True)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    for one, other in gradients:
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_slices_behind_2_to_the_32_elements_are_not_the_first_again(monkeypatch):
    monkeypatch.setattr(module, "WORD", 2**6)  # as if a word had six bits
    rows = draws(jax.random.key(0), (9, 64))
    assert np.unique(rows, axis=0).shape[0] == 9
