# SPDX-License-Identifier: Apache-2.0
"""Scaled dot-product attention (Vaswani et al. 2017, section 3.2.1) and its masks."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from lm_scale.models.blockwise import Blocks, attend
from lm_scale.models.dropout import dropout
from lm_scale.models.kernels import cudnn, splash, vmem, vmem_takes
from lm_scale.models.layout import spread, widen
from lm_scale.models.ring import ring_attention
from lm_scale.sharding import Rules, shards


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens so far, for generation."""

    k: Float[Array, "L B S K N"]
    v: Float[Array, "L B S K N"]
    length: Int[Array, ""]  # tokens already in it


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mask:
    """Which keys a query sees, said in words that a kernel can use.

    All of these must hold: the key's position is not after the query's (`causal`); the
    two are fewer than `window` places apart; they are of one segment (document). By
    default every query sees every key.
    """

    causal: bool = field(default=False, metadata={"static": True})
    window: int | None = field(default=None, metadata={"static": True})
    segments: Int[Array, "B T"] | None = None  # of the queries; None: all are of one
    key_segments: Int[Array, "B S"] | None = None  # None: those of the queries
    # Of the queries, their places in the row; None: 0, 1, 2 ... Where they restart with
    # each document, [B T], `segments` must keep the documents apart: of two tokens of
    # one document they then say the same as places in the row.
    positions: Int[Array, "T"] | Int[Array, "B T"] | None = None
    key_positions: Int[Array, "S"] | Int[Array, "B S"] | None = None  # None: as above

    @property
    def is_in_order(self) -> bool:
        """If the queries' places in the row say as much as `positions` do.

        Positions of each row for itself are those that restart with its segments.
        """
        if self.positions is None:
            return True
        return self.positions.ndim == 2 and self.segments is not None

    def matrix(self, queries: int, rules: Rules) -> Bool[Array, "#B 1 T S"] | None:
        """True where each of so many queries may look; None: everywhere."""
        seen = []
        if self.causal or self.window is not None:
            places = jnp.arange(queries) if self.positions is None else self.positions
            back = _pairs(jnp.subtract, places, self.key_positions, rules)
            if self.causal:
                seen.append(back >= 0)
            if self.window is not None:
                seen.append(jnp.abs(back) < self.window)
        if self.segments is not None:
            seen.append(_pairs(jnp.equal, self.segments, self.key_segments, rules))
        return functools.reduce(jnp.logical_and, seen) if seen else None


def _pairs(
    compare: Callable[[Array, Array], Array],
    queries: Int[Array, "*B T"],
    keys: Int[Array, "*B S"] | None,
    rules: Rules,
) -> Shaped[Array, "#B 1 T S"]:
    """What `compare` makes of each query with each key (None: with each query)."""
    # Each device compares its own queries with the keys of the whole sequence.
    keys = queries if keys is None else keys
    whole = jax.reshard(keys, rules.spec(*["batch", None][-keys.ndim :]))
    queries, whole = jnp.atleast_2d(queries), jnp.atleast_2d(whole)
    return compare(queries[:, None, :, None], whole[:, None, None, :])


