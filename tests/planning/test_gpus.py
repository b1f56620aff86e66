# SPDX-License-Identifier: Apache-2.0
"""`lm-scale plan` for GPUs: reckoned where there are none, compiled where there are.

CPUs take the place of GPUs that are here.
"""

import dataclasses
import io

import jax
import pytest
from rich.console import Console
from tiny import causal_run

from lm_scale.errors import InputError
from lm_scale.models import Compute
from lm_scale.planning import accelerators, gpus
from lm_scale.planning.accelerators import GIB, GPUS, find_slice
from lm_scale.planning.candidates import Space
from lm_scale.planning.plan import from_json, make_plan, to_json
from lm_scale.planning.report import print_plan
from lm_scale.planning.search import search
from lm_scale.sharding import PRESETS, MeshShape


def config(tmp_path):
    """A tiny GPT-2, whose weights and batch are cut over 8 devices."""
    tiny = causal_run(tmp_path, steps=100, batch=32)
    compute = Compute(rules=PRESETS["fsdp"], remat="dots")
    mesh = MeshShape(data=1, fsdp=8)
    return dataclasses.replace(tiny, compute=compute, mesh=mesh)


def printed(plan) -> str:
    out = io.StringIO()
    print_plan(plan, Console(file=out, width=100))
    return out.getvalue()


@pytest.fixture
def eight_are_here(monkeypatch):
    """The machine has eight GPUs of the kind of an H100: its simulated CPUs."""
    kind = jax.devices()[0].device_kind
    own = [dataclasses.replace(one, kind=kind) for one in GPUS if one.name == "h100"]
    monkeypatch.setattr(accelerators, "GPUS", own)
    monkeypatch.setitem(accelerators.GPU_PEAK, kind, 1e12)
    monkeypatch.setattr(gpus, "_gpus", jax.devices)


def test_gpus_that_are_not_here_are_reckoned(tmp_path):
    plan = make_plan(config(tmp_path), "h100-8")
    assert (plan.chips.devices, dict(plan.mesh)["fsdp"]) == (8, 8)
    assert plan.reckoned is not None and plan.compiled.program is None
    given = plan.compiled.arguments
    assert (given.weights, given.optimizer) == (
        plan.reckoned.weights, plan.reckoned.optimizer,
    )  # fmt: skip
    assert given.weights >= 4 * plan.weights / 8
    assert plan.fits and plan.spare == plan.chips.usable_hbm - plan.reckoned.peak
    assert plan.times is not None and plan.times.step is None
    assert plan.times.compute == plan.flops / (8 * 1979e12 / 2)
    assert plan.times.ici is not None
    assert plan.tokens_per_s is None and plan.mfu is None
    assert from_json(to_json(plan)) == plan
    text = printed(plan)
    assert "It should fit" in text and "at most" in text and "100 steps" in text


def test_products_in_8_bits(tmp_path):
    """Two of three take half of the time; MFU would be by the bf16 peak."""
    plain = config(tmp_path)
    compute = dataclasses.replace(plain.compute, quantize="float8")
    rounded = dataclasses.replace(plain, compute=compute)
    times = [make_plan(one, "h100-8").times for one in (plain, rounded)]
    assert times[0] is not None and times[1] is not None
    assert times[1].compute == pytest.approx(2 / 3 * times[0].compute)
    text = "the model's FLOPs at the peak, two of three at twice that"
    assert text in printed(make_plan(rounded, "h100-8"))
    assert text not in printed(make_plan(plain, "h100-8"))
    with pytest.raises(InputError, match="'float8' gains nothing on NVIDIA A100"):
        make_plan(rounded, "a100-8")


def test_what_a_run_costs_at_least(tmp_path):
    plan = make_plan(config(tmp_path), "h100-8", price=3.0)
    assert plan.times is not None and plan.length.hours is not None
    assert plan.length.hours == pytest.approx(100 * plan.times.least / 3600)
    assert plan.length.cost == pytest.approx(3.0 * 8 * plan.length.hours)
    assert "at the given price" in printed(plan)


def test_what_does_not_fit_is_said(tmp_path):
    small = config(tmp_path)
    whole = dataclasses.replace(small, batch=2**24, accumulate=1)
    plan = make_plan(whole, "l4-8")
    assert not plan.fits and plan.spare is not None and plan.spare < 0
    assert "It should not fit into 16.88 GiB" in printed(plan)


def test_nothing_is_said_of_the_network_between_nodes(tmp_path):
    cut = dataclasses.replace(config(tmp_path), mesh=MeshShape(data=2, fsdp=8))
    plan = make_plan(cut, "h100-16")
    assert plan.times is not None and plan.times.ici is None
    assert "not known" in printed(plan)


@pytest.mark.usefixtures("eight_are_here")
def test_gpus_that_are_here_are_compiled_for(tmp_path):
    plan = make_plan(config(tmp_path), "h100-8", cache=tmp_path / "cache")
    assert plan.reckoned is None and plan.fits
    assert plan.compiled.program is not None and plan.compiled.memory is not None
    assert plan.compiled.memory.peak > plan.compiled.arguments.total
    assert plan.times is not None and plan.times.step is None
    assert {one.axes for one in plan.compiled.program.traffic} == {"fsdp"}
    assert "It fits" in (text := printed(plan)) and "Collectives" in text
    again = make_plan(config(tmp_path), "h100-8", cache=tmp_path / "cache")
    assert again == plan


@pytest.mark.usefixtures("eight_are_here")
def test_what_compiles_and_is_too_large_does_not_fit(tmp_path, monkeypatch):
    (own,) = accelerators.GPUS
    small = dataclasses.replace(own, usable=2**10)
    monkeypatch.setattr(accelerators, "GPUS", [small])
    plan = make_plan(config(tmp_path), "h100-8")
    assert not plan.fits and plan.spare is not None and plan.spare < 0
    assert "It does not fit into 0.0 MiB" in printed(plan)


@pytest.mark.usefixtures("eight_are_here")
def test_of_a_kind_of_which_there_are_too_few_it_is_reckoned(tmp_path):
    cut = dataclasses.replace(config(tmp_path), mesh=MeshShape(data=2, fsdp=8))
    assert make_plan(cut, "h100-16").reckoned is not None


def test_names():
    assert find_slice("a100-80gb-4").hbm == 79.6 * GIB
    assert find_slice("H200-1").devices == 1
    for name in ("h100-0", "h100", "h300-8", "a100-80gb"):
        with pytest.raises(InputError, match=r"h100-8|expected|Expected"):
            find_slice(name)


def test_no_search_without_cycles(tmp_path):
    with pytest.raises(InputError, match="leave out --search"):
        search(config(tmp_path), find_slice("h100-8"), Space(), budget=1, jobs=1)
