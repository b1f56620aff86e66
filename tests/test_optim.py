# SPDX-License-Identifier: Apache-2.0
"""Schedules at their edges, and AdamW against a plain float64 numpy reference."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm_scale.errors import InputError
from lm_scale.optim import AdamW, Schedule, make_optimizer, make_schedule

STEPS, WARMUP, PEAK = 30, 6, 2e-3


def rates(steps=STEPS, **fields):
    settings = {"peak": PEAK, "warmup": WARMUP, **fields}
    schedule = make_schedule(Schedule(**settings), steps)
    return np.array([float(schedule(step)) for step in range(steps + 1)])


# --- Schedules ------------------------------------------------------------------------


@pytest.mark.parametrize("decay", ["linear", "cosine", "constant"])
def test_warm_up_rises_from_zero_to_the_peak(decay):
    expected = PEAK * np.arange(WARMUP + 1) / WARMUP
    found = rates(decay=decay)[: WARMUP + 1]
    assert found[0] == 0.0
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("final", [0.0, 0.25])
def test_linear_decay_is_a_straight_line(final):
    share = np.arange(STEPS - WARMUP + 1) / (STEPS - WARMUP)
    expected = PEAK * (1 - share * (1 - final))
    found = rates(decay="linear", final=final)
    np.testing.assert_allclose(found[WARMUP:], expected, rtol=1e-5, atol=1e-10)
    assert found[STEPS] == pytest.approx(PEAK * final, abs=1e-10)


@pytest.mark.parametrize("final", [0.0, 0.1])
def test_cosine_decay_is_half_a_wave(final):
    share = np.arange(STEPS - WARMUP + 1) / (STEPS - WARMUP)
    wave = (1 + np.cos(np.pi * share)) / 2
    expected = PEAK * (final + (1 - final) * wave)
    found = rates(decay="cosine", final=final)
    np.testing.assert_allclose(found[WARMUP:], expected, rtol=1e-5, atol=1e-9)


def test_constant_stays_at_the_peak():
    np.testing.assert_allclose(rates(decay="constant")[WARMUP:], PEAK, rtol=1e-6)


@pytest.mark.parametrize("decay", ["linear", "cosine", "constant"])
def test_without_warm_up_the_first_update_has_the_peak(decay):
    found = rates(decay=decay, warmup=0)
    assert found[0] == pytest.approx(PEAK)
    assert (found[1:] < PEAK).all() or decay == "constant"


def test_warm_up_of_one_step():
    assert rates(warmup=1)[:2] == pytest.approx([0.0, PEAK])


@pytest.mark.parametrize("warmup", [STEPS, STEPS + 1])
def test_a_warm_up_as_long_as_the_run_is_refused(warmup):
    with pytest.raises(InputError, match=rf"{warmup} steps .* a run of {STEPS} steps"):
        make_schedule(Schedule(warmup=warmup), STEPS)
    make_schedule(Schedule(warmup=STEPS - 1), STEPS)


@pytest.mark.parametrize(
    "fields", [{"peak": 0.0}, {"peak": -1.0}, {"warmup": -1}, {"final": 1.5}]
)
def test_senseless_schedules_are_refused(fields):
    name, value = next(iter(fields.items()))
    with pytest.raises(InputError, match=f"{name} = {value}"):
        Schedule(**fields)


# --- AdamW ----------------------------------------------------------------------------


def adamw_reference(params, gradients, rate, *, b1, b2, eps, decay, clip, decayed):
    """Loshchilov and Hutter 2019, algorithm 2, with clipping by the global norm."""
    params = {name: x.astype(np.float64) for name, x in params.items()}
    first = {name: np.zeros_like(x) for name, x in params.items()}
    second = {name: np.zeros_like(x) for name, x in params.items()}
    for t, gradient in enumerate(gradients, start=1):
        gradient = {name: g.astype(np.float64) for name, g in gradient.items()}
        norm = np.sqrt(sum(np.sum(g**2) for g in gradient.values()))
        scale = 1.0 if clip is None else min(1.0, clip / norm)
        for name, g in gradient.items():
            g = g * scale
            first[name] = b1 * first[name] + (1 - b1) * g
            second[name] = b2 * second[name] + (1 - b2) * g**2
            m, v = first[name] / (1 - b1**t), second[name] / (1 - b2**t)
            step = m / (np.sqrt(v) + eps)
            if decayed[name]:
                step = step + decay * params[name]
            params[name] = params[name] - rate[t - 1] * step
    return params


DECAYED = {"matrix": True, "bias": False}


def problem(steps=5):
    """Parameters and gradients whose size differs from step to step."""
    rng = np.random.default_rng(3)
    shapes = {"matrix": (3, 5), "bias": (5,)}

    def draw(scale):
        return {
            name: rng.normal(0, scale, shape).astype(np.float32)
            for name, shape in shapes.items()
        }

    return draw(1.0), [draw(scale) for scale in np.linspace(0.1, 2.0, steps)]


def updated(config, schedule, params, gradients):
    optimizer = make_optimizer(config, schedule, DECAYED)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return jax.tree.map(np.asarray, params)


@pytest.mark.parametrize("clip", [None, 1.0])
def test_adamw_is_the_algorithm_of_the_paper(clip):
    config = AdamW(beta1=0.8, beta2=0.95, epsilon=1e-6, weight_decay=0.3, clip=clip)
    settings = Schedule(peak=0.1, warmup=2, decay="linear")
    rate = rates(5, peak=0.1, warmup=2)[:5]
    params, gradients = problem()
    start = jax.tree.map(jnp.asarray, params)
    found = updated(config, make_schedule(settings, 5), start, gradients)
    expected = adamw_reference(
        params, gradients, rate, b1=0.8, b2=0.95, eps=1e-6, decay=0.3, clip=clip,
        decayed=DECAYED,
    )  # fmt: skip
    for name in params:
        # f32 against f64 on numbers near 1: a few units of 1.2e-7 in five steps.
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-6, atol=2e-6)


def test_clipping_takes_the_norm_of_all_weights_together():
    """Without Adam's scale invariance: the size of the first moment tells."""
    config = AdamW(clip=1.0)
    optimizer = make_optimizer(config, lambda step: 1.0, DECAYED)
    params = {"matrix": jnp.zeros((3, 5)), "bias": jnp.zeros(5)}
    gradient = {"matrix": jnp.full((3, 5), 2.0), "bias": jnp.full(5, -2.0)}  # norm² 80
    _, state = optimizer.update(gradient, optimizer.init(params), params)
    moment = optax.tree_utils.tree_get(state, "mu")
    clipped = (1 - config.beta1) * 2.0 / np.sqrt(80)
    np.testing.assert_allclose(moment["matrix"], clipped, rtol=1e-6)
    np.testing.assert_allclose(moment["bias"], -clipped, rtol=1e-6)
    small = jax.tree.map(lambda g: g / 100, gradient)  # norm 0.09: left as it is
    _, state = optimizer.update(small, optimizer.init(params), params)
    moment = optax.tree_utils.tree_get(state, "mu")
    np.testing.assert_allclose(moment["bias"], -(1 - config.beta1) * 0.02, rtol=1e-6)


def test_no_decay_by_default():
    params, _ = problem()
    start = jax.tree.map(jnp.asarray, params)
    nothing = [jax.tree.map(jnp.zeros_like, start)] * 2
    found = updated(AdamW(), lambda step: 0.1, start, nothing)
    for name in params:
        np.testing.assert_array_equal(found[name], params[name])
