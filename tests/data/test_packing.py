# SPDX-License-Identifier: Apache-2.0
"""Plans of rows: each token once, best fit, kept on disk; and the rows made of them."""

import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import write_store

from lm_scale.data import packing, token_cache
from lm_scale.data.examples import Blocks, Documents, Pieces
from lm_scale.data.loader import EvalBatches, TrainBatches
from lm_scale.data.packing import best_fit, open_plan, packed, segmented
from lm_scale.data.store import TokenStore
from lm_scale.data.token_cache import TokenCache
from lm_scale.errors import InputError
from lm_scale.objectives import IGNORE, CausalLM, MaskedLM, Vocabulary

few = settings(derandomize=True, max_examples=60, deadline=None, database=None)
SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=30)
SEQ, SIZES_OF_STORE = 16, (3, 0, 21, 9, 5, 1, 7, 16, 4, 50, 6, 0, 8, 2)
VOCABULARY = Vocabulary(300, (0, 1, 2), mask_id=2, pad_id=1)


def offsets_of(sizes):
    return np.cumsum([0, *sizes]).astype(np.int64)


def spans_of(plan):
    """(row, first token, last + 1) of each piece."""
    rows = np.repeat(np.arange(len(plan)), np.diff(plan.rows))
    return list(zip(rows, plan.starts, plan.starts + plan.lengths, strict=True))


def covered(plan, tokens):
    """How often each token is in a row."""
    times = np.zeros(tokens, int)
    for _, start, stop in spans_of(plan):
        times[start:stop] += 1
    return times


def assert_within_documents(plan, offsets, seq_len):
    for _, start, stop in spans_of(plan):
        document = np.searchsorted(offsets, start, side="right") - 1
        assert start < stop <= offsets[document + 1]
    room = np.add.reduceat(plan.lengths, plan.rows[:-1]) if len(plan) else np.zeros(0)
    assert (room <= seq_len).all()


# --- Plans ----------------------------------------------------------------------------


