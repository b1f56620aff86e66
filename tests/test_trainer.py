# SPDX-License-Identifier: Apache-2.0
"""Whole runs: what they leave behind, and that stopping midway changes nothing."""

import dataclasses
import json
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console
from tiny import causal_run, masked_run

from lm_scale import hf
from lm_scale.checkpoint_folder import CheckpointFolder
from lm_scale.errors import InputError
from lm_scale.evaluate import evaluate
from lm_scale.models import Compute, build_model
from lm_scale.run_json import read_run
from lm_scale.runs import open_run
from lm_scale.sharding import MeshShape, flatten, make_mesh
from lm_scale.trainer import train

QUIET = Console(quiet=True)


def final_params(run_dir: str) -> dict[str, np.ndarray]:
    return {k: np.array(v) for k, v in flatten(open_run(run_dir).params).items()}


def lines(run_dir: str, kind: str) -> list[dict]:
    text = (Path(run_dir) / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, text) if line["kind"] == kind]


# Runs of masked LM are in test_main.py and in faults/ too.
BOTH = [causal_run, pytest.param(masked_run, marks=pytest.mark.exhaustive)]


@pytest.fixture(scope="module", params=BOTH)
def straight(request, tmp_path_factory):
    """A finished run of 30 steps, and the function that configures its like."""
    folder = tmp_path_factory.mktemp(request.param.__name__)
    config = request.param(folder)
    return config, train(config, QUIET), request.param


def test_a_run_learns_and_says_so(straight):
    config, outcome, _ = straight
    assert outcome.finished and not outcome.interrupted and outcome.step == 30
    losses = [line["loss"] for line in lines(config.run_dir, "train")]
    assert len(losses) == 30 and losses[-1] < losses[0] - 1
    results = json.loads((Path(config.run_dir) / "eval_results.json").read_text())
    assert results["eval_loss"] == outcome.results["loss"]
    if config.model.__class__.__name__ == "GPT2Config":
        assert results["eval_loss"] < results["unigram_loss"]
    assert [line["step"] for line in lines(config.run_dir, "eval")] == [20, 30]


def test_the_export_holds_the_final_weights(straight):
    config, _, _ = straight
    folder = Path(config.run_dir)
    assert hf.read_config(folder) == config.model
    model = build_model(config.model, config.compute)
    exported = flatten(hf.read_params(folder, model, make_mesh(MeshShape())))
    for path, value in final_params(config.run_dir).items():
        np.testing.assert_array_equal(exported[path], value, err_msg=path)


def test_stopped_and_resumed_is_bitwise_the_same(straight, tmp_path):
    config, _, make = straight
    stopped = make(tmp_path, stop_at=15)
    first = train(stopped, QUIET)
    assert first.step == 15 and not first.finished and not first.interrupted
    second = train(dataclasses.replace(stopped, stop_at=None), QUIET)
    assert second.step == 30 and second.finished

    want, got = final_params(config.run_dir), final_params(stopped.run_dir)
    for path, value in want.items():
        np.testing.assert_array_equal(got[path], value, err_msg=path)
    for key in ("step", "loss", "grad_norm", "learning_rate"):
        want_lines = [line[key] for line in lines(config.run_dir, "train")]
        got_lines = [line[key] for line in lines(stopped.run_dir, "train")]
        assert got_lines == want_lines, key  # no step missing, none twice
    assert second.results["loss"] == straight[1].results["loss"]


def test_resume_on_another_mesh_agrees_to_rounding(tmp_path, straight):
    config, _, make = straight
    shape = MeshShape(data=2, fsdp=2, tensor=2)
    stopped = make(tmp_path, stop_at=15)
    train(stopped, QUIET)
    train(dataclasses.replace(stopped, stop_at=None, mesh=shape), QUIET)
    want = [line["loss"] for line in lines(config.run_dir, "train")]
    got = [line["loss"] for line in lines(stopped.run_dir, "train")]
    # f32 sums in another order, amplified by 15 steps of Adam at 1e-2.
    np.testing.assert_allclose(got, want, rtol=2e-4)


