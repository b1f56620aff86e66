# SPDX-License-Identifier: Apache-2.0
"""What the model families share: checks, norms, lookups, Hugging Face's names.

A layer is an `nnx.Module` whose weights are declared by `sharding.param`.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from lm_scale.errors import InputError
from lm_scale.models.compute import Compute
from lm_scale.models.layout import (
    gather,
    kept,
    merged,
    mesh_axes_of,
    shared,
    spread,
    sum_over,
    to_residual,
)
from lm_scale.models.product import product
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


TANH_GELU = ((2 / math.pi) ** 0.5, 0.044715 * (2 / math.pi) ** 0.5, 0.0)
# Fitted to GELU by erf and to its slope, which it misses by 2.6e-5 and 1.1e-4 at most;
# bf16 rounds a 1 by up to 4e-3.
BF16_GELU = (0.7975079, 0.03700565, -3.515189e-4)
# `jax.default_matmul_precision`s of one product in bf16.
ROUNDED = (None, "default", "fastest", "bfloat16", "BF16_BF16_F32")


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis, computed in f32 (Ba et al. 2016)."""

    def __init__(self, features: int, epsilon: float):
        self.epsilon = epsilon
        self.scale = param((features,), (None,), ones, decay=False)
        self.bias = param((features,), (None,), zeros, decay=False)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return layer_norm(x, self.scale[...], self.bias[...], self.epsilon)


def layer_norm(x, scale, bias, epsilon: float) -> Float[Array, "*B D"]:
    """The function of `LayerNorm`; its backward pass needs the normalised `x` alone.

    The variance is a difference, E[x^2] - E[x]^2, so that one pass over `x` will do: in
    f32 its error is (mean / deviation)^2 of the last digit.
    """
    return _layer_norm(x, scale, bias, epsilon)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _layer_norm(x, scale, bias, epsilon):
    return _layer_norm_forward(x, scale, bias, epsilon)[0]


def _layer_norm_forward(x, scale, bias, epsilon):
    x32 = x.astype(jnp.float32)
    mean = jnp.mean(x32, -1, keepdims=True)
    variance = jnp.mean(jnp.square(x32), -1, keepdims=True) - jnp.square(mean)
    factor = jax.lax.rsqrt(jnp.maximum(variance, 0.0) + epsilon)
    # Rounded before it is scaled: so a backward pass makes `y` of what is kept.
    normed = kept(((x32 - mean) * factor).astype(x.dtype))
    y = _scaled(normed.astype(jnp.float32), scale, bias).astype(x.dtype)
    return y, (normed, kept(factor), scale, bias)


def _scaled(normed, scale, bias):
    return normed * spread(scale, normed) + spread(bias, normed)


def _layer_norm_backward(epsilon, saved, dy):
    normed, factor, *weights = saved
    x32 = normed.astype(jnp.float32)
    _, pull = jax.vjp(_scaled, x32, *weights)
    d_normed, *d_weights = pull(dy.astype(jnp.float32))
    along = jnp.mean(d_normed * x32, -1, keepdims=True)
    centred = d_normed - jnp.mean(d_normed, -1, keepdims=True)
    return ((centred - x32 * along) * factor).astype(normed.dtype), *d_weights


_layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


class RMSNorm(nnx.Module):
    """Division by the root mean square of the last axis, in f32 (Zhang et al. 2019)."""

    def __init__(self, features: int, epsilon: float):
        self.epsilon = epsilon
        self.scale = param((features,), (None,), ones, decay=False)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return rms_norm(x, self.scale[...], self.epsilon)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x, scale, epsilon: float) -> Float[Array, "*B D"]:
    """The function of `RMSNorm`; its backward pass needs the normalised `x` alone."""
    return _rms_norm_forward(x, scale, epsilon)[0]


def _rms_norm_forward(x, scale, epsilon):
    x32 = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x32), -1, keepdims=True)
    factor = jax.lax.rsqrt(mean_square + epsilon)
    # Rounded before it is scaled: so a backward pass makes `y` of what is kept.
    normed = kept((x32 * factor).astype(x.dtype))
    y = (normed.astype(jnp.float32) * spread(scale, x32)).astype(x.dtype)
    return y, (normed, kept(factor), scale)


