# SPDX-License-Identifier: Apache-2.0
"""The cross entropy that every objective shares, without all logits at one time."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from lm_scale.objectives import IGNORE

Sums = dict[str, Float[Array, "..."]]  # "loss", "correct", "count"


def cross_entropy(
    head: Callable[[Float[Array, "B T D"]], Float[Array, "B T V"]],
    hidden: Float[Array, "B T D"],
    labels: Int[Array, "B T"],
    *,
    chunk: int,
    accuracy: bool = False,
) -> Sums:
    """Token losses (nats), numbers of labels and, if asked for, of right guesses.

    Each is [B t], with t <= `chunk`, and still to be summed: over the chunks of a
    sequence they are added up place by place, so that no device needs a word from
    another.

    `head` turns hidden states into f32 logits; it runs on at most `chunk` positions of
    each sequence at a time (or one of each device that holds a part of it), and again
    in the backward pass, so that logits take chunk/T of the memory. A T without
    divisors near T/chunk makes smaller chunks, and so a slower step. The vocabulary may
    be sharded: no logits are gathered. Positions labelled -100 are left out.
    """

    def of_chunk(hidden, labels) -> Sums:
        logits = head(hidden)
        count = (labels != IGNORE).astype(jnp.float32)
        vocab = jnp.arange(logits.shape[-1])
        at_label = vocab == labels[..., None]  # a lookup that works on sharded logits
        label_logit = jnp.sum(jnp.where(at_label, logits, 0.0), -1)
        loss = (jax.nn.logsumexp(logits, -1) - label_logit) * count
        right = (
            (jnp.argmax(logits, -1) == labels) if accuracy else jnp.zeros_like(count)
        )
        return {"loss": loss, "correct": right.astype(jnp.float32), "count": count}

    length = hidden.shape[1]
    own = jax.typeof(hidden).sharding.shard_shape(hidden.shape)[1]  # of one device
    chunks = min(-(-length // chunk), own)
    while own % chunks:  # equal chunks, each spread over all devices
        chunks += 1
    if chunks == 1:
        return of_chunk(hidden, labels)

    def add(sums: Sums, inputs) -> tuple[Sums, None]:
        return jax.tree.map(jnp.add, sums, jax.checkpoint(of_chunk)(*inputs)), None

    parts = (split_sequence(hidden, chunks), split_sequence(labels, chunks))
    zero = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype, out_sharding=x.sharding.spec),
        jax.eval_shape(of_chunk, *(part[0] for part in parts)),
    )
    sums, _ = jax.lax.scan(add, zero, parts)
    return sums


def split_sequence(x: Array, chunks: int) -> Array:
    """[B T ...] -> [chunks B T/chunks ...]; takes every chunks-th position together.

    Strided, so that a sequence sharded over devices stays so within each chunk.
    """
    (batch, length, *rest), spec = x.shape, jax.typeof(x).sharding.spec
    axes = spec.partitions
    parted = jnp.reshape(
        x,
        (batch, length // chunks, chunks, *rest),
        out_sharding=PartitionSpec(*axes[:2], None, *axes[2:], reduced=spec.reduced),
    )
    return jnp.moveaxis(parted, 2, 0)
