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
group; `log_sum` f32 [R 1 G T]. Before them, each None where there are no such: the
segments (int32 [R 1 T], as loaded); the words of dropout, of queries (uint32 [R 1 G T],
as loaded) and of pairs of keys ([T/2 128]); biases of q, k and v (f32 [R 3 128]).
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int, Shaped

from lm_scale.models.dropout import HALF, is_kept, mixed
from lm_scale.models.layout import LANES

# Queries of a head are worked through in blocks of 128. The code of some blocks is one:
# products of one fill the waits of another. It has no more scores than VMEM has room
# for the values that exist at one time: as seen, 5.5 for each score of the backward
# pass, 6.5 under a causal mask, and less forward.
VMEM, VALUES, CAUSAL_VALUES = 2**24, 5.5, 6.5
FORWARD_SCORES = 4096  # for each query of a block: keys, of all heads and blocks
HIDDEN = -1e30  # the score of a key that is not seen
HIGH = np.uint32(0xFFFF0000)
BY_LANES, PLAIN = (((1,), (1,)), ((), ())), (((1,), (0,)), ((), ()))  # a @ b.T; a @ b


@dataclass(frozen=True)
class Call:
    """What is known of a call when the program is made."""

    head_dim: int
    causal: bool
    segments: bool = False  # a query sees keys of its own document
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

    def parts(self, rows: int, length: int, most: int) -> list[list[tuple[int, int]]]:
        """Rows and blocks of queries whose code is one, for so many scores of each."""
        blocks, heads, parts, scores = length // LANES, len(self.lanes()), [], most
        sizes = [len(self.sees(b, blocks)) * LANES * heads for b in range(blocks)]
        for block, more in enumerate(sizes):
            for row in range(rows):
                # (Where one is too large already, there is no room for a second.)
                if scores + more > most or max(sizes) > most:
                    parts.append([])
                    scores = 0
                parts[-1].append((row, block))
                scores += more
        return parts

    def forward_parts(self, rows: int, length: int):
        """The parts of the forward pass's code."""
        return self.parts(rows, length, FORWARD_SCORES)

    def backward_parts(self, rows: int, length: int, dtype: Any):
        """The parts of the backward pass's code."""
        whole, heads = rows * length * LANES, len(self.lanes())
        # What comes and goes, twice, as the next is fetched meanwhile; the scratch; the
        # words of dropout.
        taken = 2 * 7 * whole * jnp.dtype(dtype).itemsize
        taken += 4 * ((5 + self.segments) * whole + 4 * heads * length * LANES)
        taken += 4 * length * LANES * (self.dropout > 0)
        values = CAUSAL_VALUES if self.causal else VALUES
        most = int((VMEM - taken) / (4 * LANES * values))
        return self.parts(rows, length, most)


def forward_scratch(
    call: Call, rows: int, length: int, dtype: Any
) -> list[tuple[int, ...]]:
    """Shapes, f32: queries, keys, values transposed, scores of two blocks; segments."""
    whole, heads = (rows, length, LANES), len(call.lanes())
    slots = min(2, max(map(len, call.forward_parts(rows, length))))
    scores = (slots, heads, length, LANES)
    return [whole, whole, (rows, LANES, length), scores, *[whole] * call.segments]


