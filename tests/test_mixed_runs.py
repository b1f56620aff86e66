# SPDX-License-Identifier: Apache-2.0
"""Runs of several corpora: what a config may say, prepared, trained, gone on with."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
from rich.console import Console
from test_config import GPT2, begun, changed
from tiny import causal_run

from lm_scale.__main__ import main
from lm_scale.config import RunConfig, load_config
from lm_scale.data.corpus import CorpusConfig
from lm_scale.data.mixed import Mixed
from lm_scale.data.ranks import Rank
from lm_scale.data.share import Share
from lm_scale.data.store import TokenStore, read_manifest
from lm_scale.errors import InputError
from lm_scale.run_json import check_changes, check_run_dir, from_dict, to_dict
from lm_scale.run_text import (
    open_eval,
    open_train,
    prepare_data,
    prepare_share,
    recipe_of,
    training_texts,
)
from lm_scale.runs import some_mesh
from lm_scale.trainer import train

QUIET = Console(quiet=True)
WEB, BOOKS = CorpusConfig(source="web.txt"), CorpusConfig(source="books.txt")
MIXED = changed(GPT2, data__mixture=(Share("web", 7, WEB), Share("books", 2.5, BOOKS)))


def mixed_run(folder: Path, **changes) -> RunConfig:
    """Three examples of a text to one of a smaller one."""
    config = causal_run(folder, eval_every=None, **changes)
    books = folder / "books.txt"
    books.write_text("".join(f"a red cat and {i} hats sat\n" for i in range(60)))
    small = CorpusConfig(source=str(books), validation_fraction=0.2)
    mixture = (Share("web", 3, config.data.corpus), Share("books", 1, small))
    data = dataclasses.replace(
        config.data, corpus=CorpusConfig(), mixture=mixture, workers=1
    )
    return dataclasses.replace(config, data=data)


# --- The config -----------------------------------------------------------------------


def test_to_json_and_back():
    again = from_dict(RunConfig, json.loads(json.dumps(to_dict(MIXED))))
    assert again == MIXED and hash(again) == hash(MIXED)


def test_fields_of_a_source_are_overridden_by_number(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(
        "from lm_scale.config import DataConfig, RunConfig\n"
        "from lm_scale.data.share import Share\n"
        "data = DataConfig(mixture=(Share('a', 1), Share('b', WEIGHT)))\n"
        "config = RunConfig(run_dir='r', steps=1, data=data)\n".replace("WEIGHT", "2")
    )
    argv = ["--data.mixture.1.weight", "0.5", "--data.mixture.0.corpus.source", "x"]
    found = load_config(str(path), argv, prog="train").data.mixture
    assert found == (Share("a", 1, CorpusConfig("x")), Share("b", 0.5))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": None, "epochs": 1.0}, "epochs = 1.0 with data.mixture: .*`steps`"),
        ({"data__max_train_examples": 5}, "max_train_examples = 5 .*`max_documents`"),
        ({"data__max_eval_examples": 5}, "max_eval_examples = 5 .*fraction"),
        ({"data__corpus": WEB}, "'web.txt' would not be read"),
        ({"data__mixture": (Share("a", 0),)}, "data.mixture: a weight is 0;"),
        ({"data__mixture": (Share("a", float("nan")),)}, "a weight is nan;"),
        ({"data__mixture": (Share("a", 1), Share("A", 1))}, "called 'a' and 'A'"),
        ({"data__mixture": (Share("a/b", 1),)}, "called 'a/b'; expected 1 to 64"),
        ({"data__mixture": (Share("", 1),)}, "called ''; expected"),
        ({"data__mixture": (Share("Train", 1),)}, "'Train', but a folder"),
    ],
)
def test_what_cannot_be_is_refused(changes, said):
    MIXED.check()
    with pytest.raises(InputError, match=said):
        changed(MIXED, **changes).check()


def test_changes_are_named_field_by_field(tmp_path):
    config = begun(MIXED, tmp_path)
    web, books = config.data.mixture
    other = dataclasses.replace(web.corpus, source="w2.txt", streaming=False)
    mixture = (
        dataclasses.replace(web, corpus=other),
        dataclasses.replace(books, weight=1),
    )
    here = changed(config, data__mixture=mixture)
    with pytest.raises(InputError) as error:
        check_run_dir(here)
    said = str(error.value)
    assert "data.mixture.0.corpus.source: 'web.txt' there, 'w2.txt' here\n" in said
    assert "data.mixture.1.weight: 2.5 there, 1 here\n" in said
    assert said.count(" there, ") == 2  # streaming is another way to the same text
    names = ("data.mixture.0.corpus.source", "data.mixture.weight", "tokens.web.share")
    allowed = changed(here, override=names)
    check_run_dir(allowed)
    made = check_changes(to_dict(config), allowed, 10).made
    assert made["data.mixture.1.weight"] == [2.5, 1]
    with pytest.raises(InputError, match=r"names 'data\.mixture\.0\.wight'"):
        check_run_dir(changed(here, override=("data.mixture.0.wight",)))
    swapped = changed(config, data__mixture=(books, web))
    with pytest.raises(InputError, match=r"data\.mixture\.0\.name: 'web' there"):
        check_run_dir(swapped)


def test_the_tokenizer_s_recipe_has_all_texts_and_no_weight():
    recipe = recipe_of(MIXED)
    heavier = changed(
        MIXED, data__mixture=(Share("web", 1, WEB), Share("books", 9, BOOKS))
    )
    assert recipe_of(heavier) == recipe
    assert list(recipe["mixture"]) == ["web", "books"]
    corpus = to_dict(GPT2.data.corpus)
    del corpus["streaming"]  # as recipes always were
    assert recipe_of(GPT2)["corpus"] == corpus


# --- Prepared -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    config = mixed_run(folder)
    text = "from pathlib import Path\nfrom test_mixed_runs import mixed_run\n"
    (folder / "config.py").write_text(
        f"{text}config = mixed_run(Path({str(folder)!r}))"
    )
    return config, prepare_data(config, QUIET), folder / "config.py"


def test_batches_are_of_all_sources(prepared):
    config, tokenizer, _ = prepared
    batches = open_train(config, tokenizer, some_mesh(config))
    source = batches.source
    assert isinstance(source, Mixed) and list(source.sources) == ["web", "books"]
    owners = [source.owner(int(n))[0] for n in batches.place(5, range(16))[1]]
    assert abs(owners.count("books") - 4) <= 1
    held_out = open_eval(config, tokenizer, some_mesh(config)).source
    assert isinstance(held_out, Mixed)
    assert all(len(one) > 0 for one in held_out.sources.values())
    text = tokenizer.decode(source.sources["books"].store.read(0, 40).tolist())
    assert "hats" in text


def test_the_tokenizer_is_trained_on_each_in_turn(prepared):
    config, _, _ = prepared
    texts = list(training_texts(config))
    books = [text.startswith("a red cat and ") for text in texts]
    assert books[:6] == [False, True] * 3
    assert not books[-1] and sum(books) == 43 and len(texts) == 43 + 385


def test_an_error_names_its_source(tmp_path):
    config = mixed_run(tmp_path)
    web, books = config.data.mixture
    nowhere = dataclasses.replace(books.corpus, source=str(tmp_path / "none.txt"))
    mixture = (web, dataclasses.replace(books, corpus=nowhere))
    with pytest.raises(InputError, match="data.mixture, books: .*none.txt"):
        prepare_data(changed(config, data__mixture=mixture), QUIET)


def test_ranks_share_each_source(prepared, tmp_path):
    config, _, _ = prepared
    shared = dataclasses.replace(config, run_dir=str(tmp_path / "run"))
    for rank in (0, 1):
        prepare_share(shared, QUIET, Rank(rank, 2))
    for name in ("web/train", "books/validation"):
        manifests = [read_manifest(f"{c.store_dir}/{name}") for c in (config, shared)]
        assert manifests[0] is not None and manifests[0] == manifests[1]


def test_verify_inspect_and_show(prepared, capsys, monkeypatch):
    config, tokenizer, path = prepared
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    assert main(["prepare", "--verify", str(path)]) == 0
    assert capsys.readouterr().out.count(": whole: ") == 4
    assert main(["prepare", "--inspect", str(path)]) == 0
    assert capsys.readouterr().out.count("document 0, the first") == 4
    assert main(["data", "show", str(path), "--step", "2"]) == 0
    out = capsys.readouterr().out
    rows = re.findall(
        r"row \d+: epoch \d+ of (\w+), example (\d+),.*\n  document (\d+)", out
    )
    assert len(rows) == 16
    for name, example, document in rows:
        store = TokenStore.open(f"{config.store_dir}/{name}/train")
        ((first, stop),) = store.spans([int(document)]).tolist()
        assert first <= int(example) * 16 < stop


# --- Trained --------------------------------------------------------------------------


def test_train_stop_and_go_on(tmp_path, capsys):
    """No step missing; epochs are told before, in the logs and in metrics.jsonl."""
    config = mixed_run(tmp_path, save_every=None)
    assert train(dataclasses.replace(config, stop_at=3), QUIET).step == 3
    outcome = train(config, Console(width=200))
    assert (
        outcome.finished and outcome.results["loss"] < outcome.results["unigram_loss"]
    )
    out = capsys.readouterr().out
    text = (Path(config.run_dir) / "metrics.jsonl").read_text()
    lines = [line for line in map(json.loads, text.splitlines()) if "labels" in line]
    lines = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in lines] == list(range(1, 31))
    store = TokenStore.open(f"{config.store_dir}/books/train")
    examples = store.num_tokens // config.seq_len
    for line in lines[3::4]:  # 64 examples each: whole windows of the mixture
        seen = line["step"] * config.batch / 4 / examples
        assert line["epochs/books"] == pytest.approx(seen)
    assert f"books {lines[-1]['epochs/books']:.2f} epochs" in out
    assert f"| epochs web {lines[-1]['epochs/web']:.2f} books" in out
    assert "75.0% from the" in out and f"{store.num_tokens:,} of books" in out
    manifest = (Path(config.checkpoints) / "30" / "manifest.json").read_text()
    tokens = json.loads(manifest)["tokens"]
    assert tokens["web.share"] == "0.75"
    assert tokens["books.number"] == store.num_tokens
