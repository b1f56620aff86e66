# SPDX-License-Identifier: Apache-2.0
"""The activations that a remat policy keeps of all layers, found by tracing alone.

The forward pass is traced together with its `vjp`: what comes out of the loop over
layers besides the hidden states is what the backward pass will find, with its type and
sharding, whatever the family, the kernel of attention and the policy.
"""

import dataclasses
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from lm_scale.assemble import declare_model
from lm_scale.config import RunConfig
from lm_scale.models.layout import shared
from lm_scale.planning.compile_step import abstract_batch
from lm_scale.planning.libtpu import quiet
from lm_scale.sharding import Params, abstract_params
from lm_scale.step import Batch, apply


@dataclass(frozen=True)
class Stack:
    """What is kept of one value of each layer, all layers together."""

    shape: tuple[int, ...]  # of all devices
    itemsize: int  # bytes
    axes: tuple[tuple[str, ...], ...]  # mesh axes that cut each dimension

    def bytes_on(self, sizes: Mapping[str, int]) -> int:
        """Bytes of a device, on a mesh whose axes have these sizes."""
        parts = [math.prod(sizes[axis] for axis in axes) for axes in self.axes]
        shard = [-(-n // p) for n, p in zip(self.shape, parts, strict=True)]
        return math.prod(shard) * self.itemsize


def trace_stacks(config: RunConfig, mesh: Mesh, remat: str) -> tuple[Stack, ...]:
    """What the policy keeps of a whole batch; on the host too, if it is offloaded.

    The same for other meshes of these rules, if they have the same kernel of attention.
    """
    compute = dataclasses.replace(
        config.compute, remat=typing.cast(Any, remat), offload=False,
        reshard_after_forward=True,  # no weights among them
    )  # fmt: skip
    model = declare_model(dataclasses.replace(config, compute=compute), mesh)
    graphdef, rules = nnx.split(model)[0], compute.rules

    def forward(params: Params, batch: Batch):
        def hidden(params: Params):
            params = jax.tree.map(lambda x: shared(x, rules), params)
            return apply(graphdef, params, batch, jax.random.key(0))[0]

        return jax.vjp(hidden, params)

    with jax.set_mesh(mesh), quiet():
        params = abstract_params(model, rules, mesh)
        traced = jax.make_jaxpr(forward)(params, abstract_batch(config, mesh))
    made_by = {
        out: equation.primitive.name
        for equation in traced.jaxpr.eqns
        for out in equation.outvars
    }
    avals: list[Any] = [
        out.aval
        for out in traced.jaxpr.outvars
        if made_by.get(typing.cast(Any, out)) == "scan"
    ]
    return tuple(
        Stack(aval.shape, aval.dtype.itemsize, _cuts(aval.sharding.spec.partitions))
        for aval in avals
    )


def _cuts(partitions: Any) -> tuple[tuple[str, ...], ...]:
    parts = [part or () for part in partitions]
    return tuple((part,) if isinstance(part, str) else tuple(part) for part in parts)
