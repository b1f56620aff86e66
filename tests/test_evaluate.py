# SPDX-License-Identifier: Apache-2.0
"""Evaluation against a plain loop over single examples, and the unigram baseline."""

import math

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from stores import write_store

from lm_scale.data.examples import Blocks
from lm_scale.data.loader import EvalBatches
from lm_scale.data.store import TokenStore
from lm_scale.evaluate import evaluate, unigram_loss
from lm_scale.models import Compute, RobertaConfig, build_model
from lm_scale.objectives import IGNORE, CausalLM, MaskedLM, Vocabulary
from lm_scale.sharding import (
    MeshShape,
    Rules,
    declarations,
    flatten,
    init_params,
    make_mesh,
    unflatten,
)
from lm_scale.step import make_eval_step

VOCAB, SEQ, EXAMPLES = 38, 12, 11  # 11 leaves a remainder in every batch but 1 and 11
VOCABULARY = Vocabulary(size=VOCAB, special_ids=(0, 1, 2), mask_id=2)
CONFIG = RobertaConfig(vocab=VOCAB, positions=SEQ, layers=2, embed=16, heads=2, mlp=24,
                       init_std=0.5)  # fmt: skip
RULES = Rules()
MODEL = build_model(CONFIG, Compute(dtype="float32", remat="none", loss_chunk=5))


def write(path, documents, vocab=VOCAB):
    write_store(path, documents, vocab_size=vocab)
    return TokenStore.open(path)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    tokens = np.random.default_rng(0).integers(3, VOCAB, SEQ * EXAMPLES + 3)
    return write(tmp_path_factory.mktemp("evaluate") / "validation", [tokens])


def held_out(store, batch):
    """Rows differ in their number of labels; most tokens show, so some are guessed."""
    objective = MaskedLM(probability=0.4, masked=0.0, random=0.3)
    source = Blocks(store, SEQ)
    return EvalBatches(source, objective, VOCABULARY, batch=batch, seed=1)


ONE = make_mesh(MeshShape(), jax.devices()[:1])


def place(params, mesh):
    """Arrays by path -> the parameters on a mesh."""
    declared, placed = declarations(MODEL), {}
    for path, value in params.items():
        spec = RULES.spec(*declared[path].get_metadata("axes"))
        placed[path] = jax.device_put(value, NamedSharding(mesh, spec))
    return unflatten(placed)


@pytest.fixture(scope="module")
def params():
    with jax.set_mesh(ONE):
        make = jax.jit(lambda: init_params(MODEL, RULES, jax.random.key(1)))
        return {path: np.asarray(x) for path, x in flatten(make()).items()}


@pytest.fixture(scope="module")
def expected(store, params):
    """Loss, accuracy and number of labels: one example at a time, in float64."""
    graphdef, batches = nnx.split(MODEL)[0], held_out(store, 1)
    whole = NamedSharding(ONE, RULES.spec("batch", "seq"))

    @jax.jit
    def logits_of(params, tokens):
        model = nnx.merge(graphdef, params)
        return model.head(model(tokens))

    total, right, count = 0.0, 0, 0
    for number in range(EXAMPLES):
        row = batches.rows(number, [0])
        labels = row["labels"][0]
        with jax.set_mesh(ONE):
            tokens = jax.device_put(row["tokens"], whole)
            logits = logits_of(place(params, ONE), tokens)
        logits = np.asarray(logits[0], np.float64)
        for position in np.flatnonzero(labels != IGNORE):
            scores = logits[position]
            total += np.log(np.sum(np.exp(scores))) - scores[labels[position]]
            right += int(np.argmax(scores) == labels[position])
            count += 1
    return total / count, right / count, count


CASES = [
    (ONE, 1),
    (ONE, 3),
    (ONE, 8),
    (make_mesh(MeshShape(data=8)), 8),
    (make_mesh(MeshShape(data=1, fsdp=2, context=2, tensor=2)), 6),
    (make_mesh(MeshShape(data=2, fsdp=4)), 16),  # more rows than examples
]


@pytest.mark.parametrize(("mesh", "batch"), CASES)
def test_evaluation_is_the_sum_over_single_examples(
    store, params, expected, mesh, batch
):
    with jax.set_mesh(mesh):
        eval_step, on_mesh = make_eval_step(MODEL), place(params, mesh)
        found = evaluate(eval_step, on_mesh, held_out(store, batch), mesh, RULES)
    loss, accuracy, count = expected
    assert 30 < count < 80 and 0 < accuracy < 1  # the sample tells something
    assert found["labels"] == count
    assert found["loss"] == pytest.approx(loss, rel=1e-6)  # f32 sums, measured 2e-7
    assert found["accuracy"] == pytest.approx(accuracy, rel=1e-12)
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)


def test_sums_are_added_in_float64(store):
    """2**24 + 1 is no f32: adding batch to batch must not lose small sums."""
    batches = held_out(store, 1)
    sums = iter([2.0**24] + [1.0] * (EXAMPLES - 1))

    def eval_step(params, batch):
        value = np.float32(next(sums))
        return {"loss": value, "correct": np.float32(0), "count": value}

    found = evaluate(eval_step, {}, batches, ONE, RULES)
    assert found["labels"] == 2**24 + EXAMPLES - 1
    assert found["loss"] == 1.0


def test_a_split_without_labels_and_a_hopeless_loss(store):
    zero = np.float32(0)

    def nothing(params, batch):
        return {"loss": zero, "correct": zero, "count": zero}

    found = evaluate(nothing, {}, held_out(store, 3), ONE, RULES)
    assert found.pop("labels") == 0
    assert all(math.isnan(x) for x in found.values())  # nothing was measured

    def hopeless(params, batch):
        return {"loss": np.float32(1e6), "correct": zero, "count": np.float32(1)}

    found = evaluate(hopeless, {}, held_out(store, 3), ONE, RULES)
    assert found["perplexity"] == math.inf


def test_unigram_loss_by_hand(tmp_path):
    """Counts 3, 1, 0, 1 plus one each: 4, 2, 1, 2 of 9."""
    train = write(tmp_path / "train", [[0, 1, 0], [0, 3]], vocab=4)
    validation = write(tmp_path / "validation", [[0, 1, 2, 3, 0, 0, 2]], vocab=4)
    vocabulary = Vocabulary(size=4, special_ids=(), mask_id=None)
    for batch in (1, 2, 4):  # 4: with a filler row
        batches = EvalBatches(
            Blocks(validation, 2), CausalLM(), vocabulary, batch=batch, seed=0
        )
        found = unigram_loss(Blocks(train, 2), batches, 4)
        # The examples are 0 1, 2 3, 0 0; their targets 1, 3, 0.
        assert found == pytest.approx(-math.log(2 / 9 * 2 / 9 * 4 / 9) / 3)
