# SPDX-License-Identifier: Apache-2.0
"""Scaled dot-product attention (Vaswani et al. 2017, section 3.2.1) and its masks."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from lm_scale.models.layers import dropout
from lm_scale.sharding import Rules


def attention(
    q: Float[Array, "B T H N"],
    k: Float[Array, "B S H N"],
    v: Float[Array, "B S H N"],
    *,
    mask: Bool[Array, "#B 1 T S"] | None,
    rules: Rules,
    dropout_rate: float = 0.0,
    key: Key[Array, ""] | None = None,
) -> Float[Array, "B T H N"]:
    """Each query's mean of the values, weighted by softmax(q·k / sqrt(N)).

    `mask` is True where a query may look; a query that may look nowhere (padding) gets
    the plain mean. Softmax in f32. Keys and values are gathered along the sequence, so
    that with `seq` sharded (the mesh's context axis) each device has its own queries
    and sees all keys.
    """
    whole_seq = rules.spec("batch", None, "act_heads", None)
    k, v = jax.reshard(k, whole_seq), jax.reshard(v, whole_seq)
    scores = jnp.einsum(
        "BTHN,BSHN->BHTS", q * q.shape[-1] ** -0.5, k,
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    probs = jax.nn.softmax(scores).astype(v.dtype)
    probs = dropout(probs, dropout_rate, key)
    return jnp.einsum("BHTS,BSHN->BTHN", probs, v)


def causal_mask(
    queries: int, keys: int, start: int | Int[Array, ""] = 0
) -> Bool[Array, "1 1 T S"]:
    """Query i stands at position start + i and sees the keys up to its own position."""
    positions = start + jnp.arange(queries)[:, None]
    return (positions >= jnp.arange(keys)[None, :])[None, None]


def segment_mask(segments: Int[Array, "B T"], rules: Rules) -> Bool[Array, "B 1 T T"]:
    """Tokens see the tokens of their own segment (document) only."""
    keys = jax.reshard(segments, rules.spec("batch", None))
    return (segments[:, :, None] == keys[:, None, :])[:, None]
