# SPDX-License-Identifier: Apache-2.0
"""Corpus to stores: every token accounted for, reuse, refusals, and the console."""

import io
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console
from stores import read_documents

import lm_scale.data.texts as module
from lm_scale.data.corpus import CorpusConfig, documents
from lm_scale.data.prepare import Most, prepare
from lm_scale.data.store import TokenStore
from lm_scale.data.tokenizer import TokenizerConfig, tokenizer_hash, train_tokenizer
from lm_scale.errors import InputError

LINES = [f"Line {i}: the train of thought, number {i * i}.\n" for i in range(150)]


@pytest.fixture(scope="module")
def gpt2():
    return train_tokenizer(LINES, TokenizerConfig(vocab_size=280), max_length=8)


@pytest.fixture(scope="module")
def roberta():
    config = TokenizerConfig(vocab_size=290, kind="roberta")
    return train_tokenizer(LINES, config, max_length=8)


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "text.txt").write_text("".join(LINES))
    return CorpusConfig(source=str(tmp_path / "text.txt"), validation_fraction=0.2)


@pytest.fixture
def quiet():
    return Console(quiet=True)


def stored(path):
    store = TokenStore.open(path)
    everyone = np.arange(store.num_documents)
    return [tokens.tolist() for tokens in read_documents(store, everyone)]


@pytest.mark.parametrize("part", ["train", "validation"])
def test_each_document_and_its_separator(corpus, gpt2, quiet, tmp_path, part):
    manifests = prepare(corpus, gpt2, tmp_path / "out", console=quiet)
    texts = list(documents(corpus, part))
    expected = [[*gpt2.encode(text), gpt2.eos_token_id] for text in texts]
    assert stored(tmp_path / "out" / part) == expected
    manifest = manifests[part]
    assert manifest.documents == len(texts)
    assert manifest.tokens == sum(map(len, expected))
    assert (manifest.dtype, manifest.vocab_size) == ("uint16", 280)
    assert manifest.tokenizer_hash == tokenizer_hash(gpt2)
    assert manifest.separator == gpt2.eos_token_id
    assert manifest.source["part"] == part
    assert manifest.source["validation_fraction"] == 0.2


def test_both_parts_are_the_whole_corpus(corpus, gpt2, quiet, tmp_path):
    manifests = prepare(corpus, gpt2, tmp_path / "out", console=quiet)
    assert sum(manifest.documents for manifest in manifests.values()) == len(LINES)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "train",
        "validation",
    ]


def test_a_template_that_ends_the_text_gets_no_second_end(
    corpus, roberta, quiet, tmp_path
):
    prepare(corpus, roberta, tmp_path / "out", parts={"train": Most()}, console=quiet)
    texts = documents(corpus, "train")
    expected = [roberta(text)["input_ids"] for text in texts]  # <s> ... </s>
    assert stored(tmp_path / "out/train") == expected


def test_without_separator_a_document_is_its_encoding(corpus, gpt2, quiet, tmp_path):
    manifests = prepare(corpus, gpt2, tmp_path / "out", separator=False, console=quiet)
    texts = documents(corpus, "train")
    assert stored(tmp_path / "out/train") == [gpt2.encode(text) for text in texts]
    assert manifests["train"].separator is None


def test_text_that_looks_like_a_special_token_stays_text(gpt2, quiet, tmp_path):
    (tmp_path / "a.txt").write_text("a<|endoftext|>b\n")
    corpus = CorpusConfig(source=str(tmp_path / "a.txt"), validation_fraction=0)
    prepare(corpus, gpt2, tmp_path / "out", parts={"train": Most()}, console=quiet)
    (ids,) = stored(tmp_path / "out/train")
    assert ids.count(gpt2.eos_token_id) == 1
    assert gpt2.decode(ids[:-1]) == "a<|endoftext|>b\n"


def test_the_callers_tokenizer_is_left_alone(corpus, gpt2, quiet, tmp_path):
    prepare(corpus, gpt2, tmp_path / "out", console=quiet)
    assert gpt2("<|endoftext|>")["input_ids"] == [gpt2.eos_token_id]


def test_truncation_and_padding_of_an_earlier_call_do_not_last(
    corpus, roberta, quiet, tmp_path
):
    prepare(corpus, roberta, tmp_path / "one", console=quiet)
    roberta.backend_tokenizer.enable_truncation(4)
    roberta.backend_tokenizer.enable_padding(pad_id=1, length=99)
    prepare(corpus, roberta, tmp_path / "two", console=quiet)
    assert stored(tmp_path / "two/train") == stored(tmp_path / "one/train")


