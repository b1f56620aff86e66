# SPDX-License-Identifier: Apache-2.0
"""What the model families share: compute settings, layer norm, dropout, the layer scan.

A block is an `nnx.Module` whose weights are declared by `sharding.param`; it is written
for one layer and run for all of them by `scan_blocks`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Key

from lm_scale.errors import InputError
from lm_scale.sharding import Rules, ones, param, zeros


@dataclass(frozen=True)
class Compute:
    """How a model is computed; what it computes, but for rounding, is in its config."""

    # Of matrix products, activations and the sums of gradients over devices; weights,
    # optimizer, softmax, norm statistics and the loss are float32 in either case.
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    # What the backward pass computes again: nothing; all but the outputs of matrix
    # products with weights; or all inside a block.
    remat: Literal["none", "dots", "full"] = "dots"
    # What computes attention; auto: the best for the devices (see models/kernels.py).
    attention: Literal["auto", "xla", "splash", "cudnn"] = "auto"
    loss_chunk: int = 128  # positions of a sequence whose logits exist at one time
    rules: Rules = Rules()

    def __post_init__(self):
        if self.loss_chunk < 1:
            raise InputError(
                f"compute.loss_chunk = {self.loss_chunk}: expected a number above 0."
            )


def check_shape(config: Any) -> None:
    """InputError for a model config (of any family) that describes no model."""
    for name in ("vocab", "positions", "layers", "embed", "heads", "mlp"):
        if getattr(config, name) < 1:
            raise InputError(
                f"model.{name} = {getattr(config, name)}: expected a number above 0."
            )
    for name, value in vars(config).items():
        if "dropout" in name and not 0 <= value < 1:
            raise InputError(f"model.{name} = {value}: expected 0 <= {name} < 1.")


def check_heads(config: Any) -> None:
    """InputError unless the heads share the model's width evenly."""
    if config.embed % config.heads:
        raise InputError(
            f"model.embed = {config.embed} must be a multiple of "
            f"model.heads = {config.heads}."
        )


REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis, computed in f32 (Ba et al. 2016)."""

    def __init__(self, features: int, epsilon: float):
        self.epsilon = epsilon
        self.scale = param((features,), (None,), ones, decay=False)
        self.bias = param((features,), (None,), zeros, decay=False)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, -1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), -1, keepdims=True)
        normed = centred * jax.lax.rsqrt(variance + self.epsilon)
        return (normed * self.scale[...] + self.bias[...]).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Division by the root mean square of the last axis, in f32 (Zhang et al. 2019)."""

    def __init__(self, features: int, epsilon: float):
        self.epsilon = epsilon
        self.scale = param((features,), (None,), ones, decay=False)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x32), -1, keepdims=True)
        normed = x32 * jax.lax.rsqrt(mean_square + self.epsilon)
        return (normed * self.scale[...]).astype(x.dtype)


def dropout(x: Float[Array, "*D"], rate: float, key: Key[Array, ""] | None):
    """Zeroes a share `rate` of `x` and scales the rest up; no key, no dropout.

    The mask depends on the key and the global shape only, never on the mesh.
    """
    if key is None or rate == 0.0:
        return x
    sharding = jax.typeof(x).sharding.spec
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape, out_sharding=sharding)
    return jnp.where(keep, x / (1.0 - rate), 0)


def split_key(key: Key[Array, ""] | None, number: int):
    """`number` keys, or as many Nones: dropout is off."""
    return [None] * number if key is None else jax.random.split(key, number)


def layer_keys(key: Key[Array, ""] | None, layers: int) -> Key[Array, "L"] | None:
    """A key for each layer, as `scan_blocks` takes them."""
    return None if key is None else jax.random.split(key, layers)


def embed(
    table: nnx.Param, ids: Int[Array, "B T"], compute: Compute
) -> Float[Array, "B T D"]:
    """Rows of an embedding table, in the compute type and sharded as activations."""
    # Its columns are gathered first: a lookup in a table that is sharded both ways
    # makes XLA replicate the result. Cast last: the gradient of a frequent token is a
    # sum of thousands of rows, which bf16 would round away.
    whole = PartitionSpec(jax.typeof(table[...]).sharding.spec[0], None)
    rows = jax.reshard(table[...], whole)
    spec = compute.rules.spec("batch", "seq", "act_embed")
    return rows.at[ids].get(out_sharding=spec).astype(compute.dtype)


def scan_blocks(
    blocks: nnx.Module,
    apply: Callable[[nnx.Module, Array, Any], tuple[Array, Any]],
    x: Array,
    per_layer: Any,
    *,
    remat: str = "none",
) -> tuple[Array, Any]:
    """Runs stacked blocks one after the other: compiled once, whatever the depth.

    `apply(block, x, inputs) -> (x, outputs)` runs one layer; `per_layer` is a tree with
    a leading layer axis, of which `apply` gets one slice a layer (None: none). The
    outputs come back stacked. `remat` names what is recomputed in the backward pass.
    """
    graphdef, weights = nnx.split(blocks)

    def layer(x, inputs):
        weights, inputs = inputs
        return apply(nnx.merge(graphdef, weights), x, inputs)

    if remat != "none":
        # The scan already keeps XLA from merging the two computations of a layer.
        layer = jax.checkpoint(layer, policy=REMAT_POLICIES[remat], prevent_cse=False)
    return jax.lax.scan(layer, x, (nnx.as_pure(weights), per_layer))


@dataclass(frozen=True)
class HFWeight:
    """Where one of our weights lies in a Hugging Face checkpoint.

    `{layer}` in a name is the block's number. Several names are parts of one weight
    here, side by side on `stack_axis` of a block's weight (query, key and value).
    """

    names: tuple[str, ...]
    inputs: (
        int  # so many of our axes are the rows of their matrix; 0: theirs is a vector
    )
    transpose: bool = False  # `torch.nn.Linear` keeps (outputs, inputs)
    stack_axis: int = 0

    def matrix_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Our axes (heads, head_dim ...) merged as theirs are, before transposing."""
        sides = (shape[: self.inputs], shape[self.inputs :])
        return tuple(math.prod(side) for side in sides if side)


def hf_vector(*names: str) -> HFWeight:
    """A bias or a norm scale."""
    return HFWeight(names, inputs=0)


def hf_matrix(*names: str, inputs: int = 1) -> HFWeight:
    """A matrix kept (inputs, outputs), or an embedding table."""
    return HFWeight(names, inputs)


def hf_linear(*names: str, inputs: int = 1, stack_axis: int = 0) -> HFWeight:
    """The weight of a `torch.nn.Linear`."""
    return HFWeight(names, inputs, transpose=True, stack_axis=stack_axis)
