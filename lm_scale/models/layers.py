# SPDX-License-Identifier: Apache-2.0
"""What the model families share: checks, norms, lookups, Hugging Face's names.

A layer is an `nnx.Module` whose weights are declared by `sharding.param`.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from lm_scale.errors import InputError
from lm_scale.models.compute import Compute
from lm_scale.models.layout import mesh_axes_of, shared, spread, to_residual
from lm_scale.sharding import ones, param, zeros


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
        scale, bias = spread(self.scale[...], x32), spread(self.bias[...], x32)
        return (normed * scale + bias).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Division by the root mean square of the last axis, in f32 (Zhang et al. 2019)."""

    def __init__(self, features: int, epsilon: float):
        self.epsilon = epsilon
        self.scale = param((features,), (None,), ones, decay=False)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x32), -1, keepdims=True)
        normed = x32 * jax.lax.rsqrt(mean_square + self.epsilon)
        return (normed * spread(self.scale[...], x32)).astype(x.dtype)


def gelu(x: Float[Array, "*D"]) -> Float[Array, "*D"]:
    """The exact one (Hendrycks and Gimpel 2016), in f32, as torch computes it.

    `jax.nn.gelu` goes by erfc, which makes a step of RoBERTa on a TPU v3 a tenth longer
    (benchmarks/step).
    """
    x32 = x.astype(jnp.float32)
    return (0.5 * x32 * (1.0 + jax.lax.erf(x32 * 0.5**0.5))).astype(x.dtype)


def project(
    x: Float[Array, "B T D"],
    weight: Float[Array, "D C H N"],
    bias: Float[Array, "C H N"] | None = None,
) -> list[Float[Array, "B T H N"]]:
    """The C products of `x` with the parts of a weight, one by one.

    Where one product makes them all, XLA for TPUs writes it out and copies the parts.
    """
    products = []
    for part in range(weight.shape[1]):
        product = jnp.einsum("BTD,DHN->BTHN", x, weight[:, part])
        if bias is not None:
            product = product + spread(bias[part], product, 2, 3)
        products.append(product)
    return products


def embed(
    table: nnx.Param, ids: Int[Array, "B T"], compute: Compute
) -> Float[Array, "B T D"]:
    """Rows of an embedding table, in the compute type and sharded as the residual."""
    rules = compute.rules
    weight = shared(table[...], rules)
    # Where FSDP has cut the columns, each device looks up its columns for the tokens of
    # all, and hands the others theirs: less to send than the table, and its gradient is
    # made where it stays.
    columns = jax.typeof(weight).sharding.spec.partitions[1]
    cut = mesh_axes_of(PartitionSpec(columns))
    batch = tuple(axis for axis in rules.batch if axis not in cut) or None
    seq = rules.seq or None
    ids = jax.reshard(ids, PartitionSpec(batch, seq))
    rows = weight.at[ids].get(out_sharding=PartitionSpec(batch, seq, columns))
    # Cast only now: the gradient of a frequent token is a sum of thousands of rows,
    # which bf16 would round away.
    return to_residual(rows.astype(compute.dtype), rules)


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
