# SPDX-License-Identifier: Apache-2.0
"""What may change when a run goes on: announced, refused by name, overridden, kept."""

import dataclasses
import json

import pytest
from rich.console import Console
from test_config import GPT2, begun, changed
from tiny import causal_run

from lm_scale.changes import compare
from lm_scale.errors import InputError
from lm_scale.models import LlamaConfig
from lm_scale.optim import Adafactor, Schedule
from lm_scale.run_json import (
    SILENT,
    announce,
    check_changes,
    check_run_dir,
    field_names,
    former,
    read_run,
    to_dict,
    write_config,
)
from lm_scale.trainer import train

THERE = {"batch": 16, "steps": 30, "log": {"every": 10, "first": False}, "seed": 1}


def refusal(config) -> str:
    with pytest.raises(InputError) as error:
        check_run_dir(config)
    return str(error.value)


# --- Two configs ----------------------------------------------------------------------


def test_what_differs_is_announced_if_it_is_free_and_refused_if_not():
    here = {"batch": 32, "steps": 30, "log": {"every": 20, "first": True}, "seed": 2}
    found = compare(THERE, here, free=["log"], silent=["log.first"])
    assert found.announced == ("log.every: 10 -> 20",)
    assert found.refused == ("batch: 16 there, 32 here", "seed: 1 there, 2 here")
    assert found.overridable == ("batch", "seed")
    assert found.made == {"log.every": [10, 20]}


def test_an_override_names_a_field_or_a_part_whether_it_differs_or_not():
    here = {"batch": 32, "steps": 30, "log": {"every": 20, "first": False}, "seed": 1}
    found = compare(THERE, here, ["log", "batch", "seed"])
    assert found.refused == found.overridable == ()
    assert found.announced == (
        "batch: 16 -> 32 (overridden)",
        "log.every: 10 -> 20 (overridden)",
    )
    assert found.made == {"batch": [16, 32], "log.every": [10, 20]}
    assert compare(THERE, here, ["lo"]).overridable == ("batch", "log.every")


def test_nothing_differs():
    found = compare(THERE, dict(THERE), ["batch"])
    assert not (found.announced or found.refused or found.overridable or found.made)


@pytest.mark.parametrize("name", ["steps", "epochs"])
@pytest.mark.parametrize("decay", ["linear", "cosine", "constant"])
def test_a_run_may_become_longer(name, decay):
    """With a word on the learning rate, where its line depends on the length."""
    there = {name: 30, "schedule": {"decay": decay}}
    (line,) = compare(there, there | {name: 60}).announced
    assert line.startswith(f"{name}: 30 -> 60")
    assert ("from here on the learning rate" in line) == (decay != "constant")
    assert compare(there, there | {name: 20}).overridable == (name,)
    assert compare(there, there | {name: None}).overridable == (name,)


def test_what_no_override_can_change():
    here = THERE | {"steps": 10, "seed": 2}
    assert compare(THERE, here, ["steps", "seed"], step=10).refused == ()
    found = compare(THERE, here, ["steps", "seed"], step=20, fixed={"seed": "it is so"})
    assert found.refused == (
        "steps: 30 there, 10 here (the run is at step 20 already: no override helps)",
        "seed: 1 there, 2 here (it is so: no override helps)",
    )
    assert found.overridable == ()


# --- A run directory ------------------------------------------------------------------


def test_a_refusal_says_what_to_override(tmp_path):
    config = begun(GPT2, tmp_path)
    other = changed(config, batch=32, seed=1, log_every=3, schedule__peak=1.0)
    said = refusal(other)
    assert "`--override schedule.peak batch seed`" in said
    assert "`--override seed`" in refusal(
        changed(other, override=("schedule", "batch"))
    )
    check_run_dir(changed(other, override=("schedule", "batch", "seed", "optimizer")))
    assert read_run(tmp_path) == config


def test_other_shapes_and_another_optimizer_are_beyond_any_override(
    tmp_path,
):
    config = begun(GPT2, tmp_path)
    names = ("model", "optimizer", "seq_len")
    said = refusal(changed(config, model__layers=3, override=names))
    assert "model.layers: 12 there, 3 here (its weights have other shapes" in said
    assert "--override" not in said
    said = refusal(changed(config, optimizer=Adafactor(), override=names))
    assert "optimizer.type: 'AdamW' there, 'Adafactor' here (its state is of" in said
    check_run_dir(changed(config, model__embed_dropout=0.0, override=names))


def test_fewer_steps_than_there_were(tmp_path):
    config = begun(GPT2, tmp_path)  # at step 10
    said = refusal(changed(config, steps=9, override=("steps",)))
    assert "steps: 10 there, 9 here (the run is at step 10 already" in said


