# SPDX-License-Identifier: Apache-2.0
"""Sources of text: order, hold-out, columns, and the error for each bad source."""

import json
from dataclasses import replace
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lm_scale.data import corpus
from lm_scale.data.corpus import CorpusConfig, documents
from lm_scale.data.sources import local_files
from lm_scale.errors import InputError

ALL = 0.0  # validation_fraction: everything is for training


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory) -> str:
    """The Arrow files of a test go beside its text, not into the home directory."""
    folder = str(tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


@pytest.fixture(scope="module")
def python_docs():
    """Walks the standard library once: 4 s on 2 cores."""
    return list(documents(CorpusConfig(validation_fraction=ALL), "train"))


def read(source, part="train", **options):
    options = {"validation_fraction": ALL} | options
    return list(documents(CorpusConfig(source=str(source), **options), part))


def write(folder: Path, *names: str) -> Path:
    """Files that each hold their name as one line."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{name}\n")
    return folder


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


def test_line_breaks_may_go(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n  two\nthree")
    texts = read(tmp_path / "a.txt", keep_linebreaks=False)
    assert texts == ["one", "  two", "three"]


@pytest.mark.parametrize("streaming", [True, False])
def test_blank_lines_may_stay(tmp_path, streaming):
    """As in the old CLM script, whose paragraphs ended in an empty line."""
    (tmp_path / "a.txt").write_text("a a\n\nb\n")
    (tmp_path / "b.jsonl").write_text('{"text": null}\n{"text": ""}\n{"text": " "}\n')
    kept = {"keep_blank": True, "streaming": streaming}
    assert read(tmp_path / "a.txt", **kept) == ["a a\n", "\n", "b\n"]
    assert read(tmp_path / "a.txt", keep_linebreaks=False, **kept) == ["a a", "b"]
    assert read(tmp_path / "b.jsonl", **kept) == [" "]


@pytest.fixture
def kinds(tmp_path) -> Path:
    """The same 2 texts and a null in a file of each kind, and a folder of txt."""
    rows: list[dict] = [{"id": 1, "text": "één\n"}, {"id": 2, "text": 'two, "2"'}]
    rows.append({"id": 3, "text": None})
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.json").write_text(json.dumps(rows))
    (tmp_path / "c.csv").write_text('id,text\n1,"één\n"\n2,"two, ""2"""\n3,\n')
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    (tmp_path / "e.txt").write_text('één\n\r\n  \ntwo, "2"')
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "1.txt").write_text("één\n\n")
    (tmp_path / "f" / "2.txt").write_text("")
    (tmp_path / "f" / "3.txt").write_text('two, "2"')
    return tmp_path


KINDS = ("a.jsonl", "b.json", "c.csv", "d.parquet", "e.txt", "f")


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("streaming", [True, False])
def test_every_kind_of_file_streamed_and_through_arrow(kinds, name, streaming):
    assert read(kinds / name, streaming=streaming) == ["één\n", 'two, "2"']


def test_the_same_documents_are_held_out_either_way(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"line {i % 1700}\n" for i in range(2503)))
    for part in ("train", "validation"):
        texts = [
            read(tmp_path, part, validation_fraction=0.3, streaming=streaming)
            for streaming in (True, False)
        ]
        assert texts[0] == texts[1]


def test_workers_and_cache_dir_change_no_document(tmp_path, cache, capfd, caplog):
    folder = write(tmp_path, *(f"{name}.txt" for name in "cbadefghijkl"))
    config = CorpusConfig(source=str(folder), validation_fraction=ALL, streaming=False)
    texts = [f"{name}.txt\n" for name in "abcdefghijkl"]
    for workers, files in ((1, 1), (50, 12)):
        own = Path(cache, str(workers))
        settings = {"cache_dir": str(own), "workers": workers}
        assert list(documents(config, "train", **settings)) == texts
        assert len(list(own.rglob("*.arrow"))) == files
    assert capfd.readouterr().err + caplog.text == ""  # also about 50 for 12 files


def test_a_broken_file_is_named_with_workers_as_well(tmp_path, cache):
    write(tmp_path, "a.txt", "b.txt")
    (tmp_path / "c.txt").write_bytes(b"\xff")
    config = CorpusConfig(source=str(tmp_path), streaming=False)
    with pytest.raises(InputError, match="cannot read .*: 'utf-8' codec can't decode"):
        documents(config, "train", cache_dir=cache, workers=2)


