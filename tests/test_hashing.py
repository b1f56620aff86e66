# SPDX-License-Identifier: Apache-2.0
"""Hashes of arrays: the same however they are cut, another for any change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding

from lm_scale.hashing import block_hash, by_shard, device_hashes, shard_indices, total

P = jax.P
SHAPE = (12, 16, 6)
X = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)


def mesh_of(*sizes: int) -> jax.sharding.Mesh:
    names = ("data", "fsdp", "tensor")[: len(sizes)]
    devices = jax.devices()[: int(np.prod(sizes))]
    types = (AxisType.Explicit,) * len(sizes)
    return jax.make_mesh(sizes, names, axis_types=types, devices=devices)


def hashes(x, sizes, spec):
    mesh = mesh_of(*sizes)
    placed = jax.device_put(x, NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
        (row,) = np.asarray(device_hashes([placed]))
    return by_shard(row, shard_indices(placed.sharding, x.shape))


def whole(x) -> int:
    return int(block_hash(jnp.asarray(x), (0,) * np.ndim(x), np.shape(x)))


CUTS = [
    ((1,), P()),
    ((8,), P()),
    ((8,), P(None, "data")),
    ((2, 2, 2), P(None, "fsdp")),
    ((2, 2, 2), P(("fsdp", "data"), None, "tensor")),
    ((2, 2, 2), P("tensor", ("data", "fsdp"))),
]


@pytest.mark.parametrize(("sizes", "spec"), CUTS)
def test_the_hashes_of_shards_add_up(sizes, spec):
    shards = hashes(X, sizes, spec)
    assert total(shards) == whole(X)
    for index, value in shards.items():
        block = X[tuple(slice(*part) for part in index)]
        start = tuple(first for first, _ in index)
        assert int(block_hash(jnp.asarray(block), start, SHAPE)) == value


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "int8", "bool"])
def test_any_changed_entry_changes_the_hash(dtype):
    x = np.asarray(jnp.asarray(X > 0 if dtype == "bool" else X * 50, dtype))
    for place in [(0, 0, 0), (5, 7, 3), (11, 15, 5)]:
        other = x.copy()
        raw = other[place].tobytes()
        flipped = np.frombuffer(bytes([raw[0] ^ 1]) + raw[1:], x.dtype)
        other[place] = flipped[0]
        assert whole(other) != whole(x)


def test_entries_that_change_places_change_the_hash():
    other = X.copy()
    other[0], other[1] = X[1], X[0]
    assert whole(other) != whole(X)
    assert whole(np.zeros(7, np.float32)) != whole(np.zeros(8, np.float32))


def test_a_scalar():
    assert total(hashes(np.int32(7), (8,), P())) == whole(np.int32(7))
    assert whole(np.int32(7)) != whole(np.int32(8))
