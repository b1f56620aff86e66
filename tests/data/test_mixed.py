# SPDX-License-Identifier: Apache-2.0
"""Batches of several sources: whose rows they are, epochs, any rows, any padding."""

import numpy as np
import pytest
from stores import write_store

from lm_scale.data.examples import Blocks, Documents
from lm_scale.data.loader import EvalBatches, TrainBatches
from lm_scale.data.mixed import Mixed
from lm_scale.data.mixture import Mixture
from lm_scale.data.store import TokenStore
from lm_scale.errors import InputError
from lm_scale.objectives import CausalLM, MaskedLM, Vocabulary

SIZES = {"web": 60, "books": 9, "code": 5}  # examples of 4 tokens
WEIGHTS = [6, 3, 1]
VOCABULARY = Vocabulary(size=400, special_ids=(0,), mask_id=0, pad_id=0)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Token t of the example e of the source s is 100 * s + e + 1, in a document."""
    found = {}
    for at, (name, size) in enumerate(SIZES.items()):
        path = tmp_path_factory.mktemp(name) / "train"
        write_store(
            path, [np.full(4, 100 * at + e + 1) for e in range(size)], vocab_size=400
        )
        found[name] = TokenStore.open(path)
    return found


def mixed_of(stores) -> Mixed:
    sources = {name: Blocks(store, 4) for name, store in stores.items()}
    return Mixed(sources, Mixture(WEIGHTS, seed=1))


def batches_of(stores, objective=None, batch=8) -> TrainBatches:
    objective = objective or CausalLM()
    return TrainBatches(mixed_of(stores), objective, VOCABULARY, batch=batch, seed=1)


def test_each_source_has_its_share_and_its_own_epochs(stores):
    batches = batches_of(stores)
    steps = 96  # whole windows of the mixture
    tokens = [batches.rows(step, range(8))["tokens"][:, 0] for step in range(steps)]
    tokens = np.concatenate(tokens)
    told = mixed_of(stores).epochs(tokens.size)
    for at, (name, size) in enumerate(SIZES.items()):
        mine = tokens[tokens // 100 == at] % 100 - 1
        assert abs(mine.size - tokens.size * WEIGHTS[at] / 10) < 1
        assert told[name] == mine.size / size
        for first in range(0, mine.size - size + 1, size):  # once in each epoch
            assert sorted(mine[first : first + size]) == list(range(size))
        if mine.size >= 2 * size:
            assert mine[:size].tolist() != mine[size : 2 * size].tolist()


def test_epochs_and_numbers_are_those_of_the_rows(stores):
    batches = batches_of(stores)
    for step in (0, 7, 1000):
        epochs, numbers = batches.place(step, range(8))
        tokens = batches.rows(step, range(8))["tokens"][:, 0]
        for epoch, number, token in zip(epochs, numbers, tokens, strict=True):
            name, source, inside = mixed_of(stores).owner(int(number))
            assert token == 100 * list(SIZES).index(name) + inside + 1
            assert len(source) == SIZES[name] and epoch >= 0
    assert batches.place(1000, range(8))[0].max() > 100  # of the smallest


@pytest.mark.parametrize("step", [0, 11, 1000])
def test_any_rows_are_those_of_the_whole_batch(stores, step):
    whole = batches_of(stores, objective=MaskedLM(probability=0.5)).rows(step, range(8))
    for rows in ([0, 1, 2, 3], [4, 5, 6, 7], [7], [6, 0, 3]):
        again = batches_of(stores, objective=MaskedLM(probability=0.5))
        for name, values in again.rows(step, rows).items():
            np.testing.assert_array_equal(values, whole[name][rows])


def test_the_batch_size_does_not_change_the_order(stores):
    by_8 = [batches_of(stores).place(step, range(8))[1] for step in range(6)]
    by_24 = [batches_of(stores, batch=24).place(s, range(24))[1] for s in range(2)]
    np.testing.assert_array_equal(np.concatenate(by_8), np.concatenate(by_24))


def test_held_out_are_all_examples_of_all_sources_once(stores):
    batches = EvalBatches(mixed_of(stores), CausalLM(), VOCABULARY, batch=8, seed=1)
    tokens = np.concatenate(
        [batches.rows(step, range(8))["tokens"][:, 0] for step in range(len(batches))]
    )
    expected = [100 * s + e + 1 for s, n in enumerate(SIZES.values()) for e in range(n)]
    assert tokens[: len(expected)].tolist() == expected


def test_documents_are_padded_to_the_longest_of_all(tmp_path):
    sources = {}
    for name, length in (("short", 3), ("long", 30)):
        write_store(tmp_path / name, [np.full(length, 7)] * 5, vocab_size=400)
        sources[name] = Documents(
            TokenStore.open(tmp_path / name), 64,
            special_ids=(), pad_to_seq_len=False, multiple=16,
        )  # fmt: skip
    mixed = Mixed(sources, Mixture([1, 1], seed=0))
    batches = TrainBatches(mixed, CausalLM(), VOCABULARY, batch=4, seed=0)
    batch = batches.rows(3, range(4))
    assert batch["tokens"].shape == batch["segments"].shape == (4, 32)
    assert set(batch["segments"].sum(axis=1)) == {3, 30}
    assert mixed.mean_length == 16.5
    blocks = {"a": Blocks(sources["long"].store, 4), "b": sources["short"]}
    with pytest.raises(InputError, match="one kind of examples"):
        Mixed(blocks, Mixture([1, 1], seed=0))
