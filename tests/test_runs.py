# SPDX-License-Identifier: Apache-2.0
"""From a config to its batches: sizes, limits, kinds of examples."""

import dataclasses
from pathlib import Path

import jax
import pytest
from rich.console import Console
from tiny import masked_run

from lm_scale.data.examples import Blocks, Documents, Pieces
from lm_scale.data.prepare import Most
from lm_scale.data.store import read_manifest
from lm_scale.models import Compute
from lm_scale.run_text import most, open_eval, open_source, open_train, prepare_data
from lm_scale.sharding import PRESETS, MeshShape, make_mesh

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    config = masked_run(tmp_path_factory.mktemp("runs"))
    return config, prepare_data(config, QUIET)


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({}, 16), ({"accumulate": 2}, 8), ({"eval_batch": 24}, 24),
        ({"eval_batch": 3}, 8), ({"accumulate": 2, "eval_batch": 9}, 16),
    ],
)  # fmt: skip
def test_the_held_out_batch(prepared, changes, size):
    config, tokenizer = prepared
    config = dataclasses.replace(config, **changes)
    mesh = make_mesh(MeshShape())
    assert open_eval(config, tokenizer, mesh).batch == size
    assert open_train(config, tokenizer, mesh).batch == 16


def test_kinds_of_examples_and_their_limits(prepared):
    config, tokenizer = prepared
    mesh = make_mesh(MeshShape(data=2, context=4))
    blocks = open_source(config, tokenizer, mesh, "train")
    assert isinstance(blocks, Blocks)
    data = dataclasses.replace(
        config.data, examples="documents", max_train_examples=7, max_eval_examples=5
    )
    lines = dataclasses.replace(config, data=data)
    train = open_source(lines, tokenizer, mesh, "train")
    assert isinstance(train, Documents) and len(train) == 7
    assert len(open_source(lines, tokenizer, mesh, "validation")) == 5
    assert train.fixed_width is None and train.multiple == 16
    # Cut in three between the sublayers, whatever the width of a batch.
    compute = Compute(rules=PRESETS["fsdp_tp_sp"])
    mesh_of_6 = make_mesh(MeshShape(data=2, tensor=3), jax.devices()[:6])
    cut = dataclasses.replace(lines, compute=compute)
    cut = open_source(cut, tokenizer, mesh_of_6, "train")
    assert isinstance(cut, Documents) and cut.multiple == 48
    full = dataclasses.replace(
        lines, data=dataclasses.replace(data, pad_to_seq_len=True)
    )
    assert open_source(full, tokenizer, mesh, "train").fixed_width == config.seq_len


@pytest.mark.parametrize("kind", ["segmented", "packed"])
def test_planned_rows_are_kept_beside_the_store(prepared, kind):
    config, tokenizer = prepared
    data = dataclasses.replace(config.data, examples=kind, max_train_examples=7)
    planned = dataclasses.replace(config, data=data)
    source = open_source(planned, tokenizer, make_mesh(MeshShape()), "train")
    assert isinstance(source, Pieces) and len(source) == 7
    plans = [path.name for path in (Path(config.store_dir) / "plans/train").iterdir()]
    assert any(name.startswith(f"{kind}-{config.seq_len}-") for name in plans)


def test_limits_stop_the_tokenizing(tmp_path):
    config = masked_run(tmp_path)
    assert most(config, "train") == Most()
    data = dataclasses.replace(
        config.data, max_train_examples=3, max_eval_examples=2, workers=1,
        cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    config = dataclasses.replace(config, data=data)
    assert most(config, "train") == Most(tokens=3 * 16)
    tokenizer = prepare_data(config, QUIET)
    batches = open_train(config, tokenizer, make_mesh(MeshShape()))
    assert batches.examples == 3
    manifest = read_manifest(Path(config.store_dir) / "train")
    assert manifest is not None and manifest.source["most_tokens"] == 48
    assert len(open_eval(config, tokenizer, make_mesh(MeshShape())).source) == 2


def test_arrow_files_go_to_cache_dir(tmp_path):
    config = masked_run(tmp_path)
    corpus = dataclasses.replace(config.data.corpus, streaming=False, holdout="first")
    data = dataclasses.replace(
        config.data, corpus=corpus, cache_dir=str(tmp_path / "cache")
    )
    config = dataclasses.replace(config, data=data)
    prepare_data(config, QUIET)
    assert list((tmp_path / "cache").rglob("*.arrow"))
