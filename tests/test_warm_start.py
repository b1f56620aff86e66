# SPDX-License-Identifier: Apache-2.0
"""First weights from runs, checkpoints and Hugging Face folders, and made to fit."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import save_file
from tiny import causal_run

from lm_scale import hf
from lm_scale.config import RunConfig
from lm_scale.errors import InputError
from lm_scale.first_weights import check_init_from, find_source, read_weights
from lm_scale.models import Compute, GPT2Config, LlamaConfig, RobertaConfig, build_model
from lm_scale.objectives import CausalLM, MaskedLM
from lm_scale.run_json import read_run
from lm_scale.runs import open_run
from lm_scale.sharding import MeshShape, flatten, init_params, make_mesh, unflatten
from lm_scale.trainer import evaluate_only, train
from lm_scale.warm_start import WarmStart

QUIET = Console(quiet=True)
SMALL: dict[str, Any] = {
    "vocab": 301,
    "positions": 25,
    "layers": 3,
    "embed": 32,
    "heads": 4,
    "mlp": 48,
}
LLAMA: dict[str, Any] = {**SMALL, "kv_heads": 2, "head_dim": 8}
FAMILIES = {
    "gpt2": GPT2Config(**SMALL),
    "roberta": RobertaConfig(**SMALL, pad_id=3),
    "llama": LlamaConfig(**LLAMA),
    "llama, tied": LlamaConfig(**LLAMA, tied=True),
}
NOTHING = WarmStart()
EVERYTHING = WarmStart(grow_vocab=True, grow_positions=True, layers=(2, 0))
ROWS = ("tokens", "positions", "output", "head_bias")  # the weights that may grow
ONE, EIGHT = MeshShape(data=1), MeshShape(data=2, fsdp=2, tensor=2)


def in_numpy(params) -> dict[str, np.ndarray]:
    return {path: np.array(value) for path, value in flatten(params).items()}


def model_of(config):
    return build_model(config, Compute(dtype="float32", remat="none"))


def fresh(config, seed: int, mesh: MeshShape = ONE) -> dict[str, np.ndarray]:
    model = model_of(config)
    with jax.set_mesh(mesh_of(mesh)):
        make = jax.jit(
            lambda: init_params(model, model.compute.rules, jax.random.key(seed))
        )
        return in_numpy(make())


def mesh_of(shape: MeshShape):
    return make_mesh(shape, jax.devices()[:1] if shape == ONE else None)


def write_model(folder: Path, config) -> dict[str, np.ndarray]:
    """A Hugging Face folder with random weights, which are returned."""
    params = fresh(config, seed=7)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    save_file(hf.to_hf(config, unflatten(params)), folder / "model.safetensors")
    return params


def warm(folder: object, config, init: WarmStart = NOTHING, **changes) -> RunConfig:
    masked = isinstance(config, RobertaConfig)
    return RunConfig(
        run_dir="nowhere", model=config, objective=MaskedLM() if masked else CausalLM(),
        seq_len=16, steps=3, init_from=str(folder), init=init, **changes,
    )  # fmt: skip


def read(config: RunConfig, mesh: MeshShape = ONE) -> dict[str, np.ndarray]:
    check_init_from(config)
    with jax.set_mesh(mesh_of(mesh)):
        model = model_of(config.model)
        params = read_weights(config, model, mesh_of(mesh), QUIET)
        target = jax.eval_shape(
            lambda: init_params(model, model.compute.rules, jax.random.key(0))
        )
        for path, value in flatten(params).items():
            assert jax.typeof(value) == jax.typeof(flatten(target)[path]), path
        return in_numpy(params)


def refusal(config: RunConfig) -> str:
    with pytest.raises(InputError) as error:
        check_init_from(config)
    return str(error.value)


# --- Made to fit ----------------------------------------------------------------------


@pytest.mark.parametrize("mesh", [ONE, EIGHT], ids=["1 device", "8 devices"])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_that_may_differ_at_once(tmp_path, family, mesh):
    """301 rows of tokens, which no mesh divides, become 306; of 3 layers, 2 stay."""
    there = FAMILIES[family]
    here = dataclasses.replace(there, vocab=306, positions=40, layers=2)
    given = write_model(tmp_path / "hf", there)
    made = read(warm(tmp_path / "hf", here, EVERYTHING), mesh)
    expected = fresh(here, seed=42)
    assert made.keys() == expected.keys()
    for path, value in made.items():
        old = given[path]
        if path.startswith("blocks."):
            np.testing.assert_array_equal(value, old[[2, 0]], err_msg=path)
            continue
        rows = len(old)
        np.testing.assert_array_equal(value[:rows], old, err_msg=path)
        # Of the initializer, whose last bit is up to the compiler.
        np.testing.assert_allclose(value[rows:], expected[path][rows:], rtol=1e-6)
        assert (len(value) > rows) == (path in ROWS), path


@pytest.mark.parametrize("family", ["gpt2", "roberta"])
def test_positions_alone(tmp_path, family):
    """RoBERTa's table has pad_id + 1 rows before those of the positions: they stay."""
    there = FAMILIES[family]
    here = dataclasses.replace(there, positions=40)
    given = write_model(tmp_path / "hf", there)
    made = read(warm(tmp_path / "hf", here, WarmStart(grow_positions=True)))
    offset = there.pad_id + 1 if isinstance(there, RobertaConfig) else 0
    assert given["positions"].shape[0] == 25 + offset
    assert made["positions"].shape[0] == 40 + offset
    np.testing.assert_array_equal(made["positions"][: 25 + offset], given["positions"])
    assert 0.01 < made["positions"][25 + offset :].std() < 0.03  # init_std is 0.02
    for path, value in made.items():
        if path != "positions":
            np.testing.assert_array_equal(value, given[path], err_msg=path)


