# SPDX-License-Identifier: Apache-2.0
"""Learning-rate schedules and the optimizers, made of optax parts."""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

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
        if not self.weight_decay >= 0:
            raise InputError(
                f"optimizer: expected weight_decay >= 0, got {self.weight_decay}."
            )
        check_clip(self.clip)


@dataclass(frozen=True)
class Adafactor:
    """Adam's second moment as row and column means (Shazeer and Stern 2018).

    The settings are those of `optax.adafactor`: no momentum, no weight decay, and the
    learning rate is relative: a share of each matrix's root mean square.
    """

    clip: float | None = None  # largest global gradient norm

    def __post_init__(self):
        check_clip(self.clip)


Optimizer = AdamW | Adafactor


def check_clip(clip: float | None) -> None:
    """InputError for a gradient norm that nothing can be clipped to."""
    if clip is not None and not clip > 0:
        raise InputError(
            f"optimizer: expected clip > 0, or None for no clipping, got {clip}."
        )


def make_schedule(config: Schedule, steps: int) -> optax.Schedule:
    """Update number (from 0) -> learning rate; the first is 0 if there is a warm-up.

    If the warm-up is not shorter than the run of `steps`, the rate rises along the
    warm-up's line to the end of the run and never reaches its peak.
    """
    after = max(steps - config.warmup, 1)  # a decay not come to has a length too
    decay = {
        "linear": optax.linear_schedule(config.peak, config.peak * config.final, after),
        "cosine": optax.cosine_decay_schedule(config.peak, after, config.final),
        "constant": optax.constant_schedule(config.peak),
    }[config.decay]
    warmup = optax.linear_schedule(0.0, config.peak, config.warmup)
    return optax.join_schedules([warmup, decay], [config.warmup])


@dataclass(frozen=True)
class MatrixAxes:
    """Which axes of a weight are the rows of a matrix, and which its columns.

    The other axes number the matrices: layers; query, key and value. A vector's axes
    are all columns.
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]


def make_optimizer(
    config: Optimizer,
    schedule: optax.Schedule,
    decay_mask: Any,
    matrix_axes: Any = None,
) -> optax.GradientTransformation:
    """The optimizer; its state is sharded as the parameters are.

    AdamW asks `decay_mask` for each parameter if it is decayed, Adafactor asks
    `matrix_axes` which matrices it holds (a `MatrixAxes`); AdamW needs none.
    """
    clip = optax.identity()
    if config.clip is not None:
        clip = optax.clip_by_global_norm(config.clip)
    if isinstance(config, Adafactor):
        rule = optax.chain(
            scale_by_adafactor(matrix_axes), optax.scale_by_learning_rate(schedule)
        )
    else:
        rule = optax.adamw(
            schedule,
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=decay_mask,
        )
    return optax.chain(clip, rule)


# --- Adafactor ------------------------------------------------------------------------

# Of `optax.adafactor`.
SMALLEST_FACTORED = 128  # rows and columns; below it every entry has its own mean
DECAY = 0.8  # the running means forget: at update t they keep 1 - t ** -DECAY
LARGEST_UPDATE = 1.0  # of a matrix: root mean square, before the weights' as a factor
SMALLEST_WEIGHT = 1e-3  # so large at least is that factor, for weights that start at 0
EPSILON = 1e-30  # added to squared gradients


class AdafactorState(NamedTuple):
    """Running means of squared gradients; the axes that are averaged have size 1."""

    count: Int[Array, ""]  # updates made
    rows: optax.Params  # of each row
    columns: optax.Params  # of each column


def scale_by_adafactor(matrix_axes: Any) -> optax.GradientTransformation:
    """`optax.adafactor` without learning rate and sign, matrix by matrix.

    optax takes each array for one tensor, factored along its two largest axes. Our
    weights hold several matrices, with rows or columns split over axes (heads, head
    width), so that the means are taken over `MatrixAxes` here. Nothing is reshaped:
    the weights may be sharded along any axis. Algorithms 4 and 5 of the paper.
    """

    def init(params) -> AdafactorState:
        axes = jax.tree.map(factored_axes, params, matrix_axes)
        zero = jax.tree.map(jnp.zeros_like, params)
        rows = jax.tree.map(lambda x, a: mean(x, a.columns), zero, axes)
        columns = jax.tree.map(lambda x, a: mean(x, a.rows), zero, axes)
        return AdafactorState(jnp.zeros((), jnp.int32), rows, columns)

    def update(updates, state, params=None):
        axes = jax.tree.map(factored_axes, updates, matrix_axes)
        count = cast(Array, optax.safe_increment(state.count))
        keep = 1.0 - count.astype(jnp.float32) ** -DECAY

        def running(former, squares, over):
            return keep * former + (1.0 - keep) * mean(squares, over)

        def scaled(gradient, rows, columns, param, axes):
            both = axes.rows + axes.columns
            # The second moment's estimate is rows * columns / mean(rows).
            step = gradient * (rows / mean(rows, axes.rows)) ** -0.5 * columns**-0.5
            step /= jnp.maximum(root_mean_square(step, both) / LARGEST_UPDATE, 1.0)
            return step * jnp.maximum(root_mean_square(param, both), SMALLEST_WEIGHT)

        squares = jax.tree.map(lambda g: jnp.square(g) + EPSILON, updates)
        rows = jax.tree.map(
            lambda m, x, a: running(m, x, a.columns), state.rows, squares, axes
        )
        columns = jax.tree.map(
            lambda m, x, a: running(m, x, a.rows), state.columns, squares, axes
        )
        updates = jax.tree.map(scaled, updates, rows, columns, params, axes)
        return updates, AdafactorState(count, rows, columns)

    return optax.GradientTransformation(init, update)


def factored_axes(weight: Array, axes: MatrixAxes) -> MatrixAxes:
    """`axes`, or those of no factoring: every entry is a row of one column.

    Its row mean is then its own, and the one column's mean is that of the rows, by
    which they are divided: the estimate is the entry's own mean square.
    """
    sizes = [
        math.prod(weight.shape[i] for i in side) for side in (axes.rows, axes.columns)
    ]
    if min(sizes) >= SMALLEST_FACTORED:
        return axes
    return MatrixAxes(rows=axes.rows + axes.columns, columns=())


def mean(x: Array, axes: tuple[int, ...]) -> Array:
    """The mean over `axes`, which stay with size 1."""
    return jnp.mean(x, axes, keepdims=True)


def root_mean_square(x: Array, axes: tuple[int, ...]) -> Array:
    """The same of the squares, and its root."""
    return jnp.sqrt(mean(jnp.square(x), axes))
