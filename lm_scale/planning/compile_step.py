# SPDX-License-Identifier: Apache-2.0
"""The real train step of a config, compiled for TPUs that need not be there.

Shapes take the place of weights and batches: no text, tokenizer or store is read. A
step that cannot be compiled is a result too.
"""

import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from lm_scale.assemble import declare_model, make_parts
from lm_scale.compile_cache import uncached
from lm_scale.config import RunConfig
from lm_scale.objectives import NoiseKeys, Vocabulary
from lm_scale.planning import kept
from lm_scale.planning.accelerators import GIB, Slice
from lm_scale.planning.gpus import gpu_devices
from lm_scale.planning.kernel_cycles import kernel_cycles
from lm_scale.planning.libtpu import quiet, topology_devices
from lm_scale.planning.program import Program, read
from lm_scale.run_json import from_dict, to_dict
from lm_scale.sharding import make_mesh
from lm_scale.step import abstract_state
from lm_scale.xla_options import xla_options

STEPS = 10_000  # of the schedule, where the run's length is not known: a constant in it
MESSAGE_LINES, MESSAGE_WIDTH = 14, 160  # of what the compiler says of a failure
UNITS = {"K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}


@dataclass(frozen=True)
class Arguments:
    """Bytes of a device that a step is given, by what they are."""

    weights: int
    optimizer: int
    batch: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.optimizer + self.batch


@dataclass(frozen=True)
class Memory:
    """Bytes of a device in a step, besides its arguments."""

    padding: int  # of the arguments, to whole tiles, and the step's counters
    temporaries: int  # at the peak: activations, gradients, buffers of collectives
    peak: int  # arguments and both of the above
    code: int  # the program itself
    host: int  # of the host's memory, for what is offloaded


@dataclass(frozen=True)
class Failure:
    """Why there is no program."""

    out_of_memory: bool
    needed: float | None  # bytes of a device, or more; if the compiler says
    available: float | None  # the same
    message: str  # the compiler's, shortened


@dataclass(frozen=True)
class CompiledStep:
    """What the compiler made of a step; either `program` and `memory`, or `failure`."""

    arguments: Arguments
    program: Program | None
    memory: Memory | None
    failure: Failure | None
    # Of attention in models/vmem.py; None: of other kernels, or no schedule was seen.
    kernel_cycles: int | None
    seconds: float  # that lowering and compiling took
    made_by: str  # versions of jax and of the compiler


def slice_mesh(config: RunConfig, chosen: Slice) -> Mesh:
    """The config's mesh over the devices of a slice; InputError if it does not fit."""
    of = gpu_devices if chosen.generation.is_gpu else topology_devices
    return make_mesh(config.mesh, of(chosen))


def abstract_batch(config: RunConfig, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The batch of a step: int32 [batch T] or [batch M], with shardings.

    Documents that are padded to the longest of a batch count with `seq_len` places.
    """
    tokens = np.zeros((1, config.seq_len), np.int32)
    examples = config.data.examples
    segments = None if examples == "blocks" else np.ones_like(tokens)
    one = np.zeros(1, np.int64)
    row = config.objective.examples(
        tokens, Vocabulary(3, (1, 2), mask_id=2, pad_id=1), NoiseKeys(0, one, one),
        segments,
    )  # fmt: skip
    if segments is not None:
        row["segments"] = segments
    if examples in ("segmented", "packed"):
        row["positions"] = tokens
    rules = config.compute.rules
    by_token = NamedSharding(mesh, rules.spec("batch", "seq"))
    by_row = NamedSharding(mesh, rules.spec("batch", None))
    return {
        name: jax.ShapeDtypeStruct(
            (config.batch, x.shape[1]), np.int32,
            sharding=by_row if name == "masked_positions" else by_token,
        )
        for name, x in row.items()
    }  # fmt: skip


def compile_step(
    config: RunConfig,
    mesh: Mesh,
    *,
    steps: int | None = None,
    options: Mapping[str, str] | None = None,
    cache: Path | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> CompiledStep:
    """The step of `config` for the mesh's devices.

    steps: of the run. options: XLA's, besides those of a run. cache: a folder of
    results, by a hash of the lowered program, its devices, the options and the versions
    of the compiler. tell: hears of what takes long.
    Raises InputError if the mesh cannot cut the batch or the weights.
    """
    begun = time.monotonic()
    with quiet():
        options = xla_options(mesh) | dict(options or {})
    lowered, arguments = lower_step(config, mesh, steps)
    made_by = f"jax {version('jax')}, {compiler_of(mesh)}"
    path = None
    if cache is not None:
        path = cache / f"{kept.key_of(lowered.as_text(), mesh, options, made_by)}.json"
        if (found := kept.read(path)) is not None:
            return from_dict(CompiledStep, found)
    program = memory = failure = cycles = None
    tell("Compiling the step, which takes minutes the first time ...")
    try:
        with quiet(), uncached():
            compiled = lowered.compile({**options})
            text = compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        failure = explain_failure(error)
    else:
        assert text is not None  # a program of XLA's has one
        program = read(text, dict(mesh.shape))
        if config.choose_attention(mesh)[0] == "vmem":
            cycles = kernel_cycles(config, mesh, program.kernels)
            if cycles is None:
                tell("The compiler shows no schedule of the attention kernels.")
                path = None  # perhaps next time
        memory = memory_of(compiled.memory_analysis(), arguments)
    result = CompiledStep(
        arguments, program, memory, failure, cycles, time.monotonic() - begun, made_by
    )
    if path is not None:
        kept.write(path, to_dict(result))
    return result


def compiler_of(mesh: Mesh) -> str:
    """What compiles for the mesh's devices, with its version."""
    device = mesh.devices.flat[0]
    if device.platform == "tpu":
        return f"libtpu {version('libtpu')}"
    told = " ".join(device.client.platform_version.split())
    return f"XLA for {device.device_kind} ({told})"


def lower_step(
    config: RunConfig, mesh: Mesh, steps: int | None = None
) -> tuple[jax.stages.Lowered, Arguments]:
    """The step as it goes to the compiler, and what it is given, for these devices.

    Raises InputError if the mesh cannot cut the batch or the weights.
    """
    model = declare_model(config, mesh)
    parts = make_parts(config, model, steps or STEPS)
    state = abstract_state(model, parts.optimizer, mesh)
    batch = abstract_batch(config, mesh)
    step: Any = parts.step  # jitted, and so can be lowered
    with jax.set_mesh(mesh), quiet():
        lowered = step.lower(state, batch)
    return lowered, Arguments(
        shard_bytes(state.params), shard_bytes(state.opt_state), shard_bytes(batch)
    )


def memory_of(analysis: Any, arguments: Arguments) -> Memory:
    """What `compiled.memory_analysis()` says, besides the arguments."""
    given, peak = analysis.argument_size_in_bytes, analysis.peak_memory_in_bytes
    return Memory(
        padding=given - arguments.total,
        temporaries=peak - given,
        peak=peak,
        code=analysis.generated_code_size_in_bytes,
        host=analysis.host_temp_size_in_bytes + analysis.host_argument_size_in_bytes,
    )


def shard_bytes(tree: Any) -> int:
    """Bytes of a device's shards of these abstract arrays."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def explain_failure(error: RuntimeError) -> Failure:
    """What the compiler said, shortened; the sizes, if it ran out of memory."""
    text = str(error)
    over = re.search(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT])", text) or re.search(
        r"\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)", text
    )
    needed = available = None
    if over:
        needed = float(over[1]) * UNITS[over[2]]
        available = float(over[3]) * UNITS[over[4]]
    lines = [line.strip() for line in text.splitlines() if line.strip(" =")]
    shown = [line[:MESSAGE_WIDTH] for line in lines[:MESSAGE_LINES]]
    if len(lines) > len(shown):
        shown.append(f"... ({len(lines) - len(shown)} more lines)")
    return Failure("RESOURCE_EXHAUSTED" in text, needed, available, "\n".join(shown))
