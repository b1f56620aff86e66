# SPDX-License-Identifier: Apache-2.0
"""The product of an activation with a block's weight, in 8 bits if one asks for that.

Each factor is rounded to int8 or float8 by itself: of an activation every token, of a
weight every output has a scale of its own, its largest value (qwix). The factors of a
forward pass are rounded, and those of the gradients of activations; the gradients of
weights, sums over all tokens, stay in the compute type. So two of three products of a
train step run in 8 bits, at twice the speed where the hardware has them, of which
rounding takes a part (benchmarks/step). A model is the same on any mesh: scales are of
whole rows, not of a device's part of them.
"""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from lm_scale.errors import InputError
from lm_scale.models.compute import Compute
from lm_scale.models.layout import kept, mesh_axes_of, summed

# Of values, and of gradients, which have a wider range (Micikevicius et al. 2022,
# arXiv:2209.05433, section 3).
TYPES = {
    "int8": (jnp.int8, jnp.int8),
    "float8": (jnp.float8_e4m3fn, jnp.float8_e5m2),
}
# int8: a row's largest value is 127. By itself qwix makes it 127.5, which rounding
# errors send to -127 on one mesh and to -128 on the other.
CALIBRATION = {
    jnp.int8: f"absmax,{127.5 / 127}",
    jnp.float8_e4m3fn: "absmax",
    jnp.float8_e5m2: "absmax",
}
INT8_TPUS = ("TPU v5 lite", "TPU v5e", "TPU v5", "TPU v5p", "TPU v6 lite", "TPU v6e")
FLOAT8_TPUS = ("TPU7x",)
LEAST_CAPABILITY = {"int8": 8.0, "float8": 8.9}  # NVIDIA's: A100; L4, H100


def check_quantize(compute: Compute, device: Any) -> None:
    """InputError if such a device multiplies no faster in 8 bits."""
    kind = compute.quantize
    if kind is not None and not _is_fast(kind, device):
        raise InputError(
            f"compute.quantize = {kind!r} gains nothing on {device.device_kind}. TPUs "
            f"v5e, v5p and v6e and NVIDIA's GPUs from the A100 on multiply int8 "
            f"faster; TPU7x, and GPUs from the L4 and H100 on, float8. Leave it out."
        )


def _is_fast(kind: str, device: Any) -> bool:
    if device.platform == "tpu":
        return device.device_kind in (INT8_TPUS if kind == "int8" else FLOAT8_TPUS)
    if device.platform == "gpu":
        capability = str(getattr(device, "compute_capability", ""))
        try:
            return float(capability) >= LEAST_CAPABILITY[kind]
        except ValueError:  # AMD's
            return False
    return True  # a CPU is slow in either, and there to try things


def product(
    pattern: str,
    x: Array,
    weight: Array,
    compute: Compute,
    into: PartitionSpec | None = None,
) -> Array:
    """An einsum of an activation and a weight, laid out as `into` says.

    `into` may leave partial sums (`layout.sum_over`); None: it follows.
    """
    if compute.quantize is None:
        return jnp.einsum(pattern, x, weight, out_sharding=into)
    made = cast(Array, _quantized(pattern, x, weight, into, compute.quantize))
    return made if jax.typeof(made).sharding.spec.unreduced else kept(made)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3, 4))
def _quantized(pattern, x, weight, into, kind):
    value = TYPES[kind][0]
    return _in_8_bits(pattern, (x, value), (weight, value), into)


def _quantized_forward(pattern, x, weight, into, kind):
    return _quantized(pattern, x, weight, into, kind), (x, weight)


def _quantized_backward(pattern, into, kind, saved, dy):
    x, weight = saved
    value, gradient = TYPES[kind]
    factors, out = pattern.split("->")
    left, right = factors.split(",")
    spec = jax.typeof(x).sharding.spec
    back = PartitionSpec(*spec.partitions, unreduced=spec.reduced)
    dx = _in_8_bits(f"{out},{right}->{left}", (dy, gradient), (weight, value), back)
    _, pull = jax.vjp(
        lambda weight: jnp.einsum(pattern, x, weight, out_sharding=into), weight
    )
    return dx, *pull(dy)


_quantized.defvjp(_quantized_forward, _quantized_backward)


def _in_8_bits(pattern, first, second, into):
    """The einsum of two arrays, each with the type that its values are rounded to."""
    factors, out = pattern.split("->")
    letters = factors.split(",")
    cuts: dict[str, Any] = {}
    values, scales = [], []
    for (array, kind), names in zip((first, second), letters, strict=True):
        spec = jax.typeof(array).sharding.spec
        cuts |= dict(zip(names, spec.partitions, strict=True))
        value, scale = _round(array, kind, names, out)
        values.append(value)
        scales.append(scale)
    whole = PartitionSpec(*(cuts[name] for name in out))
    contracted = PartitionSpec(*(cut for name, cut in cuts.items() if name not in out))
    partial = mesh_axes_of(contracted)
    sums = jnp.einsum(
        pattern, *values,
        preferred_element_type=jnp.int32 if first[1] == jnp.int8 else jnp.float32,
        out_sharding=PartitionSpec(*whole.partitions, unreduced=partial),
    )  # fmt: skip
    # (Partial sums may be multiplied by what is the same on all that have one.)
    scale = jax.reshard(
        scales[0] * scales[1], PartitionSpec(*whole.partitions, reduced=partial)
    )
    made = (sums.astype(jnp.float32) * scale).astype(first[0].dtype)
    return made if into is None else summed(made, into)


def _round(array, kind, names, out):
    """Values of the type `kind`, and their scales as they multiply the product."""
    import qwix  # takes most of a second, and few runs need it

    # The type's `reduced` axes are for gradients, of which there are none here.
    spec = jax.typeof(array).sharding.spec
    array = jax.reshard(array, PartitionSpec(*spec.partitions)).astype(jnp.float32)
    own = [axis for axis, name in enumerate(names) if name in out]
    rounded = qwix.quantize(
        array, kind, channelwise_axes=own, calibration_method=CALIBRATION[kind]
    )
    scale = jnp.squeeze(rounded.scale, [a for a in range(array.ndim) if a not in own])
    dims = [names[axis] for axis in own]
    assert dims == [name for name in out if name in dims]  # in the product's order
    return rounded.qvalue, jnp.expand_dims(
        scale, [axis for axis, name in enumerate(out) if name not in dims]
    )
