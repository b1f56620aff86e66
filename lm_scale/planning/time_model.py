# SPDX-License-Identifier: Apache-2.0
"""How long a step may take, roughly: good enough to say what to compile first.

    step = max(compute, hbm) + ici                 seconds of one device

compute: the model's FLOPs and those of what is computed again, at the peak. Again:
always the scores of attention, one of its two products; by remat "attention" the rest
of a layer's forward pass but the other product, by "full" that too. hbm: each part of a
batch writes and reads what is kept and what a layer needs (memory_model.py), and reads
the weights in its forward pass, in its backward pass and again; gradients, weights and
optimizer state are read and written once a step. ici: what a device sends in a ring.
FSDP gathers each weight twice (without `reshard_after_forward`, once) and scatters its
gradient, for each part of a batch;
gradients are summed once a step over the devices that have the same weights; a matrix
that is cut over devices makes four sums of activations a layer; a sequence that is cut
sends its keys and values around, forward and twice backward.

Nothing overlaps here, and every operation runs at the peak: times are wrong, their
order less so. Where a bandwidth is not known, its term is left out.
"""

import math

import jax.numpy as jnp
from jax.sharding import Mesh

from lm_scale.assemble import flops_per_token
from lm_scale.config import RunConfig
from lm_scale.models.layout import token_axes
from lm_scale.planning.accelerators import Slice
from lm_scale.planning.memory_model import F32, Estimate
from lm_scale.sharding import shards

TENSOR_SUMS = 4  # of activations, a layer: two forward, two backward
SEQUENCE_TURNS = 3  # of keys and values: forward; themselves and gradients backward


def estimate_seconds(
    config: RunConfig, chosen: Slice, mesh: Mesh, memory: Estimate
) -> float:
    """Seconds of a step on these devices, whose bytes the memory model has told."""
    flops = config.batch * config.seq_len * step_flops(config) / chosen.devices
    compute = seconds_at_peak(config, flops, chosen)
    hbm = _over(hbm_bytes(config, memory), chosen.hbm_bandwidth)
    return max(compute, hbm) + _over(sent_bytes(config, mesh, memory),
                                     chosen.ici_bandwidth)  # fmt: skip


def seconds_at_peak(config: RunConfig, flops: float, chosen: Slice) -> float:
    """Seconds that so many FLOPs of a device take at least.

    Of a step in 8 bits, two of three products take half of their time: reckoned here
    as if that were so of attention and of the head too, which are not rounded.
    """
    share = 1.0 if config.compute.quantize is None else 2 / 3
    return share * flops / chosen.generation.peak


def _over(size: float, bandwidth: float | None) -> float:
    return 0.0 if bandwidth is None else size / bandwidth


def step_flops(config: RunConfig) -> float:
    """FLOPs of a token, with what is computed again."""
    blocks = config.model.train_flops_per_token(config.seq_len, 0.0) / 3
    products = attention_flops(config) / 3
    again = {
        "none": 0.0, "dots": 0.0, "attention": blocks - products, "full": blocks
    }  # fmt: skip
    return flops_per_token(config) + products / 2 + again[config.compute.remat]


def attention_flops(config: RunConfig) -> float:
    """Of a train step, for a token: what grows with the length of its sequence.

    Of all keys that it sees but one: the formula that MFU uses, at this length and 1.
    """
    share = config.objective.head_share(config.seq_len)
    of_length = config.model.train_flops_per_token
    return of_length(config.seq_len, share) - of_length(1, share)


def hbm_bytes(config: RunConfig, memory: Estimate) -> float:
    """Read and written by a device in a step."""
    passes = 3 if config.compute.remat == "none" else 4
    layers = passes * config.model.layers * memory.layer
    of_part = layers + memory.kept + memory.loss
    of_step = memory.gradients + memory.weights + memory.optimizer
    return 2 * (config.accumulate * (of_part + memory.sums) + of_step)


def sent_bytes(config: RunConfig, mesh: Mesh, memory: Estimate) -> float:
    """Sent by a device in a step."""
    rules, layers = config.compute.rules, config.model.layers
    itemsize = jnp.dtype(config.compute.dtype).itemsize
    cut = [axis for axis in rules.embed if axis in token_axes(rules)]
    ring = math.prod(mesh.shape[axis] for axis in cut)
    copies = math.prod(mesh.shape[axis] for axis in token_axes(rules)) // ring
    # All but a device's own part of each weight comes to it, and goes from it.
    moved = (ring - 1) * memory.weights / F32
    wire = jnp.dtype(config.compute.grad_dtype).itemsize
    gathers = 1 + config.compute.reshard_after_forward
    sent = config.accumulate * moved * (gathers * itemsize + wire)
    sent += 2 * (copies - 1) / copies * memory.weights / F32 * wire
    rows = config.batch // shards(rules, mesh, "batch")
    residual = itemsize * rows * config.seq_len * config.model.embed
    heads, parts = shards(rules, mesh, "act_mlp"), shards(rules, mesh, "seq")
    residual /= parts
    sent += layers * TENSOR_SUMS * residual * 2 * (heads - 1) / heads
    sent += layers * SEQUENCE_TURNS * 2 * residual * kv_share(config) * (parts - 1)
    return sent


def kv_share(config: RunConfig) -> float:
    """The keys' width by that of the model."""
    kv_heads = getattr(config.model, "kv_heads", config.model.heads)
    return kv_heads / config.model.heads
