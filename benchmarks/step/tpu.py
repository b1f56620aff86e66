# SPDX-License-Identifier: Apache-2.0
"""The train steps of the old scripts' recipes on a TPU v3-8, as compiled for it.

    python -m benchmarks.step.tpu                # what is missing; README.md too
    python -m benchmarks.step.tpu GPT-2 --fresh  # rows whose names hold this, anew

The old step was compiled in the same way, by the same compiler: see README.md. And
Llama 3.1 8B on slices of 64 and 256 chips. Two minutes of CPU a row, four to six of
the Llamas'. Keeps what it has in tpu.json.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from benchmarks.plan import markdown
from benchmarks.plan.rows import Row, load, make_rows_asked_for
from lm_scale.config import RunConfig, load_config
from lm_scale.objectives import MaskedLM
from lm_scale.planning.accelerators import GIB, find_slice
from lm_scale.sharding import FULLY_SHARDED, PRESETS, MeshShape

HERE = Path(__file__).parent
CONFIGS = HERE.parents[1] / "configs"
KEPT, README = HERE / "tpu.json", HERE / "README.md"
HEADER = (
    "work of a core", "old step (s)", "ours (s)", "old / ours", "goal (s)", "tokens/s",
    "memory (GiB)", "MFU", "binds",
)  # fmt: skip
LARGE_HEADER = (
    "slice", "mesh", "rules, remat, parts", "step (s)", "tokens/s", "of a chip",
    "memory (GiB)", "MFU", "waits (s)", "binds",
)  # fmt: skip
CORES = 8


@dataclass(frozen=True)
class Work:
    """A row: one of the shipped recipes, and what it is changed in."""

    name: str
    config: str  # a shipped config
    rows: int  # of a core
    dtype: str
    masks: bool | None = None  # a fixed number of masks a row; None: no masks
    remat: str = "dots"
    unroll: int = 12  # of 12 layers
    mesh: MeshShape = FULLY_SHARDED
    old: float | None = None  # seconds of the old scripts' step; None: it does not fit
    goal: float | None = None

    def ask(self) -> tuple[RunConfig, str]:
        """The config, and the slice."""
        path = str(CONFIGS / f"{self.config}.py")
        config = load_config(path, [], prog="benchmarks.step.tpu")
        objective, chunk = config.objective, config.compute.loss_chunk
        if self.masks is not None:
            objective = MaskedLM(fixed_count=self.masks)
            chunk = 20 if self.masks else 16
        compute = dataclasses.replace(
            config.compute, dtype=self.dtype, loss_chunk=chunk, remat=self.remat,
            unroll=self.unroll,
        )  # fmt: skip
        return dataclasses.replace(
            config, batch=self.rows * CORES, objective=objective, compute=compute,
            mesh=self.mesh,
        ), "v3-8"  # fmt: skip


MLM = functools.partial(Work, config="roberta_base_norwegian", masks=True, goal=0.21)
CLM = functools.partial(Work, config="gpt2_norwegian", goal=0.62)
# The old step's seconds: compiled by libtpu 0.0.50, as is told in README.md.
WORK = (
    MLM("RoBERTa-base MLM, 128 x 128, float32", rows=128, dtype="float32", old=0.485),
    MLM("RoBERTa-base MLM, 128 x 128, bfloat16", rows=128, dtype="bfloat16", old=0.439),
    MLM("the same, each core with all weights", rows=128, dtype="bfloat16", old=0.439,
        mesh=MeshShape()),
    MLM("the same, each mask drawn by itself", rows=128, dtype="bfloat16", masks=False,
        old=0.439),
    MLM("RoBERTa-base MLM, 128 x 128, bfloat16, layers in a loop", rows=128,
        dtype="bfloat16", unroll=1, old=0.439),
    MLM("RoBERTa-base MLM, 256 x 128, float32", rows=256, dtype="float32", goal=None),
    MLM("RoBERTa-base MLM, 256 x 128, bfloat16", rows=256, dtype="bfloat16", goal=None),
    CLM("GPT-2 124M CLM, 64 x 512, float32", rows=64, dtype="float32"),
    CLM("GPT-2 124M CLM, 64 x 512, float32, remat attention", rows=64, dtype="float32",
        remat="attention"),
    CLM("GPT-2 124M CLM, 64 x 512, bfloat16", rows=64, dtype="bfloat16", old=0.902),
    CLM("GPT-2 124M CLM, 64 x 512, bfloat16, each core with all weights", rows=64,
        dtype="bfloat16", old=0.902, mesh=MeshShape()),
    CLM("GPT-2 124M CLM, 64 x 512, bfloat16, layers in a loop", rows=64,
        dtype="bfloat16", unroll=1, old=0.902),
    CLM("GPT-2 124M CLM, 128 x 512, float32, remat attention", rows=128,
        dtype="float32", remat="attention", goal=None),
    CLM("GPT-2 124M CLM, 128 x 512, bfloat16", rows=128, dtype="bfloat16", goal=None),
)  # fmt: skip


@dataclass(frozen=True)
class Large:
    """Llama 3.1 8B, 4 Mi tokens a step, on a slice, with a mesh of its own for it."""

    slice: str
    mesh: MeshShape
    rules: str
    remat: str
    accumulate: int
    quantize: str | None = None

    @property
    def name(self) -> str:
        in_8_bits = "" if self.quantize is None else f" {self.quantize}"
        return f"llama3_8b {self.slice}{in_8_bits}"

    def ask(self) -> tuple[RunConfig, str]:
        """The config, and the slice."""
        path = str(CONFIGS / "llama3_8b.py")
        config = load_config(path, [], prog="benchmarks.step.tpu")
        compute = dataclasses.replace(
            config.compute, rules=PRESETS[self.rules], remat=cast(Any, self.remat),
            quantize=cast(Any, self.quantize),
        )  # fmt: skip
        return dataclasses.replace(
            config, mesh=self.mesh, compute=compute, accumulate=self.accumulate
        ), self.slice


# v5e, v6e: the best that `lm-scale plan --search` compiled; v5p: the config's own.
LARGE = (
    Large("v5e-256", MeshShape(data=4, fsdp=16, tensor=4), "fsdp_tp_sp", "dots", 4),
    Large("v5e-256", MeshShape(data=4, fsdp=16, tensor=4), "fsdp_tp_sp", "dots", 4,
          "int8"),
    Large("v6e-64", MeshShape(data=2, fsdp=16, tensor=2), "fsdp_tp_sp", "dots", 8),
    Large("v6e-64", MeshShape(data=2, fsdp=16, tensor=2), "fsdp_tp_sp", "dots", 8,
          "int8"),
    Large("v5p-128", MeshShape(data=1, fsdp=64), "fsdp", "dots", 8),
    Large("v5p-128", MeshShape(data=1, fsdp=64), "fsdp", "dots", 8, "int8"),
)  # fmt: skip


def large_cells(large: Large, row: Row | None) -> list[str]:
    """A line of the Llamas' table."""
    sizes = dataclasses.asdict(large.mesh)
    mesh = " ".join(f"{axis}={n}" for axis, n in sizes.items() if n > 1)
    how = f"{large.rules}, {large.remat}, {large.accumulate}"
    how += "" if large.quantize is None else f", {large.quantize}"
    if row is None or row.step is None or row.peak is None or row.tokens_per_s is None:
        return [large.slice, mesh, how, "not compiled yet", *[""] * 6]
    waited = sum(one[3] for one in row.traffic)
    links = find_slice(large.slice).ici_bandwidth
    assert links is not None
    return [
        large.slice, mesh, how, f"{row.step:.2f}", f"{row.tokens_per_s:,.0f}",
        f"{row.tokens_per_s / row.chips:,.0f}",
        f"{row.peak / GIB:.1f} of {row.usable / GIB:.2f}", f"{row.mfu or 0:.0%}",
        f"{waited / links:.2f}", row.binds or "",
    ]  # fmt: skip


