# SPDX-License-Identifier: Apache-2.0
"""A store made in parts: by whom, in how many tries and by how many changes no byte."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tensorstore as ts
from rich.console import Console
from stores import content, read_documents

from lm_scale.data import parts as parts_module
from lm_scale.data import places, texts, units, waiting, work
from lm_scale.data.arrays import Appender
from lm_scale.data.corpus import CorpusConfig, documents
from lm_scale.data.prepare import Most, prepare
from lm_scale.data.ranks import Rank
from lm_scale.data.store import TokenStore
from lm_scale.data.tokenizer import TokenizerConfig, train_tokenizer
from lm_scale.data.verify import stores_at, verify
from lm_scale.errors import InputError, StorageError

LINES = [f"Line {i}: the train of thought, number {i * i}.\n" for i in range(300)]
QUIET = Console(quiet=True)
TRAIN = {"train": Most()}


@pytest.fixture(scope="module")
def gpt2():
    return train_tokenizer(LINES, TokenizerConfig(vocab_size=280), max_length=8)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Each file is a unit of some parts; a batch is in several of them."""
    # No test pulls the plug, and waiting for the disk is most of their time.
    monkeypatch.setattr(places, "_CONTEXT", ts.Context({"file_io_sync": False}))
    monkeypatch.setattr(units, "UNIT_BYTES", 1)
    monkeypatch.setattr(work, "PART_TOKENS", 500)
    monkeypatch.setattr(texts, "BATCH_DOCUMENTS", 70)


@pytest.fixture
def corpus(tmp_path) -> CorpusConfig:
    """5 files, one empty, one with a document of another; blank lines among them."""
    folder = tmp_path / "text"
    folder.mkdir()
    for number, (start, stop) in enumerate(((0, 90), (90, 91), (0, 0), (91, 300))):
        (folder / f"{number}.txt").write_text("\n".join(LINES[start:stop]))
    (folder / "4.txt").write_text("".join(LINES[50:52]))
    return CorpusConfig(source=str(folder), validation_fraction=0)


def made(corpus, tokenizer, out: Path, **options) -> dict[str, bytes]:
    options = {"parts": TRAIN, "console": QUIET, "workers": 1} | options
    prepare(corpus, tokenizer, out, **options)
    return content(out)


def stored(path) -> list[list[int]]:
    store = TokenStore.open(path)
    found = read_documents(store, np.arange(store.num_documents))
    return [tokens.tolist() for tokens in found]


def test_parts_hold_every_document_in_order(corpus, gpt2, tmp_path):
    made(corpus, gpt2, tmp_path / "out")
    store = TokenStore.open(tmp_path / "out/train")
    names = [entry.name for entry in store.manifest.parts]
    assert len(names) > 8 and names == sorted(names)
    assert {name[6:11] for name in names} == {f"{unit:05d}" for unit in range(5)}
    ends = gpt2.eos_token_id
    expected = [[*gpt2.encode(text), ends] for text in documents(corpus, "train")]
    assert stored(tmp_path / "out/train") == expected
    assert store.manifest.counts["empty"] == 89 + 208
    # A part ends with the document that fills it.
    sizes = [entry.tokens for entry in store.manifest.parts]
    assert all(size < 500 + 60 for size in sizes)
    assert sum(size >= 500 for size in sizes) > 4


@pytest.mark.parametrize("world", [2, 3, 7])
def test_ranks_make_the_same_store(corpus, gpt2, tmp_path, world):
    expected = made(corpus, gpt2, tmp_path / "one")
    console = Console(file=io.StringIO(), width=200)
    options = {"parts": TRAIN, "workers": 1, "console": console}
    for index in reversed(range(world)):
        assert not (tmp_path / "all/train/manifest.json").exists()
        found = prepare(
            corpus, gpt2, tmp_path / "all", rank=Rank(index, world), **options
        )
        assert bool(found) == (index == 0)
    assert content(tmp_path / "all") == expected
    assert "units are still missing" in console.file.getvalue()


