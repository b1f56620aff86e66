# SPDX-License-Identifier: Apache-2.0
"""Blocks and documents as examples, and the batches that are made of documents."""

import jax
import numpy as np
import pytest
from stores import write_store

from lm_scale.data.examples import Blocks, Documents
from lm_scale.data.loader import EvalBatches, TrainBatches, device_batches
from lm_scale.data.store import TokenStore
from lm_scale.errors import InputError
from lm_scale.objectives import IGNORE, MaskedLM, Vocabulary
from lm_scale.sharding import MeshShape, Rules, make_mesh

BOS, PAD, EOS, MASK = 0, 1, 2, 4
VOCABULARY = Vocabulary(300, (BOS, PAD, EOS, 3, MASK), mask_id=MASK, pad_id=PAD)
LENGTHS = (3, 40, 17, 33, 5, 16, 2)
SEQ = 33


def document(number: int) -> np.ndarray:
    """<s>, words that tell document and place, </s>."""
    words = 10 + number * 40 + np.arange(LENGTHS[number] - 2)
    return np.concatenate([[BOS], words, [EOS]])


def write(path, documents) -> TokenStore:
    write_store(path, documents, vocab_size=300)
    return TokenStore.open(path)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("examples") / "train"
    return write(path, [document(i) for i in range(len(LENGTHS))])


def documents(store, *, seq_len=SEQ, pad=False, multiple=16, most=None):
    return Documents(
        store, seq_len, special_ids=VOCABULARY.special_ids, pad_to_seq_len=pad,
        multiple=multiple, most=most,
    )  # fmt: skip


def test_a_document_is_cut_as_the_tokenizer_cuts_it(store):
    """The end-of-text token stays, as with `truncation=True` in transformers."""
    rows = documents(store).read(np.array([0, 1, 3]), SEQ, PAD)
    short, cut, exact = rows.tokens
    np.testing.assert_array_equal(short, [*document(0), *[PAD] * (SEQ - LENGTHS[0])])
    np.testing.assert_array_equal(cut, [*document(1)[: SEQ - 1], EOS])
    np.testing.assert_array_equal(exact, document(3))


def test_a_document_without_a_last_special_token_is_just_cut(tmp_path):
    store = write(tmp_path / "s", [np.arange(100, 110)])
    (tokens,) = documents(store, seq_len=4).read(np.array([0]), 4, PAD).tokens
    assert tokens.tolist() == [100, 101, 102, 103]


@pytest.mark.parametrize(
    ("numbers", "width"),
    [([0, 4], 16), ([5], 16), ([0, 2], 32), ([3], 33), ([1, 0], 33)],
)
def test_the_width_is_that_of_the_longest(store, numbers, width):
    assert documents(store).width(np.array(numbers)) == width
    assert documents(store, pad=True).fixed_width == SEQ


def test_most_limits_both_kinds(store):
    assert len(documents(store)) == len(LENGTHS)
    assert len(documents(store, most=3)) == 3
    assert len(documents(store, most=99)) == len(LENGTHS)
    assert len(Blocks(store, 8)) == sum(LENGTHS) // 8
    assert len(Blocks(store, 8, most=2)) == 2


def test_mean_length_counts_real_tokens(store):
    assert documents(store).mean_length == pytest.approx(sum(LENGTHS) / len(LENGTHS))
    assert Blocks(store, 8).mean_length == 8


def test_an_empty_store_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no document"):
        documents(write(tmp_path / "s", []))


@pytest.mark.parametrize("pad", [False, True])
def test_rows_are_padded_and_marked(store, pad):
    source = documents(store, pad=pad, most=5)
    batches = EvalBatches(source, MaskedLM(), VOCABULARY, batch=5, seed=0)
    batch = batches.rows(0, range(5))
    assert {x.shape for x in batch.values()} == {(5, SEQ)}
    for row, length in enumerate(LENGTHS[:5]):
        length = min(length, SEQ)
        assert batch["segments"][row].tolist() == [1] * length + [0] * (SEQ - length)
        assert (batch["tokens"][row, length:] == PAD).all()
        assert (batch["labels"][row, length:] == IGNORE).all()
        # Special tokens are never to be predicted.
        assert batch["labels"][row, 0] == batch["labels"][row, length - 1] == IGNORE


def test_padding_changes_nothing_but_the_padding(store):
    """The same masks, however wide the batch."""
    few = [0, 4]
    objective = MaskedLM(probability=0.5)
    narrow = TrainBatches(documents(store), objective, VOCABULARY, batch=2, seed=3)
    wide = TrainBatches(
        documents(store, pad=True), objective, VOCABULARY, batch=2, seed=3
    )
    a = narrow.make(np.zeros(2, np.int64), np.array(few), 16)
    b = wide.make(np.zeros(2, np.int64), np.array(few), SEQ)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name][:, :16])
    assert (a["labels"] != IGNORE).any()


def test_rows_made_apart_have_the_width_of_the_whole_batch(store):
    """As on several hosts, of which one has the short documents only."""
    batches = TrainBatches(documents(store), MaskedLM(), VOCABULARY, batch=6, seed=1)
    for step in range(4):
        whole = batches.rows(step, range(6))
        for row in range(6):
            part = batches.rows(step, [row])
            for name in whole:
                np.testing.assert_array_equal(part[name], whole[name][[row]])


def test_device_batches_of_changing_width(store):
    """Widths follow the documents, and stay divisible by the mesh's context axis."""
    mesh = make_mesh(MeshShape(data=2, context=4))
    source = documents(store, seq_len=64, multiple=16)
    batches = TrainBatches(source, MaskedLM(), VOCABULARY, batch=2, seed=0)
    widths = set()
    steps = device_batches(batches, mesh, Rules(), start=0, stop=8)
    for step, batch in enumerate(steps):
        expected = batches.rows(step, range(2))
        for name, value in batch.items():
            np.testing.assert_array_equal(jax.device_get(value), expected[name])
        widths.add(batch["tokens"].shape[1])
    assert widths == {16, 32, 48}