def forward_kernel(call: Call, of_queries, words, biases, q_ref, k_ref, v_ref, *refs):
    """From q, k, v: the means and `log_sum`."""
    mean_ref, sum_ref, queries, keys, values_t, scores, *of_keys = refs
    segments = _segments(of_queries, *of_keys)
    rows, T = q_ref.shape[:2]
    blocks = T // LANES
    for row in range(rows):
        for block in map(_tokens, range(blocks)):
            q, k, v = (
                _load(ref, row, block) + _bias(biases, row, part)
                for part, ref in enumerate((q_ref, k_ref, v_ref))
            )
            queries[row, block], keys[row, block] = q, k
            values_t[row, :, block] = v.T

    def score(row, block, slot):
        """Scores, and the largest of each query."""
        largest = []
        query = queries[row, _tokens(block)]
        for head, own in enumerate(_of_heads(call, query, call.scale)):
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
                    stays = _undropped(call, words, (row, head, block, other))
                    weight = jnp.where(stays, weight, 0.0)
                mean = mean + _product(values_t[row, lanes, _tokens(other)], weight)
            total = jnp.sum(total, axis=0, keepdims=True)
            log_sum = largest[head] + jnp.log(total)
            sum_ref[row, 0, head : head + 1, _tokens(block)] = log_sum
            means.append(mean * (call.more / total))
        _store(call, mean_ref, row, _tokens(block), jnp.concatenate(means, axis=0).T)

    _overlap(call.forward_parts(rows, T), score, mix)


def backward_scratch(
    call: Call, rows: int, length: int, dtype: Any
) -> list[tuple[int, ...]]:
    """Shapes, f32: keys, values, keys transposed, dk, dv, weights, their gradients.

    And segments.
    """
    whole, heads = (rows, length, LANES), len(call.lanes())
    slots = min(2, max(map(len, call.backward_parts(rows, length, dtype))))
    scores = (slots, heads, length, LANES)
    turned, of_keys = (rows, LANES, length), [whole] * call.segments
    return [whole, whole, turned, whole, whole, scores, scores, *of_keys]


def backward_kernel(call: Call, of_queries, words, biases, q_ref, k_ref, v_ref, *refs):
    """From q, k, v, the gradient of the means and `log_sum`: theirs, and biases'.

    Those of q, k and v are one array, the tokens of each behind the tokens of the one
    before; the biases' are of each row for itself, sums of all its tokens.
    """
    d_mean_ref, sum_ref, d_ref, d_biases, *refs = refs
    keys, values, keys_t, dks, dvs, weights, d_weights, *of_keys = refs
    segments = _segments(of_queries, *of_keys)
    rows, T = q_ref.shape[:2]
    blocks = T // LANES
    for row in range(rows):
        for block in map(_tokens, range(blocks)):
            key = _load(k_ref, row, block) + _bias(biases, row, 1)
            keys[row, block], keys_t[row, :, block] = key, key.T
            values[row, block] = _load(v_ref, row, block) + _bias(biases, row, 2)

    def score(row, block, slot):
        """Weights (of those dropped the negative), their gradients and these' mean."""
        query = _load(q_ref, row, _tokens(block)) + _bias(biases, row, 0)
        d_mean = _load(d_mean_ref, row, _tokens(block))
        both = _of_heads(call, query, call.scale), _of_heads(call, d_mean, call.more)
        factors = list(zip(*both, strict=True))
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
                    stays = _undropped(call, words, (row, head, block, other))
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
        dq = (jnp.concatenate(dqs, axis=0) * call.scale).T
        _store(call, d_ref, row, _tokens(block), dq)
        _add_to_bias(d_biases, row, 0, dq, is_first=block == 0)

    _overlap(call.backward_parts(rows, T, q_ref.dtype), score, mix)
    for row in range(rows):
        for block in range(blocks):
            for part, gradients in ((1, dks), (2, dvs)):
                gradient = gradients[row, _tokens(block)]
                _store(call, d_ref, row, _tokens(part * blocks + block), gradient)
                _add_to_bias(d_biases, row, part, gradient, is_first=block == 0)


def _overlap(parts: list[list[tuple[int, int]]], score, mix) -> None:
    """Each block of queries is mixed after the next of its part is scored."""

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
        work(parts[0])
    else:
        jax.lax.fori_loop(0, len(parts), turn, None)