def test_a_plain_prepare_completes_what_ranks_have_left(corpus, gpt2, tmp_path):
    expected = made(corpus, gpt2, tmp_path / "one")
    made(corpus, gpt2, tmp_path / "all", rank=Rank(1, 3))
    assert made(corpus, gpt2, tmp_path / "all") == expected


class Killed(BaseException):
    """What no handler expects."""


@pytest.mark.parametrize(
    ("where", "name"),
    [
        (Appender, "_flush"),
        (places, "commit"),
        (parts_module, "write_bytes"),
        (work, "write_manifest"),
        (work, "remove"),
    ],
)
def test_a_process_that_ends_anywhere_goes_on(
    corpus, gpt2, tmp_path, monkeypatch, where, name
):
    """At every third call of what writes; nothing is cleaned up, as after a kill."""
    expected = made(corpus, gpt2, tmp_path / "one")
    target = parts_module if where is places else where
    real, calls = getattr(target, name), [0]

    def counted(*given, **named):
        calls[0] += 1
        if calls[0] % 3 == 1:
            raise Killed
        return real(*given, **named)

    tries = 0
    with monkeypatch.context() as patch:
        patch.setattr(target, name, counted)
        patch.setattr(work._UnitWriter, "discard", lambda self: None)
        patch.setattr(work.shutil, "rmtree", lambda *given, **named: None)
        while not (tmp_path / "two/train/manifest.json").exists() and tries < 60:
            tries += 1
            try:
                prepare(
                    corpus, gpt2, tmp_path / "two",
                    parts=TRAIN, workers=1, console=QUIET,
                )  # fmt: skip
            except Killed:
                pass
    assert tries > 0 and calls[0] > 0
    assert made(corpus, gpt2, tmp_path / "two") == expected


def test_an_object_store_gets_the_same_bytes(corpus, gpt2, tmp_path, monkeypatch):
    expected = made(corpus, gpt2, tmp_path / "one")
    real, calls = parts_module.write_bytes, [0]

    def counted(*given):
        calls[0] += 1
        if calls[0] == 4:
            raise Killed
        real(*given)

    monkeypatch.setattr(parts_module, "write_bytes", counted)
    with pytest.raises(Killed):
        made(corpus, gpt2, (tmp_path / "two").as_uri())
    prepare(corpus, gpt2, (tmp_path / "two").as_uri(), parts=TRAIN, console=QUIET)
    assert content(tmp_path / "two") == expected
    memory = f"memory://{tmp_path.name}"
    manifest = prepare(corpus, gpt2, memory, parts=TRAIN, console=QUIET)["train"]
    assert TokenStore.open(f"{memory}/train").manifest == manifest
    assert stored(f"{memory}/train") == stored(tmp_path / "one/train")


def test_limits_end_with_the_same_document(corpus, gpt2, tmp_path, monkeypatch):
    expected = made(corpus, gpt2, tmp_path / "all")
    everything = stored(tmp_path / "all/train")
    ends = np.cumsum([len(tokens) for tokens in everything])
    for most in (Most(documents=77), Most(tokens=int(ends[76])), Most(tokens=2000)):
        out = tmp_path / f"{most}"
        expected = made(corpus, gpt2, out, parts={"train": most})
        number = 77 if most.tokens != 2000 else int(np.searchsorted(ends, 2000)) + 1
        assert stored(out / "train") == everything[:number]
        # Once more, from each of its parts on.
        folders = sorted((out / "train/parts").iterdir())
        for last in range(len(folders)):
            (out / "train/manifest.json").unlink()
            for folder in folders[last:]:
                shutil.rmtree(folder)
            assert made(corpus, gpt2, out, parts={"train": most}) == expected


def test_text_that_has_changed_since_is_refused(corpus, gpt2, tmp_path):
    made(corpus, gpt2, tmp_path / "out", rank=Rank(0, 2))
    other = replace(corpus, keep_linebreaks=False)
    with pytest.raises(InputError, match="keep_linebreaks: True there, False here"):
        made(other, gpt2, tmp_path / "out")
    with (tmp_path / "text/0.txt").open("a") as file:
        file.write("more\n")
    with pytest.raises(InputError, match="of 0.txt, fingerprint.bytes"):
        made(corpus, gpt2, tmp_path / "out")


