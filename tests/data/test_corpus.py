# SPDX-License-Identifier: Apache-2.0
"""Sources of text: order, hold-out, columns, and the error for each bad source."""

import json
from dataclasses import replace

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lm_scale.data.corpus import CorpusConfig, documents
from lm_scale.errors import InputError

ALL = 0.0  # validation_fraction: everything is for training


@pytest.fixture(scope="module")
def python_docs():
    """Walks the standard library once: 4 s on 2 cores."""
    return list(documents(CorpusConfig(validation_fraction=ALL), "train"))


def read(source, part="train", **options):
    options = {"validation_fraction": ALL} | options
    return list(documents(CorpusConfig(source=str(source), **options), part))


def refusal(source, part="train", **options) -> str:
    with pytest.raises(InputError) as caught:
        read(source, part, **options)
    return str(caught.value)


def test_python_docs_hold_the_manual_and_the_docstrings(python_docs):
    from pydoc_data.topics import topics

    assert python_docs[: len(topics)] == [topics[name] for name in sorted(topics)]
    (module,) = [text for text in python_docs if text.startswith("JSON (JavaScript")]
    # One document a file, its docstrings by line: the module's, then its functions'.
    first, *functions = module.split("\n\nSerialize ``obj`` ")
    assert "http://json.org" in first or "https://json.org" in first
    assert len(functions) == 2  # dump and dumps


def test_python_docs_are_the_library_without_its_tests(python_docs):
    assert 300 < len(python_docs) < 1200
    assert not any("Regression tests" in text[:100] for text in python_docs)


def test_python_docs_hold_out_from_the_same_documents(python_docs):
    train = documents(CorpusConfig(validation_fraction=0.3), "train")
    kept = [next(train) for _ in range(40)]
    assert kept != python_docs[:40]
    places = [python_docs.index(text) for text in kept]
    assert places == sorted(places)


def test_held_out_documents_never_straddle_and_keep_their_order(tmp_path):
    lines = [f"document {i % 300}\n" for i in range(900)]  # each one three times
    (tmp_path / "a.txt").write_text("".join(lines))
    parts = {
        part: read(tmp_path / "a.txt", part, validation_fraction=0.2)
        for part in ("train", "validation")
    }
    held_out = set(parts["validation"])
    assert 30 < len(held_out) < 90
    assert parts["train"] == [line for line in lines if line not in held_out]
    assert parts["validation"] == [line for line in lines if line in held_out]


def test_held_out_documents_are_fixed_by_their_text(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"{i}\n" for i in range(40)))
    held_out = read(tmp_path / "a.txt", "validation", validation_fraction=0.1)
    assert held_out == ["30\n", "36\n"]  # another choice would leak


def test_no_share_is_no_validation(tmp_path):
    (tmp_path / "a.txt").write_text("x\n")
    assert read(tmp_path / "a.txt", "validation", validation_fraction=0) == []


@pytest.mark.parametrize(
    ("sample_by", "expected"),
    [
        ("line", ["one\n", "  two\n", "three"]),
        ("paragraph", ["one", "  two\nthree"]),
        ("document", ["one\n\n  two\nthree"]),
    ],
)
def test_txt_is_cut_as_asked(tmp_path, sample_by, expected):
    (tmp_path / "a.txt").write_text("one\n\n  two\nthree")
    assert read(tmp_path / "a.txt", sample_by=sample_by) == expected


def test_every_kind_of_file(tmp_path):
    rows = [{"id": 1, "text": "één\n"}, {"id": 2, "text": 'two, "2"'}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.json").write_text(json.dumps(rows))
    (tmp_path / "c.csv").write_text('id,text\n1,"één\n"\n2,"two, ""2"""\n')
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    for name in ("a.jsonl", "b.json", "c.csv", "d.parquet"):
        assert read(tmp_path / name) == ["één\n", 'two, "2"'], name


def test_the_column_is_text_or_the_first_of_strings_or_the_named_one(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"n": 1, "title": "t", "body": "b"}\n')
    (tmp_path / "b.jsonl").write_text('{"title": "t", "text": "x"}\n')
    assert read(tmp_path / "a.jsonl") == ["t"]
    assert read(tmp_path / "a.jsonl", text_column="body") == ["b"]
    assert read(tmp_path / "b.jsonl") == ["x"]


def test_nulls_and_blank_documents_are_no_documents(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"text": null}\n{"text": " \\n"}\n{"text": ""}\n{"text": "x"}\n'
    )
    assert read(tmp_path / "a.jsonl") == ["x"]


