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

from lm_scale.models.layout import LANES, kept
from lm_scale.models.vmem_kernels import (
    Call,
    as_loaded,
    backward_kernel,
    backward_scratch,
    forward_kernel,
    forward_scratch,
)

LONGEST = {"bfloat16": 1024, "float32": 512}  # tokens of a row, for 16 MiB of VMEM
TOKENS, SCORES = 1024, 2048  # at most, of short rows that a kernel holds
Words = tuple[UInt32[Array, "B H T"], UInt32[Array, "T"]]
Others = tuple[Float[Array, "B 3 D"] | None, Int[Array, "B T"] | None, Words | None]
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
    biases: Float[Array, "B 3 D"] | None,
    segments: Int[Array, "B T"] | None,
    words: Words | None,
) -> Float[Array, "B T D"]:
    """The weighted means, on one device, of rows without a `vmem_obstacle`.

    E: K·N, of as many heads as there are queries', or fewer. biases: added to q, k and
    v, for each row; where E = D. So their gradients are summed over a row's tokens here
    and not by a pass over all of them. segments: a query sees keys of its own. words:
    `dropout.words_of` the weights [B H T S] of all devices, this device's part.
    """
    return _forward(call, q, k, v, biases, segments, words)[0]


def _forward(call: Call, q, k, v, biases, segments, words):
    q, k, v = kept(q), kept(k), kept(v)
    others = biases, segments, words
    B, T, D = q.shape
    heads = len(call.lanes())
    log_sum = jax.ShapeDtypeStruct((B, D // LANES, heads, T), jnp.float32)
    mean, log_sum = _run(
        forward_kernel, FORWARD, forward_scratch, call, others,
        [q, *_of_queries(call, q, k, v)], made=[q, log_sum],
    )  # fmt: skip
    mean, log_sum = (kept(checkpoint_name(x, "attention")) for x in (mean, log_sum))
    return mean, (q, k, v, others, log_sum)


def _backward(call: Call, saved, d_mean):
    q, k, v, others, log_sum = saved
    B, T, D = q.shape
    gradients, d_biases = _run(
        backward_kernel, BACKWARD, backward_scratch, call, others,
        [q, *_of_queries(call, q, k, v), d_mean, log_sum],
        made=[jax.ShapeDtypeStruct((B, 3 * T, D), q.dtype), others[0]],
    )  # fmt: skip
    dq, *of_queries = jnp.split(gradients, 3, axis=1)
    dk, dv = (_of_keys(call, x, k) for x in of_queries)
    return dq, dk, dv, d_biases, None, None


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
    scratch: Callable[[Call, int, int, Any], list[tuple[int, ...]]],
    call: Call,
    others: Others,
    given: list[Array],
    *,
    made: list[Any],
) -> tuple[Any, ...]:
    """A kernel over all rows and all groups of heads; `made`: the results' shapes.

    None: no such array is given, or made.
    """
    biases, segments, words = others
    B, T, D = given[0].shape
    heads = len(call.lanes())
    rows = rows_of_kernel(B, T, call.head_dim)

    def spec(x):
        if x.ndim == 3:
            lanes = rows, x.shape[1], LANES
            return pl.BlockSpec(lanes, lambda b, group: (b, 0, group))
        return pl.BlockSpec((rows, 1, heads, T), lambda b, group: (b, group, 0, 0))

    of_rows, of_words, shapes = None, None, scratch(call, rows, T, given[0].dtype)
    if segments is not None:
        segments = as_loaded(segments)[:, None]
        of_rows = pl.BlockSpec((rows, 1, T), lambda b, group: (b, 0, 0))
    if words is not None:
        queries, keys = words
        queries = as_loaded(queries).reshape(B, -1, heads, T)
        pairs = jnp.broadcast_to(keys[::2, None], (T // 2, LANES))
        all_pairs = pl.BlockSpec(pairs.shape, lambda b, group: (0, 0))
        words, of_words = (queries, pairs), (spec(queries), all_pairs)
    of_heads, results = (
        [None if x is None else spec(x) for x in arrays]
        for arrays in ([biases, *given], made)
    )
    results = pl.pallas_call(
        functools.partial(kernel, call),
        grid=(B // rows, D // LANES),
        in_specs=[of_rows, of_words, *of_heads], out_specs=results,
        out_shape=[
            None if x is None else jax.ShapeDtypeStruct(x.shape, x.dtype) for x in made
        ],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in shapes],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel")
        ),
        interpret=call.interpret, name=name,
    )(segments, words, biases, *given)  # fmt: skip
    return tuple(results)


def rows_of_kernel(batch: int, length: int, head_dim: int) -> int:
    """Of so many rows of a device, those that a kernel holds at one time."""
    scores = LANES // head_dim * length * length // LANES  # for each query of a block
    return math.gcd(batch, max(1, min(TOKENS // length, SCORES // scores)))