# --- The first rows held out ----------------------------------------------------------


def test_the_cut_is_that_of_the_slices_of_datasets():
    percents, counts = range(1, 100), [*range(1, 131), 997, 10_050]
    for rows in counts:
        for percent in percents:
            spec = datasets.ReadInstruction.from_spec(f"train[:{percent}%]")
            (slice_,) = spec.to_absolute({"train": rows})
            held_out = corpus._first(range(rows), percent / 100, validating=True)
            kept = corpus._first(range(rows), percent / 100, validating=False)
            assert list(held_out) == list(range(slice_.to)), (rows, percent)
            assert list(kept) == list(range(slice_.to, rows)), (rows, percent)


@pytest.mark.parametrize("keep_blank", [False, True])
@pytest.mark.parametrize("rows", [30, 131])  # 5 % are 1.5, which is 2, and 6.55
def test_the_first_rows_are_held_out_blank_ones_counted(
    tmp_path, cache, rows, keep_blank
):
    file = tmp_path / "a.txt"
    file.write_text("".join(f"{i}\n" if i % 4 else "\n" for i in range(rows)))
    for part, slice_ in (("validation", "train[:5%]"), ("train", "train[5%:]")):
        expected = datasets.load_dataset(
            "text", data_files=str(file), split=slice_, cache_dir=cache
        )
        texts = [text + "\n" for text in expected["text"] if text or keep_blank]
        first = {"holdout": "first", "streaming": False, "validation_fraction": 0.05}
        first["keep_blank"] = keep_blank
        assert read(file, part, **first) == texts


def test_a_share_that_rounds_to_no_row_holds_nothing_out(tmp_path):
    file = write(tmp_path, "a.txt") / "a.txt"
    first = {"holdout": "first", "streaming": False, "validation_fraction": 0.05}
    assert read(file, "validation", **first) == []
    assert read(file, **first) == ["a.txt\n"]


def test_the_builtin_corpus_is_counted(monkeypatch):
    monkeypatch.setattr(
        corpus, "python_docs", lambda: iter("a b c".split() + [" "] * 7)
    )
    config = CorpusConfig(holdout="first", validation_fraction=0.2)
    assert list(documents(config, "validation")) == ["a", "b"]
    assert list(documents(config, "train")) == ["c"]


def test_a_stream_has_no_first_share():
    with pytest.raises(
        InputError, match="set streaming to False, or holdout to 'hash'"
    ):
        CorpusConfig(source="a.txt", holdout="first")


# --- Columns --------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [True, False])
def test_the_column_is_text_or_the_first_of_strings_or_the_named_one(
    tmp_path, streaming
):
    (tmp_path / "a.jsonl").write_text('{"n": 1, "title": "t", "body": "b"}\n')
    (tmp_path / "b.jsonl").write_text('{"title": "t", "text": "x"}\n')
    kind = {"streaming": streaming}
    assert read(tmp_path / "a.jsonl", **kind) == ["t"]
    assert read(tmp_path / "a.jsonl", text_column="body", **kind) == ["b"]
    assert read(tmp_path / "b.jsonl", **kind) == ["x"]


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


@pytest.mark.parametrize("streaming", [True, False])
def test_a_folder_with_a_validation_split_is_evaluated_on_it(tmp_path, streaming):
    write(tmp_path, "train_a.txt", "train_b.txt", "dev.txt", "test.txt")
    options = {"validation_fraction": 0.5, "streaming": streaming}
    assert read(tmp_path, **options) == ["train_a.txt\n", "train_b.txt\n"]
    assert read(tmp_path, "validation", **options) == ["dev.txt\n"]
    assert read(tmp_path, split="test", **options) == ["test.txt\n"]


def test_test_files_may_be_unlike_the_others(tmp_path):
    write(tmp_path, "train.txt", "test.csv")
    assert read(tmp_path) == ["train.txt\n"]


def test_a_folder_without_training_files_is_refused(tmp_path):
    write(tmp_path, "a.txt", "validation.txt")
    message = refusal(tmp_path)
    assert "by the names of its files" in message
    assert "no split 'train'; it has validation" in message


# --- Folders that stand in for hub datasets -------------------------------------------


