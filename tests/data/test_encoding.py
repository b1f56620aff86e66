# SPDX-License-Identifier: Apache-2.0
"""Worker processes: the same tokens in the same order; the death of one is an error."""

import multiprocessing
import os
import signal
from concurrent.futures import wait

import numpy as np
import pytest

from lm_scale.data import encoding
from lm_scale.data.encoding import Encoder, Encoders, Spec, Texts, WorkerDied
from lm_scale.data.tokenizer import TokenizerConfig, train_tokenizer

LINES = [f"Line {i}: a thought, number {i * i}.\n" for i in range(200)]


@pytest.fixture(scope="module")
def spec() -> Spec:
    tokenizer = train_tokenizer(LINES, TokenizerConfig(vocab_size=280))
    return Spec(tokenizer.backend_tokenizer.to_str(), 0, "uint16")


def test_workers_give_the_same_in_order_and_their_death_is_an_error(spec, monkeypatch):
    monkeypatch.setattr(encoding, "ALONE", 100)  # the first batches are encoded here
    batches = [Texts(LINES[i : i + 7]) for i in range(0, 200, 7)]
    batches[9:9] = [Texts([])]
    encoder = Encoder(spec)
    before = dict(os.environ)
    with Encoders[int](spec, workers=2) as encoders:
        for _ in range(2):  # the pool stays for the next store
            wait(encoders._begun)  # so that the second time the workers encode
            found = list(encoders.map(enumerate(batches)))
            assert [number for number, _ in found] == list(range(len(batches)))
            for (_, tokens), batch in zip(found, batches, strict=True):
                expected = encoder(batch)
                np.testing.assert_array_equal(tokens.tokens, expected.tokens)
                np.testing.assert_array_equal(tokens.lengths, expected.lengths)
        assert dict(os.environ) == before
        workers = multiprocessing.active_children()
        assert len(workers) == 2
        os.kill(workers[0].pid, signal.SIGKILL)
        with pytest.raises(WorkerDied, match="fewer .data.workers"):
            while True:  # the other one may be through before the pool looks
                list(encoders.map(enumerate(batches)))
    assert not multiprocessing.active_children()


def test_leaving_ends_the_workers(spec, monkeypatch):
    """At once, whatever is under way, as after Ctrl-C."""
    monkeypatch.setattr(encoding, "ALONE", 0)
    batches = [Texts(LINES)] * 50
    with pytest.raises(KeyboardInterrupt):
        with Encoders[int](spec, workers=1 + 1) as encoders:
            for number, _ in encoders.map(enumerate(batches)):
                if number == 1:
                    raise KeyboardInterrupt
    assert not multiprocessing.active_children()


def test_text_that_looks_like_a_special_token_stays_text(spec):
    found = Encoder(spec)(Texts(["<|endoftext|>"]))
    assert np.count_nonzero(found.tokens == 0) == 1  # the separator
