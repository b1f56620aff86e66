# SPDX-License-Identifier: Apache-2.0
"""The loop over a model's blocks, and what it keeps for the backward pass."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Key

from lm_scale.models.compute import Compute
from lm_scale.models.layout import gather, shared


def layer_keys(key: Key[Array, ""] | None, layers: int) -> Key[Array, "L"] | None:
    """A key for each layer, as `scan_blocks` takes them."""
    return None if key is None else jax.random.split(key, layers)


def scan_blocks(
    blocks: nnx.Module,
    apply: Callable[[nnx.Module, Array, Any], tuple[Array, Any]],
    x: Array,
    per_layer: Any,
    compute: Compute,
) -> tuple[Array, Any]:
    """Runs stacked blocks one after the other: compiled once, whatever the depth.

    `apply(block, x, inputs) -> (x, outputs)` runs one layer; `per_layer` is a tree with
    a leading layer axis, of which `apply` gets one slice a layer (None: none). The
    outputs come back stacked. Each layer's weights are gathered when it is its turn,
    and again in the backward pass, unless `compute` says that they are kept.
    """
    graphdef, weights = nnx.split(blocks)

    def whole(weights):
        return jax.tree.map(lambda w: gather(w, compute), weights)

    def computed_again(x, weights, inputs):
        if compute.reshard_after_forward:
            weights = whole(weights)
        return apply(nnx.merge(graphdef, weights), x, inputs)

    def layer(x, inputs):
        weights, inputs = inputs
        # Not by the policy: it would keep them in a type that XLA must not change, such
        # as f32, of which a TPU's products need bf16 alone (`reduce_precision`).
        if not compute.reshard_after_forward:
            weights = whole(weights)
        return computed_again(x, weights, inputs)

    # A loop's turns keep XLA from merging the two computations of a layer. Inside of
    # one turn it is told to, where they have products (attention, full): it would keep
    # all, and compute nothing again. What else is computed again costs as little to
    # keep, and it may choose (a step of RoBERTa is 5 % faster so, in no more memory).
    again = compute.unroll > 1 and compute.remat in ("attention", "full")
    computed_again = jax.checkpoint(
        computed_again, policy=remat_policy(compute), prevent_cse=again
    )
    weights = jax.tree.map(lambda w: shared(w, compute.rules), nnx.as_pure(weights))
    inputs, unroll = (weights, per_layer), compute.unroll
    if unroll == 1:
        return jax.lax.scan(layer, x, inputs)

    def turn(x, group):
        made = []
        stacks, structure = jax.tree.flatten(group)
        for parts in zip(*map(_unstacked, stacks), strict=True):
            x, outputs = layer(x, structure.unflatten(parts))
            made.append(outputs)
        return x, jax.tree.map(lambda *each: jnp.stack(each), *made)

    # (The scan's own `unroll` cannot cut stacks whose type has partial sums.)
    groups = jax.tree.map(lambda a: _regroup(a, (-1, unroll), 1), inputs)
    turns = jax.tree.leaves(groups)[0].shape[0]
    x, made = jax.lax.scan(turn, x, groups, unroll=turns == 1)
    return x, jax.tree.map(lambda a: _regroup(a, (-1,), 2), made)


def _unstacked(x: Array) -> list[Array]:
    """What is stacked, part by part; its gradient is a stack, not a sum of paddings."""
    return [_regroup(part, (), 1) for part in jax.lax.split(x, [1] * len(x))]


def _regroup(x: Array, layers: tuple[int, ...], dims: int) -> Array:
    """`x` with its first `dims` dimensions as these; the others stay as they are."""
    spec = jax.typeof(x).sharding.spec
    cut = PartitionSpec(
        *[None] * len(layers), *spec.partitions[dims:],
        unreduced=spec.unreduced, reduced=spec.reduced,
    )  # fmt: skip
    return jnp.reshape(x, (*layers, *x.shape[dims:]), out_sharding=cut)


def remat_policy(compute: Compute) -> Callable[..., Any]:
    """Which values of a layer the backward pass finds, and does not compute again."""
    if compute.remat == "none":
        # All but what comes from other devices (`layout.widen` is a custom_vjp), parts
        # of it (`layers.project`) and other shapes of it (`layout.gather`): else the
        # weights of every layer would be whole at one time.
        moved = {
            "reshard", "custom_vjp_call", "reshape", "slice", "dynamic_slice", "squeeze"
        }  # fmt: skip
        return lambda primitive, *_, **__: primitive.name not in moved
    if compute.remat == "dots":
        return _dots(compute.offload)
    if compute.remat == "attention":
        return _named(("attention",), compute.offload)
    return jax.checkpoint_policies.nothing_saveable


_TO_HOST = {"offload_src": "device", "offload_dst": "pinned_host"}


def _named(names: tuple[str, ...], offload: bool) -> Callable[..., Any]:
    if not offload:
        return jax.checkpoint_policies.save_only_these_names(*names)
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=list(names),
        **_TO_HOST,
    )


def _dots(offload: bool) -> Callable[..., Any]:
    """Products, also those of `xla`'s and `vmem`'s attention; of partial sums, sums."""
    policies = jax.checkpoint_policies
    named = _named(("residual", "products"), offload)
    products = policies.dots_with_no_batch_dims_saveable
    if offload:
        products = policies.offload_dot_with_no_batch_dims(**_TO_HOST)

    def policy(primitive, *operands, **params):
        into = params.get("out_sharding")
        if primitive.name == "dot_general" and into and into.spec.unreduced:
            return False
        choose = named if primitive.name == "name" else products
        return choose(primitive, *operands, **params)

    return policy
