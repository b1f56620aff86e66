# SPDX-License-Identifier: Apache-2.0
"""Ring attention: a sequence cut over devices, whose keys and values go round.

Liu et al. 2023, arXiv:2310.01889: each device keeps its queries and passes its keys and
values on to the next, until all queries have met all keys. What has been seen so far is
held as an online softmax (FlashAttention, Dao et al. 2022, arXiv:2205.14135, section
3.1), so no device ever holds the keys of a whole row. The backward pass goes round once
more (their appendix B.2) and keeps, beside its inputs, only the output and one number a
query.

Under a causal mask the first device of a plain ring would be done after one step and
the last one after all. So rows are laid out in zigzag: with c parts a row is cut into
2c chunks and device i holds chunks i and 2c-1-i, its low and its high one. At every
step but the first exactly two of the four pairs of chunks are visible, wherever the
keys come from, and only these are computed: a device has 2c+1 pairs, where all queries
against all keys make 4c.

Inside, heads come before positions: q is [X B K J T N], k and v are [X B K S N], where
X counts the chunks of a device (2 if causal, else 1), T and S are positions of a chunk.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from math import lcm
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from lm_scale.sharding import Rules, shards

HIDDEN = float(jnp.finfo(jnp.float32).min)  # the score of a key that is not seen


def zigzag_order(length: int, parts: int) -> np.ndarray:
    """The positions of a row, [length], in the order in which `parts` devices hold it.

    `x[:, order]` lays rows out, `y[:, np.argsort(order)]` puts them back. Raises
    ValueError if the length is not a multiple of 2 × parts.
    """
    if length % (2 * parts):
        raise ValueError(f"{length} positions cannot be cut into 2 × {parts} chunks.")
    chunks = np.arange(length, dtype=np.int32).reshape(2 * parts, -1)
    return np.stack([chunks[:parts], chunks[parts:][::-1]], axis=1).reshape(length)


def ring_attention(
    q: Float[Array, "B T H N"],
    k: Float[Array, "B T K N"],
    v: Float[Array, "B T K N"],
    *,
    causal: bool,
    window: int | None,
    segments: Int[Array, "B T"] | None,
    rules: Rules,
    positions: Int[Array, "T"] | None = None,
) -> Float[Array, "B T H N"]:
    """Each query's mean of the values, weighted by softmax(q·k / sqrt(N)).

    As `attention.attention`, without dropout, and for a sequence in two or more parts:
    to be traced under `jax.set_mesh`, with inputs as the rules shard them. If causal,
    the tokens of a row lie in `zigzag_order`; if not, in any order. A query sees the
    tokens of its own segment only, and of these the `window` last ones, its own
    included; not causal: those less than `window` away in either direction, which needs
    the `positions` that the tokens of a row have, in the order in which they lie.

    A device holds the scores of one chunk against another at a time, f32.

    Raises ValueError if the sequence is not cut, if its length does not fit (see
    `zigzag_order`), or if `positions` are missing or given without need.
    """
    (_, length, _, N), K = q.shape, k.shape[2]
    mesh = jax.sharding.get_abstract_mesh()
    parts = shards(rules, mesh, "seq")
    if parts < 2:
        raise ValueError("Ring attention needs a sequence in two or more parts.")
    if (positions is not None) != (window is not None and not causal):
        raise ValueError("`positions` belong to a window that is not causal.")
    if causal:
        positions = jnp.asarray(zigzag_order(length, parts))
    # Fewer key-value heads than parts: as many copies as give each part its own.
    copies = lcm(K, shards(rules, mesh, "act_heads")) // K
    if copies > 1:
        k, v = (jnp.repeat(x, copies, axis=2) for x in (k, v))
    heads = rules.spec("batch", "seq", "act_heads", None)
    rows = rules.spec("batch", "seq")
    everywhere = PartitionSpec(None)  # all know where everyone's tokens stand
    specs = (heads, heads, heads, everywhere, rows)
    inputs = [
        None if x is None else jax.reshard(x, spec)
        for x, spec in zip((q * N**-0.5, k, v, positions, segments), specs, strict=True)
    ]
    inside = partial(_attend_inside, Ring(rules.seq, parts, causal, window))
    return jax.shard_map(inside, in_specs=specs, out_specs=heads)(*inputs)


@dataclass(frozen=True)
class Ring:
    """What all devices know: who passes to whom, and which chunks see each other."""

    axes: tuple[str, ...]  # of the mesh, along which sequences are cut
    parts: int
    causal: bool
    window: int | None

    @property
    def chunks(self) -> int:
        """How many chunks a device holds."""
        return 2 if self.causal else 1

    def pass_on(self, arrays: Any) -> Any:
        """Each device's arrays to the next device, the last one's to the first."""
        to_next = [(i, (i + 1) % self.parts) for i in range(self.parts)]
        send = partial(jax.lax.ppermute, axis_name=self.axes, perm=to_next)
        return jax.tree.map(send, arrays)

    def source(self, step: int | Array) -> Array:
        """The device whose keys this device has at a step; step 0: its own."""
        return (jax.lax.axis_index(self.axes) - step) % self.parts

    def pairs(self, step: int | Array) -> Iterator[tuple[int | Array, int | Array]]:
        """The chunks (of the queries, of the keys) that see each other at a step.

        Step 0 is the int 0; later ones may be traced.
        """
        if not self.causal:
            yield 0, 0
            return
        yield 1, 0  # every low chunk comes before every high one
        if _is_first(step):
            yield 0, 0
            yield 1, 1
        else:
            # The lower of two devices has the earlier low and the later high chunk.
            both = jnp.where(self.source(step) < self.source(0), 0, 1)
            yield both, both

    def scores(self, step, pair, q, k, places: "Places", key_segments) -> Array:
        """What the queries of a chunk think of the keys of another, f32 [B K J T S]."""
        a, b = pair
        scores = jnp.einsum(
            "BKJTN,BKSN->BKJTS", q[a], k[b], preferred_element_type=jnp.float32
        )
        diagonal = self.causal and _is_first(step) and a == b
        if diagonal or self.window is not None:
            assert places.positions is not None
            queries = places.positions[self.source(0), a]
            back = queries[:, None] - places.positions[self.source(step), b]
            if diagonal:
                scores = jnp.where(back >= 0, scores, HIDDEN)
            if self.window is not None:
                scores = jnp.where(jnp.abs(back) < self.window, scores, HIDDEN)
        if places.segments is not None:
            same = places.segments[a][:, :, None] == key_segments[b][:, None, :]
            scores = jnp.where(same[:, None, None], scores, HIDDEN)
        return scores


def _is_first(step: int | Array) -> bool:
    return isinstance(step, int) and step == 0


class Places(NamedTuple):
    """Where tokens stand: everyone's positions, the queries' documents."""

    positions: Int[Array, "C X T"] | None  # of each of the C devices
    segments: Int[Array, "X B T"] | None


def _attend_inside(ring: Ring, q, k, v, positions, segments):
    """One device's part: its own positions of q [B T H N], k and v [B T K N]."""
    (B, T, H, N), K, X = q.shape, k.shape[2], ring.chunks
    T = T // X
    q = q.reshape(B, X, T, K, H // K, N).transpose(1, 0, 3, 4, 2, 5)
    k, v = (x.reshape(B, X, T, K, N).transpose(1, 0, 3, 2, 4) for x in (k, v))
    if positions is not None:
        positions = positions.reshape(ring.parts, X, T)
    if segments is not None:
        segments = segments.reshape(B, X, T).swapaxes(0, 1)
    mixed = _attend(ring, q, k, v, Places(positions, segments))
    return mixed.transpose(1, 0, 4, 2, 3, 5).reshape(B, X * T, H, N)


def _forward(ring: Ring, q, k, v, places: Places):
    """The first time round; also what the second needs."""

    def meet(state, step, keys):
        """The queries see the keys of a step: one more block of the online softmax."""
        k, v, key_segments = keys
        for a, b in ring.pairs(step):
            scores = ring.scores(step, (a, b), q, k, places, key_segments)
            mixed, largest, weight = (x[a] for x in state)
            now_largest = jnp.maximum(largest, scores.max(axis=-1))
            # While a query has seen no key, HIDDEN is its largest score and it sums
            # what is hidden; at its first key the shrinking makes zeros of that.
            shrink = jnp.exp(largest - now_largest)
            weights = jnp.exp(scores - now_largest[..., None])
            values = jnp.einsum(
                "BKJTS,BKSN->BKJTN", weights.astype(v.dtype), v[b],
                preferred_element_type=jnp.float32,
            )  # fmt: skip
            mixed = mixed * shrink[..., None] + values
            weight = weight * shrink + weights.sum(axis=-1)
            state = _put(state, a, (mixed, now_largest, weight))
        return state

    state = (
        jnp.zeros(q.shape, jnp.float32),  # sums of the values times their weights
        jnp.full(q.shape[:-1], HIDDEN),  # largest score so far
        jnp.zeros(q.shape[:-1], jnp.float32),  # sums of the weights
    )
    keys = (k, v, places.segments)
    state, keys = meet(state, 0, keys), ring.pass_on(keys)

    def turn(carry, step):
        # The passing on does not wait for what is computed: the two overlap.
        state, keys = carry
        return (meet(state, step, keys), ring.pass_on(keys)), None

    between = jnp.arange(1, ring.parts - 1)
    (state, keys), _ = jax.lax.scan(turn, (state, keys), between)
    mixed, largest, weight = meet(state, ring.parts - 1, keys)
    # Named for the remat policies, which may keep what the second time round needs.
    mixed = checkpoint_name((mixed / weight[..., None]).astype(q.dtype), "attention")
    log_weight = checkpoint_name(largest + jnp.log(weight), "attention")
    return mixed, (q, k, v, places, mixed, log_weight)


def _backward(ring: Ring, saved, d_mixed):
    """The second time round: gradients of keys and values travel behind them, f32."""
    q, k, v, places, mixed, log_weight = saved
    inner = jnp.sum(d_mixed.astype(jnp.float32) * mixed.astype(jnp.float32), axis=-1)

    def meet(dq, step, keys):
        """A step's share of the gradients: dq with it added, and (dk, dv) alone."""
        k, v, key_segments = keys
        dkv = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
        for a, b in ring.pairs(step):
            scores = ring.scores(step, (a, b), q, k, places, key_segments)
            probs = jnp.exp(scores - log_weight[a][..., None])
            d_probs = jnp.einsum(
                "BKJTN,BKSN->BKJTS", d_mixed[a], v[b],
                preferred_element_type=jnp.float32,
            )  # fmt: skip
            d_scores = (probs * (d_probs - inner[a][..., None])).astype(q.dtype)
            to_queries = partial(
                jnp.einsum, "BKJTS,BKSN->BKJTN", preferred_element_type=jnp.float32
            )
            to_keys = partial(
                jnp.einsum, "BKJTS,BKJTN->BKSN", preferred_element_type=jnp.float32
            )
            dq = _put(dq, a, dq[a] + to_queries(d_scores, k[b]))
            dk = dkv[0][b] + to_keys(d_scores, q[a])
            dv = dkv[1][b] + to_keys(probs.astype(q.dtype), d_mixed[a])
            dkv = _put(dkv, b, (dk, dv))
        return dq, dkv

    keys = (k, v, places.segments)
    dq, dkv = meet(jnp.zeros(q.shape, jnp.float32), 0, keys)
    keys = ring.pass_on(keys)

    def turn(carry, step):
        dq, keys, dkv = carry
        dq, share = meet(dq, step, keys)
        return (dq, ring.pass_on(keys), _sum(ring.pass_on(dkv), share)), None

    between = jnp.arange(1, ring.parts - 1)
    (dq, keys, dkv), _ = jax.lax.scan(turn, (dq, keys, dkv), between)
    dq, share = meet(dq, ring.parts - 1, keys)
    dk, dv = ring.pass_on(_sum(ring.pass_on(dkv), share))  # home again
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


def _put(arrays: Any, chunk: int | Array, parts: Any) -> Any:
    """The arrays, with the part of this chunk replaced."""
    put = partial(jax.lax.dynamic_update_index_in_dim, index=chunk, axis=0)
    return jax.tree.map(put, arrays, parts)


def _sum(left: Any, right: Any) -> Any:
    return jax.tree.map(jnp.add, left, right)


_attend = jax.custom_vjp(lambda *inputs: _forward(*inputs)[0], nondiff_argnums=(0,))
_attend.defvjp(_forward, _backward)
