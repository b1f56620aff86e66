# SPDX-License-Identifier: Apache-2.0
"""Which document a token is of, against all offsets at once."""

import numpy as np
import pytest
from stores import write_store

import lm_scale.data.where as module
from lm_scale.data.store import TokenStore
from lm_scale.data.where import Piece, document_at, pieces


def store_of(path, lengths) -> TokenStore:
    write_store(
        path,
        [np.zeros(n, np.int64) for n in lengths],
        vocab_size=9,
        chunk_tokens=16,
        shard_tokens=64,
    )
    return TokenStore.open(path)


@pytest.fixture(scope="module")
def lengths():
    return np.random.default_rng(0).integers(0, 4, 100)  # a quarter are empty


@pytest.fixture(scope="module")
def store(tmp_path_factory, lengths):
    return store_of(tmp_path_factory.mktemp("where") / "s", lengths)


@pytest.mark.parametrize("block", [1, 7, 2048])
def test_each_token_is_of_its_document(store, lengths, block, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", block)
    owners = np.repeat(np.arange(lengths.size), lengths).tolist()
    tokens = range(0, store.num_tokens, 3)
    assert [document_at(store, token) for token in tokens] == owners[::3]


def test_no_token_no_document(store):
    for token in (-1, store.num_tokens):
        with pytest.raises(IndexError, match=f"token {token} of"):
            document_at(store, token)
    with pytest.raises(IndexError):
        pieces(store, 0, store.num_tokens + 1)


def test_pieces_cover_the_tokens_in_order(store, lengths):
    begins = np.concatenate([[0], np.cumsum(lengths)])
    for first in range(0, store.num_tokens - 10, 11):
        for stop in (first + 1, first + 10):
            at = first
            for document, inside, tokens, whole in pieces(store, first, stop):
                assert begins[document] + inside == at and tokens > 0
                assert whole == lengths[document] >= inside + tokens
                at += tokens
            assert at == stop


def test_pieces_of_a_known_store(tmp_path):
    store = store_of(tmp_path / "s", [3, 0, 5, 0, 0, 2])
    assert pieces(store, 2, 9) == [
        Piece(0, 2, 1, 3), Piece(2, 0, 5, 5), Piece(5, 0, 1, 2),
    ]  # fmt: skip


def test_spans_of_documents(store, lengths):
    begins = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    np.testing.assert_array_equal(store.spans(np.arange(100))[:, 0], begins)
    np.testing.assert_array_equal(store.spans([99, 3, 3])[:, 0], begins[[99, 3, 3]])
    with pytest.raises(IndexError):
        store.spans([100])
