# SPDX-License-Identifier: Apache-2.0
"""Attention on a TPU in Pallas kernels of our own: rows up to 1024, with dropout.

Scores never leave VMEM; vmem_kernels.py says how. Shapes: q [B T D] with D = H N, heads
side by side, k and v [B T K·N], `log_sum` f32 [B D/128 G T] for groups of G = 128 / N
heads.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, UInt32

from lm_scale.models.layout import kept
from lm_scale.models.vmem_kernels import (
    LANES,
    Call,
    as_loaded,
    backward_kernel,
    backward_scratch,
    forward_kernel,
    forward_scratch,
)

LONGEST = {"bfloat16": 1024, "float32": 512}  # tokens of a row, for 16 MiB of VMEM
TOKENS = 512  # at least, of the rows that a kernel holds, if a device has them
FORWARD, BACKWARD = "attention_forward", "attention_backward"  # as programs name them


def vmem_obstacle(heads: int, head_dim: int, length: int, dtype: str) -> str | None:
    """What keeps rows of a device from the kernels, to be read after "because"."""
    if length % LANES or length > LONGEST[dtype]:
        return (
            f"vmem takes rows of 128, 256 ... {LONGEST[dtype]} tokens in {dtype}, and "
            f"these have {length}"
        )
    if head_dim not in (64, LANES):
        return f"vmem takes a head_dim of 64 or 128, and it is {head_dim}"
    if heads * head_dim % LANES:
        return f"vmem takes pairs of heads, and a device has {heads}"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend_in_vmem(
    call: Call,
    q: Float[Array, "B T D"],
    k: Float[Array, "B T E"],
    v: Float[Array, "B T E"],
    noise: UInt32[Array, "4"] | None,
    segments: Int[Array, "B T"] | None,
) -> Float[Array, "B T D"]:
    """The weighted means, on one device, of rows without a `vmem_obstacle`.

    E: K·N, of as many heads as there are queries', or fewer. noise: of dropout, a key's
    two words and the numbers of this device's first row and head; the mask is that of
    `dropout.dropout` on weights [B H T S] of all devices. segments: a query sees keys
    of its own.
    """
    return _forward(call, q, k, v, noise, segments)[0]


def _forward(call: Call, q, k, v, noise, segments):
    q, k, v = kept(q), kept(k), kept(v)
    B, T, D = q.shape
    heads = len(call.lanes())
    log_sum = jax.ShapeDtypeStruct((B, D // LANES, heads, T), jnp.float32)
    mean, log_sum = _run(
        forward_kernel, FORWARD, forward_scratch, call, noise, segments,
        [q, *_of_queries(call, q, k, v)], made=[q, log_sum],
    )  # fmt: skip
    mean, log_sum = (kept(checkpoint_name(x, "attention")) for x in (mean, log_sum))
    return mean, (q, k, v, noise, segments, log_sum)


def _backward(call: Call, saved, d_mean):
    q, k, v, noise, segments, log_sum = saved
    dq, *of_queries = _run(
        backward_kernel, BACKWARD, backward_scratch, call, noise, segments,
        [q, *_of_queries(call, q, k, v), d_mean, log_sum], made=[q, q, q],
    )  # fmt: skip
    dk, dv = (_of_keys(call, x, k) for x in of_queries)
    return dq, dk, dv, None, None


attend_in_vmem.defvjp(_forward, _backward)


def _of_queries(call: Call, q, *of_keys) -> list[Array]:
    """Keys or values [B T K·N] with a copy for each query head, [B T H·N]."""
    share = q.shape[2] // of_keys[0].shape[2]
    heads = (x.reshape(*x.shape[:2], -1, 1, call.head_dim) for x in of_keys)
    return [jnp.repeat(x, share, axis=3).reshape(q.shape) for x in heads]


def _of_keys(call: Call, gradient, k) -> Array:
    """The gradient of copies [B T H·N], summed in f32 to that of [B T K·N]."""
    if gradient.shape == k.shape:
        return gradient
    share = gradient.shape[2] // k.shape[2]
    copies = gradient.reshape(*k.shape[:2], -1, share, call.head_dim)
    total = jnp.sum(copies, axis=3, dtype=jnp.float32)
    return total.reshape(k.shape).astype(k.dtype)


def _run(
    kernel: Callable[..., None],
    name: str,
    scratch: Callable[[Call, int, int], list[tuple[int, ...]]],
    call: Call,
    noise: UInt32[Array, "4"] | None,
    segments: Int[Array, "B T"] | None,
    given: list[Array],
    *,
    made: list[Any],
) -> tuple[Array, ...]:
    """A kernel over all rows and all groups of heads; `made`: the results' shapes."""
    B, T, D = given[0].shape
    rows, heads = rows_of_kernel(B, T), len(call.lanes())

    def spec(x):
        if x.ndim == 3:
            return pl.BlockSpec((rows, T, LANES), lambda b, group: (b, 0, group))
        return pl.BlockSpec((rows, 1, heads, T), lambda b, group: (b, group, 0, 0))

    first, specs, shapes = [], [], scratch(call, rows, T)
    if call.dropout:
        first.append(noise)
        specs.append(pl.BlockSpec(memory_space=pltpu.SMEM))
    if segments is not None:
        first.append(as_loaded(segments)[:, None])
        specs.append(pl.BlockSpec((rows, 1, T), lambda b, group: (b, 0, 0)))
        shapes.append((rows, T, LANES))
    results = pl.pallas_call(
        functools.partial(kernel, call, segments is not None),
        grid=(B // rows, D // LANES),
        in_specs=[*specs, *map(spec, given)], out_specs=[*map(spec, made)],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in made],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in shapes],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel")
        ),
        interpret=call.interpret, name=name,
    )(*first, *given)  # fmt: skip
    return tuple(results)


def rows_of_kernel(batch: int, length: int) -> int:
    """Of so many rows of a device, those that a kernel holds at one time."""
    return math.gcd(batch, max(1, TOKENS // length))