def _rms_norm_backward(epsilon, saved, dy):
    normed, factor, scale = saved
    x32 = normed.astype(jnp.float32)
    _, pull = jax.vjp(lambda x, scale: x * spread(scale, x), x32, scale)
    d_normed, d_scale = pull(dy.astype(jnp.float32))
    along = jnp.mean(d_normed * x32, -1, keepdims=True)
    return ((d_normed - x32 * along) * factor).astype(normed.dtype), d_scale


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


def gelu(x: Float[Array, "*D"], approximate: bool) -> Float[Array, "*D"]:
    """x times the normal distribution up to x (Hendrycks and Gimpel 2016), in f32.

    approximate: by tanh, as GPT-2 has it. The slope is made with the value: a backward
    pass that finds it kept has one product to make.
    """
    return _gelu(x, approximate)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gelu(x, approximate):
    return _gelu_forward(x, approximate)[0]


def _gelu_forward(x, approximate):
    x32 = x.astype(jnp.float32)
    if approximate:
        y, slope = _gelu_by_tanh(x32, TANH_GELU)
    elif x.dtype == jnp.bfloat16 or _products_round():
        y, slope = _gelu_by_tanh(x32, BF16_GELU)
    else:
        y, slope = jax.jvp(_exact_gelu, (x32,), (jnp.ones_like(x32),))
    return y.astype(x.dtype), slope.astype(x.dtype)


