# SPDX-License-Identifier: Apache-2.0
"""Dropout (Srivastava et al. 2014), with masks that are the same on every mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Key, UInt32

from lm_scale.models.layout import spread

WORD, HALF = 2**32, 16  # bits of half a word
DRAWS = 2**HALF
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
    words = even_words(key, x.shape, jax.typeof(x).sharding)
    return jnp.where(is_kept(words, rate), x / (1.0 - rate), 0)


# The mask is made again in the backward pass: to keep it and to read it takes longer.
_drop.defvjp(
    lambda x, key, rate: (_drop(x, key, rate), key),
    lambda rate, key, dy: (_drop(dy, key, rate), None),
)


def add_dropped(
    x: Float[Array, "B T D"],
    y: Float[Array, "B T D"],
    bias: Float[Array, "D"],
    rate: float,
    key: Key[Array, ""] | None,
) -> Float[Array, "B T D"]:
    """`x` + `dropout` of (`y` + `bias`): what a sublayer adds to its residual."""
    if key is None or rate == 0.0:
        return x + (y + spread(bias, y))
    return _add_dropped(x, y, bias, key, rate)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _add_dropped(x, y, bias, key, rate):
    return x + _drop(y + spread(bias, y), key, rate)


def _add_dropped_backward(rate, saved, dx):
    bias, key = saved
    dy = _drop(dx, key, rate)
    _, pull = jax.vjp(lambda bias: spread(bias, dx), bias)
    # Behind a barrier, which has XLA make and write all of it in one pass: else it
    # draws the mask again for each use, and there are two products and a sum.
    return *jax.lax.optimization_barrier((dx, dy, *pull(dy))), None


_add_dropped.defvjp(
    lambda x, y, bias, key, rate: (_add_dropped(x, y, bias, key, rate), (bias, key)),
    _add_dropped_backward,
)


def is_kept(words: UInt32[Array, "*D"], rate: float) -> Bool[Array, "*D"]:
    """False for a share `rate` of even words, in steps of 2**-16."""
    # As a signed number: TPUs compare unsigned ones by one operation more.
    numbers = jax.lax.bitcast_convert_type(words, jnp.int32)
    dropped = min(round(rate * DRAWS), DRAWS - 1)
    return numbers >= np.int32(dropped * DRAWS - WORD // 2)


def even_words(
    key: Key[Array, ""], shape: tuple[int, ...], sharding: NamedSharding
) -> UInt32[Array, "..."]:
    """For each element a word whose upper half is an even draw.

    A mask has to be even, and need not be secret: with the draws of `jax.random`, a
    hash that is (Threefry, some 110 operations each), dropout takes a third of a step
    of RoBERTa on a TPU v3. So rows and columns are hashed once, and an element mixes
    the two (`mixed`), in 15 operations. Two columns share a word, a half for each: so a
    kernel that has both at hand mixes once.
    """
    rows, columns = words_of(key, shape, sharding)
    odd = _numbers(shape[-1:], jax.typeof(columns).sharding) & 1
    halves = (1 - odd) * HALF
    last, whole = len(shape) - 1, {"shape": shape, "out_sharding": sharding}
    rows = jax.lax.broadcast_in_dim(
        rows, broadcast_dimensions=tuple(range(last)), **whole
    )
    columns, halves = (
        jax.lax.broadcast_in_dim(x, broadcast_dimensions=(last,), **whole)
        for x in (columns, halves)
    )
    return mixed(rows, columns) << halves


def words_of(
    key: Key[Array, ""], shape: tuple[int, ...], sharding: NamedSharding
) -> tuple[UInt32[Array, "*B"], UInt32[Array, "D"]]:
    """What an array's rows and its columns are hashed to, two columns to one word.

    By the key and their numbers in the whole array, wherever it is cut.
    """
    words = jax.random.bits(key, (4,), jnp.uint32)
    parts = sharding.spec.partitions
    cuts = [sharding.update(spec=PartitionSpec(*of)) for of in (parts[:-1], parts[-1:])]
    rows, columns = _numbers(shape[:-1], cuts[0]), _numbers(shape[-1:], cuts[1])
    # Behind a barrier, or else XLA may hash once for each element.
    return jax.lax.optimization_barrier(
        (hashed(rows, *words[:2]), hashed(columns >> 1, *words[2:]))
    )


def mixed(
    row: UInt32[Array, "*#D"], column: UInt32[Array, "*#D"]
) -> UInt32[Array, "*D"]:
    """A word of whose halves both are even, by one of a row and one of a column.

    By so few operations that a single number would not be hashed well. But of words
    that are hashed already it makes masks like those of independent draws: the largest
    singular value of a matrix of them (16384 by 3072, standardised) is what chance
    makes it, where other shifts and factors, such as those of `hashed`, leave a pattern
    of rows and columns up to 1.6 times as large (tests/models/test_dropout.py).
    """
    x = row + column
    x = (x ^ (x >> 12)) * np.uint32(2**32 - 2**13 - 2**8 + 1)
    return (x ^ (x >> 15)) * np.uint32(2**32 - 2**20 - 2**9 + 1)


def hashed(
    x: UInt32[Array, "*D"], first: UInt32[Array, ""], second: UInt32[Array, ""]
) -> UInt32[Array, "*D"]:
    """A permutation of 32-bit words, by two that are drawn evenly.

    To flip one bit of `x` flips each bit of the result half of the time, within 0.2 %
    in the mean and 2 % at most. TPU v2 and v3 multiply words by shifting and adding:
    these factors, found by a search, have two digits besides their last.
    """
    x = x ^ first
    x = (x ^ (x >> 13)) * np.uint32(2**32 - 2**12 + 2**2 + 1)
    x = (x ^ (x >> 18)) * np.uint32(2**32 - 2**25 - 2**7 + 1)
    x = x + second
    x = (x ^ (x >> 15)) * np.uint32(2**32 - 2**30 - 2**8 + 1)
    x = (x ^ (x >> 15)) * np.uint32(2**19 - 2**11 + 1)
    return x ^ (x >> 14)


def _numbers(shape: tuple[int, ...], sharding: NamedSharding) -> UInt32[Array, "..."]:
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