def test_a_repaired_file_is_read_and_the_parts_before_it_stay(corpus, gpt2, tmp_path):
    expected = made(corpus, gpt2, tmp_path / "one")
    broken, times = tmp_path / "text/3.txt", os.stat(tmp_path / "text/3.txt")
    whole = broken.read_bytes()
    broken.write_bytes(whole[:5000] + b"\xff" + whole[5001:])
    line = whole[:5000].count(b"\n") + 1
    said = rf"cannot read .*decode.*\(line {line} of {broken}, byte 5000\)"
    with pytest.raises(InputError, match=said):
        made(corpus, gpt2, tmp_path / "two")
    first = tmp_path / "two/train/parts/00000-00000/part.json"
    before = first.stat().st_mtime_ns
    broken.write_bytes(whole)
    os.utime(broken, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert made(corpus, gpt2, tmp_path / "two") == expected
    assert first.stat().st_mtime_ns == before


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv"])
def test_bytes_that_are_no_utf8_may_be_replaced(gpt2, tmp_path, kind):
    rows = {
        "txt": b"fine\na \xff b\n",
        "jsonl": b'{"text": "fine\\n"}\n{"text": "a \xff b\\n"}\n',
        "csv": b'text\n"fine\n"\n"a \xff b\n"\n',
    }
    file = tmp_path / f"a.{kind}"
    file.write_bytes(rows[kind])
    corpus = CorpusConfig(source=str(file), validation_fraction=0)
    with pytest.raises(InputError, match=rf"byte {rows[kind].index(255)}\)"):
        made(corpus, gpt2, tmp_path / "out")
    corpus = replace(corpus, invalid_utf8="replace")
    assert list(documents(corpus, "train")) == ["fine\n", "a \ufffd b\n"]
    made(corpus, gpt2, tmp_path / "out")
    assert TokenStore.open(tmp_path / "out/train").manifest.counts["replaced"] == 1


def test_a_full_disk_keeps_the_finished_parts(corpus, gpt2, tmp_path, monkeypatch):
    expected = made(corpus, gpt2, tmp_path / "one")
    real, calls = places.os.rename, [0]

    def rename(*given):
        calls[0] += 1
        if calls[0] > 3:
            raise OSError(28, "No space left on device")
        real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(places.os, "rename", rename)
        with pytest.raises(StorageError, match="No space left on device.*same command"):
            made(corpus, gpt2, tmp_path / "two")
    assert len(list((tmp_path / "two/train/parts").iterdir())) == 3
    assert made(corpus, gpt2, tmp_path / "two") == expected


def test_a_second_prepare_of_the_same_rank_is_refused(corpus, gpt2, tmp_path):
    lock = tmp_path / "out/train/work/rank-0-of-1/lock.json"
    lock.parent.mkdir(parents=True)
    here = work.RunLock(work.epath.Path(lock.parent), print)
    here.take()
    try:
        with pytest.raises(InputError, match=f"in use by process {os.getpid()}.*same"):
            made(corpus, gpt2, tmp_path / "out")
    finally:
        here.release()
    made(corpus, gpt2, tmp_path / "out")


KILLED = """
import os, signal, sys
from lm_scale.data import parts, texts, units, work
from lm_scale.data.corpus import CorpusConfig
from lm_scale.data.prepare import Most, prepare
from lm_scale.data.tokenizer import load_tokenizer
units.UNIT_BYTES, work.PART_TOKENS, texts.BATCH_DOCUMENTS = 1, 500, 70
real, calls = parts.commit, []
def commit(*given):
    calls.append(given)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    real(*given)
parts.commit = commit
corpus = CorpusConfig(source=sys.argv[1], validation_fraction=0)
prepare(corpus, load_tokenizer(sys.argv[2]), sys.argv[3], parts={"train": Most()}, workers=1)
"""  # noqa: E501


def test_killed_for_good(corpus, gpt2, tmp_path):
    """By SIGKILL: its scratch and its lock stay, and are in nobody's way."""
    expected = made(corpus, gpt2, tmp_path / "one")
    gpt2.save_pretrained(tmp_path / "tokenizer")
    arguments = [corpus.source, str(tmp_path / "tokenizer"), str(tmp_path / "two")]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False)
    assert done.returncode == -signal.SIGKILL
    left = content(tmp_path / "two/train/work")
    assert "rank-0-of-1/lock.json" in left and len(left) > 3
    assert len(list((tmp_path / "two/train/parts").iterdir())) == 3
    assert made(corpus, gpt2, tmp_path / "two") == expected