@pytest.mark.parametrize("streaming", [True, False])
def test_a_subset_is_a_subfolder(tmp_path, monkeypatch, streaming):
    """`--dataset_name oscar` of the old scripts, with a folder of that name."""
    names = "unshuffled_deduplicated_no/a.txt", "unshuffled_deduplicated_nn/b.txt"
    write(tmp_path / "oscar", *names)
    monkeypatch.chdir(tmp_path)
    for source in ("oscar", "./oscar"):
        no = {"subset": "unshuffled_deduplicated_no", "streaming": streaming}
        assert read(source, **no) == [names[0] + "\n"]


def test_a_subfolder_that_is_not_there_is_refused_with_those_there(tmp_path):
    write(tmp_path, "nn/a.txt", "no/b.txt", "c.txt", "README.md", ".git/d.txt")
    message = refusal(tmp_path, subset="nb")
    assert f"the folder {tmp_path} has no subset (subfolder) 'nb'; it has nn, no" in (
        message
    )
    assert "it has no subfolders" in refusal(tmp_path / "no", subset="nb")


@pytest.fixture
def card(tmp_path) -> Path:
    """A copy of a hub dataset whose README.md says what its subsets are."""
    write(tmp_path, "x/1.txt", "x/2.txt", "x/3.txt", "other/train.txt")
    (tmp_path / "README.md").write_text(
        "---\nlicense: cc0-1.0\nconfigs:\n- config_name: one\n  data_files:\n"
        "  - {split: train, path: x/1.txt}\n  - {split: validation, path: x/3.txt}\n"
        "- config_name: two\n  data_files: x/2.txt\n---\nText.\n"
    )
    return tmp_path


@pytest.mark.parametrize("streaming", [True, False])
def test_the_subsets_that_a_readme_declares(card, streaming):
    own = {"streaming": streaming, "validation_fraction": 0.5}
    assert read(card, subset="one", **own) == ["x/1.txt\n"]
    assert read(card, "validation", subset="one", **own) == ["x/3.txt\n"]
    assert read(card, subset="two", streaming=streaming) == ["x/2.txt\n"]
    assert read(card, subset="other", streaming=streaming) == ["other/train.txt\n"]


def test_a_default_subset(card):
    readme, text = card / "README.md", (card / "README.md").read_text()
    assert "declares the subsets one, two; name one" in refusal(card)
    for default in (
        text.replace("name: two\n", "name: two\n  default: true\n"),
        text.replace("name: two\n", "name: default\n"),
        text[: text.index("configs")]
        + "configs: [{config_name: a, data_files: x/2*}]\n"
        "---\n",
    ):
        readme.write_text(default)
        assert read(card) == ["x/2.txt\n"]


def test_subsets_that_are_not_there_and_a_broken_readme(card):
    assert "it has one, other, two, x" in refusal(card, subset="three")
    (card / "README.md").write_text("---\nconfigs: [a: b: c\n---\n")
    assert "cannot read the header of" in refusal(card)


@pytest.mark.parametrize("streaming", [True, False])
def test_what_save_to_disk_made_is_read(tmp_path, streaming):
    train = datasets.Dataset.from_dict({"text": ["a", "b", "", "c"]})
    held_out = datasets.Dataset.from_dict({"text": ["v"]})
    both = datasets.DatasetDict({"train": train, "validation": held_out})
    train.save_to_disk(tmp_path / "one")
    both.save_to_disk(tmp_path / "sets" / "both")
    assert read(tmp_path / "one", streaming=streaming) == ["a", "b", "c"]
    first = {"streaming": False, "holdout": "first", "validation_fraction": 0.5}
    assert read(tmp_path / "one", "validation", **first) == ["a", "b"]
    own = {"subset": "both", "streaming": streaming, "validation_fraction": 0.5}
    assert read(tmp_path / "sets", **own) == ["a", "b", "c"]
    assert read(tmp_path / "sets", "validation", **own) == ["v"]
    own |= {"split": "test"}
    assert "no split 'test'; it has train, validation" in refusal(
        tmp_path / "sets", **own
    )


# --- Names ----------------------------------------------------------------------------


def test_a_name_with_glob_characters_is_itself(tmp_path, monkeypatch):
    (tmp_path / "a[1] *.txt").write_text("odd")
    (tmp_path / "a1 x.txt").write_text("other")
    assert read(tmp_path / "a[1] *.txt") == ["odd"]
    monkeypatch.chdir(tmp_path)
    assert read("a[1] *.txt") == ["odd"]