def _segments(of_queries, of_keys: Any = None):
    """Those along lanes, and along rows, which are written here; None: there are none.

    of_keys: the last of the scratch, if there are segments.
    """
    if of_queries is None:
        return None
    rows, _, T = of_queries.shape
    for row in range(rows):
        for block in map(_tokens, range(T // LANES)):
            ids = of_queries[row, :, block].astype(jnp.float32)
            of_keys[row, block] = jnp.broadcast_to(ids, (LANES, LANES)).T
    return of_queries, of_keys


def _bias(biases, row: int, part: int) -> Float[Array, "1 128"] | float:
    return 0.0 if biases is None else biases[row, part : part + 1]


def _add_to_bias(d_biases, row: int, part: int, gradient, *, is_first: bool) -> None:
    if d_biases is not None:
        total = jnp.sum(gradient, axis=0, keepdims=True)
        at = row, slice(part, part + 1)
        d_biases[at] = total if is_first else d_biases[at] + total


def _tokens(block: int) -> slice:
    return slice(block * LANES, (block + 1) * LANES)


def _load(ref, row: int, tokens: slice) -> Float[Array, "128 128"]:
    """A block's tokens in f32: the first, the third, ..., and then those between.

    For two of bf16 share a word, which a shift and a mask take apart without a move.
    """
    if ref.dtype == jnp.float32:
        halves = [ref[pl.ds(row, 1), half][0] for half in _halves(tokens)]
        return jnp.concatenate(halves, axis=0)
    words = _words(ref)[row, _pairs(tokens)]
    halves = jnp.concatenate([words << 16, words & HIGH], axis=0)
    return jax.lax.bitcast_convert_type(halves, jnp.float32)


def _store(call: Call, ref, row: int, tokens: slice, x: Float[Array, "128 128"]):
    """The way back from `_load`; bf16 is the nearest, as the hardware rounds."""
    low, high = x[: LANES // 2], x[LANES // 2 :]
    if ref.dtype == jnp.float32:
        for half, of_half in zip(_halves(tokens), (low, high), strict=True):
            ref[pl.ds(row, 1), half] = of_half[None]
    elif call.interpret:  # jax 0.10 does not interpret what is written as words
        both = jnp.stack([low, high], axis=1).reshape(x.shape)
        ref[row, tokens] = both.astype(ref.dtype)
    else:
        words = pltpu.pack_elementwise([low, high], packed_dtype=ref.dtype)
        _words(ref)[row, _pairs(tokens)] = words


def _words(ref):
    """The words that two tokens share; to cast a value, and not memory, moves it."""
    return ref.bitcast(jnp.uint32)


def _pairs(tokens: slice) -> slice:
    return slice(tokens.start // 2, tokens.stop // 2)


def _halves(tokens: slice):
    return [pl.ds(tokens.start + at, LANES // 2, stride=2) for at in range(2)]


def _places(dim: int) -> Int[Array, "128 128"]:
    """Along `dim`, the places in a block of the tokens that `_load` gives."""
    number = jax.lax.broadcasted_iota(jnp.int32, (LANES, LANES), dim)
    return jnp.where(number < LANES // 2, 2 * number, 2 * number - LANES + 1)


def as_loaded(x: Shaped[Array, "*B T"]) -> Shaped[Array, "*B T"]:
    """What is of tokens in the order of `_load`."""
    pairs = x.reshape(*x.shape[:-1], -1, LANES // 2, 2)
    return pairs.swapaxes(-1, -2).reshape(x.shape)


def _of_heads(
    call: Call, x: Float[Array, "T 128"], factor: float
) -> list[Float[Array, "T 128"]]:
    """`x` times a factor for each head, zero in the lanes of the others."""
    if call.head_dim == LANES:
        return [x * factor]
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    own = ((lane >= at.start) & (lane < at.stop) for at in call.lanes())
    return [x * jnp.where(lanes, factor, 0.0) for lanes in own]


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


def _undropped(call: Call, words, at) -> Bool[Array, "S T"]:
    """Where dropout leaves a block's weights."""
    row, head, block, other = at
    of_queries, of_pairs = words
    own = of_queries[row, 0, head : head + 1, _tokens(block)]
    # Words of even keys and those after them.
    both = mixed(own, of_pairs[_pairs(_tokens(other))])
    return is_kept(jnp.concatenate([both << HALF, both], axis=0), call.dropout)
