# SPDX-License-Identifier: Apache-2.0
"""Damaged files: an InputError or a right result; nothing hangs, nothing is lost.

A few rounds in CI; for more: `LM_SCALE_FUZZ=1000 pytest tests/data/test_fuzz.py`, from
another beginning each time with LM_SCALE_FUZZ_SEED.
"""

import csv
import json
import os
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from rich.console import Console
from stores import read_documents, write_store

from lm_scale.data.corpus import CorpusConfig, documents
from lm_scale.data.prepare import prepare
from lm_scale.data.store import TokenStore
from lm_scale.data.tokenizer import (
    TokenizerConfig,
    load_tokenizer,
    tokenizer_hash,
    train_tokenizer,
)
from lm_scale.errors import InputError

ROUNDS = int(os.environ.get("LM_SCALE_FUZZ", "6"))
SEED = int(os.environ.get("LM_SCALE_FUZZ_SEED", "0"))
TEXTS = [f'Line {i}, é and 語, of {i * i} words\tand "more".\n' for i in range(60)]
SECONDS = 30  # after which a case hangs


def damaged(good: bytes, rng: np.random.Generator) -> bytes:
    """The bytes with a random mishap."""
    data = bytearray(good)
    at = int(rng.integers(0, len(data)))
    match rng.integers(0, 6):
        case 0:  # nothing of it is left
            return rng.bytes(int(rng.integers(0, 300)))
        case 1:  # the writer was cut short
            return bytes(data[:at])
        case 2:
            for place in rng.integers(0, len(data), int(rng.integers(1, 4))):
                data[place] ^= 1 << int(rng.integers(0, 8))
        case 3:
            data[at : at + 40] = rng.bytes(int(rng.integers(0, 80)))
        case 4:  # a block of zeros, as after a power failure
            data[at : at + 64] = bytes(len(data[at : at + 64]))
        case 5:  # a piece twice
            data[at:at] = data[at : at + int(rng.integers(1, 200))]
    return bytes(data)


def cases(name: str):
    for number in range(ROUNDS):
        yield np.random.default_rng([SEED, number, *name.encode()])


@pytest.fixture(autouse=True)
def nothing_hangs():
    def tell(*_):
        raise AssertionError(f"it hangs: {SECONDS} s")

    before = signal.signal(signal.SIGALRM, tell)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def attempt(function, *given, **options):
    """What it returns, or its InputError; any other error is the test's."""
    signal.alarm(SECONDS)
    try:
        return function(*given, **options)
    except InputError as error:
        assert len(str(error)) < 2_000 and "Traceback" not in str(error)
        return error
    finally:
        signal.alarm(0)


def texts_of(corpus: CorpusConfig, **options) -> list[str]:
    return list(documents(corpus, "train", **options))


def snapshot(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def write_text(path: Path) -> bytes:
    """A good file of the kind that its name says."""
    rows = {"text": TEXTS, "number": list(range(len(TEXTS)))}
    if path.suffix == ".txt":
        path.write_text("".join(TEXTS))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    elif path.suffix == ".json":
        path.write_text(json.dumps([{"text": t} for t in TEXTS]))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows(
                [("text", "number"), *zip(TEXTS, rows["number"], strict=True)]
            )
    else:
        parquet.write_table(pa.table(rows), path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, TokenizerConfig(vocab_size=300))


@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "csv", "parquet"])
def test_a_damaged_corpus(kind, tokenizer, tmp_path):
    path = tmp_path / f"corpus.{kind}"
    good = write_text(path)
    kept = tmp_path / "kept"
    corpus = CorpusConfig(source=str(path), validation_fraction=0.2)
    prepare(corpus, tokenizer, kept, console=Console(quiet=True))
    before = snapshot(kept)
    for number, rng in enumerate(cases(kind)):
        path.write_bytes(bad := damaged(good, rng))
        texts = attempt(texts_of, corpus)
        if not isinstance(texts, InputError):
            assert all(isinstance(text, str) and text for text in texts)
        out = tmp_path / f"out{number}"
        made = attempt(prepare, corpus, tokenizer, out, console=Console(quiet=True))
        for part in ("train", "validation"):  # whole, or not there
            if (out / part).exists():
                store = TokenStore.open(out / part)
                store.read(0, store.num_tokens)
        if isinstance(texts, InputError) or not texts:  # all may be held out
            assert isinstance(made, InputError) and not (out / "train").exists()
        attempt(prepare, corpus, tokenizer, kept, console=Console(quiet=True))
        assert snapshot(kept) == before and path.read_bytes() == bad


def test_a_damaged_corpus_through_arrow(tmp_path):
    for kind in ("jsonl", "parquet"):
        path = tmp_path / f"corpus.{kind}"
        good = write_text(path)
        corpus = CorpusConfig(source=str(path), streaming=False)
        for rng in list(cases(f"arrow {kind}"))[: max(2, ROUNDS // 10)]:
            path.write_bytes(damaged(good, rng))
            texts = attempt(texts_of, corpus, cache_dir=str(tmp_path / "cache"))
            if not isinstance(texts, InputError):
                assert all(isinstance(text, str) and text for text in texts)


@pytest.mark.parametrize("beside", [False, True])
def test_a_damaged_tokenizer(beside, tokenizer, tmp_path):
    """beside: with the tokenizer_config.json that transformers reads too."""
    folder = tmp_path / "tokenizer"
    tokenizer.save_pretrained(folder)
    names = ["tokenizer.json"]
    if beside:
        names.append("tokenizer_config.json")
    else:
        (folder / "tokenizer_config.json").unlink()
    for name in names:
        good = (folder / name).read_bytes()
        for rng in cases(f"tokenizer {beside} {name}"):
            (folder / name).write_bytes(damaged(good, rng))
            found = attempt(load_tokenizer, folder)
            if not isinstance(found, InputError):
                tokenizer_hash(found)
                for text in TEXTS[:3]:
                    assert all(isinstance(i, int) for i in found.encode(text))
        (folder / name).write_bytes(good)
    assert tokenizer_hash(load_tokenizer(folder)) == tokenizer_hash(tokenizer)


def test_a_damaged_store(tmp_path):
    rng = np.random.default_rng(0)
    flat = rng.integers(0, 300, 900)
    path = tmp_path / "store"
    write_store(
        path,
        np.split(flat, range(7, 900, 13)),
        vocab_size=300,
        chunk_tokens=64,
        shard_tokens=512,
        tokenizer_hash="abc",
        source={"part": "train"},
    )
    good = snapshot(path)

    def read() -> bool:
        store = TokenStore.open(path)
        every = read_documents(store, np.arange(store.num_documents))
        whole = store.read(0, store.num_tokens)
        return np.array_equal(np.concatenate(every), whole) and np.array_equal(
            whole, flat
        )

    for name, content in good.items():
        for rng in cases(f"store {name}"):
            (path / name).write_bytes(damaged(content, rng))
            before = snapshot(path)
            assert attempt(read) is not False, name
            assert snapshot(path) == before
        (path / name).write_bytes(content)
    assert read()
