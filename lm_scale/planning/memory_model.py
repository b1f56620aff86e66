# SPDX-License-Identifier: Apache-2.0
"""What a device will hold in a step, reckoned without compiling it.

    peak = weights + optimizer state + batch      what the step is given, exactly
         + sums of gradients, if accumulate > 1
         + kept                                   activations, by the remat policy
         + the larger of   loss                   logits of a chunk, the head
                           gradients + layer      a layer's weights and activations

What the step is given is `step.abstract_state` and the batch, by the shards of their
shardings. Gradients are f32, cut as the weights are stored. What is kept is traced, see
activations.py; of a part of the batch it is 1/accumulate. While a layer's backward pass
computes it again, it needs what remat = "none" would keep of one layer. FSDP gathers a
layer's matrices in the compute type, the next layer's beside them (all layers' are kept
without `reshard_after_forward`), and makes gradients
in f32 before they are scattered (`models.layout.gather`); the weights outside of the
blocks are gathered in f32 (`step.gather_head`) and cast. Logits are f32 and there are
two of them: they and their gradient (`losses.training_loss`). So are the scores of
attention, where no kernel does without (`models.blockwise`).

Left out: the padding of tiles, what XLA keeps longer than it has to, and what it never
writes down. Against the compiler (libtpu 0.0.42, 0.0.50): of the peaks of llama_160m
(v3-8), llama_1b (v5e-16), llama3_8b (v5p-64) and llama3_70b (v5p-512), all with remat =
"dots", the estimate is 0.99, 1.04, 1.04 and 0.99. Of steps of a tiny model (v3-8,
v5e-4) it was 0.96 to 1.16 with "none", and up to 1.73 with "full", where XLA needed
half of what is reckoned for a layer; and 0.37 where rows are so few that tiles are
mostly padding. So LOW is what it needs at least of all but what the step is given. That
is exact; there is no upper bound.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from lm_scale.assemble import declare_model, make_parts
from lm_scale.config import RunConfig
from lm_scale.losses import positions_at_once
from lm_scale.models import Model, family_of
from lm_scale.models.blockwise import Blocks
from lm_scale.models.layout import token_axes
from lm_scale.planning.activations import Stack, trace_stacks
from lm_scale.planning.compile_step import STEPS, abstract_batch, shard_bytes
from lm_scale.sharding import LOGICAL_AXES, declarations, shards
from lm_scale.step import abstract_state

LOW = 0.5  # what XLA needs at least of what is reckoned
F32 = 4
# The logical axes of activations: rules that differ in others keep the same.
OF_ACTIVATIONS = tuple(
    axis
    for axis in LOGICAL_AXES
    if axis in ("batch", "seq", "residual_seq") or axis.startswith("act_")
)


@dataclass(frozen=True)
class Estimate:
    """Bytes of a device."""

    weights: int
    optimizer: int
    batch: int
    gradients: int
    sums: int  # of gradients, over the parts of a batch
    kept: int  # for the backward pass, of all layers
    layer: int  # what one layer needs besides, while it is computed again
    loss: int  # what the loss needs besides

    @property
    def peak(self) -> int:
        """All that there is at the worst moment of a step."""
        worst = max(self.loss, self.gradients + self.layer)
        return self.given + self.sums + self.kept + worst

    @property
    def given(self) -> int:
        """What the step is given."""
        return self.weights + self.optimizer + self.batch

    @property
    def least(self) -> float:
        """What it surely needs, wrong as the estimate may be."""
        return self.given + LOW * (self.peak - self.given)


@dataclass(frozen=True)
class InUse:
    """A device's weights where they are used: cut by no axis that cuts tokens."""

    layer: int  # numbers of one block
    head: int  # numbers outside of the blocks
    gathered: bool  # if some of them come from other devices


@dataclass(frozen=True)
class Layout:
    """What all variants share that are cut alike; bytes and numbers of a device."""

    kernel: str  # of attention
    weights: int
    optimizer: int
    batch: int
    used: InUse


