# SPDX-License-Identifier: Apache-2.0
"""What a config makes a step of: model and optimizer; needs no text, no device.

`train` and `plan` both take it from here, so that what is planned is what will run.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import optax
from jax.sharding import Mesh

from lm_scale.config import RunConfig
from lm_scale.models import Model, build_model
from lm_scale.models.product import check_quantize
from lm_scale.optim import make_optimizer, make_schedule
from lm_scale.sharding import check_divides
from lm_scale.step import (
    Batch,
    Metrics,
    TrainState,
    decay_mask,
    make_train_step,
    matrix_axes,
)


@dataclass(frozen=True)
class Parts:
    """What changes a state."""

    optimizer: optax.GradientTransformation
    step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def declare_model(config: RunConfig, mesh: Mesh) -> Model:
    """The declared model, with the kernels for the mesh's devices; no weights yet.

    Raises InputError if the mesh cannot cut the batch or the weights.
    """
    config.check_mesh(mesh)
    check_quantize(config.compute, mesh.devices.flat[0])
    attention, _ = config.choose_attention(mesh)
    compute = dataclasses.replace(config.compute, attention=attention)
    model = build_model(config.model, compute)
    check_divides(model, config.compute.rules, mesh)
    return model


def make_parts(
    config: RunConfig,
    model: Model,
    steps: int,
    xla_options: Mapping[str, str] | None = None,
) -> Parts:
    """Optimizer and train step of a run of so many steps."""
    schedule = make_schedule(config.schedule, steps)
    optimizer = make_optimizer(
        config.optimizer, schedule, decay_mask(model), matrix_axes(model)
    )
    step = make_train_step(
        model, optimizer, schedule, seed=config.seed,
        accumulate=config.accumulate, skip_bad=config.guard.policy != "off",
        xla_options=xla_options,
    )  # fmt: skip
    return Parts(optimizer, step)


def flops_per_token(config: RunConfig) -> float:
    """Model FLOPs of a train step for a token, as MFU counts them.

    Forward and backward pass, matrix products alone, no recomputation; of attention,
    the keys that a query sees (each family's `train_flops_per_token` says more). Those
    of full rows: that documents of a packed row do not see one another is left out.
    """
    share = config.objective.head_share(config.seq_len)
    return config.model.train_flops_per_token(config.seq_len, share)
