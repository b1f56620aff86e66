# SPDX-License-Identifier: Apache-2.0
"""The cross entropy that every objective shares, without all logits at one time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from lm_scale.objectives import IGNORE

SMALL = 1e-20  # what f32 can't show beside a sum of so much is far from it
# Of a device, whose logits exist at one time, if no one says. A CPU's are to stay in
# its cache: a step of a small GPT-2 is a tenth faster so (benchmarks/step).
TOKENS, TOKENS_OF_CPU = 2048, 256
Sums = dict[str, Float[Array, "..."]]  # "loss", "correct", "count"


def cross_entropy(
    head: Callable[[Float[Array, "B T D"]], Float[Array, "B T V"]],
    hidden: Float[Array, "B T D"],
    labels: Int[Array, "B T"],
    *,
    chunk: int | None,
    accuracy: bool = False,
) -> Sums:
    """Token losses (nats), numbers of labels and, if asked for, of right guesses.

    Each is [B t], with t <= `chunk`, and still to be summed: over the chunks of a
    sequence they are added up place by place, so that devices need no more of one
    another than `_log_sum` asks.

    `head` turns hidden states into f32 logits; it runs on at most `chunk` positions
    (None: `positions_at_once`) of each sequence at a time (or one of each device that
    holds a part of it), so that logits take chunk/T of the memory (and all of it where
    this is differentiated, which is what `training_loss` is for). A T without divisors
    near T/chunk makes smaller chunks, and so a slower step. The vocabulary may be
    sharded: no logits are gathered. Positions labelled -100 are left out.
    """

    def of_chunk(hidden, labels) -> Sums:
        logits = head(hidden)
        count = (labels != IGNORE).astype(jnp.float32)
        right = (
            (jnp.argmax(logits, -1) == labels) if accuracy else jnp.zeros_like(count)
        )
        losses = _losses(logits, labels)
        return {"loss": losses, "correct": right.astype(jnp.float32), "count": count}

    chunks = _chunks(hidden, chunk)
    if chunks == 1:
        return of_chunk(hidden, labels)

    def add(sums: Sums, inputs) -> tuple[Sums, None]:
        return jax.tree.map(jnp.add, sums, of_chunk(*inputs)), None

    parts = (split_sequence(hidden, chunks), split_sequence(labels, chunks))
    zero = _zeros(jax.eval_shape(of_chunk, *(part[0] for part in parts)))
    sums, _ = jax.lax.scan(add, zero, parts)
    return sums


def training_loss(
    head: Callable[[Float[Array, "B T D"]], Float[Array, "B T V"]],
    hidden: Float[Array, "B T D"],
    labels: Int[Array, "B T"],
    *,
    chunk: int | None,
) -> tuple[Float[Array, ""], Float[Array, "B t"]]:
    """The summed loss of `cross_entropy`, and its losses, which have no gradient.

    The gradient is made together with the loss, while the logits of a chunk are there:
    the head runs once, not again in the backward pass. So use this where a gradient is
    wanted, and the other where not.
    """
    chunks = _chunks(hidden, chunk)
    if chunks == 1:
        losses = _losses(head(hidden), labels)
        return jnp.sum(losses), jax.lax.stop_gradient(losses)
    parts = (split_sequence(hidden, chunks), split_sequence(labels, chunks))
    # The head as a function of its weights as well: those that it uses, no others.
    pure, weights = jax.closure_convert(head, parts[0][0])
    return _with_gradient(pure, weights, *parts)


def _with_gradient_forward(head, weights, hidden, labels):
    """Loss and losses of chunks [chunks B t ...], and the gradients of the loss."""

    def of_chunk(hidden, labels):
        losses, pull = jax.vjp(
            lambda weights, hidden: _losses(head(hidden, *weights), labels),
            weights, hidden,
        )  # fmt: skip
        return losses, *pull(jnp.ones_like(losses))

    def add(sums, inputs):
        losses, d_weights, d_hidden = of_chunk(*inputs)
        return jax.tree.map(jnp.add, sums, (losses, d_weights)), d_hidden

    zero = _zeros(jax.eval_shape(of_chunk, hidden[0], labels[0])[:2])
    (losses, d_weights), d_hidden = jax.lax.scan(add, zero, (hidden, labels))
    return (jnp.sum(losses), losses), (d_weights, d_hidden)


def _with_gradient_backward(head, gradients, cotangents):
    scale, _ = cotangents

    def scaled(gradient: Array) -> Array:
        # Partial sums take a factor that is known to be the same on all devices.
        axes = jax.typeof(gradient).sharding.spec.unreduced
        same = jax.reshard(scale, PartitionSpec(reduced=axes)) if axes else scale
        return gradient * same.astype(gradient.dtype)

    return *jax.tree.map(scaled, gradients), None


_with_gradient = jax.custom_vjp(
    lambda *inputs: _with_gradient_forward(*inputs)[0], nondiff_argnums=(0,)
)
_with_gradient.defvjp(_with_gradient_forward, _with_gradient_backward)


def _losses(logits: Float[Array, "B T V"], labels: Int[Array, "B T"]) -> Array:
    """The loss of each place, f32 [B T]; 0 where there is no label."""
    return _at_labels(logits, labels) * (labels != IGNORE).astype(jnp.float32)


def _at_labels_forward(logits, labels):
    """-log softmax at the label; at a place without one, nothing of meaning."""
    log_sum = _log_sum(logits)
    # A lookup that works on sharded logits.
    label_logit = jnp.sum(jnp.where(_is_label(logits, labels), logits, 0.0), -1)
    return log_sum - label_logit, (logits, log_sum, labels)


def _at_labels_backward(saved, gradient):
    logits, log_sum, labels = saved
    shares = jnp.exp(logits - log_sum[..., None])
    # In one expression: XLA for CPUs makes a pass of each.
    return (shares - _is_label(logits, labels)) * gradient[..., None], None


_at_labels = jax.custom_vjp(lambda *inputs: _at_labels_forward(*inputs)[0])
_at_labels.defvjp(_at_labels_forward, _at_labels_backward)


def _is_label(logits: Array, labels: Array) -> Bool[Array, "B T V"]:
    return jnp.arange(logits.shape[-1]) == labels[..., None]


def _log_sum(logits: Float[Array, "B T V"]) -> Float[Array, "B T"]:
    """log(sum(exp(logits))), f32.

    Without their largest, for which the logits would be read once more: with a sum that
    needs no other before it, XLA for TPUs makes both in the pass that makes the logits.
    Centred logits can't be too small for that, as exp is convex: their sum is V at
    least. Where it is too large for f32, or the logits are not centred and it's too
    small, all are made with the largest after all; if so, all devices say in one byte.
    """
    sums = jnp.sum(jnp.exp(logits), -1)
    within = jnp.all((sums > SMALL) & (sums < jnp.inf))
    return jax.lax.cond(
        within, lambda: jnp.log(sums), lambda: jax.nn.logsumexp(logits, -1)
    )


def positions_at_once(rows: int, devices: int, platform: str | None = None) -> int:
    """Positions of a sequence that one chunk of the loss has, if no one says.

    rows: of a device; devices: that share a sequence. With fewer tokens the head's
    weights and their gradient are read and written again for too few products.
    """
    tokens = TOKENS_OF_CPU if platform == "cpu" else TOKENS
    return max(1, tokens // rows) * devices


def _chunks(hidden: Float[Array, "B T D"], chunk: int | None) -> int:
    """How many equal chunks a sequence is cut into, each spread over all devices."""
    length = hidden.shape[1]
    # Of one device:
    sharding = jax.typeof(hidden).sharding
    rows, own, _ = sharding.shard_shape(hidden.shape)
    if chunk is None:
        device = sharding.mesh.abstract_device  # None: of a mesh that has no devices
        chunk = positions_at_once(rows, length // own, device and device.platform)
    chunks = min(-(-length // chunk), own)
    while own % chunks:
        chunks += 1
    return chunks


def _zeros(like: Any) -> Any:
    return jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype, out_sharding=x.sharding.spec), like
    )


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
