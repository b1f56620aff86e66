# SPDX-License-Identifier: Apache-2.0
"""Attention in plain XLA, with as few and as small matrices of scores as that allows.

Queries are worked through in a few blocks, each with the keys that it can see at all:
under a causal mask four blocks have 10/16 of all scores. The backward pass makes the
weights anew, from queries, keys and one number a query, the logarithm of the sum that
its weights are divided by (FlashAttention-2, Dao 2023, section 3.1). It goes by blocks
of keys, so that of the three gradients one alone is a sum over blocks.

Shapes: q [B T K J N], k and v [B S K N] with S = T, scores [B K J T S]; a block's T and
S are shorter. J query heads share a key-value head.
"""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from lm_scale.models.dropout import dropout
from lm_scale.models.layout import kept

HIDDEN = float(jnp.finfo(jnp.float32).min)  # the score of a key that is not seen
BLOCKS = 4  # of the queries; each adds to the program
LEAST = 128  # queries of a block


@dataclass(frozen=True)
class Blocks:
    """What is known of the mask when the program is made, and the rate of dropout."""

    causal: bool
    window: int | None
    dropout: float

    def spans(self, length: int) -> Iterator[tuple[slice, slice]]:
        """The places of each block's queries, and of the keys that these may see."""
        for first, stop in self._edges(length):
            start = 0 if self.window is None else max(0, first - self.window + 1)
            yield slice(first, stop), slice(start, stop)

    def spans_of_keys(self, length: int) -> Iterator[tuple[slice, slice]]:
        """The places of each block's keys, and of the queries that may see these."""
        for first, stop in self._edges(length):
            end = length if self.window is None else min(length, stop + self.window - 1)
            yield slice(first, stop), slice(first, end)

    def _edges(self, length: int) -> Iterator[tuple[int, int]]:
        count = max(1, min(BLOCKS, length // LEAST)) if self.causal else 1
        return itertools.pairwise(length * at // count for at in range(count + 1))

    def factors(self, q: Array, k: Array, key: Array | None) -> Array | None:
        """What dropout multiplies all weights by; XLA makes of it what a block uses.

        Of all and not of each block, so that a mesh which cuts sequences has the same.
        """
        if key is None or self.dropout == 0.0:
            return None
        like = jax.eval_shape(functools.partial(_scores, seen=None), q, k)
        ones = jnp.ones(like.shape, like.dtype, out_sharding=like.sharding)
        return dropout(ones, self.dropout, key)


def _scores(q, k, seen) -> Array:
    scores = jnp.einsum("BTKJN,BSKN->BKJTS", q, k, preferred_element_type=jnp.float32)
    return scores if seen is None else jnp.where(seen, scores, HIDDEN)


def _forward(blocks: Blocks, q, k, v, seen, key):
    """The weighted means, [B T K J N]; also what `_backward` needs.

    q: scaled. seen: bool [#B 1 1 T S], or None: all is seen. A query that sees nothing
    gets the plain mean of the values that its block meets, which is finite, and gives
    no gradient.
    """
    q, k, v = kept(q), kept(k), kept(v)
    products, largest, sums, factors = [], [], [], blocks.factors(q, k, key)
    # What the weights of a query sum to comes with their product with the values: a
    # head of 64 leaves half the lanes of a TPU free. (With dropout, not of the same.)
    values = v if factors is not None else _with_ones(v)
    for t, s in blocks.spans(q.shape[1]):
        scores = _scores(q[:, t], k[:, s], None if seen is None else seen[..., t, s])
        largest.append(jnp.max(scores, axis=-1))
        weights = jnp.exp(scores - largest[-1][..., None])
        if factors is not None:
            sums.append(jnp.sum(weights, axis=-1))
            weights = weights * factors[..., t, s]
        products.append(jnp.einsum(
            "BKJTS,BSKN->BTKJN", weights.astype(v.dtype), values[:, s],
            preferred_element_type=jnp.float32,
        ))  # fmt: skip
    product = jnp.concatenate(products, axis=1)
    if factors is None:
        product, sums = product[..., :-1], [jnp.moveaxis(product[..., -1], 1, 3)]
    share = 1.0 / jnp.concatenate(sums, axis=-1)
    mean = _named((product * jnp.moveaxis(share, 3, 1)[..., None]).astype(v.dtype))
    log_sum = _named(jnp.concatenate(largest, axis=-1) - jnp.log(share))
    return mean, (q, k, v, seen, key, mean, log_sum)


def _with_ones(v: Array) -> Array:
    """[B S K N] -> [B S K N+1]."""
    ones = jnp.ones_like(v[..., :1])
    return jnp.concatenate([v, ones], axis=-1)


def _named(x: Array) -> Array:
    """For the remat policies: `dots` keeps it too, as it is made of products."""
    return kept(checkpoint_name(x, "attention"))


def _backward(blocks: Blocks, saved, d_mean):
    q, k, v, seen, key, mean, log_sum = saved
    length = q.shape[1]
    inner = jnp.einsum(
        "BTKJN,BTKJN->BKJT", d_mean, mean, preferred_element_type=jnp.float32
    )
    dq, dk, dv, factors = [], [], [], blocks.factors(q, k, key)
    for s, t in blocks.spans_of_keys(length):
        probs = jnp.exp(_scores(q[:, t], k[:, s], None) - log_sum[..., t, None])
        if seen is not None:
            probs = jnp.where(seen[..., t, s], probs, 0.0)
        # Written once, rounded, and read by both that need it: XLA would make it of the
        # scores again, and write the gradient of `probs` in f32 instead.
        probs = jax.lax.optimization_barrier(probs.astype(q.dtype))
        d_probs = jnp.einsum(
            "BTKJN,BSKN->BKJTS", d_mean[:, t], v[:, s],
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        weights = probs
        if factors is not None:
            d_probs = d_probs * factors[..., t, s]
            weights = (probs * factors[..., t, s]).astype(q.dtype)
        d_scores = (probs * (d_probs - inner[..., t, None])).astype(q.dtype)
        dq.append(_part(d_scores, k[:, s], t, length))
        dk.append(jnp.einsum("BKJTS,BTKJN->BSKN", d_scores, q[:, t]))
        dv.append(jnp.einsum("BKJTS,BTKJN->BSKN", weights, d_mean[:, t]))
    dq = functools.reduce(jnp.add, dq).astype(q.dtype)
    return dq, jnp.concatenate(dk, axis=1), jnp.concatenate(dv, axis=1), None, None


def _part(d_scores, keys, span: slice, length: int) -> Array:
    """What a block of keys adds to the gradient of all queries, f32 [B T K J N]."""
    part = jnp.einsum(
        "BKJTS,BSKN->BTKJN", d_scores, keys, preferred_element_type=jnp.float32
    )
    around = (span.start, length - span.stop)
    return jnp.pad(part, ((0, 0), around, (0, 0), (0, 0), (0, 0)))


attend = jax.custom_vjp(lambda *inputs: _forward(*inputs)[0], nondiff_argnums=(0,))
attend.defvjp(_forward, _backward)
