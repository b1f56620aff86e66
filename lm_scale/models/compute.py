# SPDX-License-Identifier: Apache-2.0
"""How a model is computed: number types, what is recomputed, kernels, rules."""

from dataclasses import dataclass
from typing import Literal

from lm_scale.errors import InputError
from lm_scale.sharding import Rules


@dataclass(frozen=True)
class Compute:
    """How a model is computed; what it computes, but for rounding, is in its config."""

    # Of matrix products and activations; weights, optimizer, softmax, norm statistics
    # and the loss are float32 in either case. TPUs round float32 factors of a product
    # to bfloat16, unless `jax_default_matmul_precision` says otherwise.
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    # Products of activations with the blocks' weights, and those of their gradients, in
    # 8 bits (qwix), where a device multiplies these faster; of those that were compiled
    # for, it shortens a step of TPU v5p alone (benchmarks/step). Weights stay float32,
    # and a trained run is opened (eval, generate, export) without it.
    quantize: Literal["int8", "float8"] | None = None
    # What the backward pass computes again: nothing; all but the outputs of matrix
    # products (and not of splash, cudnn or ring); all but those of attention; or all
    # inside a block.
    remat: Literal["none", "dots", "attention", "full"] = "dots"
    offload: bool = False  # what `remat` keeps waits in the host's memory (not on CPUs)
    # Weights of a layer that FSDP has cut are gathered for the forward pass, and again
    # for the backward pass; False: they are kept, whole, in the compute type, and the
    # embedding takes its rows from the table that is whole for the head, if it's tied.
    reshard_after_forward: bool = True
    # Layers that are compiled as one turn of the loop over layers; divides these.
    unroll: int = 1
    # Of gradients while they are summed over devices.
    grad_dtype: Literal["float32", "bfloat16"] = "float32"
    # What computes attention; auto: the best for the devices (see models/kernels.py).
    attention: Literal["auto", "xla", "splash", "vmem", "cudnn", "ring"] = "auto"
    # Positions of a sequence whose logits exist at one time; None: so many that those
    # of 2048 tokens do on a device (of 256 on a CPU).
    loss_chunk: int | None = None
    rules: Rules = Rules()

    def __post_init__(self):
        for name in ("loss_chunk", "unroll"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(
                    f"compute.{name} = {value}: expected a number above 0."
                )
        if self.offload and self.remat not in ("dots", "attention"):
            raise InputError(
                f"compute.offload needs compute.remat = dots or attention, whose "
                f"outputs are kept; with {self.remat} there is nothing to offload."
            )
