# SPDX-License-Identifier: Apache-2.0
"""What packing and the head at chosen places promise, through the models and the step.

A model is the probe: if attention, positions or labels leaked from one document of a
row into another, its loss and gradients would not be those of the documents alone.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from stores import write_store

from lm_scale.data.examples import Pieces
from lm_scale.data.loader import EvalBatches
from lm_scale.data.packing import packed
from lm_scale.data.store import TokenStore
from lm_scale.models import (
    Compute,
    GPT2Config,
    LlamaConfig,
    RobertaConfig,
    build_model,
)
from lm_scale.objectives import IGNORE, CausalLM, MaskedLM, NoiseKeys, Vocabulary
from lm_scale.optim import Schedule, make_schedule
from lm_scale.sharding import MeshShape, Rules, init_params, make_mesh
from lm_scale.step import (
    apply,
    init_state,
    make_eval_step,
    make_train_step,
)

VOCAB, SEQ, ROWS = 40, 16, 8
SHAPE = {"vocab": VOCAB, "positions": SEQ, "layers": 1, "embed": 16, "heads": 4,
         "mlp": 24, "init_std": 0.3}  # fmt: skip
CONFIGS = {
    "gpt2": GPT2Config(
        **SHAPE, embed_dropout=0.0, attention_dropout=0.0, residual_dropout=0.0
    ),
    # A window shorter than the documents, which a packed row must not widen.
    "llama": LlamaConfig(**SHAPE, kind="mistral", kv_heads=2, head_dim=4, window=5),
    "roberta": RobertaConfig(**SHAPE, dropout=0.0, attention_dropout=0.0),
}
VOCABULARY = Vocabulary(VOCAB, (0, 1, 2), mask_id=2, pad_id=1)
MLM = MaskedLM(probability=0.3, fixed_count=True)
MESHES = {
    "one": MeshShape(),
    "all": MeshShape(data=1, fsdp=2, context=2, tensor=2),
    "ring": MeshShape(data=2, context=4),
}
# f32 sums of some ten terms in another order: 1e-6 of the largest logit was seen.
LOGITS = {"rtol": 0, "atol": 2e-5}


def model_of(family, attention="xla"):
    compute = Compute(dtype="float32", remat="none", attention=attention)
    return build_model(CONFIGS[family], compute)


def mesh_of(name):
    return make_mesh(MESHES[name], jax.devices()[:1] if name == "one" else None)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Rows of several documents; two are longer than a row, and in pieces."""
    path = tmp_path_factory.mktemp("packed") / "train"
    rng = np.random.default_rng(0)
    sizes = [3, 21, 9, 5, 1, 7, 16, 4, 30, 6, 8, 2, 5]
    write_store(
        path, [rng.integers(3, VOCAB, size) for size in sizes], vocab_size=VOCAB
    )
    plan = packed(np.cumsum([0, *sizes]), SEQ)
    source = Pieces(TokenStore.open(path), SEQ, plan)
    assert len(source) == ROWS and np.diff(plan.rows).max() >= 3
    return source


def batch_of(source, objective):
    batches = EvalBatches(source, objective, VOCABULARY, batch=ROWS, seed=0)
    return batches.rows(0, range(ROWS))


def alone(batch):
    """Each document of the batch in a row of its own, and where it stood."""
    rows, places = [], []
    for row, segments in enumerate(batch["segments"]):
        for segment in range(1, segments.max() + 1):
            at = np.flatnonzero(segments == segment)
            tokens, labels = np.full(SEQ, 1), np.full(SEQ, IGNORE)
            tokens[: at.size] = batch["tokens"][row, at]
            labels[: at.size] = batch["labels"][row, at]
            rows.append((tokens, labels, (np.arange(SEQ) < at.size)))
            places.append((row, at))
    tokens, labels, segments = (np.array(x, np.int32) for x in zip(*rows, strict=True))
    return {"tokens": tokens, "labels": labels, "segments": segments}, places


@functools.cache
def logits_program(family, mesh, attention="xla"):
    model, mesh = model_of(family, attention), mesh_of(mesh)
    graphdef = nnx.split(model)[0]

    @jax.jit
    def run(batch):
        params = init_params(model, Rules(), jax.random.key(0))
        hidden, head, labels = apply(graphdef, params, batch)
        return head(hidden), labels

    def logits(batch):
        sharding = NamedSharding(mesh, Rules().spec("batch", "seq"))
        batch = {k: v for k, v in batch.items() if k != "masked_positions"}
        with jax.set_mesh(mesh):
            return jax.device_get(run(jax.device_put(batch, sharding)))

    return logits


