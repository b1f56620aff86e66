# SPDX-License-Identifier: Apache-2.0
"""`lm-scale plan --search`, on 8 cores that are not there and a space of 4 choices."""

import dataclasses
import json
import multiprocessing
import os
from pathlib import Path

import pytest

from lm_scale.__main__ import main
from lm_scale.config import load_config
from lm_scale.errors import InputError
from lm_scale.planning import search_report
from lm_scale.planning.accelerators import find_slice
from lm_scale.planning.candidates import (
    Candidate,
    Space,
    find_candidates,
    layout_of,
    own_choice,
)
from lm_scale.planning.compile_step import Failure
from lm_scale.planning.kept import cache_folder
from lm_scale.planning.libtpu import topology_devices
from lm_scale.planning.memory_model import LOW
from lm_scale.planning.plan import make_plan
from lm_scale.planning.search import Course, Prospect, Search, Tried, weigh
from lm_scale.planning.search_report import front, write_picture
from lm_scale.planning.workers import Failed, make_plans
from lm_scale.sharding import PRESETS, MeshShape, Rules

pytest.importorskip("libtpu", reason="libtpu, the compiler for TPUs, is not installed")

CHIPS = find_slice("v3-8")
# So small that it compiles in seconds.
CONFIG = """
from lm_scale.config import DataConfig, RunConfig
from lm_scale.data.tokenizer import TokenizerConfig
from lm_scale.models import Compute, LlamaConfig

config = RunConfig(
    run_dir="runs/tiny",
    model=LlamaConfig(
        vocab=258, positions=16, layers=2, embed=32, heads=2, kv_heads=2, head_dim=16,
        mlp=32,
    ),
    data=DataConfig(tokenizer=TokenizerConfig(vocab_size=257)),
    seq_len=16,
    batch=16,
    steps=100,
    slice="v3-8",
    compute=Compute(dtype="float32", remat="full", loss_chunk=16),
)
"""
# The space that the search is given, by hand: rules and meshes.
MESHES = (
    ("dp", MeshShape(data=8)),
    ("fsdp", MeshShape(data=1, fsdp=8)),
    ("fsdp", MeshShape(data=2, fsdp=4)),
    ("fsdp", MeshShape(data=4, fsdp=2)),
)
AMONG = ["--among", "rules=dp,fsdp", "--among", "remat=full",
         "--among", "accumulate=1"]  # fmt: skip
