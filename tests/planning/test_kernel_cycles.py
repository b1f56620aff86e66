# SPDX-License-Identifier: Apache-2.0
"""The kernels of models/vmem.py as the real compiler schedules them, for TPUs."""

import dataclasses

import pytest
from tiny import causal_run

from lm_scale.models import GPT2Config
from lm_scale.planning import compile_step, kernel_cycles
from lm_scale.planning.accelerators import find_slice
from lm_scale.planning.compile_step import slice_mesh
from lm_scale.planning.kernel_cycles import Attention, Cycles, attention_of, scheduled
from lm_scale.planning.plan import estimate
from lm_scale.sharding import MeshShape

pytest.importorskip("libtpu", reason="libtpu, the compiler for TPUs, is not installed")

GPT2 = Attention(
    kind="TPU v3", batch=4, length=512, heads=12, head_dim=64, causal=True,
    biases=True, segments=False, dropout=0.0, dtype="bfloat16",
)  # fmt: skip
UNIT = 2 * 2 * 128 * 128  # FLOPs a cycle of a TPU v3's two matrix units


def test_the_schedule_is_longer_than_the_products_at_the_peak_and_not_much():
    """Seven products of 128 x 128 x 128 for each of a head's ten blocks of scores."""
    found = scheduled(GPT2)
    assert found is not None
    blocks = GPT2.batch * GPT2.heads * 10
    for cycles, products in ((found.forward, 2), (found.backward, 5)):
        least = products * blocks * 2 * 128**3 / UNIT
        # (Half of a head's lanes are of the other; of some products, half the rows.)
        assert 0.6 * least < cycles < 2.5 * least
    twice = scheduled(dataclasses.replace(GPT2, batch=8))
    assert twice == Cycles(2 * found.forward, 2 * found.backward)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("TPU v2", marks=pytest.mark.exhaustive),
        "TPU v3",
        pytest.param("TPU v5 lite", marks=pytest.mark.exhaustive),
        "TPU v6 lite",
    ],
)
@pytest.mark.parametrize(
    "most",
    [
        {"dtype": "bfloat16", "length": 1024, "causal": False},
        {"dtype": "float32", "length": 512, "causal": False},
        {"dtype": "bfloat16", "length": 1024, "head_dim": 128, "causal": True},
        {"dtype": "bfloat16", "length": 1024, "causal": True},
        {"dtype": "bfloat16", "length": 896, "causal": True},
        {"dtype": "bfloat16", "length": 640, "causal": False},
    ],
    ids=str,
)
def test_the_longest_rows_fit_into_vmem(kind, most):
    """With all that takes room: dropout, documents."""
    given = {"dropout": 0.1, "segments": True, "kind": kind} | most
    assert scheduled(dataclasses.replace(GPT2, **given)) is not None


@pytest.mark.parametrize(("length", "dropout"), [(128, 0.1), (256, 0.0)])
def test_rows_one_by_one_take_no_less_than_together(length, dropout):
    """And no more than what the waits of one row for itself are: as seen, 1.3 times."""
    short = dataclasses.replace(GPT2, length=length, causal=False, dropout=dropout)
    together, alone = scheduled(short), scheduled(dataclasses.replace(short, batch=1))
    assert together is not None and alone is not None
    for one, all_four in (
        (alone.forward, together.forward), (alone.backward, together.backward),
    ):  # fmt: skip
        assert 0.9 * all_four < 4 * one < 1.8 * all_four


def test_no_schedule_is_no_answer():
    """A kind that is not known fails in the process that compiles."""
    assert scheduled(dataclasses.replace(GPT2, kind="TPU v0")) is None


def test_no_answer_is_said_and_not_kept(tmp_path, monkeypatch):
    model = GPT2Config(vocab=512, positions=128, layers=1, embed=128, heads=2, mlp=256)
    config = causal_run(
        tmp_path, model=model, seq_len=128, batch=16, mesh=MeshShape(data=8)
    )
    mesh = slice_mesh(config, find_slice("v3-8"))
    monkeypatch.setattr(kernel_cycles, "scheduled", lambda asked: None)
    said = []
    found = compile_step.compile_step(
        config, mesh, steps=1, cache=tmp_path / "plans", tell=said.append
    )
    assert found.program is not None and found.kernel_cycles is None
    assert "no schedule of the attention kernels" in said[-1]
    assert not (tmp_path / "plans").exists()


def test_a_plan_takes_the_schedule_for_the_kernels_time(tmp_path, monkeypatch):
    model = GPT2Config(vocab=512, positions=256, layers=2, embed=128, heads=2, mlp=256)
    config = causal_run(
        tmp_path, model=model, seq_len=256, batch=16, mesh=MeshShape(data=8)
    )
    chosen = find_slice("v3-8")
    mesh = slice_mesh(config, chosen)
    one = attention_of(config, mesh)
    assert one == Attention("TPU v3", 1, 256, 2, 64, True, True, False, 0.1, "float32")
    monkeypatch.setattr(kernel_cycles, "scheduled", lambda asked: Cycles(1000, 10_000))
    found = compile_step.compile_step(config, mesh, steps=1)
    # Two layers of two micro-batches, both ways.
    assert found.program is not None and found.program.kernels == 8
    assert found.kernel_cycles == 4 * 11_000
    times = estimate(config, chosen, found, 16 * 256, 1e9)
    assert times is not None and times.step is not None and times.cycles is not None
    assert times.kernels == pytest.approx(44_000 / 940e6)
    assert times.step == pytest.approx(times.cycles + times.kernels + times.waiting)
