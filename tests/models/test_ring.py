# SPDX-License-Identifier: Apache-2.0
"""Ring attention: the numbers of a plain softmax, half its work, and what it sends."""

import math
import re
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding

from lm_scale.models.ring import ring_attention, zigzag_order
from lm_scale.sharding import MeshShape, Rules, make_mesh

RULES = Rules()
TOLERANCES = [5e-6, 2e-5, 2e-5, 2e-5]  # of the output, and gradients of q, k and v
CUBE = MeshShape(data=2, context=2, tensor=2)


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
    "causal window": Case(CUBE, 28, True, window=9),
    "fewer kv heads than parts": Case(
        MeshShape(data=1, context=2, tensor=4), 12, True, segmented=False,
        rules=Rules(kv_heads=(), act_kv_heads=()),
    ),
    "bidirectional": Case(MeshShape(data=1, context=8), 24, False, kv_heads=4),
    "bidirectional window": Case(CUBE, 14, False, window=4, segmented=False),
}  # fmt: skip


def documents(length):
    """Two rows of segments: many short documents, and one long with a short one."""
    short = np.repeat(np.arange(length), np.resize([1, 5, 2, 4], length))[:length]
    return np.stack([short, np.arange(length) >= length - 3]).astype(np.int32)


def reference(q, k, v, d_mixed, segments, case):
    """From the definition, in f64 and in the rows' own order; with the gradients."""
    back = np.subtract.outer(np.arange(case.length), np.arange(case.length))
    seen = np.ones((2, case.length, case.length), bool)
    if case.causal:
        seen &= back >= 0
    if case.window is not None:
        seen &= np.abs(back) < case.window
    if segments is not None:
        seen &= segments[:, :, None] == segments[:, None, :]
    q, k, v, d_mixed = (x.astype(np.float64) for x in (q, k, v, d_mixed))
    sharing = q.shape[2] // k.shape[2]  # so many heads of queries share a key
    k, v = (np.repeat(x, sharing, axis=2) for x in (k, v))
    scale = q.shape[3] ** -0.5
    weights = np.exp(scale * np.einsum("bthn,bshn->bhts", q, k)) * seen[:, None]
    probs = weights / weights.sum(axis=-1, keepdims=True)
    d_probs = np.einsum("bthn,bshn->bhts", d_mixed, v)
    d_scores = probs * (d_probs - (probs * d_probs).sum(axis=-1, keepdims=True)) * scale
    of_all_heads = lambda x: x.reshape(2, case.length, -1, sharing, 5).sum(3)  # noqa: E731
    return (
        np.einsum("bhts,bshn->bthn", probs, v),
        np.einsum("bhts,bshn->bthn", d_scores, k),
        of_all_heads(np.einsum("bhts,bthn->bshn", d_scores, q)),
        of_all_heads(np.einsum("bhts,bthn->bshn", probs, d_mixed)),
    )


def order_of(case):
    """Zigzag if it must be, else any."""
    parts = case.mesh.context
    if case.causal:
        return zigzag_order(case.length, parts)
    return np.random.default_rng(1).permutation(case.length)


def arrays(case):
    """q, k, v, the output's cotangent and segments, in the rows' own order."""
    rng = np.random.default_rng(0)
    heads = [4, case.kv_heads, case.kv_heads, 4]
    made = [rng.standard_normal((2, case.length, h, 5), np.float32) for h in heads]
    return *made, documents(case.length) if case.segmented else None


def program(case):
    """(q, k, v, cotangent, segments, positions) -> output and gradients, jitted."""
    attend = partial(
        ring_attention, causal=case.causal, window=case.window, rules=case.rules
    )

    @jax.jit
    def run(q, k, v, d_mixed, segments, positions):
        where = {"segments": segments, "positions": positions}
        mixed, pull = jax.vjp(lambda *qkv: attend(*qkv, **where), q, k, v)
        return mixed, *pull(d_mixed)

    return run


def specs(case):
    """How q, k, v and the output's cotangent are sharded, and the segments."""
    spec = case.rules.spec
    heads = spec("batch", "seq", "act_heads", None)
    kv_heads = spec("batch", "seq", "act_kv_heads", None)
    return heads, kv_heads, kv_heads, heads, spec("batch", "seq")


@pytest.mark.parametrize("name", CASES)
def test_the_numbers_of_a_plain_softmax(name):
    """Ours in f32: sums of at most 48 terms, of size 1 or so, and 3 of them chained."""
    case = CASES[name]
    order, inputs = order_of(case), arrays(case)
    needed = case.window is not None and not case.causal
    with jax.set_mesh(make_mesh(case.mesh)):
        laid_out = [None if x is None else x[:, order] for x in inputs]
        placed = jax.device_put(laid_out, list(specs(case)))
        done = program(case).lower(*placed, jnp.asarray(order) if needed else None)
        done = done.compile()
        results = done(*placed, jnp.asarray(order) if needed else None)
    if case.rules == RULES:  # else the gradients of a key's copies are gathered
        assert "all-gather" not in done.as_text()
    results = [np.asarray(x)[:, np.argsort(order)] for x in results]
    expected = reference(*inputs, case)
    for found, exact, tolerance in zip(results, expected, TOLERANCES, strict=True):
        np.testing.assert_allclose(found, exact, rtol=0, atol=tolerance)


