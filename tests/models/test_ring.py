# SPDX-License-Identifier: Apache-2.0
"""Ring attention: the numbers of a plain softmax, half its work, and what it sends."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm_scale.models.ring import ring_attention, zigzag_order
from lm_scale.sharding import MeshShape, Rules, make_mesh

RULES = Rules()
CUBE = MeshShape(data=2, context=2, tensor=2)
FEW_KV_HEADS = Rules(kv_heads=(), act_kv_heads=())  # kept whole on every device


@dataclass(frozen=True)
class Case:
    mesh: MeshShape
    length: int
    causal: bool
    window: int | None = None
    segmented: bool = True
    kv_heads: int = 2
    rules: Rules = RULES


# Four heads of queries. Chunks of 3 and of 7 positions; documents start anywhere.
CASES = {
    "causal": Case(MeshShape(data=1, context=8), 48, True),
    "causal, one document": Case(CUBE, 28, True, segmented=False, kv_heads=4),
    "window": Case(CUBE, 28, True, window=9),
    "fewer kv heads than parts": Case(
        MeshShape(data=1, context=2, tensor=4), 12, True, rules=FEW_KV_HEADS
    ),
    "bidirectional": Case(MeshShape(data=1, context=8), 24, False),
    "bidirectional window": Case(CUBE, 14, False, window=4),
}


def documents(length):
    """Two rows of segments: many short documents, and one long with a short one."""
    short = np.repeat(np.arange(length), np.resize([1, 5, 2, 4], length))[:length]
    return np.stack([short, np.arange(length) >= length - 3]).astype(np.int32)


def reference(q, k, v, segments, case):
    """In the rows' own order, from the definition."""
    positions = np.arange(case.length)
    back = positions[:, None] - positions[None, :]
    seen = np.ones((2, case.length, case.length), bool)
    if case.causal:
        seen &= back >= 0
    if case.window is not None:
        seen &= np.abs(back) < case.window
    if segments is not None:
        seen &= segments[:, :, None] == segments[:, None, :]
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("bthn,bshn->bhts", q, k) / np.sqrt(q.shape[3])
    probs = jax.nn.softmax(jnp.where(seen[:, None], scores, -1e30), axis=-1)
    return jnp.einsum("bhts,bshn->bthn", probs, v)


def with_gradients(attend):
    """attend -> (what it gives, gradients of q, k and v), for a given cotangent."""

    def run(q, k, v, d_mixed, *places):
        mixed, pull = jax.vjp(lambda *qkv: attend(*qkv, *places), q, k, v)
        return mixed, *pull(d_mixed)

    return run


def order_of(case):
    """Zigzag if it must be, else any."""
    parts = case.mesh.context
    if case.causal:
        return zigzag_order(case.length, parts)
    return np.random.default_rng(1).permutation(case.length)


def arrays(case, dtype=np.float32):
    """q, k, v, the output's cotangent and segments, in the rows' own order."""
    rng = np.random.default_rng(0)
    heads = [4, case.kv_heads, case.kv_heads, 4]
    made = [rng.standard_normal((2, case.length, h, 5)).astype(dtype) for h in heads]
    return made, documents(case.length) if case.segmented else None


def ours(case, made, segments):
    """Laid out, sharded, attended to, and put back."""
    order, rules = order_of(case), case.rules
    attend = partial(
        ring_attention, causal=case.causal, window=case.window, rules=rules
    )

    @jax.jit
    @with_gradients
    def run(q, k, v, segments, positions):
        return attend(q, k, v, segments=segments, positions=positions)

    with jax.set_mesh(make_mesh(case.mesh)):
        heads = rules.spec("batch", "seq", "act_heads", None)
        kv_heads = rules.spec("batch", "seq", "act_kv_heads", None)
        specs = (heads, kv_heads, kv_heads, heads)
        put = lambda x, spec: jax.device_put(x[:, order], spec)  # noqa: E731
        placed = [put(x, spec) for x, spec in zip(made, specs, strict=True)]
        if segments is not None:
            segments = put(segments, rules.spec("batch", "seq"))
        needed = case.window is not None and not case.causal
        results = run(*placed, segments, jnp.asarray(order) if needed else None)
    return [np.asarray(x)[:, np.argsort(order)] for x in results]


@pytest.mark.parametrize("name", CASES)
def test_the_numbers_of_a_plain_softmax(name):
    """All in f32: what differs is the order of sums, of at most 48 terms."""
    case = CASES[name]
    made, segments = arrays(case)
    plain = with_gradients(partial(reference, segments=segments, case=case))
    mixed, *gradients = ours(case, made, segments)
    expected, *expected_gradients = plain(*made)
    np.testing.assert_allclose(mixed, expected, rtol=0, atol=5e-6)
    for found, gradient in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(found, gradient, rtol=0, atol=2e-5)