def attention(
    q: Float[Array, "B T H N"],
    k: Float[Array, "B S K N"],
    v: Float[Array, "B S K N"],
    *,
    mask: Mask,
    rules: Rules,
    kernel: str = "xla",
    dropout_rate: float = 0.0,
    key: Key[Array, ""] | None = None,
    biases: Float[Array, "3 H N"] | None = None,
) -> Float[Array, "B T H N"]:
    """Each query's mean of the values, weighted by softmax(q·k / sqrt(N)).

    Each of the K key-value heads serves H/K query heads, neighbours (grouped-query
    attention, Ainslie et al. 2023). A query that `mask` lets look nowhere (padding)
    gets the plain mean. Softmax in f32. Keys and values are gathered along the
    sequence, so that with `seq` sharded (the mesh's context axis) each device has its
    own queries and sees all keys. `biases` are added to q, k and v, which have as many
    heads then.

    `kernel` is what `kernels.choose_attention` chose for the run; with `ring`, causal
    rows lie in its `zigzag_order`. Where a kernel cannot do this call (generation with
    a cache, say), xla does it: by blocks of queries (models/blockwise.py) or, with keys
    of another row or sequences that are cut, in one piece.
    """
    uncut = shards(rules, jax.sharding.get_abstract_mesh(), "seq") == 1
    of_row = mask.key_positions is None  # the keys are those of the queries
    in_order = of_row and mask.is_in_order
    both_ways = mask.window is not None and not mask.causal
    how: Any = {"causal": mask.causal, "window": mask.window, "rules": rules}
    plain = mask.key_segments is None and mask.window is None
    if kernel == "vmem" and uncut and in_order and plain and vmem_takes(q, rules):
        return vmem(
            q, k, v, causal=mask.causal, segments=mask.segments, biases=biases,
            dropout_rate=dropout_rate, key=key, rules=rules,
        )  # fmt: skip
    if biases is not None:
        q, k, v = (x + spread(biases[part], x) for part, x in enumerate((q, k, v)))
    if key is not None and dropout_rate > 0.0:
        kernel = "xla"
    if kernel == "ring" and not uncut and of_row and not both_ways:
        return ring_attention(q, k, v, segments=mask.segments, **how)
    if kernel == "splash" and uncut and in_order:
        ids = {"segments": mask.segments, "key_segments": mask.key_segments}
        return splash(q, k, v, **ids, **how)
    in_one = mask.segments is None and not both_ways
    if kernel == "cudnn" and uncut and in_order and in_one:
        return cudnn(q, k, v, **how)
    (B, T, H, N), K = q.shape, k.shape[2]
    if K != H and rules.act_kv_heads != rules.act_heads:
        # Fewer key-value heads than parts: each device takes those of its queries.
        k, v, K = jnp.repeat(k, H // K, axis=2), jnp.repeat(v, H // K, axis=2), H
    heads = "act_heads" if K == H else "act_kv_heads"
    if uncut and of_row:
        return _blockwise(q, k, v, mask, rules, heads, dropout_rate, key)
    # Each device sees all keys, and has its own queries' part of their gradients.
    parts, gathered = rules.spec("batch", None, heads, None), frozenset(rules.seq)
    whole_seq = PartitionSpec(*parts, reduced=gathered)
    k, v = widen(k, whole_seq), widen(v, whole_seq)
    grouped = rules.spec("batch", "seq", heads, None, None)
    q = jnp.reshape(q, (B, T, K, H // K, N), out_sharding=grouped)
    scores = jnp.einsum(
        "BTKJN,BSKN->BKJTS", q * N**-0.5, k, preferred_element_type=jnp.float32
    )
    seen = mask.matrix(T, rules)
    if seen is not None:
        scores = jnp.where(seen[:, None], scores, jnp.finfo(scores.dtype).min)
    probs = jax.nn.softmax(scores).astype(v.dtype)
    probs = dropout(probs, dropout_rate, key)
    mixed = jnp.einsum("BKJTS,BSKN->BTKJN", probs, v)
    whole = rules.spec("batch", "seq", "act_heads", None)
    mixed = jnp.reshape(mixed, (B, T, H, N), out_sharding=whole)
    return checkpoint_name(mixed, "attention")


def _blockwise(q, k, v, mask: Mask, rules: Rules, heads: str, rate: float, key):
    """The same for whole sequences, whose queries are the keys' own."""
    (B, T, H, N), K = q.shape, k.shape[2]
    whole = rules.spec("batch", None, "act_heads", None)
    grouped = rules.spec("batch", None, heads, None, None)
    q = jax.reshard(q * N**-0.5, whole)
    q = jnp.reshape(q, (B, T, K, H // K, N), out_sharding=grouped)
    k, v = (jax.reshard(x, rules.spec("batch", None, heads, None)) for x in (k, v))
    seen = mask.matrix(T, rules)
    if seen is not None:
        rows = jax.typeof(seen).sharding.spec.partitions[0]
        seen = jax.reshard(seen[:, None], PartitionSpec(rows))
    # Causal by places in the row, as blocks want it.
    blocks = Blocks(mask.causal and mask.is_in_order, mask.window, rate)
    mixed = attend(blocks, q, k, v, seen, key)
    mixed = jnp.reshape(mixed, (B, T, H, N), out_sharding=whole)
    return jax.reshard(mixed, rules.spec("batch", "seq", "act_heads", None))