@pytest.mark.parametrize("make", BOTH)
def test_a_run_whose_sequences_are_cut(make, tmp_path, capsys):
    """By ring attention, trained and evaluated, as with whole sequences."""
    model = make(tmp_path).model
    off = {name: 0.0 for name in vars(model) if "dropout" in name}
    model = dataclasses.replace(model, **off)
    cut, whole = (
        make(tmp_path, run_dir=str(tmp_path / name), model=model, mesh=mesh, steps=8)
        for name, mesh in (
            ("cut", MeshShape(data=2, context=4)), ("whole", MeshShape(data=8))
        )
    )  # fmt: skip
    results = train(cut, Console()).results
    assert "attention  ring (cpu)" in capsys.readouterr().out
    expected = train(whole, QUIET).results
    assert results["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert results["labels"] == expected["labels"]
    losses = [
        [line["loss"] for line in lines(run.run_dir, "train")] for run in (cut, whole)
    ]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_a_finished_run_has_nothing_left_to_do(straight):
    config, outcome, _ = straight
    again = train(config, QUIET)
    assert again.step == 30 and again.finished
    assert again.results == outcome.results
    assert len(lines(config.run_dir, "train")) == 30
    assert len(lines(config.run_dir, "eval")) == 2


def test_work_after_the_last_checkpoint_is_done_again_once(straight, tmp_path):
    """As after a kill: the logs go further than the newest checkpoint."""
    config, _, make = straight
    killed = make(tmp_path, stop_at=23)
    train(killed, QUIET)
    folder = CheckpointFolder(killed.checkpoints)
    folder.delete(23)
    assert folder.steps()[-1] == 20
    train(dataclasses.replace(killed, stop_at=None), QUIET)
    steps = [line["step"] for line in lines(killed.run_dir, "train")]
    assert steps == list(range(1, 31))
    want, got = final_params(config.run_dir), final_params(killed.run_dir)
    for path, value in want.items():
        np.testing.assert_array_equal(got[path], value, err_msg=path)


def test_another_config_is_refused_by_field(straight):
    config, _, _ = straight
    changed = dataclasses.replace(config, batch=32, seed=1, log_every=7)
    with pytest.raises(InputError) as error:
        train(changed, QUIET)
    assert "batch: 16 there, 32 here" in str(error.value)
    assert "seed: 42 there, 1 here" in str(error.value)
    assert "log_every" not in str(error.value)
    assert read_run(config.run_dir) == config  # nothing was overwritten


def test_init_from_a_hugging_face_folder(straight, tmp_path):
    config, outcome, make = straight
    folder = Path(config.run_dir)
    data = dataclasses.replace(  # the weights' own tokenizer
        config.data,
        tokenizer=dataclasses.replace(config.data.tokenizer, path=str(folder)),
    )
    warm = make(tmp_path, init_from=str(folder), data=data, steps=8, eval_every=1)
    train(warm, QUIET)
    first = lines(warm.run_dir, "eval")[0]["loss"]
    # The first update has learning rate 0, so this is the loss of the exported weights.
    assert first == pytest.approx(outcome.results["loss"], rel=1e-6)


def test_init_from_another_architecture_names_the_fields(straight, tmp_path):
    config, _, make = straight
    folder = str(Path(config.run_dir))
    wide = dataclasses.replace(config.model, mlp=64)
    with pytest.raises(InputError, match="mlp: 48 there, 64 here"):
        train(make(tmp_path, init_from=folder, model=wide), QUIET)


def test_keep_limits_the_checkpoints(straight):
    config, _, _ = straight
    folder = Path(config.run_dir) / "checkpoints"
    assert sorted(int(path.name) for path in folder.iterdir()) == [20, 30]


def test_a_run_opens_on_one_device(straight, monkeypatch):
    config, _, _ = straight
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: one)
    run = open_run(config.run_dir)
    assert run.mesh.size == 1


def test_a_run_in_8_bits_opens_without_them(tmp_path):
    compute = Compute(dtype="float32", remat="dots", quantize="int8")
    config = causal_run(tmp_path, compute=compute, steps=2, sample_prompt=None)
    train(config)
    assert read_run(config.run_dir).compute.quantize == "int8"
    run = open_run(config.run_dir)
    assert run.model.compute.quantize is None


