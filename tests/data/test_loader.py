# SPDX-License-Identifier: Apache-2.0
"""Batches as a function of their number: order, rows, epochs, and the global array."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from stores import write_store

from lm_scale.data.examples import Blocks
from lm_scale.data.loader import EvalBatches, TrainBatches, device_batches
from lm_scale.data.store import TokenStore
from lm_scale.errors import InputError
from lm_scale.objectives import IGNORE, CausalLM, MaskedLM, Vocabulary
from lm_scale.sharding import MeshShape, Rules, make_mesh

SEQ, EXAMPLES = 8, 23
TOKENS = SEQ * EXAMPLES + 5  # the last five make no example
VOCABULARY = Vocabulary(size=300, special_ids=(0, 1, 2), mask_id=2)
MLM = MaskedLM(probability=0.5)  # so that each short example has noise


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Token t at place t, plus 10: a token tells which example it belongs to."""
    path = tmp_path_factory.mktemp("loader") / "train"
    write_store(path, [np.arange(TOKENS) + 10], vocab_size=VOCABULARY.size)
    return TokenStore.open(path)


def train_batches(store, *, objective=None, batch=4, seed=0, seq_len=SEQ):
    objective = objective or CausalLM()
    source = Blocks(store, seq_len)
    return TrainBatches(source, objective, VOCABULARY, batch=batch, seed=seed)


def eval_batches(store, *, objective=None, batch=4, seed=0):
    objective = objective or CausalLM()
    source = Blocks(store, SEQ)
    return EvalBatches(source, objective, VOCABULARY, batch=batch, seed=seed)


