# SPDX-License-Identifier: Apache-2.0
"""The two kernels of models/vmem.py: attention of some rows and heads, in VMEM.

Mosaic cannot multiply bf16 for TPU v2 and v3, but matrix units round f32 factors to
bf16 by themselves. So blocks of 128 tokens come in as bf16, are widened by shifts, and
are multiplied as f32. A kernel holds whole rows of queries, keys and values, of as many
heads as fill 128 lanes (two of 64). A factor that is zero in the lanes of the others
makes the product of one head: with 64 of its 128 lanes the matrix unit would be no
faster.

Scores are made as [S T], keys by queries, so that what belongs to a query (its largest
score, its sum, its mean gradient) lies along lanes and spreads over rows for nothing.
The backward pass makes weights anew from one number a query, the logarithm of its sum
(FlashAttention-2, Dao 2023, section 3.1). Dropout's mask is made where it is used.

Refs: q, k, v and what is of their size [R T 128], R rows and the G = 128 / N heads of a
group; `log_sum` f32 [R 1 G T]; before them the noise of dropout (uint32 [4], see
`vmem.attend_in_vmem`) and the segments (int32 [R 1 T], as loaded), if there are such.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int, UInt32

from lm_scale.models.dropout import hashed, is_kept

LANES = 128  # of a register; a block has as many tokens
# Queries of a head are worked through in blocks of 128. The code of some blocks is one:
# products of one fill the waits of another. So many scores of keys, over the heads and
# the blocks of one code, leave VMEM room for all values that exist at one time.
FORWARD_SCORES, BACKWARD_SCORES = 4096, 2048
HIDDEN = -1e30  # the score of a key that is not seen
LOW, HIGH, NAN = np.uint32(0xFFFF), np.uint32(0xFFFF0000), np.uint32(0x7FC00000)
BY_LANES, PLAIN = (((1,), (1,)), ((), ())), (((1,), (0,)), ((), ()))  # a @ b.T; a @ b


@dataclass(frozen=True)
class Call:
    """What is known of a call when the program is made."""

    heads: int  # of all devices: what numbers weights for dropout
    head_dim: int
    causal: bool
    dropout: float = 0.0
    interpret: bool = False  # on any device, slowly

    @property
    def scale(self) -> float:
        """What scores are multiplied by."""
        return self.head_dim**-0.5

    @property
    def more(self) -> float:
        """What the weights that dropout leaves are multiplied by."""
        return 1.0 / (1.0 - self.dropout)

    def lanes(self) -> list[slice]:
        """Those of each head that lies in a register."""
        edges = range(0, LANES, self.head_dim)
        return [slice(edge, edge + self.head_dim) for edge in edges]

    def sees(self, block: int, blocks: int) -> range:
        """The blocks of keys that a block of queries sees something of."""
        return range(block + 1 if self.causal else blocks)

    def blocks_at_once(self, scores: int, length: int) -> int:
        """The blocks of queries whose code is one, for so many scores."""
        return max(1, scores // (len(self.lanes()) * length))


def forward_scratch(call: Call, rows: int, length: int) -> list[tuple[int, ...]]:
    """Shapes, f32: queries, keys, values transposed, scores of two blocks."""
    whole, heads = (rows, length, LANES), len(call.lanes())
    slots = min(2, call.blocks_at_once(FORWARD_SCORES, length))
    return [whole, whole, (rows, LANES, length), (slots, heads, length, LANES)]


def forward_kernel(call: Call, segmented: bool, *refs):
    """From q, k, v: the means and `log_sum`."""
    noise, segments, refs = _prepare(call, segmented, refs)
    q_ref, k_ref, v_ref, mean_ref, sum_ref, queries, keys, values_t, scores = refs
    rows, T = q_ref.shape[:2]
    blocks = T // LANES
    for row in range(rows):
        for block in map(_tokens, range(blocks)):
            queries[row, block] = _load(q_ref, row, block) * call.scale
            keys[row, block] = _load(k_ref, row, block)
            values_t[row, :, block] = _load(v_ref, row, block).T

    def score(row, block, slot):
        """Scores, and the largest of each query."""
        largest = []
        for head, own in enumerate(_of_heads(call, queries[row, _tokens(block)])):
            most = jnp.full((LANES, LANES), HIDDEN)
            for other in call.sees(block, blocks):
                score = _product(keys[row, _tokens(other)], own, BY_LANES)
                seen = _seen(call, segments, (row, block, other))
                score = score if seen is None else jnp.where(seen, score, HIDDEN)
                scores[slot, head, _tokens(other)] = score
                most = jnp.maximum(most, score)
            largest.append(jnp.max(most, axis=0, keepdims=True))
        return largest

    def mix(row, block, slot, largest):
        """Weights, and the means of values."""
        means = []
        for head, lanes in enumerate(call.lanes()):
            total = mean = 0.0
            for other in call.sees(block, blocks):
                weight = jnp.exp(scores[slot, head, _tokens(other)] - largest[head])
                total = total + weight
                if call.dropout:
                    stays = _undropped(call, noise, T, (row, head, block, other))
                    weight = jnp.where(stays, weight, 0.0)
                mean = mean + _product(values_t[row, lanes, _tokens(other)], weight)
            total = jnp.sum(total, axis=0, keepdims=True)
            log_sum = largest[head] + jnp.log(total)
            sum_ref[row, 0, head : head + 1, _tokens(block)] = log_sum
            means.append(mean * (call.more / total))
        _store(mean_ref, row, _tokens(block), jnp.concatenate(means, axis=0).T)

    _overlap(rows, blocks, score, mix, call.blocks_at_once(FORWARD_SCORES, T))


def backward_scratch(call: Call, rows: int, length: int) -> list[tuple[int, ...]]:
    """Shapes, f32: keys, values, keys transposed; dk, dv; weights and gradients."""
    whole, heads = (rows, length, LANES), len(call.lanes())
    slots = min(2, call.blocks_at_once(BACKWARD_SCORES, length))
    scores = (slots, heads, length, LANES)
    return [whole, whole, (rows, LANES, length), whole, whole, scores, scores]


def backward_kernel(call: Call, segmented: bool, *refs):
    """From q, k, v, the gradient of the means and `log_sum`: dq, dk, dv."""
    noise, segments, refs = _prepare(call, segmented, refs)
    q_ref, k_ref, v_ref, d_mean_ref, sum_ref, *refs = refs
    dq_ref, dk_ref, dv_ref, keys, values, keys_t, dks, dvs, weights, d_weights = refs
    rows, T = q_ref.shape[:2]
    blocks = T // LANES
    for row in range(rows):
        for block in map(_tokens, range(blocks)):
            keys[row, block] = key = _load(k_ref, row, block)
            keys_t[row, :, block] = key.T
            values[row, block] = _load(v_ref, row, block) * call.more

    def score(row, block, slot):
        """Weights (of those dropped the negative), their gradients and these' mean."""
        query = _load(q_ref, row, _tokens(block)) * call.scale
        d_mean = _load(d_mean_ref, row, _tokens(block))
        factors = list(zip(*(_of_heads(call, x) for x in (query, d_mean)), strict=True))
        inner = []
        for head, (own, d_own) in enumerate(factors):
            log_sum, along = sum_ref[row, 0, head : head + 1, _tokens(block)], 0.0
            for other in call.sees(block, blocks):
                score = _product(keys[row, _tokens(other)], own, BY_LANES)
                weight = jnp.exp(score - log_sum)
                seen = _seen(call, segments, (row, block, other))
                weight = weight if seen is None else jnp.where(seen, weight, 0.0)
                d_weight = _product(values[row, _tokens(other)], d_own, BY_LANES)
                signed = weight
                if call.dropout:
                    stays = _undropped(call, noise, T, (row, head, block, other))
                    d_weight = jnp.where(stays, d_weight, 0.0)
                    signed = jnp.where(stays, weight, -weight)
                weights[slot, head, _tokens(other)] = signed
                d_weights[slot, head, _tokens(other)] = d_weight
                along = along + weight * d_weight
            inner.append(jnp.sum(along, axis=0, keepdims=True))
        return factors, inner

    def mix(row, block, slot, scored):
        """Gradients: what keys and values get of this block, and its queries' own."""
        factors, inner = scored
        dqs: list[Any] = [0.0] * len(factors)
        for other in call.sees(block, blocks):
            dk: Any = 0.0
            dv: Any = 0.0
            for head, (own, d_own) in enumerate(factors):
                at = slot, head, _tokens(other)
                weight = used = weights[at]
                if call.dropout:
                    weight, used = jnp.abs(used), jnp.maximum(used, 0.0)
                d_score = weight * (d_weights[at] - inner[head])
                dk = dk + _product(d_score, own)
                dv = dv + _product(used, d_own)
                key = keys_t[row, call.lanes()[head], _tokens(other)]
                dqs[head] = dqs[head] + _product(key, d_score)
            at = row, _tokens(other)
            if block > (other if call.causal else 0):
                dk, dv = dks[at] + dk, dvs[at] + dv
            dks[at], dvs[at] = dk, dv
        dq = jnp.concatenate(dqs, axis=0) * call.scale
        _store(dq_ref, row, _tokens(block), dq.T)

    _overlap(rows, blocks, score, mix, call.blocks_at_once(BACKWARD_SCORES, T))
    for row in range(rows):
        for block in map(_tokens, range(blocks)):
            _store(dk_ref, row, block, dks[row, block])
            _store(dv_ref, row, block, dvs[row, block] * call.more)


