# SPDX-License-Identifier: Apache-2.0
"""Exports in several files, from several devices and processes."""

import json
import math
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import parity
import pytest
from safetensors.numpy import load_file

from lm_scale import hf, hf_shards
from lm_scale.data.tokenizer import TokenizerConfig, train_tokenizer
from lm_scale.errors import InputError
from lm_scale.models import build_model
from lm_scale.models.compute import Compute
from lm_scale.models.gpt2 import GPT2Config
from lm_scale.sharding import MeshShape, flatten, make_mesh

CONFIG = GPT2Config(vocab=300, positions=10, layers=3, embed=16, heads=2, mlp=20)
MAX_SHARD = 6_000  # bytes; a layer has about 7,000, the embedding 19,200
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def tokenizer():
    settings = TokenizerConfig(vocab_size=257, kind="gpt2")
    return train_tokenizer(["no pair twice"], settings)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(hf_shards, "MAX_SHARD", MAX_SHARD)


def export(folder, tokenizer, config=CONFIG, mesh=None, change=0.0):
    """Exports weights that a config names; returns the tensors that went in."""
    tensors = parity.random_tensors(config)
    tensors = {name: x + np.float32(change) for name, x in tensors.items()}
    model = build_model(config, Compute())
    params = parity.placed(model, tensors, mesh or parity.one_device())
    hf.export(config, params, tokenizer, folder)
    return tensors


def weights_in(folder):
    return {path.name for path in folder.glob("model*")}


def assert_holds(folder, tensors, config=CONFIG):
    """Read by the index alone, as others do, and by us."""
    index = json.loads((folder / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    found, sizes = {}, []
    for file in files:
        content = load_file(folder / file)
        assert {name for name, x in index["weight_map"].items() if x == file} == set(
            content
        )
        found |= content
        sizes.append(sum(x.nbytes for x in content.values()))
    assert index["metadata"]["total_size"] == sum(sizes)
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    model = build_model(config, Compute())
    again = flatten(hf.read_params(folder, model, parity.one_device()))
    for path, value in flatten(hf.from_hf(model, tensors)).items():
        np.testing.assert_array_equal(again[path], value, err_msg=path)
    return files, sizes


def test_a_large_model_is_dealt_out_to_files(tmp_path, tokenizer, small_shards):
    mesh = make_mesh(MeshShape(data=2, fsdp=2, tensor=2))
    tensors = export(tmp_path, tokenizer, mesh=mesh)
    files, sizes = assert_holds(tmp_path, tensors)
    count = len(files)
    assert files == [
        f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)
    ]
    assert weights_in(tmp_path) == {*files, INDEX}
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1
    # None is larger than it may be, but for a tensor that is; none is needlessly small.
    embedding = tensors["transformer.wte.weight"].nbytes
    assert [size for size in sizes if size > MAX_SHARD] == [embedding]
    assert all(a + b > MAX_SHARD for a, b in zip(sizes, sizes[1:], strict=False))


def test_layers_share_a_program(tmp_path, tokenizer):
    config = replace(CONFIG, layers=7)
    hf_shards._take.clear_cache()
    export(tmp_path, tokenizer, config, make_mesh(MeshShape(data=1, fsdp=8)))
    # 12 weights of a block, of which six are vectors of the model's width.
    assert hf_shards._take._cache_size() == 7


def test_weights_of_an_older_export_are_removed(tmp_path, tokenizer, monkeypatch):
    large, other = replace(CONFIG, layers=5), tmp_path / "model-of-mine.safetensors"
    other.write_bytes(b"not ours")
    for most, config in ((MAX_SHARD, large), (MAX_SHARD, CONFIG), (MAX_SHARD, large)):
        monkeypatch.setattr(hf_shards, "MAX_SHARD", most)
        tensors = export(tmp_path, tokenizer, config)
        files, _ = assert_holds(tmp_path, tensors, config)
        assert weights_in(tmp_path) == {*files, INDEX, other.name}
    monkeypatch.undo()
    export(tmp_path, tokenizer)
    assert weights_in(tmp_path) == {"model.safetensors", other.name}
    monkeypatch.setattr(hf_shards, "MAX_SHARD", MAX_SHARD)
    files, _ = assert_holds(tmp_path, export(tmp_path, tokenizer))
    assert weights_in(tmp_path) == {*files, INDEX, other.name}


@pytest.mark.parametrize("before", ["one file", "several", "nothing"])
def test_an_export_that_is_killed_never_mixes_two_models(
    tmp_path, tokenizer, monkeypatch, before
):
    """Killed at each of its renamings in turn."""
    model, move = build_model(CONFIG, Compute()), os.replace
    if before == "several":
        monkeypatch.setattr(hf_shards, "MAX_SHARD", MAX_SHARD)
    old = None if before == "nothing" else export(tmp_path, tokenizer)
    monkeypatch.setattr(hf_shards, "MAX_SHARD", MAX_SHARD)
    for files_that_pass in range(100):
        moved = []

        def killed(source, target):
            if len(moved) == files_that_pass:  # noqa: B023
                raise KeyboardInterrupt
            moved.append(target.name)  # noqa: B023
            move(source, target)

        monkeypatch.setattr(os, "replace", killed)
        try:
            new = export(tmp_path, tokenizer, change=1.0)
            break
        except KeyboardInterrupt:
            pass
        try:
            found = hf.read_params(tmp_path, model, parity.one_device())
        except InputError as error:
            assert "has neither" in str(error) and before != "one file"
            continue
        assert old is not None
        values = hf.to_hf(CONFIG, found)
        assert all(np.array_equal(values[name], x) for name, x in old.items())
    assert moved[-1] == INDEX and len(moved) > 6
    assert_holds(tmp_path, new)


@pytest.mark.slow
def test_two_processes_read_and_write_a_half_each(tmp_path, tokenizer):
    tensors = export(tmp_path / "from", tokenizer)
    target = tmp_path / "to"
    with socket.socket() as found:
        found.bind(("localhost", 0))
        address = f"localhost:{found.getsockname()[1]}"
    here = Path(__file__).parent
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}
    processes = [
        subprocess.Popen(
            [
                sys.executable, str(here / "hf_process.py"), address, "2", str(number),
                str(tmp_path / "from"), str(target), str(MAX_SHARD),
            ],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env,
        )
        for number in range(2)
    ]  # fmt: skip
    try:
        ends = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, ends, strict=True):
        assert process.returncode == 0, errors
    # gloo greets on the same stream.
    done = [json.loads(shown.splitlines()[-1]) for shown, _ in ends]
    files, _ = assert_holds(target, tensors)
    assert done[0]["wrote"] == files[::2] and done[1]["wrote"] == files[1::2] != []
    size = sum(x.size for x in tensors.values())
    vectors = sum(x.size for x in tensors.values() if x.ndim == 1)  # held by both
    for process in done:
        assert process["read"] <= math.ceil(size / 2) + vectors
    assert not (target / ".export").exists()
