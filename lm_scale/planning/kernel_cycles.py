# SPDX-License-Identifier: Apache-2.0
"""What the kernels of models/vmem.py take, by the compiler's schedule of them.

XLA's estimates leave hand-written kernels out. But the schedule that the compiler makes
of one is static: an instruction word (a bundle) a cycle, waits for the units included,
and each is run once for a part of the grid. libtpu writes it to a folder if it is told
to when it is loaded; so a process of its own compiles the kernels, with nothing else.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, SingleDeviceSharding

from lm_scale.compile_cache import uncached
from lm_scale.config import RunConfig
from lm_scale.models import LlamaConfig, family_of
from lm_scale.models.kernels import head_dim_of
from lm_scale.models.layout import LANES
from lm_scale.models.vmem import (
    BACKWARD,
    FORWARD,
    attend_in_vmem,
    rows_of_kernel,
)
from lm_scale.models.vmem_kernels import Call
from lm_scale.planning.accelerators import GENERATIONS, Slice
from lm_scale.planning.libtpu import topology_devices
from lm_scale.sharding import shards

BUNDLE = re.compile(r"^\s*(?:0x)?[0-9a-f]+\s.*\{", re.MULTILINE)
DELAY = re.compile(r"vdelay (\d+)")  # cycles that a bundle waits
SECONDS = 300  # after which there is no answer


@dataclass(frozen=True)
class Attention:
    """The attention of one layer, on one device."""

    kind: str  # `device_kind`
    batch: int  # rows
    length: int
    heads: int
    head_dim: int
    causal: bool
    biases: bool  # of queries, keys and values
    segments: bool
    dropout: float
    dtype: str


@dataclass(frozen=True)
class Cycles:
    """Of all the device's rows and heads, in one layer."""

    forward: int
    backward: int


def attention_of(config: RunConfig, mesh: Mesh) -> Attention:
    """That of a micro-batch of a run."""
    rules, model = config.compute.rules, config.model
    parts = config.accumulate * shards(rules, mesh, "batch")
    return Attention(
        kind=mesh.devices.flat[0].device_kind,
        batch=config.batch // parts, length=config.seq_len,
        heads=model.heads // shards(rules, mesh, "act_heads"),
        head_dim=head_dim_of(model), causal=family_of(model).causal,
        biases=not isinstance(model, LlamaConfig),  # whose are added before they turn
        segments=config.data.examples != "blocks", dropout=model.attention_dropout,
        dtype=config.compute.dtype,
    )  # fmt: skip


def kernel_cycles(config: RunConfig, mesh: Mesh, calls: int) -> int | None:
    """Of a device in a step that calls kernels so often; None: no schedule was seen.

    Backward for each layer and micro-batch; what is left of the calls is forward.
    """
    found = scheduled(attention_of(config, mesh))
    if found is None:
        return None
    backward = min(calls, config.model.layers * config.accumulate)
    return backward * found.backward + (calls - backward) * found.forward


def scheduled(attention: Attention) -> Cycles | None:
    """By the compiler's schedule; None where it does not show it.

    Takes some seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        given = os.environ.get("LIBTPU_INIT_ARGS", "")
        environment = os.environ | {
            "LIBTPU_INIT_ARGS": f"{given} {dump_arguments(folder)}",
            "JAX_PLATFORMS": "cpu",
        }
        task = json.dumps(dataclasses.asdict(attention))
        try:
            subprocess.run(
                [sys.executable, "-m", __name__, task],
                env=environment, check=True, capture_output=True, timeout=SECONDS,
            )  # fmt: skip
        except (OSError, subprocess.SubprocessError):
            return None
        found = [_of_schedule(Path(folder), name) for name in (FORWARD, BACKWARD)]
    rows = rows_of_kernel(attention.batch, attention.length, attention.head_dim)
    groups = attention.heads * attention.head_dim // LANES
    parts = attention.batch // rows * groups
    forward, backward = found
    if forward is None or backward is None:
        return None
    return Cycles(forward * parts, backward * parts)


def dump_arguments(folder: str) -> str:
    """What makes libtpu, when it is loaded, write its schedules to a folder."""
    return (
        f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
        f"--xla_jf_dump_llo_pass_label_regex=.*final_bundles"
    )


def _of_schedule(folder: Path, name: str) -> int | None:
    """Cycles of one part of the grid: a bundle each, and what they wait."""
    files = [*folder.glob(f"*{name}*-final_bundles.txt")]
    if len(files) != 1:
        return None
    text = files[0].read_text("utf-8")
    cycles = len(BUNDLE.findall(text)) + sum(map(int, DELAY.findall(text)))
    return cycles or None  # none: of a form that is not known


def compile_kernels(attention: Attention) -> None:
    """Both kernels, for a grid of three by two, whose parts are alike."""
    generation = next(one for one in GENERATIONS if one.kind == attention.kind)
    device = topology_devices(Slice("", generation, 4))[0]
    here = SingleDeviceSharding(device)
    rows = rows_of_kernel(attention.batch, attention.length, attention.head_dim)

    def shape(dims, dtype):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=here)

    # (Three, and not two: of twice the rows a kernel might hold twice as many.)
    x = shape((3 * rows, attention.length, 2 * LANES), attention.dtype)
    B, T, D = x.shape
    biases = shape((B, 3, D), jnp.float32) if attention.biases else None
    segments = shape((B, T), jnp.int32) if attention.segments else None
    words = None
    if attention.dropout:
        heads = D // attention.head_dim
        words = shape((B, heads, T), jnp.uint32), shape((T,), jnp.uint32)
    call = Call(
        attention.head_dim, attention.causal, attention.segments, attention.dropout
    )

    def both(q, k, v, biases, d_mean, segments, words):
        def attend(*given):
            return attend_in_vmem(call, *given, segments, words)

        mean, pull = jax.vjp(attend, q, k, v, biases)
        return mean, *pull(d_mean)

    with uncached():  # what is loaded has no schedule
        jax.jit(both).lower(x, x, x, biases, x, segments, words).compile()


if __name__ == "__main__":
    task: dict[str, Any] = json.loads(sys.argv[1])
    compile_kernels(Attention(**task))
