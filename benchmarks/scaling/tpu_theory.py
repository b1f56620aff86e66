# SPDX-License-Identifier: Apache-2.0
"""What a step of a Llama should need and send on a device, by arithmetic.

With every layer made again in the backward pass (`remat="full"`), AdamW, f32 weights
and gradients, bf16 activations and gathered weights. README.md explains the terms.
"""

from dataclasses import dataclass

from lm_scale.models import LlamaConfig

F32, BF16 = 4, 2  # bytes
CHUNK = 128  # positions of a sequence whose logits exist at one time


@dataclass(frozen=True)
class Layout:
    """How a preset cuts things; sizes of the mesh axes."""

    preset: str
    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1
    rows: int = 1  # sequences of the devices that share a part of the batch

    @property
    def residual(self) -> int:
        """Parts of a sequence between the sublayers."""
        sequence = self.tensor if self.preset == "fsdp_tp_sp" else 1
        return sequence * self.context


def others(group: int) -> float:
    """The share of a whole array that a device sends in a ring of so many."""
    return (group - 1) / group


def sizes(c: LlamaConfig) -> tuple[int, int]:
    """Weights of the blocks, and of the embedding (the output matrix is as large)."""
    queries, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
    block = c.embed * (2 * queries + 2 * keys + 3 * c.mlp)
    return c.layers * block, c.vocab * c.embed


def memory(c: LlamaConfig, at: Layout, length: int) -> dict[str, float]:
    """Bytes of a device by what they are for."""
    blocks, table = sizes(c)
    weights = blocks + 2 * table
    parts = at.fsdp * at.tensor
    tokens = at.rows * length / at.context
    queries, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
    # What the products of one layer make, and what enters it.
    layer = (2 * queries + 2 * keys + 2 * c.mlp) / at.tensor + 2 * c.embed
    moments = 2 * F32 * weights
    whole = at.preset in ("dp", "zero1")
    return {
        "weights": F32 * weights / parts,
        "AdamW's moments": moments / (at.data if at.preset == "zero1" else parts),
        "gradients": F32 * (weights if whole else (blocks + table) / parts),
        "output matrix, whole": (BF16 + (0 if whole else F32)) * table / at.tensor,
        "one block, whole": BF16 * blocks / c.layers / at.tensor,
        "what enters each layer": BF16 * c.layers * c.embed * at.rows * length
        / at.residual,
        "one layer made again": BF16 * layer * tokens,
        "logits of a chunk and their gradient": 2 * F32 * at.rows * CHUNK * c.vocab
        / at.tensor,
    }  # fmt: skip


def sent(c: LlamaConfig, at: Layout, length: int) -> dict[str, float]:
    """Bytes that a device sends in a step, by what they are."""
    blocks, table = sizes(c)
    if at.preset in ("dp", "zero1"):
        # An all-reduce of the gradients; or a reduce-scatter, and the new weights back.
        weights = 2 * F32 * (blocks + 2 * table) * others(at.data)
        return {"gradients, and weights made new": weights}
    share = others(at.fsdp)
    stream = BF16 * at.rows * length * c.embed / at.context  # of a group, whole
    found = {
        # Each block twice, for the layer is made again; the output matrix once.
        "weights, gathered": BF16 * (2 * blocks + table) / at.tensor * share,
        "gradients, scattered": F32 * (blocks + table) / at.tensor * share,
        # The embedding's columns of all tokens, and back in the backward pass.
        "embedding, dealt out": 2 * stream / at.tensor * share,
    }
    if at.tensor > 1:
        # Two sums a layer forward and two backward, and one when it is made again (the
        # second one's result is not needed); each is an all-reduce, or a scatter and a
        # gather. Besides, those around the embedding and the output.
        sums = 2 * (5 * c.layers + 2) * stream
        found["activations, over tensor"] = sums * others(at.tensor)
    if at.context > 1:
        # Keys and values go round forward, once more as the layer is made again, and
        # backward with their gradients in f32; the blocks' gradients are summed.
        kv = 2 * at.rows * length / at.context * c.kv_heads * c.head_dim
        hops = at.context - 1
        ring = c.layers * kv * (hops * 3 * BF16 + at.context * F32)
        total = 2 * F32 * (blocks + table) / at.fsdp * others(at.context)
        found |= {"keys and values, round": ring, "gradients, over context": total}
    return found
