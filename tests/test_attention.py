# SPDX-License-Identifier: Apache-2.0
"""Attention: the numbers of jax.nn, and documents that do not see each other."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from flax import nnx
from parity import one_device

from lm_scale.models import build_model
from lm_scale.models.attention import Mask, attention
from lm_scale.models.compute import Compute
from lm_scale.models.gpt2 import GPT2Config
from lm_scale.models.llama import LlamaConfig
from lm_scale.models.roberta import RobertaConfig
from lm_scale.sharding import MeshShape, Rules, make_mesh

RULES = Rules()
B, T, H, N = 2, 8, 2, 5
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 3], [1, 1, 1, 1, 1, 1, 0, 0]], np.int32)
KINDS = [
    "all", "causal", "window", "window both ways", "segments", "causal in segments",
    "padding",
]  # fmt: skip


def random_qkv(dtype=np.float32):
    rng = np.random.default_rng(0)
    return [rng.standard_normal((B, T, H, N)).astype(dtype) for _ in range(3)]


def placed(*qkv):
    """As the models' projections make them, on the mesh that is set."""
    return jax.device_put(qkv, RULES.spec("batch", "seq", "act_heads", None))


@partial(jax.jit, static_argnames="kind")
def attend(q, k, v, segments, kind):
    """Ours, with the masks that the models make."""
    mask = {
        "all": Mask(),
        "causal": Mask(causal=True),
        "window": Mask(causal=True, window=3),
        "window both ways": Mask(window=3),
        "segments": Mask(segments=segments),
        "causal in segments": Mask(causal=True, segments=segments),
        "padding": Mask(
            segments=jnp.ones_like(segments),
            key_segments=(segments != 0).astype(jnp.int32),
        ),
    }[kind]
    return attention(q, k, v, mask=mask, rules=RULES)


def reference(q, k, v, kind):
    """jax.nn's, with masks written out pair by pair."""
    sees = {
        "all": lambda row, t, s: True,
        "causal": lambda row, t, s: s <= t,
        "window": lambda row, t, s: t - 3 < s <= t,
        "window both ways": lambda row, t, s: t - 3 < s < t + 3,
        "segments": lambda row, t, s: row[t] == row[s],
        "causal in segments": lambda row, t, s: s <= t and row[t] == row[s],
        "padding": lambda row, t, s: row[s] != 0,
    }[kind]
    mask = [
        [[bool(sees(row, t, s)) for s in range(T)] for t in range(T)]
        for row in SEGMENTS
    ]
    return jax.nn.dot_product_attention(q, k, v, mask=np.array(mask)[:, None])


@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_of_jax_nn(kind):
    q, k, v = random_qkv()
    with jax.set_mesh(mesh := one_device()):
        segments = parity.place_rows(SEGMENTS, mesh)
        mixed = attend(*placed(q, k, v), segments, kind)
    expected = reference(q, k, v, kind)
    np.testing.assert_allclose(mixed, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "mesh",
    [MeshShape(data=2, context=2, tensor=2), MeshShape(context=4, tensor=2)],
    ids=["data=2,context=2,tensor=2", "context=4,tensor=2"],
)
def test_eight_devices_attend_as_one(mesh):
    """Rows over data, queries over context, heads over tensor."""
    q, k, v = random_qkv()
    with jax.set_mesh(mesh := make_mesh(mesh)):
        segments = parity.place_rows(SEGMENTS, mesh)
        mixed = attend(*placed(q, k, v), segments, "causal in segments")
        split = RULES.spec("batch", "seq", "act_heads", None)
        assert jax.typeof(mixed).sharding.spec == split
    expected = reference(q, k, v, "causal in segments")
    np.testing.assert_allclose(mixed, expected, rtol=1e-5, atol=1e-6)


def test_bfloat16_keeps_its_type_and_softmax_in_float32():
    q, k, v = random_qkv(jnp.bfloat16)
    with jax.set_mesh(mesh := one_device()):
        segments = parity.place_rows(SEGMENTS, mesh)
        mixed = attend(*placed(q, k, v), segments, "causal")
    assert mixed.dtype == jnp.bfloat16
    exact = reference(*(x.astype(np.float32) for x in (q, k, v)), "causal")
    np.testing.assert_allclose(mixed.astype(np.float32), exact, atol=0.03)


