# SPDX-License-Identifier: Apache-2.0
"""Runs that train from a stream: lost and resumed as if nothing had been; refusals."""

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from tiny import causal_run

from lm_scale.data import shards
from lm_scale.data.corpus import CorpusConfig
from lm_scale.data.ranks import Rank
from lm_scale.errors import InputError, SourceLost
from lm_scale.look import show_step
from lm_scale.run_text import first_texts, prepare_share
from lm_scale.runs import open_run
from lm_scale.sharding import flatten
from lm_scale.trainer import train

QUIET = Console(quiet=True)


def streamed(folder: Path, **changes):
    """Each epoch is some 20 steps; a document is shorter than a sequence."""
    config = causal_run(folder, steps=24, save_every=None, eval_every=None, **changes)
    data = dataclasses.replace(config.data, stream=True, stream_buffer=30)
    return dataclasses.replace(config, data=data)


def outcome(config):
    text = (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()
    lines = [line for line in map(json.loads, text) if line["kind"] == "train"]
    params = flatten(open_run(config.run_dir).params)
    assert "data_wait" in lines[-1]
    return [line["loss"] for line in lines], {k: np.array(v) for k, v in params.items()}


def test_a_lost_stream_is_saved_and_resumed_bit_for_bit(tmp_path, monkeypatch):
    straight = streamed(tmp_path / "a", run_dir=str(tmp_path / "straight"))
    told = io.StringIO()
    prepare_share(straight, Console(file=told, width=200), Rank())
    assert "only the tokenizer and the held-out text" in told.getvalue()
    with pytest.raises(InputError, match="data.stream = True: .* cannot be shown"):
        show_step(straight, 1, range(1), QUIET)
    results = train(straight, QUIET).results
    manifest = tmp_path / "straight" / "checkpoints" / "24" / "manifest.json"
    place = json.loads(manifest.read_text())["stream"]
    assert place["batch"] == 24 and place["lanes"]["0"]["epoch"] == 1
    assert not (tmp_path / "straight" / "data" / "train").exists()

    lost = streamed(tmp_path / "a", run_dir=str(tmp_path / "lost"))
    read = shards.Shards._read

    def failing(self, shard, row):
        for at, text in read(self, shard, row):
            if at >= 330:
                raise ConnectionError("network is down")
            yield at, text

    with monkeypatch.context() as patch:
        patch.setattr(shards, "PAUSES", (0,))
        patch.setattr(shards.Shards, "_read", failing)
        with pytest.raises(SourceLost, match="row 3.* read: network is down"):
            train(lost, QUIET)
    # The only one: that of the step at which it was heard.
    (saved,) = (tmp_path / "lost" / "checkpoints").iterdir()
    assert 0 < int(saved.name) < 24
    assert train(lost, QUIET).results["loss"] == results["loss"]
    (losses, params), (expected, wanted) = outcome(lost), outcome(straight)
    assert losses == expected
    for path, value in wanted.items():
        np.testing.assert_array_equal(params[path], value, err_msg=path)

    buffer = dataclasses.replace(lost.data, stream_buffer=31)
    with pytest.raises(InputError, match="stream_buffer: 30 .* no override helps"):
        train(dataclasses.replace(lost, data=buffer, steps=30), QUIET)
    with (tmp_path / "a" / "corpus.txt").open("a") as file:
        file.write("one more\n")
    with pytest.raises(InputError, match="tokens.files"):
        train(dataclasses.replace(lost, steps=30), QUIET)


@pytest.mark.parametrize(
    ("run", "data", "said"),
    [
        ({}, {"examples": "documents"}, "cuts blocks, not data.examples = 'documents'"),
        ({"steps": None, "epochs": 2.0}, {}, "epochs = 2.0, .* Give `steps`"),
        ({}, {"max_train_examples": 9}, "max_train_examples = 9"),
        (
            {},
            {"corpus": CorpusConfig(holdout="first")},
            "needs .* got 'first' and True",
        ),
        ({}, {"corpus": CorpusConfig(streaming=False)}, "got 'hash' and False"),
        (
            {},
            {"corpus": CorpusConfig(drop_duplicates=True)},
            "drop_duplicates = True, .* which documents it has read before",
        ),
        ({}, {"stream_lanes": 3}, "dealt evenly to data.stream_lanes = 3"),
        ({}, {"stream_buffer": 0}, "stream_buffer = 0: expected a number above 0"),
    ],
)
def test_what_a_stream_cannot_do_is_refused(tmp_path, run, data, said):
    config = dataclasses.replace(streamed(tmp_path), **run)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, **data))
    with pytest.raises(InputError, match=said):
        config.check()


def test_a_tokenizer_is_trained_on_the_first_texts():
    assert list(first_texts(iter(["abc", "d", "ef", "g"]), 5)) == ["abc", "d", "ef"]
    assert list(first_texts(iter(["a"]), 5)) == ["a"]
