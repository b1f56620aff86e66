# SPDX-License-Identifier: Apache-2.0
"""`prepare` killed at random moments, again and again, ends with the same bytes."""

import multiprocessing
import random
import signal
import time

import pytest
from rich.console import Console
from stores import content

from lm_scale.data import encoding, texts, units, work
from lm_scale.data.corpus import CorpusConfig
from lm_scale.data.prepare import prepare
from lm_scale.data.tokenizer import TokenizerConfig, train_tokenizer

LINES = [f"Line {i}: the train of thought, number {i * i}.\n" for i in range(1000)]


def make(text: str, tokenizer, out: str, workers: int) -> None:
    """In a process of its own: some fifteen parts, of five units, of both texts."""
    units.UNIT_BYTES, work.PART_TOKENS, texts.BATCH_DOCUMENTS = 1, 2000, 90
    encoding.ALONE = 3000  # characters; then the workers do it
    corpus = CorpusConfig(text, validation_fraction=0.2, drop_duplicates=True)
    prepare(corpus, tokenizer, out, workers=workers, console=Console(quiet=True))


def further(*case):
    return pytest.param(*case, marks=pytest.mark.exhaustive)


@pytest.fixture(scope="module")
def started():
    """Starts `make` in a process that need not import anything."""
    context = multiprocessing.get_context("forkserver")
    modules = ("lm_scale.data.prepare", "transformers.tokenization_utils_tokenizers")
    context.set_forkserver_preload(list(modules))

    def start(*given):
        process = context.Process(target=make, args=given)
        process.start()
        return process

    return start


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "times"), [(1, 6), further(1, 20), further(2, 20)])
def test_at_random_moments(started, tmp_path, workers, times):
    (tmp_path / "text").mkdir()
    for number in range(5):
        lines = LINES[number * 200 : (number + 1) * 200] + LINES[:9]
        (tmp_path / f"text/{number}.txt").write_text("".join(lines))
    tokenizer = train_tokenizer(LINES[::10], TokenizerConfig(vocab_size=280))
    given = [str(tmp_path / "text"), tokenizer]
    alone = started(*given, str(tmp_path / "alone"), workers)
    begun = time.monotonic()
    alone.join()
    whole = time.monotonic() - begun
    assert alone.exitcode == 0
    expected = content(tmp_path / "alone")
    assert len([name for name in expected if name.endswith("part.json")]) > 12

    rng, kills, ends = random.Random(workers), 0, 0
    while kills < times or process.exitcode != 0:
        out = tmp_path / f"run-{ends}"
        process = started(*given, str(out), workers)
        process.join(rng.uniform(0, whole) if kills < times else None)
        process.kill()  # nothing happens if it is through
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        if process.exitcode == 0:
            assert content(out) == expected
            ends += 1
        else:
            kills += 1