def test_a_query_with_nothing_to_see_gets_the_mean_and_no_nan():
    q, k, v = random_qkv()
    segments = np.ones((B, T), np.int32)
    other = segments.copy()
    other[0, 3] = 2
    mask = Mask(segments=jnp.asarray(other), key_segments=jnp.asarray(segments))

    @jax.jit
    def run(q, k, v):
        def total(q, k, v):
            mixed = attention(q, k, v, mask=mask, rules=RULES)
            return jnp.sum(mixed**2), mixed

        return jax.grad(total, argnums=(0, 1, 2), has_aux=True)(q, k, v)

    with jax.set_mesh(one_device()):
        gradients, mixed = run(*placed(q, k, v))
    np.testing.assert_allclose(mixed[0, 3], v[0].mean(axis=0), rtol=1e-5, atol=1e-6)
    assert all(np.isfinite(x).all() for x in (mixed, *gradients))


def test_dropout_of_the_weights_keeps_their_mean():
    """A value of ones comes out as the kept share, scaled: 1 on average."""
    q, k, _ = (np.tile(x, (50, 1, 1, 1)) for x in random_qkv())
    drop = jax.jit(partial(attention, mask=Mask(), rules=RULES, dropout_rate=0.4))
    with jax.set_mesh(one_device()):
        mixed = drop(*placed(q, k, np.ones_like(k)), key=jax.random.key(0))
    assert mixed.std() > 0.1
    np.testing.assert_allclose(mixed.mean(), 1, atol=0.05)


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        (None, [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]),
        (2, [[0, 1, 1, 0, 0], [0, 0, 1, 1, 0]]),
    ],
)
def test_mask_of_a_later_piece(window, expected):
    places, keys = jnp.arange(2, 4), jnp.arange(5)
    mask = Mask(causal=True, window=window, positions=places, key_positions=keys)
    with jax.set_mesh(one_device()):
        seen = mask.matrix(2, RULES)
    assert seen is not None
    np.testing.assert_array_equal(seen[0, 0], expected)


