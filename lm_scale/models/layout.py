# SPDX-License-Identifier: Apache-2.0
"""How weights and activations change their layout inside a model.

A weight's gradient is a sum over all tokens, and each device sees some of them. Where a
weight is used it gets a type that says so: it is `reduced` over the mesh axes of batch
and sequence (the same everywhere), so that its gradient is `unreduced` there: a partial
sum on each device. Partial sums may be added up, over micro-batches for one, and are
summed over the devices when, and in the type, that the program says. The same two words
serve activations, where a matrix is cut over devices (`sum_over`, `from_residual`).
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from lm_scale.models.compute import Compute
from lm_scale.sharding import Rules

LANES = 128  # of a TPU's registers; kernels work by blocks of as many tokens


def token_axes(rules: Rules) -> frozenset[str]:
    """The mesh axes over which different devices see different tokens."""
    return frozenset(rules.batch + rules.seq)


def _cuts(spec: PartitionSpec) -> list[tuple[str, ...]]:
    """The mesh axes over which each dimension is cut."""
    parts = [part or () for part in spec.partitions]
    return [part if isinstance(part, tuple) else (part,) for part in parts]


def mesh_axes_of(spec: PartitionSpec) -> frozenset[str]:
    """The mesh axes over which an array with this partition is cut."""
    return frozenset(axis for part in _cuts(spec) for axis in part)


def summed(x: Array, spec: PartitionSpec) -> Array:
    """Partial sums, summed over the devices and cut as `spec` says.

    Where that cuts a dimension anew, each device gets its part of the sum only (a
    reduce-scatter): left to a reshard, XLA makes the whole sum everywhere, and cuts.
    """
    have, mesh = jax.typeof(x).sharding.spec, jax.sharding.get_abstract_mesh()
    before, after = _cuts(have), _cuts(spec)
    news = [new[len(old) :] for old, new in zip(before, after, strict=True)]
    sums = have.unreduced - spec.unreduced
    rest = sums.difference(*news)
    kept = all(new[: len(old)] == old for old, new in zip(before, after, strict=True))
    kept = kept and sums.issuperset(axis for new in news for axis in new)
    if not kept or all(mesh.shape[axis] == 1 for axis in sums):
        return jax.reshard(x, spec)  # something to move besides, or nothing to sum

    def on_each_device(x: Array) -> Array:
        for dim, axes in enumerate(news):
            if axes:
                x = jax.lax.psum_scatter(x, axes, scatter_dimension=dim, tiled=True)
        return jax.lax.psum(x, tuple(axis for axis in mesh.axis_names if axis in rest))

    return jax.shard_map(on_each_device, in_specs=have, out_specs=spec)(x)


def widen(
    x: Array, whole: PartitionSpec, *, dtype: str | None = None, wire: str | None = None
) -> Array:
    """`x` gathered to what `whole` says, whose `reduced` axes see different uses of it.

    Its gradient, a partial sum on each device along these, is `summed` back to where
    `x` is cut. `dtype`: of the result (that of `x`); `wire`: of the gradient meanwhile.
    """
    spec, own = jax.typeof(x).sharding.spec, str(x.dtype)
    back = PartitionSpec(*spec.partitions, unreduced=spec.reduced)
    return _widen(x, whole, back, own, dtype or own, wire or dtype or own)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4, 5))
def _widen(x, whole, back, own, dtype, wire):
    return jax.reshard(x.astype(dtype), whole)


def _widen_forward(x, *how):
    return _widen(x, *how), None


def _widen_backward(whole, back, own, dtype, wire, _, gradient):
    return (summed(gradient.astype(wire), back).astype(own),)


_widen.defvjp(_widen_forward, _widen_backward)


def shared(weight: Array, rules: Rules, spec: PartitionSpec | None = None) -> Array:
    """The same weight, where it is cut; its gradient stays a partial sum elsewhere.

    spec: cut like this, and not as it has been.
    """
    cut = jax.typeof(weight).sharding.spec if spec is None else spec
    others = token_axes(rules) - mesh_axes_of(cut)
    return jax.reshard(weight, PartitionSpec(*cut.partitions, reduced=others))


def gather(weight: Array, compute: Compute, dtype: str | None = None) -> Array:
    """A weight as a layer uses it: in the compute type, and whole but for `tensor`.

    What FSDP has cut is gathered; the gradient is summed over the same devices, and
    scattered to them, in `compute.grad_dtype`. `dtype`: instead of the compute type.
    Vectors, which norms need in f32, keep their type.
    """
    dtype = dtype or (compute.dtype if weight.ndim > 1 else "float32")
    spec, tokens = jax.typeof(weight).sharding.spec, token_axes(compute.rules)
    if weight.ndim > 2 and weight.shape[-1] < LANES and spec.partitions[-1] is None:
        # Side by side: a TPU gives a row of 64 the place of 128, or turns all around.
        flat = gather(merged(weight, weight.ndim - 2), compute, dtype)
        spec = jax.typeof(flat).sharding.spec
        cut = PartitionSpec(*spec.partitions, None, reduced=spec.reduced)
        return jnp.reshape(flat, weight.shape, out_sharding=cut)
    left = [tuple(axis for axis in part if axis not in tokens) for part in _cuts(spec)]
    whole = PartitionSpec(*(part or None for part in left), reduced=tokens)
    return widen(weight, whole, dtype=dtype, wire=compute.grad_dtype)


def merged(x: Array, dim: int) -> Array:
    """`x` with its axes `dim` and `dim` + 1 as one, cut as the first of these."""
    spec = jax.typeof(x).sharding.spec
    parts, shape = [*spec.partitions], [*x.shape]
    del parts[dim + 1]
    shape[dim : dim + 2] = [x.shape[dim] * x.shape[dim + 1]]
    cut = PartitionSpec(*parts, unreduced=spec.unreduced, reduced=spec.reduced)
    return jnp.reshape(x, shape, out_sharding=cut)


def kept(x: Array) -> Array:
    """Named for the remat policy `dots`: it keeps this, and so needs less."""
    return checkpoint_name(x, "products")


def spread(weight: Array, x: Array, *dims: int) -> Array:
    """A bias or scale broadcast to the shape and the sharding of the activation `x`.

    dims: the axes of `x` that are the axes of the weight; the last ones if not given.
    """
    spec, own = jax.typeof(x).sharding.spec, jax.typeof(weight).sharding.spec
    dims = dims or tuple(range(x.ndim - weight.ndim, x.ndim))
    own = PartitionSpec(*own.partitions, reduced=mesh_axes_of(spec) - mesh_axes_of(own))
    wide = jax.lax.broadcast_in_dim(
        jax.reshard(weight, own), x.shape, dims, out_sharding=spec
    )
    # It is so cut already: this is for the way back, where the gradient is summed to a
    # partial sum on each device. Without a word of its own on how it is cut before, XLA
    # may take it from another use of the same gradient, and sum what was gathered.
    return jax.reshard(wide, spec)


def sum_over(axis: str, rules: Rules) -> PartitionSpec:
    """How a product that contracts the activations' `axis` comes out: not summed yet.

    `to_residual` sums it over the devices that had a part of the axis.
    """
    spec = rules.spec("batch", "seq", "act_embed")
    return PartitionSpec(*spec, unreduced=frozenset(getattr(rules, axis)))


def to_residual(x: Float[Array, "B T D"], rules: Rules) -> Float[Array, "B T D"]:
    """An activation, laid out as between the sublayers; a partial sum is summed."""
    whole = summed(x, rules.spec("batch", "residual_seq", "act_embed"))
    return checkpoint_name(whole, "residual")


def from_residual(
    x: Float[Array, "B T D"], rules: Rules, *axes: str
) -> Float[Array, "B T D"]:
    """The input of a sublayer or of the head: the sequence as `seq` says.

    axes: those of the activations that it is multiplied into. Where they are cut over
    the devices that have shared out the sequence, its gradient is a sum over these
    devices, and is scattered back as it is summed.
    """
    spec = rules.spec("batch", "seq", "act_embed")
    gathered = frozenset(rules.residual_seq) - frozenset(rules.seq)
    cut = [frozenset(getattr(rules, axis)) for axis in axes]
    return widen(x, PartitionSpec(*spec, reduced=gathered.intersection(*cut)))
