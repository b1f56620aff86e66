# SPDX-License-Identifier: Apache-2.0
"""Attention in blocks: its gradients are those of its own forward pass, and its blocks
hold every pair that is seen. (Its values: tests/test_attention.py.)"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import one_device
from test_attention import B, placed

from lm_scale.models import blockwise
from lm_scale.models.attention import Mask, attention
from lm_scale.models.blockwise import Blocks
from lm_scale.sharding import Rules

RULES = Rules()
T, K, J, N = 11, 2, 2, 5


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    monkeypatch.setattr(blockwise, "LEAST", 2)  # so 11 queries are cut in four


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    shapes = (B, T, K, J, N), (B, T, K, N), (B, T, K, N), (B, T, K, J, N)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def seen_by(causal, window, segments) -> np.ndarray | None:
    """bool [B 1 1 T T]."""
    back = np.arange(T)[:, None] - np.arange(T)
    seen = np.ones((B, T, T), bool)
    if causal:
        seen &= back >= 0
    if window is not None:
        seen &= abs(back) < window
    if segments:
        rows = np.array([[1] * 4 + [2] * 5 + [0] * 2, [1] * 11])
        seen &= rows[:, :, None] == rows[:, None, :]
    return None if seen.all() else seen[:, None, None]


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize(
    ("causal", "window", "segments"),
    [
        (False, None, False), (True, None, False), (True, 3, False), (False, 3, False),
        (False, None, True), (True, None, True),
    ],
)  # fmt: skip
def test_gradients_are_those_of_the_forward_pass(causal, window, segments, rate):
    q, k, v, weights = inputs()
    seen = seen_by(causal, window, segments)
    blocks, key = Blocks(causal, window, rate), jax.random.key(1)

    def total(attend, q, k, v):
        return jnp.sum(weights * attend(blocks, q, k, v, seen, key))

    def plain(*given):
        return blockwise._forward(*given)[0]

    gradients = [
        jax.jit(jax.value_and_grad(partial(total, attend), argnums=(0, 1, 2)))(q, k, v)
        for attend in (blockwise.attend, plain)
    ]
    for found, expected in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_a_query_that_sees_nothing_moves_nothing(causal):
    q, k, v, weights = inputs()
    seen = np.tril(np.ones((T, T), bool))[None, None, None].repeat(B, 0)
    seen[0, :, :, 6] = False

    def total(q, k, v):
        out = blockwise.attend(Blocks(causal, None, 0.0), q, k, v, seen, None)
        return jnp.sum((weights * out)[0, 6])

    gradients = jax.grad(total, argnums=(0, 1, 2))(q, k, v)
    assert not any(np.any(one) for one in gradients)


@pytest.mark.parametrize("window", [None, 1, 3, 20])
@pytest.mark.parametrize("length", [1, 2, 7, 11, 64])
@pytest.mark.parametrize("backward", [False, True])
def test_blocks_hold_every_pair_that_is_seen_once(length, window, backward):
    covered = np.zeros((length, length), int)
    blocks = Blocks(True, window, 0.0)
    if backward:
        spans = [(t, s) for s, t in blocks.spans_of_keys(length)]
    else:
        spans = list(blocks.spans(length))
    for queries, keys in spans:
        covered[queries, keys] += 1
    back = np.arange(length)[:, None] - np.arange(length)
    assert covered.max() == 1
    assert covered[(back >= 0) & (back < (window or length))].all()
    if length == 64:
        assert covered.sum() <= 64 * 64 * 10 / 16


def test_in_four_blocks_as_in_one(monkeypatch):
    """With several heads for a key-value head, of `attention` itself."""
    rng = np.random.default_rng(3)
    q, k, v = (rng.standard_normal((B, T, h, N)).astype("f") for h in (4, 2, 2))
    attend = partial(attention, mask=Mask(causal=True), rules=RULES)
    with jax.set_mesh(one_device()):
        blocks = jax.jit(attend)(*placed(q, k, v))
        monkeypatch.setattr(blockwise, "LEAST", 64)
        whole = jax.jit(lambda *x: attend(*x))(*placed(q, k, v))
    np.testing.assert_allclose(blocks, whole, rtol=1e-5, atol=1e-6)
