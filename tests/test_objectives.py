# SPDX-License-Identifier: Apache-2.0
"""Tokens -> examples: what is asked, and that the noise is a pure function."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_scale.errors import InputError
from lm_scale.objectives import (
    IGNORE,
    NOWHERE,
    CausalLM,
    MaskedLM,
    NoiseKeys,
    Vocabulary,
)

SPECIAL = (1, 2, 3, 4)
MASK = 4
VOCABULARY = Vocabulary(size=61, special_ids=SPECIAL, mask_id=MASK)
KEY = (42, 3, 17)  # seed, epoch, example number


def text(length, *, seed=0, special=True):
    """int32 tokens of the whole vocabulary, or without the special ones."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCABULARY.size, length).astype(np.int32)
    return tokens if special else tokens[~np.isin(tokens, SPECIAL)]


def example(objective, tokens, key=KEY, vocabulary=VOCABULARY):
    """Of one row."""
    seed, epoch, number = key
    keys = NoiseKeys(seed, np.array([epoch]), np.array([number]))
    rows = objective.examples(tokens[None], vocabulary, keys)
    return {name: x[0] for name, x in rows.items()}


def within_four_sigma(count, total, share):
    """`count` of `total` independent draws of probability `share`."""
    sigma = math.sqrt(total * share * (1 - share))
    return abs(count - total * share) <= 4 * sigma


# --- Causal LM ------------------------------------------------------------------------


def test_clm_labels_are_the_next_tokens():
    tokens = np.array([5, 0, 7, 2], np.int32)
    made = example(CausalLM(), tokens)
    np.testing.assert_array_equal(made["tokens"], [5, 0, 7, 2])
    np.testing.assert_array_equal(made["labels"], [0, 7, 2, IGNORE])
    assert made["labels"].dtype == np.int32
    np.testing.assert_array_equal(tokens, [5, 0, 7, 2])  # the input is left alone


def test_clm_of_one_token_asks_nothing():
    made = example(CausalLM(), np.array([5], np.int32))
    np.testing.assert_array_equal(made["labels"], [IGNORE])


def test_clm_takes_any_vocabulary():
    CausalLM().check(dataclasses.replace(VOCABULARY, mask_id=None))


# --- Masked LM ------------------------------------------------------------------------


def test_mlm_is_a_function_of_seed_epoch_and_number():
    tokens = text(500)
    once = example(MaskedLM(), tokens)
    again = example(MaskedLM(), tokens.copy())
    for name in ("tokens", "labels"):
        np.testing.assert_array_equal(once[name], again[name])
        assert once[name].dtype == np.int32 and once[name].shape == tokens.shape
    # Each part of the key matters, and they do not stand in for one another.
    others = [(43, 3, 17), (42, 4, 17), (42, 3, 18), (42, 17, 3), (3, 42, 17)]
    noises = [example(MaskedLM(), tokens, key)["labels"] for key in others]
    for i, noise in enumerate([once["labels"], *noises]):
        for other in noises[i:]:
            assert not np.array_equal(noise, other)


def test_mlm_noise_of_neighbours_is_independent():
    """No shifted copy: example n + 1 must not go on where example n's stream ends."""
    tokens = text(4000, special=False)
    size = tokens.size
    chosen = [
        example(MaskedLM(), tokens, (42, epoch, number))["labels"] != IGNORE
        for epoch, number in ((0, 0), (0, 1), (1, 0))
    ]
    for a in range(3):
        for b in range(a + 1, 3):
            for shift in range(-8, 9):
                both = np.sum(chosen[a] & np.roll(chosen[b], shift))
                assert within_four_sigma(both, size, 0.15**2), (a, b, shift)


def test_mlm_statistics():
    """15 % are chosen; of those 80 % become the mask, 10 % any token, 10 % stay."""
    tokens = text(200_000, special=False)
    made = example(MaskedLM(), tokens)
    chosen = made["labels"] != IGNORE
    hidden = made["tokens"][chosen]
    total = int(chosen.sum())
    assert within_four_sigma(total, tokens.size, 0.15)
    assert (tokens[chosen] != MASK).all()  # so a mask there comes from the objective
    # "Any token" is the mask or the token itself once in 61 times.
    size = VOCABULARY.size
    masked = np.sum(hidden == MASK)
    kept = np.sum(hidden == tokens[chosen])
    assert within_four_sigma(masked, total, 0.8 + 0.1 / size)
    assert within_four_sigma(kept, total, 0.1 + 0.1 / size)
    swapped = total - masked - kept
    assert within_four_sigma(swapped, total, 0.1 * (size - 2) / size)