def cells(work: Work, row: Row | None) -> list[str]:
    """A line of the table."""
    goal = "" if work.goal is None else f"{work.goal:.2f}"
    old = "" if work.goal is None else "does not fit"
    if work.old is not None:
        old = f"{work.old:.3f}"
    if row is None:
        return [work.name, old, "not compiled yet", "", goal, "", "", "", ""]
    usable = f"{row.usable / GIB:.2f}"
    if row.step is None or row.peak is None or row.tokens_per_s is None:
        memory = f"**does not fit** {usable}"
        return [work.name, old, "", "", goal, "", memory, "", ""]
    ratio = "" if work.old is None else f"{work.old / row.step:.2f}"
    return [
        work.name, old, f"{row.step:.3f}", ratio, goal, f"{row.tokens_per_s:,.0f}",
        f"{row.peak / GIB:.1f} of {usable}", f"{row.mfu or 0:.0%}", row.binds or "",
    ]  # fmt: skip


def text(rows: dict[str, Row]) -> str:
    """The table, with what made it."""
    lines = [cells(work, rows.get(work.name)) for work in WORK]
    made_by = sorted({row.made_by for row in rows.values()})
    return f"{markdown.table(HEADER, lines)}\n\nCompiled by {'; '.join(made_by)}."


def main() -> None:
    asked: dict[str, Callable] = {one.name: one.ask for one in (*WORK, *LARGE)}
    make_rows_asked_for(KEPT, asked, __doc__)
    rows = load(KEPT)
    markdown.put(README, "steps", text(rows))
    lines = [large_cells(one, rows.get(one.name)) for one in LARGE]
    markdown.put(README, "llamas", markdown.table(LARGE_HEADER, lines))


if __name__ == "__main__":
    main()