@pytest.mark.parametrize(
    ("source", "subset", "names"),
    [
        ("a.txt", None, "a.txt"),
        ("a[1].txt", None, "a[1].txt"),
        ("a.tsv", None, "a.tsv"),  # refused, but not here
        ("folder/**/*.txt", None, "folder/nn/b.txt folder/no/c.txt"),
        ("folder", None, "folder/nn/b.txt folder/no/c.txt folder/no/d.csv"),
        ("~/folder", "no", "folder/no/c.txt folder/no/d.csv"),
        ("folder", "none", ""),
        ("set", None, "set/README.md set/x/1.txt set/x/2.json.gz"),
        ("set", "one", "set/README.md set/x/1.txt set/x/2.json.gz"),
        ("set", "x", "set/x/1.txt"),
        ("broken", None, "broken/a.txt"),
        ("none.txt", None, ""),
        ("~nobody-of-this-name/a.txt", None, ""),
        ("", None, ""),  # not the working directory
        ("python-docs", None, ""),
        ("oscar", "unshuffled_deduplicated_no", ""),
        ("hf://datasets/a/b/*.parquet", None, ""),
    ],
)
def test_the_local_files_of_a_source(tmp_path, monkeypatch, source, subset, names):
    write(tmp_path, "a.txt", "a[1].txt", "a1.txt", "a.tsv", "python-docs/a.txt")
    write(tmp_path / "folder", "nn/b.txt", "no/c.txt", "no/d.csv", "no/.git/e.txt")
    write(tmp_path / "set", "x/1.txt", "x/2.json.gz", "README.md", ".git/index")
    header = "---\nconfigs:\n- {config_name: one, data_files: x/1.txt}\n---\n"
    (tmp_path / "set" / "README.md").write_text(header)
    write(tmp_path / "broken", "a.txt", "README.md")
    (tmp_path / "broken" / "README.md").write_text("---\nconfigs: [a: b: c\n---\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    files = local_files(source, subset)
    assert [str(file.absolute().relative_to(tmp_path)) for file in files] == (
        names.split()
    )


def test_the_local_files_of_what_save_to_disk_made(tmp_path):
    rows = datasets.Dataset.from_dict({"text": ["a"]})
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "sets" / "both")
    files = local_files(str(tmp_path / "sets"), "both")
    assert sorted({file.suffix for file in files}) == [".arrow", ".json"]
    assert all(file.is_relative_to(tmp_path / "sets" / "both") for file in files)


def test_validation_source_leaves_the_source_whole(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"{i}\n" for i in range(50)))
    (tmp_path / "b.jsonl").write_text('{"text": "eval"}\n')
    own = {
        "validation_source": str(tmp_path / "b.jsonl"),
        "validation_fraction": 0.5,
    }
    assert len(read(tmp_path / "a.txt", **own)) == 50
    assert read(tmp_path / "a.txt", "validation", **own) == ["eval"]


def test_subset_and_split_are_of_the_source_alone(tmp_path):
    write(tmp_path, "own/no/test.txt", "other/a.txt")
    own = {"validation_source": str(tmp_path / "other"), "subset": "no"}
    own |= {"split": "test"}
    assert read(tmp_path / "own", **own) == ["own/no/test.txt\n"]
    assert read(tmp_path / "own", "validation", **own) == ["other/a.txt\n"]


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


@pytest.mark.parametrize("streaming", [True, False])
def test_a_column_that_is_not_text_is_refused(tmp_path, streaming):
    (tmp_path / "a.csv").write_text("text,b\n1,x\n")
    message = refusal(tmp_path / "a.csv", streaming=streaming)
    assert "holds 1 where a string was expected" in message


def test_a_later_file_without_the_column_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("title\nx\n")
    (tmp_path / "b.csv").write_text("other\ny\n")
    assert "no column 'title'; its columns are other" in refusal(tmp_path)
    assert str(tmp_path) in refusal(tmp_path, streaming=False)


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b"fine\n\xff\xfe\n"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n'),
        ("a.parquet", b"not parquet"),
        ("a.csv", b""),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, streaming):
    (tmp_path / name).write_bytes(content)
    message = refusal(tmp_path / name, streaming=streaming)
    assert message.startswith(f"cannot read {tmp_path / name}: ")
    assert "\n" not in message
    assert "error occurred while" not in message  # says nothing


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("content", ["", " \n\n"])
def test_an_empty_corpus_is_refused(tmp_path, content, streaming):
    (tmp_path / "a.txt").write_text(content)
    assert "holds no text" in refusal(tmp_path / "a.txt", streaming=streaming)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 5])