FAILURE = Failure(True, 2.0**40, 2.0**34, "RESOURCE_EXHAUSTED: too large")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With a config file; plans are kept there."""
    folder = tmp_path_factory.mktemp("search")
    (folder / "tiny.py").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def config(folder):
    return load_config(str(folder / "tiny.py"), [], prog="test")


@pytest.fixture(scope="module")
def exhaustive(folder, config):
    """Each choice of the space with its plan, compiled one after the other."""
    choices = [Candidate(mesh, rules, "full", 1) for rules, mesh in MESHES]
    return {
        choice: make_plan(choice.of(config), cache=cache_folder()) for choice in choices
    }


def test_it_finds_what_exhaustive_compiling_finds(folder, config, exhaustive, capsys):
    """With half of the compilations; the best, as overrides, makes that very config."""
    out = folder / "best.txt"
    words = ["--budget", "2", "--jobs", "1", "--out", str(out), "--json"]
    status = main(["plan", str(folder / "tiny.py"), "--search", *AMONG, *words])
    found = json.loads(capsys.readouterr().out)
    best, plan = max(exhaustive.items(), key=lambda item: item[1].tokens_per_s)
    assert status == 0
    assert (found["candidates"], len(found["tried"]), found["left"]) == (4, 2, 2)
    first = found["tried"][0]
    assert first["tokens_per_s"] == plan.tokens_per_s and first["fits"]
    assert first["memory"] == plan.compiled.memory.peak + plan.compiled.memory.code
    made = load_config(str(folder / "tiny.py"), out.read_text().split(), prog="test")
    assert made == best.of(config)
    speeds = [one["tokens_per_s"] for one in found["tried"]]
    assert speeds == sorted(speeds, reverse=True)


def test_what_fits_is_not_pruned(config, exhaustive):
    space = Space(("dp", "fsdp"), ("full",), (1,))
    prospects = weigh(config, CHIPS, space)
    assert {one.candidate for one in prospects} == set(exhaustive)
    for one in prospects:
        # No upper bound: arrays of so few rows are padded to tiles.
        assert exhaustive[one.candidate].compiled.memory.peak > LOW * one.memory
        assert not one.too_large


def test_a_worker_that_dies_is_a_failed_candidate(config):
    """And another takes its place; all of them end with the iteration."""

    class Deadly:
        def __reduce__(self):
            return os._exit, (7,)  # where it is read

    wrong = dataclasses.replace(config, mesh=MeshShape(data=3))
    plans = make_plans(iter([("deadly", Deadly()), ("wrong", wrong), ("more", wrong)]),
                       "v3-8", jobs=1)  # fmt: skip
    assert next(plans) == ("deadly", Failed("its compiler died: exit status 7"))
    key, failed = next(plans)
    assert key == "wrong" and failed.message.startswith("InputError: Mesh (data=3")
    assert len(multiprocessing.active_children()) == 1
    plans.close()
    assert not multiprocessing.active_children()


def test_what_no_budget_can_make_fit_has_status_3(folder, capsys):
    """All is surely too large; what needs the least is compiled all the same."""
    words = ["--search", "--jobs", "1", *AMONG, "--batch", str(2**26)]
    assert main(["plan", str(folder / "tiny.py"), *words]) == 3
    said = " ".join(capsys.readouterr().out.split())
    assert "1 of 4 candidates were tried; 3 are too large by a reckoning." in said
    assert "Nothing fits v3-8: a device has 15.48 GiB." in said
    assert "too large" in said


# --- Candidates -----------------------------------------------------------------------


def test_each_layout_is_a_candidate_once(config):
    devices = topology_devices(CHIPS)
    found = find_candidates(config, devices, Space(remat=("full",), accumulate=(1,)))
    layouts = [layout_of(PRESETS[one.rules], one.mesh) for one in found]
    assert len(set(layouts)) == len(layouts)
    by_rules = {name: [x.mesh_text for x in found if x.rules == name]
                for name in PRESETS}  # fmt: skip
    assert by_rules["dp"] == by_rules["zero1"] == ["data=8"]
    # data=8 is that of dp
    assert by_rules["fsdp"] == ["fsdp=8", "data=4 fsdp=2", "data=2 fsdp=4"]
    # Two heads cannot be cut into four.
    assert by_rules["fsdp_tp"] == [
        "data=4 tensor=2", "fsdp=4 tensor=2", "data=2 fsdp=2 tensor=2",
    ]  # fmt: skip
    assert by_rules["fsdp_tp_sp"] == by_rules["fsdp_tp"]
    assert all("context" in mesh for mesh in by_rules["context"])


def test_the_global_batch_is_kept(config):
    devices = topology_devices(CHIPS)
    space = Space(("fsdp",), ("full",))
    small = dataclasses.replace(config, batch=48)
    found = find_candidates(small, devices, space)
    assert {one.accumulate for one in found} == {1, 2, 3, 6}
    assert all(one.of(small).batch == 48 for one in found)


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        (Candidate(MeshShape(data=1, fsdp=8), "fsdp", "full", 2), []),
        (Candidate(MeshShape(data=4, tensor=2), "fsdp_tp", "none", 1),
         ["--mesh.data=1", "--mesh.fsdp=-1", "--rules=fsdp"]),
        (Candidate(MeshShape(data=4), "dp", "none", 4),
         ["--compute.remat=dots", "--compute.offload"]),
        (Candidate(MeshShape(data=4), "dp", "attention", 4),
         ["--compute.remat=dots", "--compute.offload"]),
    ],
)  # fmt: skip
def test_a_choice_is_what_its_overrides_make(folder, choice, words):
    path = str(folder / "tiny.py")
    config = load_config(path, words, prog="test")
    again = load_config(path, [*words, *choice.overrides(config)], prog="test")
    assert again == choice.of(config)


def test_rules_of_ones_own_are_tried_as_well(config):
    devices = topology_devices(CHIPS)
    rules = Rules(vocab=())
    compute = dataclasses.replace(config.compute, rules=rules)
    own = dataclasses.replace(config, compute=compute)
    found = find_candidates(own, devices, Space(remat=("full",), accumulate=(1,)))
    (first, *_) = found
    assert own_choice(own, devices).rules == first.rules == "config's"
    assert first.of(own).compute.rules == rules
    assert "--rules" not in first.overrides(own)


# --- The course, the front ------------------------------------------------------------


def prospect(memory, seconds, *, mesh=MESHES[0][1], too_large=False, own=False):
    choice = Candidate(mesh, "zero1", "full", 1)
    return Prospect(choice, memory, seconds, too_large, own)


def test_the_most_promising_come_first_and_the_hopeless_not_at_all(exhaustive):
    other = MESHES[2][1]
    own, fast = prospect(5, 9.0, own=True), prospect(8, 1.0)
    unlikely = prospect(15, 1.5)  # holds more than `fast`; half as much as there is
    slow, wide = prospect(4, 2.0), prospect(9, 2.5, mesh=other)
    least = prospect(1, 8.0, mesh=other, too_large=True)
    prospects = [wide, slow, unlikely, fast, own, least]
    course = Course(prospects, usable=10.0, budget=5)
    refused = dataclasses.replace(
        next(iter(exhaustive.values())).compiled, program=None, memory=None,
        failure=FAILURE,
    )  # fmt: skip
    plan = dataclasses.replace(
        next(iter(exhaustive.values())), fits=False, compiled=refused
    )
    given = []
    for one in course.next():
        given.append(one)
        if one is fast:
            course.hear(one, plan)
    assert given == [own, fast, slow, wide, least]
    assert course.hopeless == [unlikely]
    course = Course(prospects, usable=10.0, budget=2)
    for one in course.next():
        course.hear(one, next(iter(exhaustive.values())))
    assert course.given == [own, fast]


def tried(memory, step, fits=True):
    choice = Candidate(MeshShape(data=4), "dp", "full", 1)
    return Tried(choice, False, fits, 0, memory, step, 1.0, 0.1, None)


def test_the_front_holds_what_nothing_beats():
    ones = [tried(3, 3.0), tried(1, 5.0), tried(2, 6.0), tried(4, 2.0), tried(4, 1.0),
            tried(1, None, fits=False)]  # fmt: skip
    assert [(one.memory, one.step) for one in front(ones)] == [
        (1, 5.0), (3, 3.0), (4, 1.0),
    ]  # fmt: skip


def test_a_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    ones = tuple(tried(x * 2**30, 1 / x) for x in (1, 2, 3))
    found = Search("v5e-4", 16 * 2**30, 9, 0, 0, ones, ("--rules", "dp"))
    write_picture(found, str(tmp_path / "a.png"))
    write_picture(found, str(tmp_path / "a.html"))
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "a.html").read_text()
    assert page.count("<tr>") == 4 and "<svg" in page and "--rules dp" in page


# --- Wrong input ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "expected a config file first, got none"),
        (
            ["CONFIG", "--budget", "0"],
            "argument --budget: '0': expected a number above 0",
        ),
        (["CONFIG", "--jobs"], "argument --jobs: expected one argument"),
        (["CONFIG", "--among", "mesh=4"], "expected rules=..., remat=... or acc"),
        (["CONFIG", "--among", "accumulate=2,0"], "expected numbers above 0"),
        (["CONFIG", "--among", "remat=all"], "'all' is none of none, dots, attention"),
        (["CONFIG", "--mesh", "data=4"], "--mesh has no place beside --search"),
        (["CONFIG", "--plot", "a.gif"], "expected a name that ends in .png or .html"),
        (["CONFIG", "--out", "/nowhere/x"], "there is no folder /nowhere"),
        (["CONFIG", "--out=x", "--run_dir", "a b"], "'a b' would not come back from"),
        (["CONFIG", "--slice", "tpu7x-8"], "the clock of a tpu7x is not published"),
        (
            ["CONFIG", "--batch=3", "--among=rules=dp"],
            "no mesh of 8 devices (v3-8) cuts",
        ),
    ],
)
def test_wrong_input_has_status_2(folder, capsys, words, said):
    words = [str(folder / "tiny.py") if word == "CONFIG" else word for word in words]
    assert main(["plan", "--search", *words]) == 2
    assert said in capsys.readouterr().err


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(search_report.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="matplotlib, .* pip install matplotlib"):
        search_report.check_picture("a.png")
