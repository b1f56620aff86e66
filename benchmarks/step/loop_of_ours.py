# SPDX-License-Identifier: Apache-2.0
"""The step of lm_scale, as a run has it, fed with one batch again and again."""

import jax
from jax.sharding import NamedSharding

from benchmarks.step import work
from benchmarks.step.turns import Run
from lm_scale.assemble import declare_model, make_parts
from lm_scale.config import RunConfig
from lm_scale.models import Compute
from lm_scale.objectives import CausalLM, MaskedLM
from lm_scale.optim import AdamW, Schedule
from lm_scale.sharding import MeshShape, make_mesh
from lm_scale.step import init_state
from lm_scale.xla_options import xla_options


def make(asked: work.Work, compute: Compute) -> Run:
    """Data-parallel, on all devices there are."""
    masked = asked.masked is not None
    config = RunConfig(
        run_dir="unused",
        model=asked.model,
        objective=MaskedLM(fixed_count=True) if masked else CausalLM(),
        optimizer=AdamW(
            beta1=work.BETAS[0], beta2=work.BETAS[1], weight_decay=work.WEIGHT_DECAY
        ),
        schedule=Schedule(peak=work.LEARNING_RATE, warmup=0, decay="constant"),
        seq_len=asked.seq_len,
        batch=asked.rows,
        steps=1_000_000,
        mesh=MeshShape(),
        compute=compute,
    )
    mesh = make_mesh(config.mesh)
    jax.set_mesh(mesh)
    model = declare_model(config, mesh)
    parts = make_parts(config, model, 1_000_000, xla_options(mesh))
    state = jax.jit(lambda: init_state(model, parts.optimizer, config.seed))()
    spec = model.compute.rules.spec("batch", None)
    batch = jax.device_put(asked.batch(), NamedSharding(mesh, spec))

    def run(steps: int) -> float:
        nonlocal state
        for _ in range(steps):
            state, metrics = parts.step(state, batch)
        return float(metrics["loss"])

    return run


def on_cpu(asked: work.Work, devices: int) -> Run:
    """In float32, as a run on a laptop; its few layers not in a loop."""
    jax.config.update("jax_num_cpu_devices", devices)
    layers = asked.model.layers
    return make(asked, Compute(dtype="float32", remat="none", unroll=layers))


def on_gpu(asked: work.Work) -> Run:
    """In bf16, on one."""
    return make(asked, Compute(loss_chunk=asked.seq_len // 4))
