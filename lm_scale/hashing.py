# SPDX-License-Identifier: Apache-2.0
"""Hashes of arrays, computed where they lie: shard by shard, on the devices.

An array's hash is the sum (mod 2**32) over its entries of `mix(bits, place)`, where
`place` is the entry's number in the whole array, row by row. So the hashes of shards
add up to that of the array, however it is cut: what was hashed on one mesh can be
checked on another. For a given place `mix` is a bijection of the bits, so that one
changed entry always changes the sum; more go unseen with a chance of 2**-32.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, UInt32

Index = tuple[tuple[int, int], ...]  # (start, stop) along each axis: a shard's place


def mix(bits: UInt32[Array, "*axes"], place: UInt32[Array, "*axes"]):
    """The 32-bit finalizer of MurmurHash3 (Appleby 2016), the place mixed in before."""
    x = bits ^ (place * jnp.uint32(0x9E3779B1))
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


@functools.partial(jax.jit, static_argnums=2)  # traced once for all of one shape
def block_hash(
    block: Array, start: tuple[Any, ...], shape: tuple[int, ...]
) -> UInt32[Array, ""]:
    """The hash of a block that begins at `start` of an array of this shape.

    Of types of 32 bits or fewer.
    """
    if block.dtype == jnp.bool_:
        block = block.astype(jnp.uint8)
    same_width = jnp.dtype(f"uint{8 * block.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(block, same_width).astype(jnp.uint32)
    place = jnp.zeros(block.shape, jnp.uint32)
    for axis, size in enumerate(shape):  # row by row, by Horner's rule
        own = jax.lax.broadcasted_iota(jnp.uint32, block.shape, axis)
        first = jnp.asarray(start[axis]).astype(jnp.uint32)
        place = place * jnp.uint32(size % 2**32) + first + own
    mixed = mix(bits, place)
    if block.ndim > 1:
        # Two sums, and a barrier that keeps XLA from making one of them, which takes
        # a CPU 1.7 times as long.
        mixed = jax.lax.optimization_barrier(jnp.sum(mixed, 0, dtype=jnp.uint32))
    return jnp.sum(mixed, dtype=jnp.uint32)


@jax.jit
def device_hashes(tree: Any) -> UInt32[Array, "arrays devices"]:
    """What each device holds of each array, hashed; the same on every process.

    Arrays in the order of `jax.tree.leaves`, devices in that of their mesh. All arrays
    are on one mesh; to be called under `jax.set_mesh`.
    """
    leaves = jax.tree.leaves(tree)
    mesh = jax.sharding.get_abstract_mesh()
    specs = [jax.typeof(leaf).sharding.spec for leaf in leaves]

    def local(*blocks: Array) -> Array:
        hashes = []
        for leaf, block, spec in zip(leaves, blocks, specs, strict=True):
            axes = [*spec, *[None] * (leaf.ndim - len(spec))]
            start = tuple(
                0 if axis is None else jax.lax.axis_index(axis) * size
                for axis, size in zip(axes, block.shape, strict=True)
            )
            hashes.append(block_hash(block, start, leaf.shape))
        return jnp.stack(hashes)[:, None]

    every = jax.P(None, mesh.axis_names)
    found = jax.shard_map(
        local, mesh=mesh, in_specs=tuple(specs), out_specs=every, check_vma=False
    )(*leaves)
    return jax.reshard(found, jax.P())


def described(arrays: Mapping[str, jax.Array]) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, types and shardings, which outlive arrays that are donated."""
    return {
        path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        for path, x in arrays.items()
    }


def shard_indices(sharding: NamedSharding, shape: tuple[int, ...]) -> list[Index]:
    """The part of an array that each device of the mesh holds, in the mesh's order."""
    parts = sharding.devices_indices_map(shape)
    devices: Any = sharding.mesh.devices
    return [
        tuple(s.indices(size)[:2] for s, size in zip(parts[device], shape, strict=True))
        for device in devices.flat
    ]


def by_shard(hashes: np.ndarray, indices: list[Index]) -> dict[Index, int]:
    """One hash for each part of an array, out of those of all devices."""
    return {index: int(value) for index, value in zip(indices, hashes, strict=True)}


def total(shards: dict[Index, int]) -> int:
    """The array's hash out of those of its parts."""
    return sum(shards.values()) % 2**32