@pytest.mark.parametrize(
    ("masked", "random"), [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (0.5, 0.5)]
)
def test_mlm_with_other_shares(masked, random):
    tokens = text(50_000, special=False)
    objective = MaskedLM(probability=0.4, masked=masked, random=random)
    made = example(objective, tokens)
    chosen = made["labels"] != IGNORE
    total, hidden = int(chosen.sum()), made["tokens"][chosen]
    assert within_four_sigma(total, tokens.size, 0.4)
    # An expected share of 0 or 1 leaves no room at all.
    share = masked + random / VOCABULARY.size
    assert within_four_sigma(np.sum(hidden == MASK), total, share)
    share = (1 - masked - random) + random / VOCABULARY.size
    assert within_four_sigma(np.sum(hidden == tokens[chosen]), total, share)


def test_mlm_labels_are_the_original_tokens_and_the_rest_is_unchanged():
    tokens = text(20_000)
    made = example(MaskedLM(), tokens)
    chosen = made["labels"] != IGNORE
    np.testing.assert_array_equal(made["labels"][chosen], tokens[chosen])
    np.testing.assert_array_equal(made["tokens"][~chosen], tokens[~chosen])
    assert (made["labels"][~chosen] == IGNORE).all()
    np.testing.assert_array_equal(tokens, text(20_000))  # the input is left alone


def test_mlm_never_chooses_special_tokens():
    tokens = text(20_000)
    assert np.isin(tokens, SPECIAL).sum() > 1000
    labels = example(MaskedLM(probability=0.9), tokens)["labels"]
    assert not np.isin(labels, SPECIAL).any()
    only_special = np.full(100, 2, np.int32)
    made = example(MaskedLM(probability=0.9), only_special)
    assert (made["labels"] == IGNORE).all()
    np.testing.assert_array_equal(made["tokens"], only_special)


def test_mlm_every_token_that_is_not_special_can_be_a_target():
    labels = example(MaskedLM(), text(20_000))["labels"]
    expected = set(range(VOCABULARY.size)) - set(SPECIAL)  # token 0 among them
    assert set(labels[labels != IGNORE].tolist()) == expected


def test_mlm_random_tokens_cover_the_whole_vocabulary_evenly():
    tokens = text(60_000, special=False)
    objective = MaskedLM(probability=0.9, masked=0.0, random=1.0)
    made = example(objective, tokens)
    drawn = made["tokens"][made["labels"] != IGNORE]
    counts = np.bincount(drawn, minlength=VOCABULARY.size)
    assert counts.size == VOCABULARY.size  # none beyond it
    for count in counts:
        assert within_four_sigma(count, drawn.size, 1 / VOCABULARY.size)


def test_mlm_needs_a_mask_token():
    MaskedLM().check(VOCABULARY)
    with pytest.raises(InputError, match="mask token"):
        MaskedLM().check(dataclasses.replace(VOCABULARY, mask_id=None))


def test_mlm_takes_a_mask_token_with_id_0():
    vocabulary = Vocabulary(size=61, special_ids=(0,), mask_id=0)
    MaskedLM().check(vocabulary)
    tokens = np.full(200, 7, np.int32)
    hidden = example(MaskedLM(), tokens, vocabulary=vocabulary)["tokens"]
    assert (hidden == 0).any()


@pytest.mark.parametrize(
    "fields",
    [
        {"probability": 0.0},
        {"probability": 1.0},
        {"probability": -0.1},
        {"probability": 15.0},
        {"masked": 1.2},
        {"random": -0.1},
        {"masked": 0.8, "random": 0.3},
    ],
)
def test_mlm_bad_probabilities_are_refused(fields):
    name, value = list(fields.items())[-1]
    with pytest.raises(InputError, match=f"{name} = {value}"):
        MaskedLM(**fields)


# --- Any rows of any lengths ----------------------------------------------------------

few = settings(derandomize=True, max_examples=40, deadline=None, database=None)


@st.composite
def batches(draw):
    """Rows with padding and special tokens, an objective, and keys."""
    rows, width = draw(st.integers(1, 6)), draw(st.integers(1, 70))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    tokens = rng.integers(0, VOCABULARY.size, (rows, width)).astype(np.int32)
    lengths = rng.integers(0, width + 1, rows)
    segments = (np.arange(width) < lengths[:, None]).astype(np.int32)
    objective = MaskedLM(
        probability=draw(st.sampled_from([0.01, 0.15, 0.5, 0.99])),
        fixed_count=draw(st.booleans()),
    )
    seed = draw(st.integers(0, 2**63 - 1))
    keys = NoiseKeys(seed, rng.integers(0, 9, rows), rng.integers(0, 2**40, rows))
    return tokens, segments, objective, keys