@few
@given(SIZES, st.integers(1, 25))
def test_packed_rows_hold_each_token_once(sizes, seq_len):
    offsets = offsets_of(sizes)
    plan = packed(offsets, seq_len)
    assert (covered(plan, offsets[-1]) == 1).all() and plan.tokens == offsets[-1]
    assert_within_documents(plan, offsets, seq_len)
    # Whole, but for those that no row could hold.
    pieces = sum(-(-size // seq_len) for size in sizes)
    assert plan.starts.size == pieces


@few
@given(SIZES, st.integers(1, 25))
def test_segmented_rows_hold_each_token_once_but_the_last_few(sizes, seq_len):
    offsets = offsets_of(sizes)
    plan = segmented(offsets, seq_len)
    rows = offsets[-1] // seq_len
    times = covered(plan, offsets[-1])
    assert len(plan) == rows and plan.tokens == rows * seq_len
    assert (times[: rows * seq_len] == 1).all() and not times[rows * seq_len :].any()
    assert_within_documents(plan, offsets, seq_len)
    starts = [int(start) for _, start, _ in spans_of(plan)]
    wanted = {*range(0, rows * seq_len, seq_len), *offsets[offsets < rows * seq_len]}
    assert starts == sorted(wanted)  # no cut that need not be


def one_by_one(lengths, room):
    """Best-fit-decreasing as the paper has it: the contents of the rows."""
    rows = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row in rows if sum(row) + length <= room]
        row = max(fitting, key=sum, default=None)
        if row is None:
            rows.append(row := [])
        row.append(length)
    return sorted(sorted(row) for row in rows)


@few
@given(st.lists(st.integers(1, 20), max_size=60))
def test_best_fit_is_that_of_one_piece_after_another(lengths):
    rows = best_fit(np.array(lengths, np.int64), 20)
    found = {}
    for row, length in zip(rows.tolist(), lengths, strict=True):
        found.setdefault(row, []).append(length)
    assert sorted(found) == list(range(len(found)))
    # Rows that are equally full may hold other pieces, so only their sums count.
    expected = sorted(sum(row) for row in one_by_one(lengths, 20))
    assert sorted(sum(row) for row in found.values()) == expected


def test_many_documents_of_text_like_lengths_fill_their_rows():
    """Concatenated they would be cut: 1 of 4 documents at rows of 2048 tokens."""
    sizes = np.random.default_rng(0).lognormal(5.5, 1.2, 50_000).astype(int)
    plan = packed(offsets_of(sizes), 2048)
    assert plan.tokens == sizes.sum()
    assert plan.tokens / (len(plan) * 2048) > 0.999


# --- On disk --------------------------------------------------------------------------


def tokens_of_store():
    return np.arange(sum(SIZES_OF_STORE)) + 10


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Token t at place t, plus 10."""
    path = tmp_path_factory.mktemp("packing") / "train"
    write_store(
        path,
        np.split(tokens_of_store(), offsets_of(SIZES_OF_STORE)[1:-1]),
        vocab_size=300,
    )
    return TokenStore.open(path)


def assert_same_plan(a, b):
    for name in ("starts", "lengths", "rows"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


@pytest.mark.parametrize("kind", ["packed", "segmented"])
def test_a_plan_is_made_once(store, tmp_path, kind, monkeypatch):
    made = open_plan(store, kind, SEQ, tmp_path / "plans")
    expected = getattr(packing, kind)(offsets_of(SIZES_OF_STORE), SEQ)
    assert_same_plan(made, expected)
    assert os.listdir(tmp_path / "plans") == [f"{kind}-16-{store.manifest.sha256[:16]}"]
    monkeypatch.setattr(packing, kind, None)  # not to be called again
    again = open_plan(store, kind, SEQ, tmp_path / "plans")
    assert_same_plan(again, expected)
    assert isinstance(again.starts, np.memmap)


@pytest.mark.parametrize("harm", ["other store", "cut short", "gone"])
def test_a_plan_that_does_not_fit_is_made_anew(store, tmp_path, harm):
    expected = open_plan(store, "packed", SEQ, tmp_path)
    (folder,) = tmp_path.iterdir()
    if harm == "other store":
        note = json.loads((folder / "plan.json").read_text())
        (folder / "plan.json").write_text(json.dumps(note | {"sha256": "0"}))
        np.save(folder / "starts.npy", np.zeros(len(expected.starts), np.int64))
    elif harm == "cut short":
        path = folder / "lengths.npy"
        path.write_bytes(path.read_bytes()[:-4])
    else:
        (folder / "rows.npy").unlink()
    assert_same_plan(
        open_plan(store, "packed", SEQ, tmp_path),
        packed(offsets_of(SIZES_OF_STORE), SEQ),
    )
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_written_is_told(store, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="plan of rows cannot be written to"):
        open_plan(store, "packed", SEQ, tmp_path / "file")


# --- Spans ----------------------------------------------------------------------------


@few
@given(
    st.lists(st.tuples(st.integers(0, 131), st.integers(0, 131)), max_size=8),
    st.integers(1, 40),
)
def test_spans_are_those_of_the_store(store, ends, window):
    cache, tokens = TokenCache(store, window=window), tokens_of_store()
    assert tokens.size == 132
    starts = np.array([min(pair) for pair in ends], np.int64)
    stops = np.array([max(pair) for pair in ends], np.int64)
    for _ in range(2):  # the second time from memory
        found = cache.spans(starts, stops - starts)
        expected = [tokens[a:b] for a, b in zip(starts, stops, strict=True)]
        np.testing.assert_array_equal(found, np.concatenate([[], *expected]))
        assert found.dtype == np.int32


def test_windows_that_stay_are_few(store, monkeypatch):
    monkeypatch.setattr(token_cache, "BYTES", 3 * 10 * 2)  # of ten uint16
    cache = TokenCache(store, window=10)
    for start in range(0, 130, 7):
        cache.spans(np.array([start]), np.array([2]))
        assert len(cache._windows) <= 3
    kept = list(cache._windows)
    monkeypatch.setattr(store, "read_blocks", None)  # nothing is read again
    cache.spans(np.array(kept) * 10, np.full(3, 2))


def test_spans_outside_are_refused(store):
    for start, length in ((-1, 3), (130, 3)):
        with pytest.raises(IndexError, match="in a store of 132 tokens"):
            TokenCache(store).spans(np.array([start]), np.array([length]))


# --- Batches --------------------------------------------------------------------------

KINDS = ("blocks", "segmented", "packed", "documents")
OBJECTIVES = {"clm": CausalLM(), "mlm": MaskedLM(0.4),
              "fixed": MaskedLM(0.4, fixed_count=True)}  # fmt: skip


def source_of(store, kind):
    if kind == "blocks":
        return Blocks(store, SEQ)
    if kind == "documents":
        options = {"special_ids": (0, 1, 2), "pad_to_seq_len": False, "multiple": 4}
        return Documents(store, 64, **options)
    make = {"packed": packed, "segmented": segmented}[kind]
    return Pieces(store, SEQ, make(offsets_of(SIZES_OF_STORE), SEQ))


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_is_seen_once_an_epoch(store, kind):
    """In each of two epochs, the second in another order."""
    source = source_of(store, kind)
    batches = TrainBatches(source, CausalLM(), VOCABULARY, batch=3, seed=0)
    rows = []
    for step in range(-(-2 * len(source) // 3)):
        batch = batches.rows(step, range(3))
        real = batch.get("segments", np.ones_like(batch["tokens"])) > 0
        rows += [tokens[r] for tokens, r in zip(batch["tokens"], real, strict=True)]
    first, second = rows[: len(source)], rows[len(source) : 2 * len(source)]
    whole = tokens_of_store()
    if kind in ("blocks", "segmented"):
        whole = whole[: whole.size // SEQ * SEQ]  # the stated remainder
    for epoch in (first, second):
        np.testing.assert_array_equal(np.sort(np.concatenate(epoch)), whole)
    assert any(not np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("kind", ["segmented", "packed"])
def test_segments_positions_and_labels_stop_at_a_documents_end(store, kind):
    batches = EvalBatches(
        source_of(store, kind), CausalLM(), VOCABULARY, batch=20, seed=0
    )
    batch = batches.rows(0, range(len(batches.source)))
    edges = offsets_of(SIZES_OF_STORE)
    for tokens, labels, segments, positions in zip(
        *(batch[n] for n in ("tokens", "labels", "segments", "positions")), strict=True
    ):
        real = segments > 0
        assert (tokens[~real] == 1).all() and (labels[~real] == IGNORE).all()
        document = np.searchsorted(edges, tokens[real] - 10, side="right")
        starts = np.flatnonzero(np.diff(segments[real], prepend=0))
        # A segment is one stretch of one document.
        assert segments[real][starts].tolist() == list(range(1, starts.size + 1))
        for place in np.flatnonzero(real):
            begin = starts[segments[place] - 1]
            assert document[place] == document[begin]
            assert positions[place] == place - begin == tokens[place] - tokens[begin]
            last = place + 1 == SEQ or segments[place + 1] != segments[place]
            assert labels[place] == (IGNORE if last else tokens[place] + 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_1_2_and_4_processes_make_the_same_batches(store, kind, objective):
    """Before and at an epoch's edge, where a resumed run begins anew, twice over."""

    def batches():
        return TrainBatches(
            source_of(store, kind), OBJECTIVES[objective], VOCABULARY, batch=4, seed=3
        )

    whole = batches()
    edge = len(whole.source) // 4
    for step in (edge - 1, edge, edge + 1, 2 * edge, 1000):
        expected = whole.rows(step, range(4))
        for processes in (1, 2, 4):
            for rows in np.array_split(np.arange(4), processes):
                found = batches().rows(step, rows.tolist())
                assert set(found) == set(expected)
                for name, value in expected.items():
                    np.testing.assert_array_equal(found[name], value[rows])
                    assert found[name].dtype == np.int32