@pytest.mark.parametrize(("count", "characters"), [(7, 10**9), (1000, 90), (1, 1)])
def test_batches_change_nothing(
    corpus, gpt2, quiet, tmp_path, monkeypatch, count, characters
):
    prepare(corpus, gpt2, tmp_path / "one", console=quiet)
    monkeypatch.setattr(module, "BATCH_DOCUMENTS", count)
    monkeypatch.setattr(module, "BATCH_CHARACTERS", characters)
    prepare(corpus, gpt2, tmp_path / "two", console=quiet)
    one, two = (TokenStore.open(tmp_path / name / "train") for name in ("one", "two"))
    assert one.manifest == two.manifest
    np.testing.assert_array_equal(
        one.read(0, one.num_tokens), two.read(0, two.num_tokens)
    )


def test_a_store_that_is_there_is_kept(corpus, gpt2, tmp_path):
    out = tmp_path / "out"
    first = prepare(corpus, gpt2, out, console=Console(quiet=True))
    before = (out / "train/manifest.json").stat().st_mtime_ns
    console = Console(file=io.StringIO())
    assert prepare(corpus, gpt2, out, console=console) == first
    assert (out / "train/manifest.json").stat().st_mtime_ns == before
    assert console.file.getvalue().count("kept") == 2


def test_a_different_store_is_refused_with_its_differences(
    corpus, gpt2, roberta, quiet, tmp_path
):
    out = tmp_path / "out"
    prepare(corpus, gpt2, out, console=quiet)
    other = replace(corpus, validation_fraction=0.3)
    with pytest.raises(InputError) as caught:
        prepare(other, gpt2, out, separator=False, console=quiet)
    message = str(caught.value)
    assert "source.validation_fraction: 0.2 there, 0.3 here" in message
    assert "separator: 0 there, None here" in message
    assert "tokenizer_hash" not in message
    assert "Choose another folder or delete it" in message
    with pytest.raises(InputError, match="tokenizer_hash"):
        prepare(corpus, roberta, out, console=quiet)


def test_an_empty_part_is_refused_before_any_work(corpus, gpt2, quiet, tmp_path):
    with pytest.raises(InputError, match="raise validation_fraction, give"):
        prepare(
            replace(corpus, validation_fraction=0),
            gpt2,
            tmp_path / "out",
            console=quiet,
        )
    assert not (tmp_path / "out").exists()


def test_a_failure_leaves_nothing_behind(gpt2, quiet, tmp_path):
    (tmp_path / "b.csv").write_text("text\nfine\n")
    (tmp_path / "c.csv").write_text("other\nwrong\n")
    corpus = CorpusConfig(source=str(tmp_path / "*.csv"), validation_fraction=0)
    with pytest.raises(InputError, match="no column 'text'"):
        prepare(corpus, gpt2, tmp_path / "out", parts={"train": Most()}, console=quiet)
    assert not (tmp_path / "out/train").exists()


def test_other_files_in_the_way_are_refused(corpus, gpt2, quiet, tmp_path):
    (tmp_path / "out/train").mkdir(parents=True)
    (tmp_path / "out/train/thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="holds files but no complete token store"):
        prepare(corpus, gpt2, tmp_path / "out", console=quiet)
    assert (tmp_path / "out/train/thesis.txt").read_text() == "mine"
    (tmp_path / "two").mkdir()
    (tmp_path / "two/train").write_text("a file")
    with pytest.raises(InputError):
        prepare(corpus, gpt2, tmp_path / "two", console=quiet)


def test_a_tokenizer_without_an_end_needs_separator_off(corpus, quiet, tmp_path):
    bare = train_tokenizer(LINES, TokenizerConfig(vocab_size=280))
    bare.eos_token = None
    with pytest.raises(InputError, match="no end-of-text token"):
        prepare(corpus, bare, tmp_path / "out", console=quiet)
    prepare(corpus, bare, tmp_path / "out", separator=False, console=quiet)


def test_urls_are_written_in_place(corpus, gpt2, quiet, tmp_path):
    manifests = prepare(corpus, gpt2, (tmp_path / "o").as_uri(), console=quiet)
    assert TokenStore.open(tmp_path / "o/train").manifest == manifests["train"]


def test_one_line_a_part_where_there_is_no_terminal(corpus, gpt2, tmp_path):
    console = Console(file=io.StringIO(), width=20)
    manifests = prepare(corpus, gpt2, tmp_path / "out", console=console)
    train, validation = console.file.getvalue().splitlines()
    manifest = manifests["train"]
    mean = manifest.tokens / manifest.documents
    assert train.startswith(
        f"train: {manifest.documents} documents, {manifest.tokens:,} tokens, "
        f"mean length {mean:.1f}, "
    )
    assert train.endswith(" s")
    assert validation.startswith("validation: ")


def test_progress_where_there_is_a_terminal(corpus, gpt2, tmp_path):
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    prepare(corpus, gpt2, tmp_path / "out", console=console)
    assert "tokens/s" in console.file.getvalue()