def test_a_damaged_checkpoint_is_set_aside_and_its_work_done_again(
    straight, tmp_path, capsys
):
    config, _, make = straight
    damaged = make(tmp_path, stop_at=20)
    train(damaged, QUIET)
    folder = Path(damaged.run_dir) / "checkpoints"
    (folder / "20" / "params").rename(tmp_path / "params")
    again = dataclasses.replace(damaged, stop_at=None)
    assert train(again, Console(width=400)).finished
    shown = capsys.readouterr().out
    assert (
        "WARNING: the checkpoint of step 20 cannot be used: its file params/" in shown
    )
    assert "is missing. It is now 20.damaged" in shown
    assert "Going on from step 10" in shown
    assert (folder / "20.damaged").is_dir()
    got = final_params(again.run_dir)
    for path, value in final_params(config.run_dir).items():
        np.testing.assert_array_equal(got[path], value, err_msg=path)


def test_a_torn_recipe_is_made_again(tmp_path):
    config = causal_run(tmp_path, steps=6, stop_at=1)
    train(config, QUIET)
    note = Path(config.store_dir) / "tokenizer" / "recipe.json"
    whole = note.read_text()
    note.write_text(whole[:40])
    assert train(dataclasses.replace(config, stop_at=2), QUIET).step == 2
    assert note.read_text() == whole


def test_other_tokens_under_a_checkpoint_are_refused(tmp_path):
    config = causal_run(tmp_path, steps=6, stop_at=1)
    train(config, QUIET)
    Path(config.store_dir).rename(tmp_path / "gone")
    with Path(config.data.corpus.source).open("a") as corpus:
        corpus.writelines(f"line {i} was not there before\n" for i in range(40))
    with pytest.raises(InputError, match="trained on other tokens"):
        train(dataclasses.replace(config, stop_at=2), QUIET)


def test_what_a_run_reports_and_keeps(tmp_path):
    config = causal_run(
        tmp_path, steps=5, log_every=4, log_first=True, report_to=(), keep=None,
        save_every=1, eval_at_end=False, eval_every=None,
    )  # fmt: skip
    train(config, QUIET)
    folder = Path(config.run_dir)
    assert [line["step"] for line in lines(folder, "train")] == [1, 4, 5]
    assert lines(folder, "eval") == [] and not list(folder.glob("events*"))
    assert not (folder / "data/validation").exists()
    assert not (folder / "eval_results.json").exists()
    saved = {int(path.name) for path in (folder / "checkpoints").iterdir()}
    assert saved == {1, 2, 3, 4, 5}


def test_going_on_from_another_run_s_checkpoint(straight, tmp_path):
    config, _, _ = straight
    point = f"{config.run_dir}/checkpoints/20"

    def fork(name: str, **changes):
        folder = str(tmp_path / name)
        changes = {"run_dir": folder, "resume_from": point, **changes}
        return dataclasses.replace(config, **changes)

    forked = fork("fork")
    assert train(forked, QUIET).finished
    ends = final_params(config.run_dir), final_params(forked.run_dir)
    for path, value in ends[0].items():
        np.testing.assert_array_equal(ends[1][path], value, err_msg=path)
    assert lines(forked.run_dir, "train")[0]["step"] == 21
    with pytest.raises(InputError, match="expected the folder of a run"):
        train(fork("a", resume_from=point[:-2] + "7"), QUIET)
    with pytest.raises(InputError, match="seed: 42 there, 3 here"):
        train(fork("b", seed=3), QUIET)


def test_a_signal_during_an_evaluation_stops_it_and_saves(tmp_path, monkeypatch):
    config = causal_run(tmp_path, steps=6, eval_every=4, save_every=None)

    def interrupted(*given):
        signal.raise_signal(signal.SIGINT)
        return evaluate(*given)

    for step in (4, 6):  # within the run, and the one at its end
        with monkeypatch.context() as patch:
            patch.setattr("lm_scale.loop.evaluate", interrupted)
            outcome = train(config, QUIET)
        assert outcome.interrupted and not outcome.finished and outcome.step == step
        assert lines(config.run_dir, "eval") == []
    assert train(config, QUIET).finished
    assert [line["step"] for line in lines(config.run_dir, "eval")] == [6]