@pytest.mark.parametrize(
    "mesh", [MeshShape(), MeshShape(data=2, context=4)], ids=["data=8", "context=4"]
)
@pytest.mark.parametrize("rows", [False, True], ids=["one order", "an order a row"])
def test_tokens_in_another_order_see_the_same(mesh, rows):
    """Permuted with their positions, tokens get what they got in their order."""
    q, k, v = (np.tile(x, (4, 1, 1, 1)) for x in random_qkv())
    segments = np.tile(SEGMENTS, (4, 1))
    order = np.array([np.random.default_rng(i).permutation(T) for i in range(4 * B)])
    if not rows:
        order[:] = order[0]

    @jax.jit
    def run(q, k, v, segments, positions):
        mask = Mask(causal=True, window=5, segments=segments, positions=positions)
        return attention(q, k, v, mask=mask, rules=RULES)

    pick = lambda x: np.take_along_axis(  # noqa: E731
        x, order.reshape(order.shape + (1,) * (x.ndim - 2)), axis=1
    )
    with jax.set_mesh(mesh := make_mesh(mesh)):
        spec = RULES.spec(*(["batch", "seq"] if rows else ["seq"]))
        places = jax.device_put((order if rows else order[0]).astype(np.int32), spec)
        rows_of = parity.place_rows([pick(segments)], mesh)[0]
        mixed = np.asarray(run(*placed(pick(q), pick(k), pick(v)), rows_of, places))
    near = np.abs(np.arange(T)[:, None] - np.arange(T)) < 5
    same = segments[:, None, :, None] == segments[:, None, None, :]
    expected = jax.nn.dot_product_attention(q, k, v, mask=same & near, is_causal=True)
    np.testing.assert_allclose(mixed, pick(np.asarray(expected)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("mesh", "rules"),
    [
        (MeshShape(data=2, context=2, tensor=2), RULES),
        (MeshShape(data=2, tensor=4), Rules(kv_heads=(), act_kv_heads=())),
    ],
    ids=["tensor=2", "tensor=4"],
)
def test_neighbours_share_a_key_on_any_mesh(mesh, rules):
    """Eight heads of queries, two of keys and values."""
    rng = np.random.default_rng(0)
    q = rng.standard_normal((B, T, 8, N)).astype(np.float32)
    k, v = rng.standard_normal((2, B, T, 2, N)).astype(np.float32)

    @jax.jit
    def run(q, k, v):
        return attention(q, k, v, mask=Mask(causal=True, window=3), rules=rules)

    with jax.set_mesh(make_mesh(mesh)):
        heads = jax.device_put(q, rules.spec("batch", "seq", "act_heads", None))
        shared = rules.spec("batch", "seq", "act_kv_heads", None)
        mixed = np.asarray(run(heads, *jax.device_put((k, v), shared)))
    expected = jax.nn.dot_product_attention(
        q, np.repeat(k, 4, axis=2), np.repeat(v, 4, axis=2),
        is_causal=True, local_window_size=(2, 0),
    )  # fmt: skip
    np.testing.assert_allclose(mixed, expected, rtol=1e-5, atol=1e-6)


# --- Documents of one row -------------------------------------------------------------

SHAPE = {"vocab": 37, "positions": 9, "layers": 2, "embed": 12, "heads": 3, "mlp": 20}
MODELS = [
    GPT2Config(**SHAPE),
    LlamaConfig(kind="mistral", **SHAPE, kv_heads=1, head_dim=4, window=3),
    RobertaConfig(**SHAPE),
]


@pytest.mark.parametrize("config", MODELS, ids=["gpt2", "llama", "roberta"])
def test_a_document_does_not_notice_its_neighbour(config):
    model = build_model(config, Compute(dtype="float32"))
    graphdef = nnx.split(model)[0]
    first_position = getattr(config, "pad_id", -1) + 1

    @jax.jit
    def hidden(params, tokens, positions, segments):
        model = nnx.merge(graphdef, params)
        return model(tokens, positions=positions, segments=segments)

    def run(documents):
        """One row of these documents -> the hidden states of each."""
        sizes = [len(document) for document in documents]
        positions = np.concatenate([np.arange(size) for size in sizes])
        segments = np.repeat([1, 2], sizes)
        rows = [np.concatenate(documents), positions + first_position, segments]
        rows = [row[None].astype(np.int32) for row in rows]
        states = np.asarray(hidden(params, *parity.place_rows(rows, mesh)))[0]
        return np.split(states, [sizes[0]])

    rng = np.random.default_rng(0)
    a, other_a = rng.integers(2, 37, (2, 4))
    b, other_b = rng.integers(2, 37, (2, 5))
    with jax.set_mesh(mesh := one_device()):
        params = parity.placed(model, parity.random_tensors(config), mesh)
        of_a, of_b = run([a, b])
        np.testing.assert_array_equal(run([a, other_b])[0], of_a)
        np.testing.assert_array_equal(run([other_a, b])[1], of_b)
        # Nor where in the row it stands: positions restart.
        swapped_b, swapped_a = run([b, a])
        np.testing.assert_allclose(swapped_a, of_a, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(swapped_b, of_b, rtol=1e-4, atol=1e-5)
        assert np.abs(run([other_a, b])[0] - of_a).max() > 0.1  # it does see itself


@pytest.mark.parametrize("config", MODELS, ids=["gpt2", "llama", "roberta"])
def test_without_segments_documents_see_each_other(config):
    model = build_model(config, Compute(dtype="float32"))
    graphdef = nnx.split(model)[0]

    @jax.jit
    def hidden(params, tokens):
        return nnx.merge(graphdef, params)(tokens)

    tokens = np.random.default_rng(0).integers(2, 37, (2, 9), np.int32)
    tokens[1, 4:] = tokens[0, 4:]  # only the first four tokens differ
    with jax.set_mesh(mesh := one_device()):
        params = parity.placed(model, parity.random_tensors(config), mesh)
        states = np.asarray(hidden(params, parity.place_rows(tokens, mesh)))
    assert np.abs(states[0, 4:] - states[1, 4:]).max() > 0.1