def test_longer_sequences_change_no_weight_of_a_rotary_model(tmp_path):
    given = write_model(tmp_path / "hf", FAMILIES["llama"])
    here = dataclasses.replace(FAMILIES["llama"], positions=400)
    assert "`init.grow_positions` allows it" in refusal(warm(tmp_path / "hf", here))
    made = read(warm(tmp_path / "hf", here, WarmStart(grow_positions=True)))
    for path, value in made.items():
        np.testing.assert_array_equal(value, given[path], err_msg=path)


def test_a_layer_may_come_twice(tmp_path):
    given = write_model(tmp_path / "hf", FAMILIES["gpt2"])
    here = dataclasses.replace(FAMILIES["gpt2"], layers=4)
    made = read(warm(tmp_path / "hf", here, WarmStart(layers=(0, 1, 1, 2))))
    np.testing.assert_array_equal(made["blocks.up"], given["blocks.up"][[0, 1, 1, 2]])


def test_options_that_nothing_needs_change_nothing(tmp_path):
    given = write_model(tmp_path / "hf", FAMILIES["gpt2"])
    options = WarmStart(grow_vocab=True, grow_positions=True, layers=(0, 1, 2))
    for init in (NOTHING, options):
        made = read(warm(tmp_path / "hf", FAMILIES["gpt2"], init))
        for path, value in made.items():
            np.testing.assert_array_equal(value, given[path], err_msg=path)


# --- Refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "init", "said"),
    [
        ({"vocab": 306}, NOTHING,
         "vocab: 301 there, 306 here (`init.grow_vocab` allows it)"),
        ({"positions": 26}, WarmStart(grow_vocab=True),
         "positions: 25 there, 26 here (`init.grow_positions` allows it)"),
        ({"layers": 2}, WarmStart(grow_vocab=True),
         "layers: 3 there, 2 here (`init.layers` chooses some)"),
        ({"vocab": 300, "layers": 2}, EVERYTHING,
         "vocab: 301 there, 300 here (it can only grow)"),
        ({"positions": 24, "layers": 2}, EVERYTHING,
         "positions: 25 there, 24 here (it can only grow)"),
        ({"mlp": 64, "heads": 2, "layers": 2}, EVERYTHING,
         "heads: 4 there, 2 here; mlp: 48 there, 64 here."),
        ({}, WarmStart(layers=(0, 1)), "names 2 layer(s), but model.layers = 3"),
        ({"layers": 2}, WarmStart(layers=(0, 3)), "names layer 3: expected 0 to 2"),
        ({"layers": 1}, WarmStart(layers=(-1,)), "names layer -1: expected 0 to 2"),
    ],
)  # fmt: skip
def test_another_model_is_refused_by_name(tmp_path, changes, init, said):
    write_model(tmp_path / "hf", FAMILIES["gpt2"])
    here = dataclasses.replace(FAMILIES["gpt2"], **changes)
    assert said in refusal(warm(tmp_path / "hf", here, init))


def test_dropout_and_initializer_may_differ_and_the_family_may_not(tmp_path):
    given = write_model(tmp_path / "hf", FAMILIES["gpt2"])
    here = dataclasses.replace(FAMILIES["gpt2"], embed_dropout=0.0, init_std=1.0)
    made = read(warm(tmp_path / "hf", here))
    np.testing.assert_array_equal(made["tokens"], given["tokens"])
    other = warm(tmp_path / "hf", FAMILIES["llama"], EVERYTHING)
    assert "holds a GPT2Config, the config a LlamaConfig" in refusal(other)


def test_options_without_weights():
    config = dataclasses.replace(
        warm("x", FAMILIES["gpt2"], EVERYTHING), init_from=None
    )
    with pytest.raises(InputError, match="`init_from` names none"):
        config.check()


