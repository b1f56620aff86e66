# SPDX-License-Identifier: Apache-2.0
"""`prepare --inspect` and `data show`: from the command line to what is printed."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from stores import read_documents, write_store
from tiny import causal_run, masked_run

from lm_scale.__main__ import main
from lm_scale.data.examples import Pieces
from lm_scale.data.packing import segmented
from lm_scale.data.store import TokenStore
from lm_scale.data.where import Piece
from lm_scale.data.windows import batch_number
from lm_scale.errors import InputError
from lm_scale.look import rows_of
from lm_scale.objectives import IGNORE
from lm_scale.run_json import note, write_config
from lm_scale.run_text import open_train, prepare_data
from lm_scale.runs import some_mesh
from lm_scale.show_batch import marked, pieces_of

CONFIG = """
from pathlib import Path
from tiny import {kind}
config = {kind}(Path({folder!r}))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Kind of run -> its folder, config and tokenizer, prepared."""
    runs = {}
    for kind in (causal_run, masked_run):
        folder = tmp_path_factory.mktemp(kind.__name__)
        config = kind(folder)
        text = CONFIG.format(kind=kind.__name__, folder=str(folder))
        (folder / "config.py").write_text(text)
        tokenizer = prepare_data(config, Console(quiet=True))
        runs[kind.__name__] = folder, config, tokenizer
    return runs


@pytest.fixture(autouse=True)
def tiny_is_found(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def test_inspect_by_config_and_by_folder(made, capsys):
    folder, config, _ = made["causal_run"]
    assert main(["prepare", "--inspect", str(folder / "config.py")]) == 0
    by_config = capsys.readouterr().out
    assert by_config.count("document 0, the first") == 2  # train and validation
    assert "longer than seq_len = 16" in by_config
    assert "the cat" in by_config and "<|endoftext|>" in by_config
    store = config.store_dir
    assert main(["prepare", store, "--inspect", "--seq-len", "16"]) == 0
    assert capsys.readouterr().out == by_config
    assert main(["prepare", f"{store}/train", "--inspect"]) == 0
    alone = capsys.readouterr().out
    assert "longer than" not in alone
    assert alone.splitlines()[0] in by_config.splitlines()


def test_inspect_says_what_is_missing(tmp_path, capsys):
    for flag in ("--inspect", "--verify"):
        assert main(["prepare", flag, str(tmp_path)]) == 2
        assert "there is no complete token store at" in capsys.readouterr().err
        assert main(["prepare", flag]) == 2
        assert main(["prepare", flag, "--help"]) == 0
        assert f"usage: lm-scale prepare {flag} CONFIG" in capsys.readouterr().out
    assert main(["prepare", "--verify", str(tmp_path), "--batch"]) == 2
    assert "takes nothing behind a folder, got '--batch'" in capsys.readouterr().err


ROW = r"row (\d+): epoch (\d+), example (\d+), (\d+) of (\d+) tokens to predict"
PIECE = r"document (\d+), tokens (\d+)-(\d+) of (\d+): (.*)"


@pytest.mark.parametrize("step", [1, 22, 30])
def test_show_prints_the_tokens_of_the_batch(made, step, capsys):
    """Read back from its documents, what is shown is what the step trains on."""
    folder, config, tokenizer = made["causal_run"]
    argv = ["data", "show", str(folder / "config.py"), "--step", str(step)]
    assert main([*argv, "--rows", "2:7"]) == 0
    out = capsys.readouterr().out
    batches = open_train(config, tokenizer, some_mesh(config))
    rows = batches.rows(step - 1, range(2, 7))["tokens"]
    epochs, numbers = batches.place(step - 1, range(2, 7))
    store = TokenStore.open(Path(config.store_dir) / "train")
    shown = [part for part in re.split(r"^(?=row )", out, flags=re.M)][1:]
    assert len(shown) == 5
    for at, text in enumerate(shown):
        expected = (2 + at, epochs[at], numbers[at], 15, 16)
        assert re.findall(ROW, text) == [tuple(map(str, expected))]
        tokens = []
        for document, first, last, whole, words in re.findall(PIECE, text):
            of = read_documents(store, np.array([int(document)]))[0]
            assert of.size == int(whole)
            tokens += (part := of[int(first) : int(last) + 1].tolist())
            assert words == tokenizer.decode(part).replace("\n", "⏎")
        assert tokens == rows[at].tolist()
    assert f"step {step} of 30 trains on batch {step - 1}" in out


def test_show_makes_masks_visible(made, capsys):
    folder, config, tokenizer = made["masked_run"]
    argv = ["data", "show", str(folder / "config.py"), "--step", "4"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    batch = open_train(config, tokenizer, some_mesh(config)).rows(3, range(16))
    chosen = batch["labels"] != IGNORE
    same = chosen & (batch["labels"] == batch["tokens"])
    masks = batch["tokens"] == tokenizer.mask_token_id
    assert 0 < same.sum() < chosen.sum()
    body = out.partition("row 0:")[2]
    assert body.count("⟦") == chosen.sum()
    assert body.count("→") == (chosen & ~same).sum()
    assert body.count("→<mask>⟧") == (masks & chosen).sum()


def test_show_tells_segments_and_padding(made, capsys):
    folder, config, tokenizer = made["masked_run"]
    argv = ["data", "show", str(folder / "config.py"), "--step", "2"]
    options = ["--data.examples", "documents", "--seq-len", "24"]
    assert main([*argv, *options, "--data.pad-to-seq-len"]) == 0
    out = capsys.readouterr().out
    data = dataclasses.replace(config.data, examples="documents", pad_to_seq_len=True)
    config = dataclasses.replace(config, data=data, seq_len=24)
    batch = open_train(config, tokenizer, some_mesh(config)).rows(1, range(16))
    padding = (batch["segments"] == 0).sum()
    assert sum(map(int, re.findall(r"padding: (\d+) tokens", out))) == padding > 0
    assert out.count("segment 1, document ") == 16


def test_show_tells_the_documents_of_a_planned_row(tmp_path):
    write_store(tmp_path / "s", [np.full(n, n) for n in (3, 9, 0, 2, 6)], vocab_size=10)
    store = TokenStore.open(tmp_path / "s")
    plan = segmented(np.array([0, 3, 12, 12, 14, 20]), 8)
    source = Pieces(store, 8, plan)
    assert pieces_of(source, 0) == [Piece(0, 0, 3, 3), Piece(1, 0, 5, 9)]
    assert pieces_of(source, 1) == [
        Piece(1, 5, 4, 9), Piece(3, 0, 2, 2), Piece(4, 0, 2, 6),
    ]  # fmt: skip


def test_show_leaves_out_what_the_run_leaves_out(made, capsys):
    folder, config, _ = made["causal_run"]
    write_config(config)
    argv = ["data", "show", config.run_dir, "--step", "5"]
    assert main(argv) == 0
    before = capsys.readouterr().out
    note(config.run_dir, left_out=[[3, 6]])
    try:
        assert main(argv) == 0
        after = capsys.readouterr().out
        assert batch_number(4, ((3, 6),)) == 7
        assert "step 5 of 30 trains on batch 7" in after
        assert "leaves out the batches 3 to 5" in after
        assert main(["data", "show", config.run_dir, "--step", "2"]) == 0
        assert "trains on batch 1 " in capsys.readouterr().out
    finally:
        (Path(config.run_dir) / "saved.json").unlink()
    assert "trains on batch 4 " in before
    assert before.partition("row 0")[2] != after.partition("row 0")[2]


MISTAKES = {
    "no step": (["data", "show", "CONFIG", "--step", "31"], "expected 1 to 30"),
    "step 0": (["data", "show", "CONFIG", "--step", "0"], "expected 1 to 30"),
    "rows": (["data", "show", "CONFIG", "--step", "1", "--rows", "16:"], "batch's 16"),
    "no run": (["data", "show", "nowhere", "--step", "1"], "no config file 'nowhere'"),
    "no store": (
        ["data", "show", "CONFIG", "--step", "1", "--data.store", "nowhere"],
        "run `lm-scale prepare`",
    ),
    "what": (["data", "list"], "expected `show`, got 'list'"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_clear_message(made, name, capsys):
    argv, message = MISTAKES[name]
    config = str(made["causal_run"][0] / "config.py")
    assert main([config if word == "CONFIG" else word for word in argv]) == 2
    assert message in capsys.readouterr().err


def test_help(capsys):
    assert main(["data", "--help"]) == 0
    assert "--step N" in capsys.readouterr().out
    assert main(["prepare", "--inspect", "--help"]) == 0
    assert "histogram" in capsys.readouterr().out


def test_rows_are_those_of_a_slice():
    assert rows_of(":", 8) == range(8)
    assert rows_of("2:4", 8) == range(2, 4)
    assert rows_of("-2:", 8) == range(6, 8)
    assert rows_of("3", 8) == range(3, 4)
    for wrong in ("8", "x", "5:2", "1:2:3:4", "-1", ""):
        with pytest.raises(InputError, match="--rows"):
            rows_of(wrong, 8)


class Letters:
    def decode(self, tokens, **options):
        return "".join("abcdefgh"[t] for t in tokens)


@pytest.mark.parametrize(
    ("tokens", "labels", "text"),
    [
        ([0, 1, 2], {}, "abc"),
        ([0, 7, 2], {1: 1}, "a⟦b→h⟧c"),
        ([7, 1, 7], {0: 0, 1: 1, 2: 5}, "⟦a→h⟧⟦b⟧⟦f→h⟧"),
        ([7], {0: 0}, "⟦a→h⟧"),
    ],
)
def test_what_is_hidden_stands_beside_what_hides_it(tokens, labels, text):
    array = np.full(len(tokens), IGNORE)
    for at, label in labels.items():
        array[at] = label
    assert marked(Letters(), np.array(tokens), array) == text
