# SPDX-License-Identifier: Apache-2.0
"""Learning-rate schedules and the optimizer, made of optax parts."""

import math
from dataclasses import dataclass
from typing import Literal

import optax

from lm_scale.errors import InputError


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up from 0, then a decay that ends at the last step."""

    peak: float = 3e-4  # learning rate after the warm-up
    warmup: int = 1000  # steps
    decay: Literal["linear", "cosine", "constant"] = "linear"
    final: float = 0.0  # learning rate at the last step, as a share of the peak

    def __post_init__(self):
        if not (0 < self.peak < math.inf and self.warmup >= 0 and 0 <= self.final <= 1):
            raise InputError(
                f"schedule: expected peak > 0, warmup >= 0 and final between 0 and 1, "
                f"got peak = {self.peak}, warmup = {self.warmup}, final = {self.final}."
            )


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2)."""

    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0  # of the weights declared with decay: not biases, norms
    clip: float | None = None  # largest global gradient norm

    def __post_init__(self):
        betas = (self.beta1, self.beta2)
        if not all(0 <= b < 1 for b in betas) or not self.epsilon > 0:
            raise InputError(
                f"optimizer: expected 0 <= beta < 1 and epsilon > 0, got {betas} and "
                f"{self.epsilon}."
            )
        if not self.weight_decay >= 0 or not (self.clip is None or self.clip > 0):
            raise InputError(
                f"optimizer: expected weight_decay >= 0 and clip > 0 (or None), got "
                f"{self.weight_decay} and {self.clip}."
            )


def make_schedule(config: Schedule, steps: int) -> optax.Schedule:
    """Update number (from 0) -> learning rate; the first is 0 if there is a warm-up.

    Raises InputError if the warm-up does not fit into `steps`.
    """
    if config.warmup >= steps:
        raise InputError(
            f"schedule.warmup = {config.warmup} steps leaves nothing of a run of "
            f"{steps} steps. Shorten the warm-up or train longer."
        )
    after = steps - config.warmup
    decay = {
        "linear": optax.linear_schedule(config.peak, config.peak * config.final, after),
        "cosine": optax.cosine_decay_schedule(config.peak, after, config.final),
        "constant": optax.constant_schedule(config.peak),
    }[config.decay]
    warmup = optax.linear_schedule(0.0, config.peak, config.warmup)
    return optax.join_schedules([warmup, decay], [config.warmup])


def make_optimizer(
    config: AdamW, schedule: optax.Schedule, decay_mask
) -> optax.GradientTransformation:
    """The optimizer; `decay_mask` says for each parameter if it is decayed."""
    clip = optax.identity()
    if config.clip is not None:
        clip = optax.clip_by_global_norm(config.clip)
    return optax.chain(
        clip,
        optax.adamw(
            schedule,
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=decay_mask,
        ),
    )