@dataclass
class MemoryModel:
    """Estimates for the variants of one config; remembers what they have in common."""

    layouts: dict[Any, Layout] = field(default_factory=dict)
    traces: dict[Any, tuple[Stack, ...]] = field(default_factory=dict)

    def estimate(self, config: RunConfig, mesh: Mesh) -> Estimate:
        """Bytes of a device; InputError if the mesh cannot cut batch or weights."""
        layout = self.layout(config, mesh)
        kept = self.kept(config, mesh, layout.kernel, config.compute.remat)
        again = self.kept(config, mesh, layout.kernel, "none") // config.model.layers
        itemsize = jnp.dtype(config.compute.dtype).itemsize
        layer, head = itemsize * layout.used.layer, itemsize * layout.used.head
        if layout.used.gathered:
            # The next layer's as well, and gradients; of the head these.
            layer += (itemsize + F32) * layout.used.layer
            head += 2 * F32 * layout.used.head
        kept = 0 if config.compute.offload else kept
        if not config.compute.reshard_after_forward:
            kept += config.model.layers * itemsize * layout.used.layer
        return Estimate(
            weights=layout.weights,
            optimizer=layout.optimizer,
            batch=layout.batch,
            gradients=layout.weights,
            sums=layout.weights if config.accumulate > 1 else 0,
            kept=kept,
            layer=layer + again + score_bytes(config, mesh, layout.kernel),
            loss=head + 2 * logits_bytes(config, mesh),
        )

    def layout(self, config: RunConfig, mesh: Mesh) -> Layout:
        """That of the config's rules on the mesh; InputError if they cannot cut it."""
        key = config.compute.rules, mesh
        if key not in self.layouts:
            model = declare_model(config, mesh)
            parts = make_parts(config, model, config.steps or STEPS)
            state = abstract_state(model, parts.optimizer, mesh)
            self.layouts[key] = Layout(
                model.compute.attention,
                shard_bytes(state.params),
                shard_bytes(state.opt_state),
                shard_bytes(abstract_batch(config, mesh)),
                weights_in_use(model, mesh),
            )
        return self.layouts[key]

    def kept(self, config: RunConfig, mesh: Mesh, kernel: str, remat: str) -> int:
        """Of what a remat policy keeps of all layers, for one part of a batch."""
        rules = config.compute.rules
        cuts = tuple(getattr(rules, axis) for axis in OF_ACTIVATIONS)
        key = cuts, kernel, remat
        if key not in self.traces:
            self.traces[key] = trace_stacks(config, mesh, remat)
        sizes = dict(mesh.shape)
        every = sum(one.bytes_on(sizes) for one in self.traces[key])
        return every // config.accumulate


def weights_in_use(model: Model, mesh: Mesh) -> InUse:
    """What the weights take where they are used, and if they have to be gathered."""
    rules = model.compute.rules
    tokens = token_axes(rules)
    blocks = head = 0
    gathered = False
    for path, weight in declarations(model).items():
        named = [axis for axis in weight.get_metadata("axes") if axis]
        cuts = [cut for axis in named for cut in getattr(rules, axis)]
        parts = math.prod(mesh.shape[cut] for cut in cuts if cut not in tokens)
        gathered |= any(mesh.shape[cut] > 1 for cut in cuts if cut in tokens)
        numbers = math.prod(weight.get_value().shape) // parts
        if path.startswith("blocks."):
            blocks += numbers
        else:
            head += numbers
    return InUse(blocks // model.config.layers, head, gathered)


def score_bytes(config: RunConfig, mesh: Mesh, kernel: str) -> int:
    """Bytes of a device's scores of attention and their gradients in plain XLA, f32.

    Those of the largest block of queries; a kernel has none.
    """
    if kernel != "xla":
        return 0
    rules, length = config.compute.rules, config.seq_len
    rows = config.batch // config.accumulate // shards(rules, mesh, "batch")
    heads = -(-config.model.heads // shards(rules, mesh, "act_heads"))
    parts = shards(rules, mesh, "seq")
    causal = family_of(config.model).causal and parts == 1
    spans = Blocks(causal, None, 0.0).spans(length)
    pairs = max((t.stop - t.start) * (s.stop - s.start) for t, s in spans)
    return 2 * F32 * rows * heads * pairs // parts


def logits_bytes(config: RunConfig, mesh: Mesh) -> int:
    """Bytes of a device's logits of one chunk of the loss, in f32."""
    rules = config.compute.rules
    rows = config.batch // config.accumulate // shards(rules, mesh, "batch")
    places = math.ceil(config.seq_len * config.objective.head_share(config.seq_len))
    parts = shards(rules, mesh, "seq")
    chunk = config.compute.loss_chunk or positions_at_once(rows, parts)
    vocab = -(-config.model.vocab // shards(rules, mesh, "act_vocab"))
    return F32 * rows * -(-min(chunk, places) // parts) * vocab