# --- Long documents -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "roberta"])
def test_a_document_in_pieces_has_the_same_tokens(tmp_path, monkeypatch, kind):
    tokenizer = train_tokenizer(LINES, TokenizerConfig(vocab_size=290, kind=kind))
    rng = np.random.default_rng(0)
    words = ["thought", "  ", "\n", "train.\n", " number", "é", "!?", "\t", "12 ", " "]
    lines = ["".join(rng.choice(words, 400)) + "x" for _ in range(5)]
    (tmp_path / "a.jsonl").write_text(
        "".join(f"{json.dumps({'text': x})}\n" for x in lines)
    )
    corpus = CorpusConfig(source=str(tmp_path / "a.jsonl"), validation_fraction=0)
    made(corpus, tokenizer, tmp_path / "one")
    monkeypatch.setattr(texts, "PIECE", 50)
    made(corpus, tokenizer, tmp_path / "two")
    assert stored(tmp_path / "two/train") == stored(tmp_path / "one/train")
    assert TokenStore.open(tmp_path / "two/train").manifest.counts["cut"] == 5


@pytest.mark.parametrize(
    ("text", "start", "stop", "expected"),
    [
        ("ab cd ef", 0, 4, 2),
        ("ab cd ef", 0, 5, 5),  # right before a space
        ("ab   cd ef", 0, 5, 2),  # not among spaces
        ("abcdefgh", 0, 4, 4),
        (" bcdefgh", 0, 4, 4),  # a piece is never empty
        ("ab cd", 0, 5, 5),
        ("ab cd ef gh", 5, 8, 8),
    ],
)
def test_where_a_piece_may_end(text, start, stop, expected):
    assert texts.cut_before(text, start, stop) == expected


# --- Duplicates -----------------------------------------------------------------------


@pytest.fixture
def repeated(tmp_path) -> CorpusConfig:
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(4):
        lines = [LINES[i % 60] for i in range(number, 100 + number)]
        (folder / f"{number}.txt").write_text("".join([*lines, f"own {number}\n"]))
    return CorpusConfig(
        source=str(folder), drop_duplicates=True, validation_fraction=0.3
    )


def test_the_first_of_equal_documents_stays(repeated, gpt2, tmp_path, monkeypatch):
    both = {"train": Most(), "validation": Most()}
    expected = made(repeated, gpt2, tmp_path / "one", parts=both)
    found = {}
    for part in both:
        texts_ = list(dict.fromkeys(documents(repeated, part)))
        ends = [gpt2.eos_token_id]
        assert stored(tmp_path / "one" / part) == [
            gpt2.encode(t) + ends for t in texts_
        ]
        manifest = TokenStore.open(tmp_path / "one" / part).manifest
        every = sum(1 for _ in documents(repeated, part))
        assert manifest.counts["duplicates"] == every - len(texts_) > 0
        found[part] = set(texts_)
    assert not found["train"] & found["validation"]
    # In slices of few hashes, by ranks that each see the hashes of the others.
    monkeypatch.setattr("lm_scale.data.duplicates._DOCUMENTS", 20)
    monkeypatch.setattr(waiting, "PATIENCE", 0.0)
    monkeypatch.setattr(waiting, "_PAUSE", 0.0)
    for index in (0, 1):
        with pytest.raises(StorageError, match="none has come"):
            made(repeated, gpt2, tmp_path / "two", rank=Rank(0, 2))
        assert not (tmp_path / "two/train/parts").exists()
        if index:
            break
    options = {"parts": both, "rank": Rank(1, 2)}
    with pytest.raises(StorageError):  # the validation's hashes of rank 0
        made(repeated, gpt2, tmp_path / "two", **options)
    assert made(repeated, gpt2, tmp_path / "two", parts=both) == expected