def _products_round() -> bool:
    """If products take f32 in bf16: on TPUs, unless JAX has been told otherwise.

    What is made for them alone, as GELU's value and slope are, need not be better.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None or device.platform != "tpu":
        return False
    told: Any = jax.config
    return told.jax_default_matmul_precision in ROUNDED


def _exact_gelu(x):
    # `jax.nn.gelu` goes by erfc, which makes a step of RoBERTa on a TPU v3 a tenth
    # longer (benchmarks/step).
    return 0.5 * x * (1.0 + jax.lax.erf(x * 0.5**0.5))


def _gelu_by_tanh(x, terms: tuple[float, float, float]):
    """x/2 (1 + tanh(ax + bx³ + cx⁵)) and its slope; TPUs have tanh in hardware."""
    a, b, c = terms
    square = jnp.minimum(x * x, 50.0)  # from where on tanh is 1, and its slope 0
    tanh = jnp.tanh(x * (a + square * (b + square * c)))
    inner = a + square * (3 * b + square * (5 * c))
    half = 0.5 * (1.0 + tanh)
    return x * half, half + 0.5 * x * (1.0 - tanh * tanh) * inner


def _gelu_backward(approximate, slope, dy):
    return (dy * slope,)


_gelu.defvjp(_gelu_forward, _gelu_backward)


def project(
    x: Float[Array, "B T D"],
    weight: Float[Array, "D C H N"] | Float[Array, "D C F"],
    compute: Compute,
    bias: Float[Array, "C H N"] | Float[Array, "C F"] | None = None,
) -> list[Float[Array, "B T H N"]] | list[Float[Array, "B T F"]]:
    """The C products of `x` with the parts of a weight, one by one.

    Where one product makes them all, XLA for TPUs writes it out and copies the parts.
    """
    if compute.quantize is not None:
        # Rounding asks for no layout: left alone, XLA for TPUs gathers the parts row by
        # row in turn, which takes a sixth of a step (Llama 3.1 8B on a v5p-128).
        order = (1, 0, *range(2, weight.ndim))
        weight = with_layout_constraint(weight, Layout(order))
    elif compute.attention == "vmem" and weight.shape[1] == 3 and bias is None:
        made = _project_qkv(x, merged(weight, 2))
        return [_in_heads(y, weight.shape[2:]) for y in made]
    one = project_heads if weight.ndim == 4 else _project_one
    parts = range(weight.shape[1])
    biases = [None if bias is None else bias[part] for part in parts]
    return [one(x, weight[:, part], compute, biases[part]) for part in parts]


def project_heads(
    x: Float[Array, "B T D"],
    weight: Float[Array, "D H N"],
    compute: Compute,
    bias: Float[Array, "H N"] | None = None,
) -> Float[Array, "B T H N"]:
    """The product with a weight of heads."""
    if compute.attention != "vmem":
        return _project_one(x, weight, compute, bias)
    # Its heads lie side by side. XLA by itself would have tokens innermost, as heads of
    # 64 fill half of the lanes, and copy to and from that.
    flat = None if bias is None else merged(bias, 0)
    y = _project_one(x, merged(weight, 1), compute, flat)
    return _in_heads(y, weight.shape[1:])


def _in_heads(y, heads: tuple[int, ...]):
    cut = PartitionSpec(*jax.typeof(y).sharding.spec, None)
    return jnp.reshape(y, (*y.shape[:2], *heads), out_sharding=cut)


@jax.custom_vjp
def _project_qkv(x, weight):
    return [jnp.einsum("BTD,DF->BTF", x, weight[:, part]) for part in range(3)]


def _project_qkv_backward(saved, gradients):
    # Those that `attend_in_vmem` made are parts of one array, and XLA sees that this is
    # it: so one product does, three times as deep, for three whose results are added.
    B, T, F = gradients[0].shape
    whole = jnp.concatenate(gradients, axis=1)
    batch, seq, heads = jax.typeof(whole).sharding.spec
    cut = PartitionSpec(batch, None, seq, heads)
    whole = jnp.reshape(whole, (B, 3, T, F), out_sharding=cut)
    # Left alone, XLA for TPUs copies it, to have the tokens innermost.
    whole = with_layout_constraint(whole, Layout((0, 1, 2, 3)))
    _, pull = jax.vjp(lambda x, weight: jnp.einsum("BTD,DCF->BCTF", x, weight), *saved)
    return pull(whole)


_project_qkv.defvjp(lambda *given: (_project_qkv(*given), given), _project_qkv_backward)


def _project_one(x, weight, compute: Compute, bias):
    made = "HN" if weight.ndim == 3 else "F"
    y = product(f"BTD,D{made}->BT{made}", x, weight, compute)
    return y if bias is None else y + spread(bias, y, *range(2, y.ndim))


def project_back(
    x: Float[Array, "B T H N"], weight: Float[Array, "H N D"], compute: Compute
) -> Float[Array, "B T D"]:
    """The product with all heads; partial sums where `act_heads` is cut."""
    into = sum_over("act_heads", compute.rules)
    if compute.attention == "vmem":
        return product("BTF,FD->BTD", merged(x, 2), merged(weight, 0), compute, into)
    return product("BTHN,HND->BTD", x, weight, compute, into)


def embed(
    table: nnx.Param, ids: Int[Array, "B T"], compute: Compute
) -> Float[Array, "B T D"]:
    """Rows of an embedding table, in the compute type and sharded as the residual."""
    rules, weight = compute.rules, table[...]
    ids = jax.reshard(ids, rules.spec("batch", "seq"))
    own = math.prod(jax.typeof(ids).sharding.shard_shape(ids.shape))
    # Where FSDP has cut the columns, each device looks up its columns for the tokens of
    # all, and hands the others theirs: less to send than a table of more rows than a
    # device has tokens, and its gradient is made where it stays.
    if weight.shape[0] > own:
        weight = shared(weight, rules)
    else:
        weight = gather(weight, compute, "float32")
    columns = jax.typeof(weight).sharding.spec.partitions[1]
    cut = mesh_axes_of(PartitionSpec(columns))
    batch = tuple(axis for axis in rules.batch if axis not in cut) or None
    seq = rules.seq or None
    ids = jax.reshard(ids, PartitionSpec(batch, seq))
    rows = weight.at[ids].get(out_sharding=PartitionSpec(batch, seq, columns))
    # Cast only now: the gradient of a frequent token is a sum of thousands of rows,
    # which bf16 would round away.
    return to_residual(rows.astype(compute.dtype), rules)


def centred(weight: Float[Array, "V *D"]) -> Float[Array, "V *D"]:
    """An output table, or its bias, less the mean of its rows.

    All logits of a token move by the same, which no softmax notices; their mean is 0.
    So its gradient is that of the weight as it was.
    """
    mean = jax.lax.stop_gradient(jnp.mean(weight, 0))
    return weight - spread(mean, weight)


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
