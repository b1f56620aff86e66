# SPDX-License-Identifier: Apache-2.0
"""The chunked cross entropy is the plain one: values, gradients, meshes, empty rows."""

from dataclasses import asdict
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm_scale import losses
from lm_scale.losses import IGNORE, cross_entropy, training_loss
from lm_scale.sharding import MeshShape, Rules, make_mesh

RULES = Rules()
BATCH, WIDTH = 2, 6


def example(length, vocab, *, seed=0):
    """Hidden states, labels with a third left out, and the matrix of a head."""
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((BATCH, length, WIDTH), np.float32)
    labels = rng.integers(0, vocab, (BATCH, length), np.int32)
    labels[rng.random(labels.shape) < 0.3] = IGNORE
    return hidden, labels, rng.standard_normal((WIDTH, vocab), np.float32)


def head(matrix, hidden):
    out = RULES.spec("batch", "seq", "act_vocab")
    return jnp.einsum("BTD,DV->BTV", hidden, matrix, out_sharding=out)


@partial(jax.jit, static_argnames="chunk")
def evaluated(hidden, labels, matrix, chunk):
    """((loss, sums), gradients)"""

    def loss(hidden, matrix):
        of_head = partial(head, matrix)
        sums = cross_entropy(of_head, hidden, labels, chunk=chunk, accuracy=True)
        sums = jax.tree.map(jnp.sum, sums)
        return sums["loss"], sums

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(hidden, matrix)


@partial(jax.jit, static_argnames="chunk")
def trained(hidden, labels, matrix, chunk):
    """The same, of `training_loss`."""

    def loss(hidden, matrix):
        of_head = partial(head, matrix)
        sums = cross_entropy(of_head, hidden, labels, chunk=chunk, accuracy=True)
        total, losses = training_loss(of_head, hidden, labels, chunk=chunk)
        return total, jax.tree.map(jnp.sum, sums | {"loss": losses})

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(hidden, matrix)


@pytest.fixture(params=[evaluated, trained], ids=["evaluated", "trained"])
def chunked(request):
    return request.param


def plain(hidden, labels, matrix):
    """The formula, with optax's cross entropy over all logits."""
    real = labels != IGNORE

    def loss(hidden, matrix):
        targets = jnp.where(real, labels, 0)
        losses = optax.softmax_cross_entropy_with_integer_labels(
            hidden @ matrix, targets
        )
        return jnp.sum(losses * real)

    value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(hidden, matrix)
    guesses = np.argmax(hidden @ matrix, -1)
    return value, (guesses == labels).sum(), real.sum(), gradients


def one_device():
    return jax.set_mesh(make_mesh(MeshShape(), jax.devices()[:1]))


def assert_same(chunked_result, plain_result):
    (loss, sums), gradients = jax.device_get(chunked_result)
    expected, correct, count, expected_gradients = plain_result
    np.testing.assert_allclose([loss, sums["loss"]], expected, rtol=1e-5)
    assert (sums["correct"], sums["count"]) == (correct, count)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 4, 5, 15, 100])
def test_chunks_do_not_change_the_loss(chunked, chunk):
    inputs = example(15, 23)
    with one_device():
        result = chunked(*inputs, chunk)
    assert_same(result, plain(*inputs))


@pytest.mark.parametrize(("tokens", "chunks"), [(2, 15), (6, 5), (30, 1)])
def test_without_a_chunk_each_device_has_so_many_tokens(
    chunked, tokens, chunks, monkeypatch
):
    """15 positions of 2 rows; one position at least."""
    monkeypatch.setattr(losses, "TOKENS_OF_CPU", tokens)
    inputs = example(15, 23, seed=tokens)
    with one_device():
        assert losses._chunks(jnp.asarray(inputs[0]), None) == chunks
        result = jax.jit(chunked.__wrapped__, static_argnames="chunk")(*inputs, None)
    assert_same(result, plain(*inputs))


def test_a_cpu_has_fewer_tokens_at_once():
    here = jax.devices()[0].platform
    assert losses.positions_at_once(4, 2, here) == 2 * 256 // 4
    assert losses.positions_at_once(4, 2, "tpu") == 2 * 2048 // 4
    assert losses.positions_at_once(4, 2) == 2 * 2048 // 4


def test_a_length_that_nothing_divides(chunked):
    inputs = example(13, 23)
    with one_device():
        result = chunked(*inputs, 5)
    assert_same(result, plain(*inputs))