# --- Verifying ------------------------------------------------------------------------


def test_verify_names_what_is_damaged(corpus, gpt2, tmp_path):
    expected = made(corpus, gpt2, tmp_path / "out")
    (store,) = stores_at(tmp_path / "out")
    console = Console(file=io.StringIO(), width=300)
    assert verify(store, console) and "whole" in console.file.getvalue()
    flipped = tmp_path / "out/train/parts/00000-00001/tokens/c/0"
    bytes_ = bytearray(flipped.read_bytes())
    bytes_[20] ^= 1
    flipped.write_bytes(bytes_)
    (tmp_path / "out/train/parts/00003-00000/offsets/c/0").unlink()
    # A whole array, but not the one that was written.
    other, own = (tmp_path / f"out/train/parts/00003-0000{i}" for i in (1, 2))
    shutil.rmtree(own / "tokens")
    shutil.copytree(other / "tokens", own / "tokens")
    assert not verify(store, console)
    said = console.file.getvalue()
    assert "parts/00000-00001: tokens: " in said
    assert "parts/00003-00000: offsets: " in said
    assert "parts/00003-00002: tokens is" in said
    assert "3 of" in said
    # As it says.
    (tmp_path / "out/train/manifest.json").unlink()
    for name in ("00000-00001", "00003-00000", "00003-00002"):
        shutil.rmtree(tmp_path / "out/train/parts" / name)
    assert made(corpus, gpt2, tmp_path / "out") == expected


def test_verify_finds_no_store(tmp_path):
    with pytest.raises(InputError, match="no complete token store"):
        stores_at(tmp_path)


KILLED_AT_RANDOM = """
import os, random, shutil, signal, sys, time
from lm_scale.data import texts, units, work
from lm_scale.data.corpus import CorpusConfig
from lm_scale.data.prepare import Most, prepare
from lm_scale.data.tokenizer import load_tokenizer
units.UNIT_BYTES, work.PART_TOKENS, texts.BATCH_DOCUMENTS = 1, 500, 70
corpus = CorpusConfig(source=sys.argv[1], validation_fraction=0)
tokenizer = load_tokenizer(sys.argv[2])

def start(store):
    child = os.fork()
    if not child:
        prepare(corpus, tokenizer, store, parts={"train": Most()}, workers=1)
        os._exit(0)
    return child

began = time.monotonic()
assert os.waitpid(start(sys.argv[4]), 0)[1] == 0  # to see how long it takes
whole, moments = time.monotonic() - began, random.Random(int(sys.argv[5]))
killed = 0
while killed < 20:
    child = start(sys.argv[3])
    time.sleep(moments.random() * whole)
    os.kill(child, signal.SIGKILL)
    if os.WIFSIGNALED(os.waitpid(child, 0)[1]):
        killed += 1
    else:  # it came to its end before
        shutil.rmtree(sys.argv[3])
"""  # noqa: E501


def test_killed_at_twenty_random_moments(corpus, gpt2, tmp_path):
    """By SIGKILL, each a process of its own that goes on where the last one was."""
    expected = made(corpus, gpt2, tmp_path / "one")
    gpt2.save_pretrained(tmp_path / "tokenizer")
    folders = [str(tmp_path / name) for name in ("tokenizer", "two", "three")]
    arguments = [corpus.source, *folders, "1"]
    subprocess.run([sys.executable, "-c", KILLED_AT_RANDOM, *arguments], check=True)
    assert made(corpus, gpt2, tmp_path / "two") == expected