@few
@given(batches())
def test_what_holds_for_any_row(batch):
    tokens, segments, objective, keys = batch
    made = objective.examples(tokens, VOCABULARY, keys, segments)
    chosen = made["labels"] != IGNORE
    can_be = (segments > 0) & ~np.isin(tokens, SPECIAL)
    assert not (chosen & ~can_be).any()
    np.testing.assert_array_equal(made["labels"][chosen], tokens[chosen])
    np.testing.assert_array_equal(made["tokens"][~chosen], tokens[~chosen])
    assert (made["tokens"] >= 0).all() and (made["tokens"] < VOCABULARY.size).all()
    if objective.fixed_count:
        count, share = can_be.sum(axis=1), objective.probability
        wanted = np.maximum(np.round(share * count), np.minimum(count, 1))
        np.testing.assert_array_equal(chosen.sum(axis=1), wanted)
        most = max(1, round(share * tokens.shape[1]))
        assert made["masked_positions"].shape == (len(tokens), most)
        for row, places in zip(chosen, made["masked_positions"], strict=True):
            at = np.flatnonzero(row).tolist()
            assert places.tolist() == at + [NOWHERE] * (most - len(at))


@few
@given(batches(), st.integers(0, 40))
def test_a_row_is_the_same_beside_any_others_and_before_any_padding(batch, more):
    tokens, segments, objective, keys = batch
    whole = objective.examples(tokens, VOCABULARY, keys, segments)
    for row in range(len(tokens)):
        one = NoiseKeys(keys.seed, keys.epochs[[row]], keys.numbers[[row]])
        pad = ((0, 0), (0, more))
        alone = objective.examples(
            np.pad(tokens[[row]], pad), VOCABULARY, one, np.pad(segments[[row]], pad)
        )
        for name in ("tokens", "labels"):
            found = alone[name][0, : tokens.shape[1]]
            np.testing.assert_array_equal(found, whole[name][row])


def test_each_place_is_chosen_as_often_by_a_fixed_count():
    """5 of 32 places, in 4000 rows: every place, and pairs of places no more often."""
    rows = np.full((4000, 32), 9, np.int32)
    keys = NoiseKeys(1, np.zeros(4000, np.int64), np.arange(4000))
    labels = MaskedLM(fixed_count=True).examples(rows, VOCABULARY, keys)["labels"]
    chosen = labels != IGNORE
    assert (chosen.sum(axis=1) == 5).all()
    for count in chosen.sum(axis=0):
        assert within_four_sigma(count, 4000, 5 / 32)
    for shift in (1, 2, 16):
        pairs = np.sum(chosen & np.roll(chosen, shift, axis=1))
        assert within_four_sigma(pairs, chosen.size, 5 / 32 * 4 / 31)


def test_a_fixed_count_has_the_same_fates():
    """80 % masked, 10 % any token, 10 % as they are."""
    rows = np.full((400, 512), 9, np.int32)
    keys = NoiseKeys(1, np.zeros(400, np.int64), np.arange(400))
    made = MaskedLM(fixed_count=True).examples(rows, VOCABULARY, keys)
    hidden = made["tokens"][made["labels"] != IGNORE]
    assert hidden.size == 400 * 77  # 76.8, rounded
    size = VOCABULARY.size
    assert within_four_sigma(np.sum(hidden == MASK), hidden.size, 0.8 + 0.1 / size)
    assert within_four_sigma(np.sum(hidden == 9), hidden.size, 0.1 + 0.1 / size)


def test_clm_labels_stop_at_the_end_of_a_segment():
    tokens = np.arange(10, 18, dtype=np.int32)[None]
    segments = np.array([[1, 1, 2, 3, 3, 3, 0, 0]], np.int32)
    keys = NoiseKeys(0, np.zeros(1, np.int64), np.zeros(1, np.int64))
    labels = CausalLM().examples(tokens, VOCABULARY, keys, segments)["labels"]
    none = IGNORE
    assert labels.tolist() == [[11, none, none, 14, 15, none, none, none]]


@pytest.mark.parametrize("width", [3, 7, 128])
def test_the_head_works_where_the_batch_says(width):
    assert CausalLM().head_share(width) == MaskedLM().head_share(width) == 1.0
    fixed = MaskedLM(fixed_count=True)
    (places,) = example(fixed, text(width))["masked_positions"].shape
    assert fixed.head_share(width) == places / width
