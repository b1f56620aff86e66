# SPDX-License-Identifier: Apache-2.0
"""What is told of a store, against numpy on all lengths."""

import io

import numpy as np
import pytest
from rich.console import Console
from stores import write_store

from lm_scale.data.inspect_store import inspect, measure
from lm_scale.data.shown import visible
from lm_scale.data.store import TokenStore

FACTS = {"tokenizer_hash": "abcdef0123456789", "source": {"part": "train"}}


def store_of(path, lengths, separator=None) -> TokenStore:
    write_store(
        path,
        [np.full(n, n % 300) for n in lengths],
        vocab_size=300,
        separator=separator,
        **FACTS,
    )
    return TokenStore.open(path)


def told(store, seq_len=None) -> str:
    out = io.StringIO()  # no terminal: as in a pipe
    inspect(store, None, seq_len, Console(file=out, width=80))
    return out.getvalue()


@pytest.mark.parametrize("count", [1, 2, 999, 1000])
@pytest.mark.parametrize("at_once", [1, 7, 4000])
def test_lengths_are_those_of_numpy(tmp_path, count, at_once):
    if at_once == 1 and count > 2:
        count //= 10
    lengths = np.random.default_rng(count).geometric(0.02, count) - 1
    found = measure(store_of(tmp_path / "s", lengths), at_once)
    values, counts = np.unique(lengths, return_counts=True)
    np.testing.assert_array_equal(found.tokens, values)
    np.testing.assert_array_equal(found.documents, counts)
    assert found.median == np.median(lengths)
    assert found.longest == lengths.argmax()
    for limit in (0, int(np.median(lengths)), int(lengths.max())):
        longer = lengths[lengths > limit]
        assert found.above(limit) == (longer.size, longer.sum())


def test_the_histogram_has_every_document_once(tmp_path):
    lengths = [0, 1, 1, 2, 3, 4, 7, 8, 64, 127]
    rows = measure(store_of(tmp_path / "s", lengths)).histogram()
    assert rows == [
        (0, 0, 1, 0), (1, 1, 2, 2), (2, 3, 2, 5), (4, 7, 2, 11), (8, 15, 1, 8),
        (16, 31, 0, 0), (32, 63, 0, 0), (64, 127, 2, 191),
    ]  # fmt: skip


def test_what_is_printed(tmp_path):
    lengths = [5] * 30 + [700] + [10] * 9
    text = told(store_of(tmp_path / "s", lengths, separator=7), seq_len=128)
    assert "40 documents, 940 tokens" in text
    assert "shortest 5, median 5.0, mean 23.5, longest 700 tokens (document 30)" in text
    assert "1 documents, with 74.5% of the tokens, are longer than seq_len" in text
    assert "abcdef012345" in text and "token 7 at the end" in text
    (row,) = [line for line in text.splitlines() if line.strip().startswith("4-7")]
    assert row.split() == ["4-7", "30", "16.0%", "█" * 30]
    assert "document 0, the first, 5 tokens:\n  5 5 5 5 5\n" in text
    # Of a long document the beginning only.
    assert text.endswith("  " + " ".join(["100"] * 100) + " ...\n")
    assert text == told(TokenStore.open(tmp_path / "s"), seq_len=128)


def test_a_store_without_documents(tmp_path):
    write_store(tmp_path / "s", [], vocab_size=300, **FACTS)
    assert "0 documents, 0 tokens" in told(TokenStore.open(tmp_path / "s"))


def test_no_text_can_steer_the_terminal():
    text = visible("a\x1b[31m b\tc\nd\u202ee\x00 é 語 🙂")
    assert text == "a\\x1b[31m b\\tc⏎d\\u202ee\\x00 é 語 🙂"