@pytest.mark.parametrize(
    ("mesh", "length", "chunk"),
    [
        (MeshShape(data=2, tensor=4), 16, 4),
        (MeshShape(tensor=8), 16, 5),
        (MeshShape(context=2, tensor=4), 16, 5),
        (MeshShape(context=4, tensor=2), 16, 16),
        # Chunks grow to what the devices can share out: 5 positions over 4 devices
        # would not do, nor 4 over 8.
        (MeshShape(context=4, tensor=2), 20, 5),
        (MeshShape(context=8), 16, 4),
    ],
    ids=lambda x: (
        ",".join(f"{k}={n}" for k, n in asdict(x).items() if n > 1)
        if isinstance(x, MeshShape)
        else str(x)
    ),
)
def test_sharded_over_eight_devices(chunked, mesh, length, chunk):
    """Vocabulary over tensor, sequence over context; gradients lie as their inputs."""
    inputs = example(length, 24)
    axes = (("batch", "seq", None), ("batch", "seq"), (None, "vocab"))
    with jax.set_mesh(make_mesh(mesh)):
        placed = [
            jax.device_put(x, RULES.spec(*names))
            for x, names in zip(inputs, axes, strict=True)
        ]
        result = chunked(*placed, chunk)
        hidden, _, matrix = placed
        for gradient, of in zip(result[1], (hidden, matrix), strict=True):
            assert gradient.sharding.is_equivalent_to(of.sharding, gradient.ndim)
    assert_same(result, plain(*inputs))


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("offset", [-1000.0, -100.0, 0.0, 80.0, 1000.0])
def test_logits_that_are_not_centred_or_far_apart(chunked, offset, scale):
    """Sums of exp that f32 doesn't hold, or holds none of, in one chunk or in all."""
    hidden, labels, matrix = example(15, 23)
    hidden[0] *= scale
    inputs = np.append(hidden, np.ones_like(hidden[..., :1]), -1), labels
    matrix = np.append(matrix, np.full((1, 23), offset, np.float32), 0)
    with one_device():
        result = chunked(*inputs, matrix, 5)
    (loss, sums), gradients = jax.device_get(result)
    expected, correct, count, expected_gradients = plain(*inputs, matrix)
    # A logit of 1000 is rounded by 3e-5, and so is all that comes of it.
    close = {"rtol": 1e-4, "atol": 1e-3 if abs(offset) == 1000 else 1e-4}
    np.testing.assert_allclose([loss, sums["loss"]], expected, **close)
    # But for the gradients of what makes the offset: probabilities that sum to 1, less
    # 1, times the offset.
    for theirs, ours in zip(expected_gradients, gradients, strict=True):
        real = np.s_[..., :WIDTH] if theirs.ndim == 3 else np.s_[:WIDTH]
        np.testing.assert_allclose(ours[real], theirs[real], **close)


@pytest.mark.parametrize("chunk", [5, 15])
def test_nothing_to_predict(chunked, chunk):
    hidden, labels, matrix = example(15, 23)
    with one_device():
        (loss, sums), gradients = chunked(
            hidden, np.full_like(labels, IGNORE), matrix, chunk
        )
    assert loss == sums["correct"] == sums["count"] == 0
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("chunk", [5, 15])
def test_one_single_label(chunked, chunk):
    hidden, labels, matrix = example(15, 23)
    labels = np.full_like(labels, IGNORE)
    labels[1, 7] = 22
    with one_device():
        (loss, sums), (gradient, _) = chunked(hidden, labels, matrix, chunk)
    logits = hidden[1, 7].astype(np.float64) @ matrix
    expected = np.log(np.exp(logits).sum()) - logits[22]
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert sums["count"] == 1
    touched = np.argwhere(np.abs(gradient).sum(-1))
    np.testing.assert_array_equal(touched, [[1, 7]])


def test_large_logits_do_not_overflow(chunked):
    hidden, labels, matrix = example(15, 23)
    inputs = (hidden * 1000, labels, matrix)
    with one_device():
        result = chunked(*inputs, 5)
    assert np.isfinite(result[0][0])
    np.testing.assert_allclose(result[0][0], plain(*inputs)[0], rtol=1e-5)


@pytest.mark.parametrize("chunk", [5, 15])
def test_accuracy_counts_right_guesses_only_where_there_is_a_label(chunked, chunk):
    vocab = WIDTH
    labels = np.full((BATCH, 15), IGNORE, np.int32)
    labels[0, :7], labels[1, 3] = 2, 5
    guesses = np.zeros_like(labels)  # position 0 .. 3 right, 4 .. 6 wrong
    guesses[0, :4], guesses[1, 3] = 2, 5
    hidden = np.eye(vocab, dtype=np.float32)[guesses]
    with one_device():
        (_, sums), _ = chunked(hidden, labels, np.eye(vocab, dtype=np.float32), chunk)
    assert (sums["correct"], sums["count"]) == (5, 8)


def test_accuracy_is_left_out_when_not_asked_for():
    with one_device():
        hidden, labels, matrix = map(jnp.asarray, example(15, 23))
        sums = cross_entropy(partial(head, matrix), hidden, labels, chunk=5)
        sums = jax.tree.map(jnp.sum, sums)
    assert sums["correct"] == 0


def test_in_training_the_head_runs_once():
    """A product for the logits, and one for each gradient."""
    hidden, labels, matrix = map(jnp.asarray, example(15, 23))
    with one_device():
        program = jax.make_jaxpr(partial(trained_alone, chunk=5))
        assert str(program(hidden, labels, matrix)).count("dot_general[") == 3


def trained_alone(hidden, labels, matrix, chunk):
    def loss(hidden, matrix):
        return training_loss(partial(head, matrix), hidden, labels, chunk=chunk)

    return jax.grad(loss, argnums=(0, 1), has_aux=True)(hidden, matrix)


@pytest.mark.parametrize("chunk", [5, 15])
def test_a_multiple_of_the_loss_has_that_multiple_of_the_gradient(chunk):
    hidden, labels, matrix = map(jnp.asarray, example(15, 23))

    @partial(jax.grad, argnums=(0, 1))
    def gradient(hidden, matrix, scale):
        return (
            scale * training_loss(partial(head, matrix), hidden, labels, chunk=chunk)[0]
        )

    with one_device():
        once, thrice = (gradient(hidden, matrix, scale) for scale in (1.0, 3.0))
    for one, three in zip(once, thrice, strict=True):
        np.testing.assert_allclose(3 * one, three, rtol=1e-5, atol=1e-6)
