# SPDX-License-Identifier: Apache-2.0
"""make_plan(config, slice): the compiled step in bytes, seconds, hours and money.

    step = cycles / clock                      XLA's estimate of all but what follows
         + attention's FLOPs / peak            where a hand-written kernel does them
           (of our own kernel: its schedule / clock)
         + bytes sent while it waits / ICI     of collectives that hide behind nothing

Beside it stand three bounds that no step can be faster than: the model's FLOPs at the
peak, the bytes that the program moves at HBM's bandwidth, and those that a device sends
at that of all its links. For GPUs the bounds are all that there is. Where the GPUs are
not here, there is no program either: memory and bytes are those of memory_model.py and
time_model.py.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from jax.sharding import Mesh

from lm_scale.assemble import flops_per_token
from lm_scale.config import RunConfig
from lm_scale.data.tokenizer import load_tokenizer
from lm_scale.errors import InputError
from lm_scale.models.product import check_quantize
from lm_scale.planning.accelerators import Slice, find_slice
from lm_scale.planning.compile_step import (
    Arguments,
    CompiledStep,
    compile_step,
    slice_mesh,
)
from lm_scale.planning.gpus import AbsentGpu
from lm_scale.planning.memory_model import Estimate, MemoryModel, score_bytes
from lm_scale.planning.time_model import (
    attention_flops,
    hbm_bytes,
    seconds_at_peak,
    sent_bytes,
)
from lm_scale.run_json import from_dict, to_dict
from lm_scale.run_text import open_source
from lm_scale.shapes import parameter_count

ACCURACY = (
    "An estimate, never yet measured on a chip by us. Beside published runs: of the "
    "old scripts' steps on a TPU v3-8 it gives 12 to 26 % too few tokens/s, of those "
    "of MaxText and Levanter from 1 to 37 % too many (benchmarks/plan). Fit "
    "to rank plans that one compiler made, and for ratios; no promise."
)
FORMULA = (
    "3 x forward; forward = 2 x the weights of all matrices, output included, + the "
    "two products of attention over the keys that a query sees (causal: half of them "
    "on average); lookups, norms and recomputation count nothing"
)


@dataclass(frozen=True)
class Chips:
    """The slice that a plan is for; figures of one device, None where not published."""

    slice: str
    topology: str
    kind: str
    chips: int
    devices: int
    hbm: float  # bytes
    usable_hbm: float  # bytes that the compiler gives programs
    hbm_bandwidth: float | None  # bytes/s
    ici_bandwidth: float | None  # bytes/s
    peak: float  # FLOP/s, dense bf16
    clock: float | None  # Hz
    note: str = ""  # what one should know of how it is compiled for

    @property
    def are_gpus(self) -> bool:
        """If there are bounds alone for them."""
        return not self.topology


@dataclass(frozen=True)
class Times:
    """Seconds of a step. None: not known, for want of a published figure."""

    step: float | None  # the estimate, of these three:
    cycles: float | None
    # By their schedule; else at least: attention's FLOPs, both ways, at the peak.
    kernels: float
    waiting: float  # for collectives that nothing hides
    # The bounds.
    compute: float
    hbm: float | None
    ici: float | None
    binds: str  # the largest bound: compute, hbm or ici

    @property
    def least(self) -> float:
        """The largest bound."""
        return max(self.compute, self.hbm or 0.0, self.ici or 0.0)


@dataclass(frozen=True)
class Length:
    """How long the run is; None where its number of steps is not known.

    For GPUs at least so long: by the bounds.
    """

    steps: int | None
    why: str  # where that is from, or why it is not known
    hours: float | None
    chip_hours: float | None
    cost: float | None  # at the given price of a chip-hour


@dataclass(frozen=True)
class Plan:
    """What a config's step needs and takes on a slice."""

    chips: Chips
    mesh: tuple[tuple[str, int], ...]  # axes, sizes
    attention: str  # the kernel, and why
    weights: int  # of the model, in all
    tokens: int  # of a step; padding counts as tokens
    flops: float  # the model's, of a step
    fits: bool
    compiled: CompiledStep
    reckoned: Estimate | None  # GPUs that are not here: in place of a program
    times: Times | None  # None: the program cannot be compiled
    tokens_per_s: float | None  # of all devices together
    mfu: float | None
    length: Length
    accuracy: str = ACCURACY
    formula: str = FORMULA

    @property
    def spare(self) -> float | None:
        """Bytes of a device that are left; None: not known.

        Below 0: at least so many are missing (the compiler may count temporaries only).
        """
        memory, failure = self.compiled.memory, self.compiled.failure
        if self.reckoned is not None:
            return self.chips.usable_hbm - self.reckoned.peak
        if memory is not None:
            return self.chips.usable_hbm - memory.peak - memory.code
        if failure is None or failure.needed is None or failure.available is None:
            return None
        return failure.available - failure.needed


