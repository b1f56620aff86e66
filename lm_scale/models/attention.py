# SPDX-License-Identifier: Apache-2.0
"""Scaled dot-product attention (Vaswani et al. 2017, section 3.2.1) and its masks."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from lm_scale.models.layers import dropout
from lm_scale.sharding import Rules


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens so far, for generation."""

    k: Float[Array, "L B S K N"]
    v: Float[Array, "L B S K N"]
    length: Int[Array, ""]  # tokens already in it


def attention(
    q: Float[Array, "B T H N"],
    k: Float[Array, "B S K N"],
    v: Float[Array, "B S K N"],
    *,
    mask: Bool[Array, "#B 1 T S"] | None,
    rules: Rules,
    dropout_rate: float = 0.0,
    key: Key[Array, ""] | None = None,
) -> Float[Array, "B T H N"]:
    """Each query's mean of the values, weighted by softmax(q·k / sqrt(N)).

    Each of the K key-value heads serves H/K query heads, neighbours (grouped-query
    attention, Ainslie et al. 2023). `mask` is True where a query may look; a query that
    may look nowhere (padding) gets the plain mean. Softmax in f32. Keys and values are
    gathered along the sequence, so that with `seq` sharded (the mesh's context axis)
    each device has its own queries and sees all keys.
    """
    (B, T, H, N), K = q.shape, k.shape[2]
    whole_seq = rules.spec("batch", None, "act_kv_heads", None)
    k, v = jax.reshard(k, whole_seq), jax.reshard(v, whole_seq)
    if K != H and rules.act_kv_heads != rules.act_heads:
        # Fewer key-value heads than parts: each device takes those of its queries.
        split = rules.spec("batch", None, "act_heads", None)
        k, v = (jax.reshard(jnp.repeat(x, H // K, axis=2), split) for x in (k, v))
        K = H
    heads = "act_heads" if K == H else "act_kv_heads"
    grouped = rules.spec("batch", "seq", heads, None, None)
    q = jnp.reshape(q, (B, T, K, H // K, N), out_sharding=grouped)
    scores = jnp.einsum(
        "BTKJN,BSKN->BKJTS", q * N**-0.5, k, preferred_element_type=jnp.float32
    )
    if mask is not None:
        scores = jnp.where(mask[:, None], scores, jnp.finfo(scores.dtype).min)
    probs = jax.nn.softmax(scores).astype(v.dtype)
    probs = dropout(probs, dropout_rate, key)
    mixed = jnp.einsum("BKJTS,BSKN->BTKJN", probs, v)
    whole = rules.spec("batch", "seq", "act_heads", None)
    return jnp.reshape(mixed, (B, T, H, N), out_sharding=whole)


def causal_mask(
    queries: int,
    keys: int,
    start: int | Int[Array, ""] = 0,
    window: int | None = None,
) -> Bool[Array, "1 1 T S"]:
    """Query i stands at position start + i and sees the keys up to its own position.

    Of these the last `window` only (None: all).
    """
    back = start + jnp.arange(queries)[:, None] - jnp.arange(keys)[None, :]
    seen = back >= 0 if window is None else (back >= 0) & (back < window)
    return seen[None, None]


def segment_mask(segments: Int[Array, "B T"], rules: Rules) -> Bool[Array, "B 1 T T"]:
    """Tokens see the tokens of their own segment (document) only."""
    keys = jax.reshard(segments, rules.spec("batch", None))
    return (segments[:, :, None] == keys[:, None, :])[:, None]