# --- Runs -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 4 steps with checkpoints of 2 and 4, and its weights at both."""
    folder = tmp_path_factory.mktemp("source")
    config = causal_run(
        folder, steps=4, save_every=2, keep=None, stop_at=2, eval_every=None,
        sample_prompt=None,
    )  # fmt: skip
    weights = {}
    for stop in (2, None):
        outcome = train(dataclasses.replace(config, stop_at=stop), QUIET)
        weights[outcome.step] = in_numpy(open_run(config.run_dir).params)
    return read_run(config.run_dir), weights


def assert_equal(found, expected):
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)


@pytest.mark.parametrize("mesh", [ONE, EIGHT], ids=["1 device", "8 devices"])
def test_a_run_is_its_newest_checkpoint_though_a_model_is_there_too(run, mesh):
    config, weights = run
    assert (Path(config.run_dir) / "model.safetensors").exists()
    source = warm(config.run_dir, config.model)
    assert find_source(source).step == 4
    assert_equal(read(source, mesh), weights[4])


def test_one_checkpoint_of_a_run(run):
    config, weights = run
    source = warm(f"{config.run_dir}/checkpoints/2", config.model)
    assert_equal(read(source), weights[2])
    missing = warm(f"{config.run_dir}/checkpoints/3", config.model)
    said = refusal(missing)
    assert "there is no such checkpoint" in said and "there are: 2, 4." in said


def test_the_model_that_a_run_has_exported(run, tmp_path):
    """In a folder without checkpoints it counts, though run.json is there."""
    config, weights = run
    for name in ("config.json", "model.safetensors", "run.json"):
        shutil.copy(Path(config.run_dir) / name, tmp_path)
    source = warm(tmp_path, config.model)
    assert find_source(source).step is None
    assert_equal(read(source), weights[4])


def test_a_folder_that_is_neither(tmp_path):
    said = refusal(warm(tmp_path / "checkpoints" / "7", FAMILIES["gpt2"]))
    assert "there is no such checkpoint" in said and "there are: none" in said
    assert "not a readable Hugging Face config" in refusal(
        warm(tmp_path, FAMILIES["gpt2"])
    )


@pytest.mark.parametrize("mesh", [ONE, EIGHT], ids=["1 device", "8 devices"])
def test_a_checkpoint_is_made_to_fit(run, mesh):
    config, weights = run
    here = dataclasses.replace(config.model, vocab=306, positions=40, layers=1)
    init = dataclasses.replace(EVERYTHING, layers=(1,))
    made = read(warm(config.run_dir, here, init), mesh)
    np.testing.assert_array_equal(made["tokens"][:300], weights[4]["tokens"])
    np.testing.assert_array_equal(made["positions"][:24], weights[4]["positions"])
    np.testing.assert_array_equal(made["blocks.qkv"], weights[4]["blocks.qkv"][1:])
    expected = fresh(here, seed=42)["tokens"][300:]
    np.testing.assert_allclose(made["tokens"][300:], expected, rtol=1e-6)


def test_a_warm_run_begins_at_step_0_and_needs_its_source_once(run, tmp_path, capsys):
    config, weights = run
    source = tmp_path / "source"
    shutil.copytree(config.run_dir, source)
    here = dataclasses.replace(config.model, vocab=320, positions=32)
    init = WarmStart(grow_vocab=True, grow_positions=True)
    begun = dataclasses.replace(
        config, run_dir=str(tmp_path / "run"), model=here, init=init, mesh=EIGHT,
        init_from=str(source), seq_len=32, stop_at=1, steps=3, eval_at_end=False,
    )  # fmt: skip
    assert train(begun, Console()).step == 1
    out = capsys.readouterr().out
    assert f"The first weights are the checkpoint of step 4 in {source}: vocab" in out
    assert "vocab 300 -> 320; positions 24 -> 32" in out
    # The first update has learning rate 0: these are still the given weights.
    found = in_numpy(open_run(begun.run_dir).params)
    np.testing.assert_array_equal(found["tokens"][:300], weights[4]["tokens"])
    shutil.rmtree(source)
    assert train(dataclasses.replace(begun, stop_at=None), QUIET).step == 3
    elsewhere = dataclasses.replace(begun, run_dir=str(tmp_path / "other"))
    with pytest.raises(InputError, match="is not a folder"):
        train(elsewhere, QUIET)


def test_a_single_checkpoint_evaluated(run, tmp_path):
    config, _ = run
    losses = [
        evaluate_only(
            dataclasses.replace(
                config, run_dir=str(tmp_path / str(step)),
                init_from=f"{config.run_dir}/checkpoints/{step}",
            ),
            QUIET,
        )["loss"]
        for step in (2, 4)
    ]  # fmt: skip
    assert losses[1] < losses[0]