def numbers_of(batch):
    """The examples' numbers, by their first tokens."""
    first = batch["tokens"][:, 0] - 10
    assert (first % SEQ == 0).all()
    return (first // SEQ).tolist()


def visited(batches, steps):
    rows = range(batches.batch)
    return [n for step in range(steps) for n in numbers_of(batches.rows(step, rows))]


def assert_equal(found, expected):
    assert set(found) == set(expected) == {"tokens", "labels"}
    for name, value in expected.items():
        np.testing.assert_array_equal(np.asarray(found[name]), value, err_msg=name)
        assert found[name].dtype == np.int32


# --- Training -------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 4, 23, 30])  # 4, 30: batches straddle the epochs
def test_each_epoch_visits_every_example_once(store, batch):
    steps = -(-3 * EXAMPLES // batch)
    order = visited(train_batches(store, batch=batch), steps)[: 3 * EXAMPLES]
    epochs = [order[i : i + EXAMPLES] for i in range(0, 3 * EXAMPLES, EXAMPLES)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(EXAMPLES))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_the_batch_size_does_not_change_the_order(store):
    expected = visited(train_batches(store, batch=1), 60)
    assert visited(train_batches(store, batch=4), 15) == expected
    assert visited(train_batches(store, batch=30), 2) == expected


def test_the_order_depends_on_the_seed(store):
    orders = {tuple(visited(train_batches(store, seed=s), 5)) for s in range(4)}
    assert len(orders) == 4


def test_rows_hold_whole_examples_of_consecutive_tokens(store):
    batch = train_batches(store).rows(7, range(4))
    assert batch["tokens"].shape == batch["labels"].shape == (4, SEQ)
    np.testing.assert_array_equal(np.diff(batch["tokens"], axis=1), 1)


@pytest.mark.parametrize("objective", [CausalLM(), MLM])
@pytest.mark.parametrize("step", [0, 5, 1000])  # 5: places 20 to 23, two epochs
def test_any_split_over_processes_gives_the_same_global_batch(store, objective, step):
    whole = train_batches(store, objective=objective).rows(step, range(4))
    for parts in ([[0, 1], [2, 3]], [[0], [1], [2], [3]], [[3, 1], [0, 2]]):
        for rows in parts:
            made_alone = train_batches(store, objective=objective)
            expected = {name: value[rows] for name, value in whole.items()}
            assert_equal(made_alone.rows(step, rows), expected)


def test_a_batch_is_the_same_when_made_again(store):
    batches = train_batches(store, objective=MLM)
    once = batches.rows(3, range(4))
    batches.rows(9, range(4))
    assert_equal(batches.rows(3, range(4)), once)


def test_masking_differs_from_epoch_to_epoch(store):
    """The same example, found again in the next epoch, has other noise."""
    batches = train_batches(store, objective=MLM, batch=EXAMPLES)
    masks = []
    for epoch in range(3):
        batch = batches.rows(epoch, range(EXAMPLES))
        chosen = batch["labels"] != IGNORE
        original = np.where(chosen, batch["labels"], batch["tokens"])
        masks.append(chosen[np.argsort(original[:, 0])])
    for a, b in ((0, 1), (1, 2), (0, 2)):
        # Half of the positions differ; 184 of them, 4 sigma is 0.15.
        assert np.mean(masks[a] != masks[b]) == pytest.approx(0.5, abs=0.15)


def test_a_store_shorter_than_a_sequence_is_refused(store):
    with pytest.raises(InputError, match=f"{TOKENS} tokens, .* of {TOKENS + 1}"):
        train_batches(store, seq_len=TOKENS + 1)


def test_one_example_is_enough(store):
    batches = train_batches(store, seq_len=TOKENS)
    assert batches.examples == 1
    tokens = batches.rows(0, range(4))["tokens"]
    np.testing.assert_array_equal(tokens, np.tile(np.arange(TOKENS) + 10, (4, 1)))


# --- Evaluation -----------------------------------------------------------------------


@pytest.mark.parametrize("objective", [CausalLM(), MLM])
@pytest.mark.parametrize("batch", [1, 4, 23, 24, 64])
def test_evaluation_asks_each_label_exactly_once(store, objective, batch):
    batches = eval_batches(store, objective=objective, batch=batch)
    assert len(batches) == -(-EXAMPLES // batch)
    made = [batches.rows(step, range(batch)) for step in range(len(batches))]
    labels = np.concatenate([x["labels"] for x in made])
    tokens = np.concatenate([x["tokens"] for x in made])
    assert labels.shape == (len(batches) * batch, SEQ)
    one = eval_batches(store, objective=objective, batch=1)
    for number in range(EXAMPLES):  # in order, and whatever the batch size
        expected = one.rows(number, [0])
        np.testing.assert_array_equal(labels[number], expected["labels"][0])
        np.testing.assert_array_equal(tokens[number], expected["tokens"][0])
    assert (labels[EXAMPLES:] == IGNORE).all()  # rows that fill up the last batch
    assert ((tokens >= 0) & (tokens < VOCABULARY.size)).all()


def test_evaluation_rows_are_those_of_the_whole_batch(store):
    batches = eval_batches(store, objective=MLM)
    whole = batches.rows(5, range(4))  # three examples and a filler
    for rows in ([0, 1], [2, 3], [3]):
        expected = {name: value[rows] for name, value in whole.items()}
        assert_equal(batches.rows(5, rows), expected)


# --- On the mesh ----------------------------------------------------------------------

MESHES = {
    "data": MeshShape(data=8),
    "fsdp": MeshShape(data=2, fsdp=4),
    "context": MeshShape(data=2, context=4),
    "all": MeshShape(data=1, fsdp=2, context=2, tensor=2),
}


@pytest.mark.parametrize("objective", [CausalLM(), MLM])
@pytest.mark.parametrize("name", MESHES)
def test_global_batches_are_the_rows_of_their_steps(store, name, objective):
    mesh, rules = make_mesh(MESHES[name]), Rules()
    batches = train_batches(store, objective=objective, batch=16)
    sharding = NamedSharding(mesh, rules.spec("batch", "seq"))
    steps = list(device_batches(batches, mesh, rules, start=0, stop=5))
    assert len(steps) == 5
    for step, found in enumerate(steps):
        assert_equal(found, batches.rows(step, range(16)))
        for value in found.values():
            assert value.sharding == sharding
            for shard in value.addressable_shards:  # each device its own part
                whole = np.asarray(value)
                np.testing.assert_array_equal(shard.data, whole[shard.index])


def test_a_run_can_start_in_the_middle(store):
    mesh, rules = make_mesh(MESHES["fsdp"]), Rules()
    batches = train_batches(store, objective=MLM, batch=8)
    whole = list(device_batches(batches, mesh, rules, start=0, stop=9))
    tail = list(device_batches(batches, mesh, rules, start=6, stop=9))
    assert len(tail) == 3
    for found, expected in zip(tail, whole[6:], strict=True):
        assert_equal(found, {k: np.asarray(v) for k, v in expected.items()})


def test_batches_that_are_left_out_are_those_of_no_step(store):
    mesh, rules = make_mesh(MESHES["fsdp"]), Rules()
    batches = train_batches(store, objective=MLM, batch=8)
    left_out = ((2, 5), (6, 7))
    found = device_batches(batches, mesh, rules, start=1, stop=5, left_out=left_out)
    for batch, number in zip(found, (1, 5, 7, 8), strict=True):
        assert_equal(batch, batches.rows(number, range(8)))


@pytest.mark.parametrize(("start", "stop"), [(3, 3), (5, 3)])
def test_nothing_is_left_to_do(store, start, stop):
    mesh = make_mesh(MESHES["data"])
    batches = train_batches(store, batch=8)
    assert list(device_batches(batches, mesh, Rules(), start=start, stop=stop)) == []


def test_a_row_is_read_once_though_devices_share_it(store):
    """With the sequence cut over the context axis, two devices hold parts of a row."""
    asked = []
    batches = train_batches(store, batch=8)
    spy = SimpleNamespace(
        batch=8,
        seq_len=SEQ,
        rows=lambda step, rows: asked.append(list(rows)) or batches.rows(step, rows),
    )
    mesh = make_mesh(MeshShape(data=2, context=2), jax.devices()[:4])
    list(device_batches(spy, mesh, Rules(), start=0, stop=1))
    assert asked == [list(range(8))]