# --- What it costs --------------------------------------------------------------------


def shapes(case, mesh, dtype=np.float32, head_dim=5):
    """What `program` takes, without numbers."""
    heads = [(4, head_dim), (case.kv_heads, head_dim)]
    tails = [heads[0], heads[1], heads[1], heads[0], ()]
    types = [dtype] * 4 + [np.int32]
    return [
        jax.ShapeDtypeStruct(
            (2, case.length, *tail), kind, sharding=NamedSharding(mesh, spec)
        )
        for tail, kind, spec in zip(tails, types, specs(case), strict=True)
    ]


def equations(jaxpr, times=1):
    """(equation, how many times it runs) of a program; on each device in shard_map."""
    for equation in jaxpr.eqns:
        yield equation, times
        inner = times
        if equation.primitive.name == "scan":
            inner *= equation.params["length"]
        elif equation.primitive.name == "shard_map":
            inner *= equation.params["mesh"].size
        for part in jax.tree.leaves(list(equation.params.values())):
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                yield from equations(part, inner)


def product_flops(jaxpr):
    """FLOPs of all matrix products of a program, on all devices together."""
    total = 0
    for equation, times in equations(jaxpr):
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            terms = math.prod(left[axis] for axis in contracted)
            total += times * 2 * math.prod(out) * terms
    return total


def test_causal_attention_costs_half():
    """2c + 1 of 4c pairs of chunks: 2 products each forward, 5 (not 4) backward.

    The fifth, queries by keys, is computed again: the backward pass stores no scores,
    and no loop stacks what its steps leave.
    """
    case = Case(MeshShape(data=2, context=4), 24, True)
    attend = partial(ring_attention, causal=True, window=None, rules=RULES)
    with jax.set_mesh(mesh := make_mesh(case.mesh)):
        q, k, v, d_mixed, segments = shapes(case, mesh)
        forward = jax.make_jaxpr(attend)(q, k, v, segments=segments)
        both = jax.make_jaxpr(program(case))(q, k, v, d_mixed, segments, None)
    one_product = 2 * (2 * 4 * 24 * 24 * 5)  # all queries by all keys
    assert product_flops(forward.jaxpr) == 2 * one_product * 9 / 16
    assert product_flops(both.jaxpr) == (2 + 5) * one_product * 9 / 16
    loops = [e for e, _ in equations(both.jaxpr) if e.primitive.name == "scan"]
    assert len(loops) == 2
    for loop in loops:
        body = getattr(loop.params["jaxpr"], "jaxpr", loop.params["jaxpr"])
        assert [x.aval for x in loop.outvars] == [x.aval for x in body.outvars]


@pytest.mark.slow
def test_a_tpu_sends_while_it_computes(monkeypatch):
    """Compiled for a v5e slice: permutes that span the products, and nothing else."""
    pytest.importorskip("libtpu", reason="libtpu, the compiler, is not installed")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    slice_ = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4")
    case = Case(MeshShape(data=2, context=4), 2048, True)
    with jax.set_mesh(mesh := make_mesh(case.mesh, slice_.devices)):
        inputs = shapes(case, mesh, jnp.bfloat16, head_dim=64)
        text = program(case).lower(*inputs, None).compile().as_text()
    assert not re.search("all-gather|all-reduce|all-to-all|reduce-scatter", text)
    loops = [
        part for part in text.split("\n\n")
        if "collective-permute-start(" in part and not part.startswith("ENTRY")
    ]  # fmt: skip
    assert len(loops) == 2
    for loop in loops:
        started = loop.rindex(" collective-permute-start(")
        waited = loop.index(" collective-permute-done(")
        assert loop.count(" fusion(", started, waited) == loop.count(" fusion(")


# --- What it refuses ------------------------------------------------------------------


def test_zigzag_pairs_an_early_chunk_with_a_late_one():
    expected = [0, 1, 10, 11, 2, 3, 8, 9, 4, 5, 6, 7]
    np.testing.assert_array_equal(zigzag_order(12, 3), expected)
    np.testing.assert_array_equal(zigzag_order(6, 1), np.arange(6))


@pytest.mark.parametrize(
    ("parts", "causal", "window", "with_positions", "complaint"),
    [
        (1, True, None, False, "two or more parts"),
        (8, True, None, False, "8 positions cannot be cut into 2 × 8"),
        (2, True, 3, True, "`positions` belong to a window that is not causal"),
        (2, False, 3, False, "`positions` belong to a window that is not causal"),
    ],
)
def test_a_wrong_call_says_why(parts, causal, window, with_positions, complaint):
    case = Case(MeshShape(data=1, context=parts, expert=8 // parts), 8, causal, window)
    with jax.set_mesh(mesh := make_mesh(case.mesh)):
        positions = jax.ShapeDtypeStruct((8,), np.int32) if with_positions else None
        with pytest.raises(ValueError, match=complaint):
            jax.eval_shape(program(case), *shapes(case, mesh), positions)