@pytest.mark.parametrize(
    ("name", "near"),
    [("bacth", "batch"), ("peak", "schedule.peak"), ("token", "tokens"), ("xyz", None)],
)
def test_an_override_of_no_field(tmp_path, name, near):
    """Found at the first start already."""
    config = changed(GPT2, run_dir=str(tmp_path), override=("seed", name))
    said = refusal(config)
    assert f"override names '{name}'" in said
    assert ("Did you mean" in said) == (near is not None)
    assert near is None or f"Did you mean '{near}'?" in said


def test_names_of_fields():
    names = field_names(type(GPT2))
    assert {
        "batch",
        "model.kv_heads",
        "model.pad_id",
        "model.type",
        "schedule",
    } <= names
    assert {"model.rope_scaling.type", "objective.probability", "mesh.data"} <= names
    assert set(SILENT) <= names


def test_tokens_are_compared_by_name():
    here = {"tokenizer": "abc", "number": 2}
    there = to_dict(GPT2) | {"tokens": {"tokenizer": "abc", "number": 1}}
    with pytest.raises(InputError) as error:
        check_changes(there, GPT2, 10, here)
    assert "tokens.number: 1 there, 2 here" in str(error.value)
    assert "trained on other tokens" in str(error.value)
    assert "`--override tokens.number`" in str(error.value)
    config = changed(GPT2, override=("tokens.number",))
    assert check_changes(there, config, 10, here).made == {"tokens.number": [1, 2]}
    assert not check_changes(to_dict(GPT2), GPT2, 10, here).made  # not known


def test_run_json_keeps_what_has_changed(tmp_path):
    config = begun(GPT2, tmp_path)

    def go_on(step, there, here):
        write_config(here, step, check_changes(to_dict(there), here, step))
        assert read_run(tmp_path) == here
        return json.loads((tmp_path / "run.json").read_text())["changes"]

    more = changed(config, batch=32, log_every=20, stop_at=50, override=("batch",))
    first = {"step": 10, "changes": {"batch": [64, 32], "log_every": [10, 20]}}
    assert go_on(10, config, more) == [first]
    assert go_on(10, config, more) == [first]  # started again before it saved
    assert go_on(15, more, more) == [first]
    again = changed(more, batch=16)
    second = {"step": 20, "changes": {"batch": [32, 16]}}
    assert go_on(20, more, again) == [first, second]
    write_config(config)
    assert json.loads((tmp_path / "run.json").read_text())["changes"] == []


def test_a_config_of_an_older_version_has_not_changed(tmp_path):
    config = begun(GPT2, tmp_path)
    there = to_dict(config)
    del there["seed"], there["model"]["init_std"]
    assert not check_changes(there, config, 10).made


def test_the_run_that_is_gone_on_with(tmp_path):
    assert former(changed(GPT2, run_dir=str(tmp_path / "new"))) is None
    config = begun(GPT2, tmp_path / "old")
    fork = changed(GPT2, run_dir=str(tmp_path / "new"), resume_from=config.run_dir)
    assert former(fork) == former(config) == to_dict(config)


def test_only_what_has_changed_is_printed(capsys):
    announce(compare({"a": 1}, {"a": 1}), Console())
    assert capsys.readouterr().out == ""
    announce(compare({"a": 1}, {"a": 2}, ["a"]), Console())
    assert capsys.readouterr().out == "Changed since then:\n  a: 1 -> 2 (overridden)\n"


def test_an_overridden_run_goes_on_and_says_so(tmp_path, capsys):
    config = causal_run(
        tmp_path, steps=6, stop_at=3, eval_at_end=False, eval_every=None
    )
    train(config, Console(quiet=True))
    other = dataclasses.replace(
        config, stop_at=None, steps=8, batch=32, log_every=2,
        schedule=Schedule(peak=2e-2, warmup=5),
    )  # fmt: skip
    with pytest.raises(InputError, match="`--override schedule.peak batch`"):
        train(other, Console(quiet=True))
    other = dataclasses.replace(other, override=("schedule", "batch"))
    for new in (True, False):
        assert train(other, Console()).step == 8
        out = capsys.readouterr().out
        assert out.count("batch: 16 -> 32 (overridden)") == new
        assert out.count("steps: 6 -> 8 (the linear decay ends later") == new
    kept = json.loads((tmp_path / "run/run.json").read_text())["changes"]
    assert [entry["step"] for entry in kept] == [3]
    assert kept[0]["changes"] == {
        "schedule.peak": [0.01, 0.02], "batch": [16, 32], "steps": [6, 8],
        "log_every": [1, 2],
    }  # fmt: skip


def test_another_model_of_the_same_name(tmp_path):
    config = begun(GPT2, tmp_path)
    said = refusal(changed(config, model=LlamaConfig(), override=("model",)))
    assert "model.type: 'GPT2Config' there, 'LlamaConfig' here (its weights" in said
