# SPDX-License-Identifier: Apache-2.0
"""Dropout (Srivastava et al. 2014), with masks that are the same on every mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Key, UInt32

WORD = 2**32
GOLDEN = 0x9E3779B9  # a word over the golden ratio, made odd


def split_key(key: Key[Array, ""] | None, number: int):
    """`number` keys, or as many Nones: dropout is off."""
    return [None] * number if key is None else jax.random.split(key, number)


def dropout(
    x: Float[Array, "*D"], rate: float, key: Key[Array, ""] | None
) -> Float[Array, "*D"]:
    """Zeroes a share `rate` of `x` and scales the rest up; no key, no dropout.

    The mask depends on the key and the global shape only, never on the mesh.
    """
    return x if key is None or rate == 0.0 else _drop(x, key, rate)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _drop(x, key, rate):
    draws = even_draws(key, x.shape, jax.typeof(x).sharding)
    kept = draws >= np.uint32(min(round(rate * WORD), WORD - 1))
    return jnp.where(kept, x / (1.0 - rate), 0)


# The mask is made again in the backward pass: to keep it and to read it takes longer.
_drop.defvjp(
    lambda x, key, rate: (_drop(x, key, rate), key),
    lambda rate, key, dy: (_drop(dy, key, rate), None),
)


def even_draws(
    key: Key[Array, ""], shape: tuple[int, ...], sharding: NamedSharding | None
) -> UInt32[Array, "..."]:
    """For each element an even draw from 0 ... 2**32 - 1: a hash of its number.

    A mask has to be even, and need not be secret: with the draws of `jax.random`, a
    hash that is (Threefry, some 110 operations each), dropout takes a third of a step
    of RoBERTa on a TPU v3, and with this one (some 20) a twentieth.
    """
    first, second = jax.random.key_data(key)
    return _mixed(_mixed(_numbers(shape, sharding) ^ first) + second)


def _numbers(
    shape: tuple[int, ...], sharding: NamedSharding | None
) -> UInt32[Array, "..."]:
    """The elements numbered row by row; of more than 2**32, some share a number."""
    numbers = jnp.zeros(shape, jnp.uint32, out_sharding=sharding)
    stride = 1
    for dim in reversed(range(len(shape))):
        # Strides that are multiples of a word would give whole slices equal numbers.
        step = stride if stride < WORD else GOLDEN * (stride // WORD) % WORD
        place = jax.lax.broadcasted_iota(jnp.uint32, shape, dim, out_sharding=sharding)
        numbers = numbers + place * np.uint32(step)
        stride *= shape[dim]
    return numbers


def _mixed(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """A permutation of the 32-bit words after which no bit tells of another.

    The best of its form that Wellons' search found ("Prospecting for hash functions",
    2018, and its table of results).
    """
    x = (x ^ (x >> 16)) * np.uint32(0x21F0AAAD)
    x = (x ^ (x >> 15)) * np.uint32(0x735A2D97)
    return x ^ (x >> 15)