@pytest.mark.parametrize("family", CONFIGS)
def test_a_document_has_the_logits_that_it_has_alone(source, family):
    batch = batch_of(source, MLM if family == "roberta" else CausalLM())
    logits = logits_program(family, "one")
    together, _ = logits(batch)
    single, places = alone(batch)
    expected, _ = logits(single)
    for number, (row, at) in enumerate(places):
        found = together[row, at]
        np.testing.assert_allclose(found, expected[number, : at.size], **LOGITS)
    if family != "gpt2":
        return
    for name in ("segments", "positions"):  # left out, the probe sees it
        less = {k: v for k, v in batch.items() if k != name}
        assert np.abs(logits(less)[0] - together).max() > 0.1, name


@pytest.mark.parametrize("family", ["gpt2", "roberta"])
def test_rows_cut_over_devices_give_the_same(source, family):
    """By ring attention, for which causal rows lie in zigzag order."""
    batch = batch_of(source, MLM if family == "roberta" else CausalLM())
    # Labels that say which place it is, in whatever order they come back.
    places = np.arange(ROWS * SEQ, dtype=np.int32).reshape(ROWS, SEQ)
    batch["labels"] = np.where(batch["labels"] == IGNORE, IGNORE, places)
    expected, at = map(np.array, logits_program(family, "one")(batch))
    found, where = map(np.array, logits_program(family, "ring", "ring")(batch))
    assert np.array_equal(at, where) == (family == "roberta")
    for logits, labels in ((expected, at), (found, where)):
        order = np.argsort(labels, axis=None)
        logits[:] = logits.reshape(-1, VOCAB)[order].reshape(logits.shape)
    real = (np.sort(at, axis=None) != IGNORE).reshape(ROWS, SEQ)
    np.testing.assert_allclose(found[real], expected[real], **LOGITS)


def one_step(mesh, batch, accumulate=1):
    """Loss and gradients' norm of a train step, and the number of labels."""
    model, mesh = model_of("roberta"), mesh_of(mesh)
    schedule = make_schedule(Schedule(peak=1e-2, warmup=1), 2)
    optimizer = optax.sgd(schedule)
    step = make_train_step(model, optimizer, schedule, seed=0, accumulate=accumulate)
    with jax.set_mesh(mesh):
        state = jax.jit(lambda: init_state(model, optimizer, 0))()
        _, metrics = step(state, place(batch, mesh))
    metrics = jax.device_get(metrics)
    return [metrics["loss"], metrics["grad_norm"]], int(metrics["labels"])


def place(batch, mesh):
    axes = {"masked_positions": ("batch", None)}
    return {
        name: jax.device_put(
            x, NamedSharding(mesh, Rules().spec(*axes.get(name, ("batch", "seq"))))
        )
        for name, x in batch.items()
    }


@pytest.mark.parametrize(("mesh", "accumulate"), [("one", 2), ("all", 1)])
def test_a_head_at_the_chosen_places_gives_the_same_loss(source, mesh, accumulate):
    """On devices that share out rows, sequences and the vocabulary, and in parts."""
    batch = batch_of(source, MLM)
    assert batch["masked_positions"].shape[1] % 2  # so that the devices' share is not
    whole = {k: v for k, v in batch.items() if k != "masked_positions"}
    expected, labels = one_step("one", whole)
    found, count = one_step(mesh, batch, accumulate)
    assert count == labels == (batch["labels"] != IGNORE).sum() > 20
    np.testing.assert_allclose(found, expected, rtol=2e-5)


def test_an_evaluation_at_the_chosen_places_gives_the_same_sums(source):
    batch = batch_of(source, MLM)
    whole = {k: v for k, v in batch.items() if k != "masked_positions"}
    model, mesh = model_of("roberta"), mesh_of("one")
    evaluate = make_eval_step(model)
    with jax.set_mesh(mesh):
        params = jax.jit(
            lambda: init_params(model, model.compute.rules, jax.random.key(0))
        )()
        found = jax.device_get(evaluate(params, place(batch, mesh)))
        expected = jax.device_get(evaluate(params, place(whole, mesh)))
    assert found["count"] == expected["count"] > 20
    assert found["correct"] == expected["correct"]
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=2e-6)


def test_the_head_sees_no_other_places():
    """Its work is that of the chosen places: the largest array it makes says so."""
    model = build_model(
        dataclasses.replace(CONFIGS["roberta"], vocab=1000), Compute(dtype="float32")
    )
    tokens = np.full((ROWS, SEQ), 5, np.int32)
    keys = NoiseKeys(0, np.zeros(ROWS, np.int64), np.arange(ROWS))
    vocabulary = dataclasses.replace(VOCABULARY, size=1000)
    batch = MLM.examples(tokens, vocabulary, keys)
    graphdef = nnx.split(model)[0]

    def logits(batch):
        params = init_params(model, Rules(), jax.random.key(0))
        hidden, head, _ = apply(graphdef, params, batch)
        return head(hidden)

    with jax.set_mesh(mesh_of("one")):
        shape = jax.eval_shape(logits, jax.tree.map(jnp.asarray, batch)).shape
    assert shape == (ROWS, round(0.3 * SEQ), 1000)
