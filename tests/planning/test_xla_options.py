# SPDX-License-Identifier: Apache-2.0
"""XLA's options: they reach the compiler, of a run and of a plan, if it has them."""

import jax
import pytest
from tiny import causal_run

from lm_scale import trainer, xla_options
from lm_scale.planning import compile_step
from lm_scale.planning.accelerators import find_slice
from lm_scale.planning.compile_step import slice_mesh
from lm_scale.sharding import MeshShape, make_mesh
from lm_scale.trainer import train

CPU = jax.devices()[0].device_kind
LIMIT = "xla_tpu_scoped_vmem_limit_kib"


def test_what_the_compiler_does_not_know_is_left_out(monkeypatch):
    known = {"xla_cpu_prefer_vector_width": "256"}
    monkeypatch.setitem(xla_options.OPTIONS, CPU, known | {"xla_no_such": "1"})
    assert xla_options.xla_options(make_mesh(MeshShape())) == known


def test_devices_that_share_a_cpu_take_less_memory(tmp_path):
    """One alone has no such options."""
    alone = make_mesh(MeshShape(data=1), jax.devices()[:1])
    assert xla_options.xla_options(alone) == {}
    config = causal_run(tmp_path, accumulate=1)
    mesh = make_mesh(config.mesh)
    options = xla_options.xla_options(mesh)
    assert [*options] == [*xla_options.LESS_MEMORY]
    lowered, _ = compile_step.lower_step(config, mesh, steps=1)

    def temporaries(options: dict) -> int:
        return lowered.compile(options).memory_analysis().temp_size_in_bytes

    assert temporaries(options) < 0.9 * temporaries({})


def test_a_run_compiles_with_them(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "xla_options", lambda mesh: {"xla_no_such": "1"})
    with pytest.raises(jax.errors.JaxRuntimeError, match="option: 'xla_no_such'"):
        train(causal_run(tmp_path, steps=1))


def test_a_v6e_has_one_and_a_v3_none(tmp_path):
    """Which the real compiler knows."""
    pytest.importorskip("libtpu")
    config = causal_run(tmp_path, mesh=MeshShape(data=4))
    mesh = slice_mesh(config, find_slice("v6e-4"))
    assert xla_options.xla_options(mesh) == {LIMIT: "98304"}
    eight = causal_run(tmp_path, mesh=MeshShape(data=8))
    assert xla_options.xla_options(slice_mesh(eight, find_slice("v3-8"))) == {}


def test_a_plan_compiles_with_them(tmp_path, monkeypatch):
    monkeypatch.setattr(compile_step, "xla_options", lambda mesh: {"xla_no_such": "1"})
    config = causal_run(tmp_path)
    found = compile_step.compile_step(config, make_mesh(config.mesh), steps=1)
    assert found.failure is not None and "xla_no_such" in found.failure.message