def _overlap(rows: int, blocks: int, score, mix, together: int) -> None:
    """Each block of queries is mixed after the next, of so many together, is scored."""
    places = [(row, block) for block in range(blocks) for row in range(rows)]
    parts = [places[at : at + together] for at in range(0, len(places), together)]

    def work(part):
        scored = score(*part[0], 0)
        for number, place in enumerate(part, 1):
            after = None
            if number < len(part):
                after = score(*part[number], number % 2)
            mix(*place, 1 - number % 2, scored)
            scored = after

    def turn(number, nothing):
        # A branch for each, so that the values of one are gone before the next begins.
        for at, part in enumerate(parts):
            pl.when(number == at)(functools.partial(work, part))
        return nothing

    if len(parts) == 1:
        work(places)
    else:
        jax.lax.fori_loop(0, len(parts), turn, None)


def _prepare(call: Call, segmented: bool, refs):
    """Dropout's noise here, segments along lanes and along rows, the other refs.

    Those along rows are written here, to the last of the refs.
    """
    refs, noise, segments = [*refs], None, None
    if call.dropout:
        first, second, row, head = (refs[0][at] for at in range(4))
        rows = pl.program_id(0) * refs[1].shape[0]
        heads = pl.program_id(1) * len(call.lanes())
        row, head = row + rows.astype(jnp.uint32), head + heads.astype(jnp.uint32)
        noise = first, second, row, head
        del refs[0]
    if segmented:
        of_queries, of_keys = refs.pop(0), refs.pop()
        rows, _, T = of_queries.shape
        for row in range(rows):
            for block in map(_tokens, range(T // LANES)):
                ids = of_queries[row, :, block].astype(jnp.float32)
                of_keys[row, block] = jnp.broadcast_to(ids, (LANES, LANES)).T
        segments = of_queries, of_keys
    return noise, segments, refs


def _tokens(block: int) -> slice:
    return slice(block * LANES, (block + 1) * LANES)


def _load(ref, row: int, tokens: slice) -> Float[Array, "128 128"]:
    """A block's tokens in f32: the first, the third, ..., and then those between.

    For two of bf16 share a word, which a shift and a mask take apart without a move.
    """
    if ref.dtype == jnp.float32:
        halves = [ref[pl.ds(row, 1), half][0] for half in _halves(tokens)]
        return jnp.concatenate(halves, axis=0)
    words = pltpu.bitcast(ref[row, tokens], jnp.uint32)
    halves = jnp.concatenate([words << 16, words & HIGH], axis=0)
    return jax.lax.bitcast_convert_type(halves, jnp.float32)


def _store(ref, row: int, tokens: slice, x: Float[Array, "128 128"]) -> None:
    """The way back from `_load`; rounds to the nearest bf16, to the even one of two."""
    low, high = x[: LANES // 2], x[LANES // 2 :]
    if ref.dtype == jnp.float32:
        for half, of_half in zip(_halves(tokens), (low, high), strict=True):
            ref[pl.ds(row, 1), half] = of_half[None]
        return
    low, high = _rounded(low), _rounded(high)
    ref[row, tokens] = pltpu.bitcast((low >> 16) | (high & HIGH), jnp.bfloat16)


def _halves(tokens: slice):
    return [pl.ds(tokens.start + at, LANES // 2, stride=2) for at in range(2)]


def _rounded(x: Float[Array, "*D"]) -> UInt32[Array, "*D"]:
    """Words whose high half is the nearest bf16; what is no number stays none."""
    words = jax.lax.bitcast_convert_type(x, jnp.uint32)
    nearest = words + np.uint32(0x7FFF) + ((words >> 16) & np.uint32(1))
    return jnp.where(x == x, nearest, NAN)  # noqa: PLR0124


def _places(dim: int) -> Int[Array, "128 128"]:
    """Along `dim`, the places in a block of the tokens that `_load` gives."""
    number = jax.lax.broadcasted_iota(jnp.int32, (LANES, LANES), dim)
    return jnp.where(number < LANES // 2, 2 * number, 2 * number - LANES + 1)


def as_loaded(x: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Numbers of tokens in the order of `_load`."""
    pairs = x.reshape(x.shape[0], -1, LANES // 2, 2)
    return pairs.swapaxes(2, 3).reshape(x.shape)


def _of_heads(call: Call, x: Float[Array, "T 128"]) -> list[Float[Array, "T 128"]]:
    """A copy for each head, zero in the lanes of the others."""
    if call.head_dim == LANES:
        return [x]
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return [
        jnp.where((lane >= own.start) & (lane < own.stop), x, 0.0)
        for own in call.lanes()
    ]


def _product(a, b, dims=PLAIN):
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _seen(call: Call, segments, at) -> Bool[Array, "S T"] | None:
    """What a block of queries sees of a block of keys; None: all."""
    row, block, other = at
    seen = []
    if call.causal and block == other:
        seen.append(_places(0) <= _places(1))
    if segments is not None:
        of_queries, of_keys = segments
        own = of_queries[row, :, _tokens(block)].astype(jnp.float32)
        seen.append(of_keys[row, _tokens(other)] == own)
    return functools.reduce(jnp.logical_and, seen) if seen else None


def _undropped(call: Call, noise, length: int, at) -> Bool[Array, "S T"]:
    """Where dropout leaves a block's weights."""
    row, head, block, other = at
    *key, first_row, first_head = noise
    T = np.uint32(length)
    query = (first_row + np.uint32(row)) * np.uint32(call.heads)
    query = (query + first_head + np.uint32(head)) * T + np.uint32(block * LANES)
    numbers = (_places(1) * length + _places(0)).astype(jnp.uint32)[: LANES // 2]
    numbers = numbers + (query * T + np.uint32(other * LANES))
    # Of even weights; those after them have the other halves of these words.
    words = hashed(numbers >> 1, *key)
    draws = jnp.concatenate([words & LOW, words >> 16], axis=0)
    return is_kept(draws, call.dropout)