def test_fractions_out_of_range_are_refused(fraction):
    with pytest.raises(InputError, match="validation_fraction is"):
        CorpusConfig(validation_fraction=fraction)


def test_unknown_choices_are_refused():
    with pytest.raises(InputError, match="line, paragraph, document"):
        CorpusConfig(sample_by="word")
    with pytest.raises(InputError, match="holdout is 'last'; expected one of hash"):
        CorpusConfig(holdout="last")


# --- The hub --------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """A hub of one dataset, which has both splits."""
    splits = {
        "train": [{"text": f"train {i}"} for i in range(30)],
        "validation": [{"text": "eval"}],
    }

    def load(name, subset, *, streaming, cache_dir):
        assert (name, subset, streaming, cache_dir) == ("org/set", "en", True, None)
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
        ValueError("BuilderConfig 'x' not found.\nAvailable: ['en']"),
    ],
)
def test_hub_failures_are_one_sentence(monkeypatch, error):
    def load(*names, **options):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    message = refusal("org/set")
    assert "'org/set' is no file or folder here" in message
    assert "Check the name, the subset and the network." in message
    assert "\n" not in message


def test_oscar_is_known_without_the_hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # where no folder is called oscar
    monkeypatch.setattr(datasets, "load_dataset", None)
    message = refusal("oscar", subset="unshuffled_deduplicated_no")
    assert (
        "'oscar' is a Python script, which datasets 4 and later do not run" in message
    )
    for name in ("fineweb-2 (subset nob_Latn", "HPLT2.0_cleaned", "20231101.no"):
        assert name in message
    assert (
        "'hf://datasets/oscar-corpus/oscar@refs/convert/parquet/"
        "unshuffled_deduplicated_no/*train/*.parquet'" in message
    )


def test_other_scripts_are_told_from_what_fails(monkeypatch):
    def load(*names, **options):
        raise RuntimeError("Dataset scripts are no longer supported, but found set.py")

    monkeypatch.setattr(datasets, "load_dataset", load)
    message = refusal("org/set")
    assert "'org/set' is a Python script, which datasets 4 and later do not" in message
    assert "hf://datasets/org/set@refs/convert/parquet/default/*train/" in message
    assert "fineweb" not in message


@pytest.mark.parametrize(
    ("url", "reader"),
    [
        ("hf://datasets/a/b@refs/convert/parquet/no/*train/*.parquet", "parquet"),
        ("hf://datasets/a/b/000?.jsonl", "json"),
        ("https://host/a.csv?download=true", "csv"),
    ],
)
def test_urls_go_to_the_reader_of_their_extension(monkeypatch, url, reader):
    def load(*names, data_files, split, streaming, cache_dir):
        assert (names, split, streaming) == ((reader,), "train", True)
        assert data_files == {"train": [url]}
        return [{"text": "x"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read(url) == ["x"]


def test_urls_that_cannot_be_read(monkeypatch):
    def load(*names, **options):
        raise Exception("Name or service not known")  # not even an OSError

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert "by its plain name, owner/name" in refusal("hf://datasets/a/b")
    assert "cannot read https://host/a.txt: Name or" in refusal("https://host/a.txt")


@pytest.mark.parametrize(
    ("streaming", "holdout"),
    [(True, "hash"), (False, "hash"), (False, "first")],  # a stream has no first share
)
def test_max_documents_takes_the_first(tmp_path, streaming, holdout):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i}\n" for i in range(60)))
    config = CorpusConfig(
        source=str(path), streaming=streaming, holdout=holdout, max_documents=40,
        validation_fraction=0.2,
    )  # fmt: skip
    parts = [list(documents(config, part, cache_dir=str(tmp_path / "cache")))
             for part in ("train", "validation")]  # fmt: skip
    found = sorted(int(text.split()[1]) for part in parts for text in part)
    assert found == list(range(40))
    assert len(parts[1]) == 8 or holdout == "hash"


def test_max_documents_of_the_builtin_corpus():
    config = CorpusConfig(max_documents=9, validation_fraction=0.5, holdout="first")
    assert len(list(documents(config, "train"))) == 5
    with pytest.raises(InputError, match="max_documents is 0"):
        CorpusConfig(max_documents=0)