def make_plan(
    config: RunConfig,
    slice_name: str | None = None,
    *,
    price: float | None = None,
    cache: Path | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Plan:
    """The plan of a config for a slice; None: that of `config.slice`.

    price: of a chip-hour. cache, tell: see `compile_step`. Raises InputError for a
    slice that is not known, a mesh or batch that cannot be cut for it, or if it is of
    TPUs and there is no libtpu.
    """
    chosen = choose_slice(config, slice_name)
    if price is not None and not 0 <= price < math.inf:
        raise InputError(f"--price {price}: expected the price of a chip-hour.")
    mesh = slice_mesh(config, chosen)
    steps, why = count_steps(config, mesh)
    reckoned = None
    if isinstance(mesh.devices.flat[0], AbsentGpu):
        reckoned = reckon(config, mesh)
        compiled = not_compiled(reckoned)
    else:
        compiled = compile_step(config, mesh, steps=steps, cache=cache, tell=tell)
    _, attention = config.choose_attention(mesh)
    tokens = config.batch * config.seq_len
    flops = tokens * flops_per_token(config)
    if reckoned is None:
        times = estimate(config, chosen, compiled, tokens, flops)
    else:
        moved, sent = hbm_bytes(config, reckoned), sent_bytes(config, mesh, reckoned)
        times = bounds(config, chosen, flops, moved, sent)
    step = times.step if times else None
    seconds = times.least if times and chosen.generation.is_gpu else step
    hours = None if steps is None or seconds is None else steps * seconds / 3600
    chip_hours = None if hours is None else hours * chosen.chips
    cost = None if chip_hours is None or price is None else chip_hours * price
    plan = Plan(
        chips=describe(chosen),
        mesh=tuple(mesh.shape.items()),
        attention=attention,
        weights=parameter_count(config.model),
        tokens=tokens,
        flops=flops,
        fits=compiled.failure is None,
        compiled=compiled,
        reckoned=reckoned,
        times=times,
        tokens_per_s=tokens / step if step else None,
        mfu=flops / (chosen.devices * chosen.generation.peak) / step if step else None,
        length=Length(steps, why, hours, chip_hours, cost),
    )
    # For GPUs XLA compiles what is too large, too.
    small = plan.spare is not None and plan.spare >= 0
    return replace(plan, fits=plan.fits and small) if plan.chips.are_gpus else plan


def choose_slice(config: RunConfig, name: str | None) -> Slice:
    """The slice of a name, or of the config; InputError if there is none."""
    if name is None and config.slice is None:
        raise InputError(
            "the config names no slice. Say what to plan for: --slice v3-8, or "
            "`slice` in the config."
        )
    return find_slice(name or config.slice or "")


def describe(chosen: Slice) -> Chips:
    """What is known of a slice and its devices."""
    return Chips(
        chosen.name, chosen.topology, chosen.generation.kind, chosen.chips,
        chosen.devices, chosen.hbm, chosen.usable_hbm, chosen.hbm_bandwidth,
        chosen.ici_bandwidth, chosen.generation.peak, chosen.generation.clock,
        chosen.generation.note,
    )  # fmt: skip


def estimate(
    config: RunConfig, chosen: Slice, compiled: CompiledStep, tokens: int, flops: float
) -> Times | None:
    """The seconds of a step by the program's text; None: there is none."""
    program = compiled.program
    if program is None:
        return None
    least = bounds(config, chosen, flops, program.hbm_bytes, program.sent)
    clock, links = chosen.generation.clock, chosen.ici_bandwidth
    if chosen.generation.is_gpu:
        return least
    cycles = program.cycles / clock if clock else None
    peak = chosen.devices * chosen.generation.peak
    kernels = tokens * attention_flops(config) / peak if program.kernels else 0.0
    if compiled.kernel_cycles is not None and clock:
        kernels = compiled.kernel_cycles / clock
    waiting = program.waited / links if links else 0.0
    return replace(
        least, step=None if cycles is None else cycles + kernels + waiting,
        cycles=cycles, kernels=kernels, waiting=waiting,
    )  # fmt: skip


def bounds(
    config: RunConfig, chosen: Slice, flops: float, moved: float, sent: float
) -> Times:
    """The bounds of a step, and no estimate of it.

    flops: of all devices; moved, sent: bytes of one, through its HBM and its links.
    """
    compute = seconds_at_peak(config, flops / chosen.devices, chosen)
    hbm = _over(moved, chosen.hbm_bandwidth)
    ici = _over(sent, chosen.ici_bandwidth)
    each = {"compute": compute, "hbm": hbm or 0.0, "ici": ici or 0.0}
    return Times(
        step=None, cycles=None, kernels=0.0, waiting=0.0, compute=compute, hbm=hbm,
        ici=ici, binds=max(each, key=lambda name: each[name]),
    )  # fmt: skip


def reckon(config: RunConfig, mesh: Mesh) -> Estimate:
    """What a step will hold on GPUs that are not here.

    Their attention is cuDNN's, which can't be traced without them and keeps what `xla`
    keeps, but makes no scores.
    """
    check_quantize(config.compute, mesh.devices.flat[0])
    kernel, _ = config.choose_attention(mesh)
    compute = replace(config.compute, attention="xla")
    plain = replace(config, compute=compute)
    found = MemoryModel().estimate(plain, mesh)
    if kernel == "xla":
        return found
    return replace(found, layer=found.layer - score_bytes(plain, mesh, "xla"))


def not_compiled(reckoned: Estimate) -> CompiledStep:
    """In the place of a program, where there is no compiler for the devices."""
    given = Arguments(reckoned.weights, reckoned.optimizer, reckoned.batch)
    made_by = f"none: jax {version('jax')} compiles for a GPU only where there is one"
    return CompiledStep(given, None, None, None, None, 0.0, made_by)


def _over(size: float, bandwidth: float | None) -> float | None:
    return None if bandwidth is None else size / bandwidth


def count_steps(config: RunConfig, mesh: Mesh) -> tuple[int | None, str]:
    """The run's steps, if they can be known, and where that is from."""
    if config.steps is not None:
        return config.steps, "steps of the config"
    examples, why = count_examples(config, mesh)
    return (None if examples is None else config.total_steps(examples)), why


def count_examples(config: RunConfig, mesh: Mesh) -> tuple[int | None, str]:
    """Training examples: of the store, if it is there; else the most that are used."""
    store, epochs = Path(config.store_dir), f"{config.epochs:g} epochs"
    if (store / "train" / "manifest.json").exists():
        tokenizer = load_tokenizer(store / "tokenizer")
        source = open_source(config, tokenizer, mesh, "train")
        return len(source), f"{epochs} of the tokens in {store / 'train'}"
    if (most := config.data.max_train_examples) is not None:
        return most, f"{epochs} of {most:,} examples, if the text has as many"
    return None, (
        f"{epochs}, and the number of examples is not known before the text is "
        f"prepared; --steps N --epochs None plans for N steps"
    )


def to_json(plan: Plan) -> dict:
    """A plan as JSON values, what follows from it (`spare`) included."""
    return to_dict(plan) | {"spare": plan.spare}


def from_json(value: dict) -> Plan:
    """The plan that `to_json` was given."""
    return from_dict(Plan, value)