def test_folders_and_globs_are_sorted(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name in ("b.txt", "a.txt", "sub/c.txt", ".hidden/d.txt", "notes.md"):
        (tmp_path / name).write_text(name)
    assert read(tmp_path) == ["a.txt", "b.txt", "sub/c.txt"]
    assert read(tmp_path / "**" / "[bc].txt") == ["b.txt", "sub/c.txt"]


def test_a_name_with_glob_characters_is_itself(tmp_path, monkeypatch):
    (tmp_path / "a[1] *.txt").write_text("odd")
    (tmp_path / "a1 x.txt").write_text("other")
    assert read(tmp_path / "a[1] *.txt") == ["odd"]
    monkeypatch.chdir(tmp_path)
    assert read("a[1] *.txt") == ["odd"]


def test_validation_source_leaves_the_source_whole(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"{i}\n" for i in range(50)))
    (tmp_path / "b.jsonl").write_text('{"text": "eval"}\n')
    own = {
        "validation_source": str(tmp_path / "b.jsonl"),
        "validation_fraction": 0.5,
    }
    assert len(read(tmp_path / "a.txt", **own)) == 50
    assert read(tmp_path / "a.txt", "validation", **own) == ["eval"]


def test_errors_name_the_path(tmp_path):
    for name in ("none.txt", "folder/*.txt", "data.tsv", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        (tmp_path / "data.tsv").write_text("x")
        assert str(tmp_path / name) in refusal(tmp_path / name)
    assert "no file or folder matches" in refusal(tmp_path / "none.txt")
    assert "expected a file of type .txt, .json" in refusal(tmp_path / "data.tsv")
    assert "holds no file of type" in refusal(tmp_path / "empty")


def test_missing_files_are_refused_at_the_call(tmp_path):
    with pytest.raises(InputError):
        documents(CorpusConfig(source=str(tmp_path / "none.txt")), "train")


def test_mixed_kinds_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.csv").write_text("text\nx\n")
    assert "mixes kinds of files (csv, text)" in refusal(tmp_path)


def test_missing_columns_are_refused_with_those_there(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"n": 1, "m": 2}\n')
    assert "no column of strings; its columns are n, m" in refusal(tmp_path / "a.jsonl")
    message = refusal(tmp_path / "a.jsonl", text_column="body")
    assert "no column 'body'; its columns are n, m" in message


def test_a_column_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("text,b\n1,x\n")
    assert "holds 1 where a string was expected" in refusal(tmp_path / "a.csv")


def test_a_later_file_without_the_column_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("title\nx\n")
    (tmp_path / "b.csv").write_text("other\ny\n")
    assert "no column 'title'; its columns are other" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b"fine\n\xff\xfe\n"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n'),
        ("a.parquet", b"not parquet"),
        ("a.csv", b""),
    ],
)
def test_broken_files_are_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    message = refusal(tmp_path / name)
    assert message.startswith(f"cannot read {tmp_path / name}: ")
    assert "\n" not in message


def test_an_empty_corpus_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text(" \n\n")
    assert "holds no text" in refusal(tmp_path / "a.txt")


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 5])
def test_fractions_out_of_range_are_refused(fraction):
    with pytest.raises(InputError, match="validation_fraction is"):
        CorpusConfig(validation_fraction=fraction)


def test_unknown_sample_by_is_refused():
    with pytest.raises(InputError, match="line, paragraph, document"):
        CorpusConfig(sample_by="word")


@pytest.fixture
def hub(monkeypatch):
    """A hub of one dataset, which has both splits."""
    splits = {
        "train": [{"text": f"train {i}"} for i in range(30)],
        "validation": [{"text": "eval"}],
    }

    def load(name, subset, *, streaming):
        assert (name, subset, streaming) == ("org/set", "en", True)
        return splits

    monkeypatch.setattr(datasets, "load_dataset", load)
    return splits


def test_hub_validation_split_is_used_and_train_left_whole(hub):
    config = CorpusConfig(source="org/set", subset="en", validation_fraction=0.5)
    assert len(list(documents(config, "train"))) == 30
    assert list(documents(config, "validation")) == ["eval"]


def test_hub_without_a_validation_split_holds_out(hub):
    del hub["validation"]
    config = CorpusConfig(source="org/set", subset="en", validation_fraction=0.5)
    train, held_out = (set(documents(config, p)) for p in ("train", "validation"))
    assert len(train) + len(held_out) == 30
    assert held_out


def test_training_on_the_validation_split_does_not_evaluate_on_it(hub):
    hub["validation"] = hub["train"]
    config = CorpusConfig(
        source="org/set", subset="en", split="validation", validation_fraction=0.5
    )
    train, held_out = (set(documents(config, p)) for p in ("train", "validation"))
    assert not train & held_out


def test_hub_split_that_is_not_there(hub):
    config = CorpusConfig(source="org/set", subset="en", split="all")
    with pytest.raises(InputError, match="no split 'all'; it has train, validation"):
        documents(config, "train")
    with pytest.raises(InputError, match="no split 'all'"):
        documents(replace(config, validation_source="python-docs"), "train")


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach 'org/set' on the Hub"),
        FileNotFoundError("Dataset 'org/set' doesn't exist on the Hub"),
        RuntimeError("Dataset scripts are no longer supported, but found set.py"),
        ValueError("BuilderConfig 'x' not found.\nAvailable: ['en']"),
    ],
)
def test_hub_failures_are_one_sentence(monkeypatch, error):
    def load(*names, **options):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    message = refusal("org/set")
    assert "'org/set' is no file or folder here" in message
    assert "scripts no longer load" in message
    assert "\n" not in message
