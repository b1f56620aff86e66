# SPDX-License-Identifier: Apache-2.0
"""The train steps of the old scripts' recipes on a TPU v3-8, as compiled for it.

    python -m benchmarks.step.tpu                # what is missing; README.md too
    python -m benchmarks.step.tpu GPT-2 --fresh  # rows whose names hold this, anew

The old step was compiled in the same way, by a later compiler than some of ours: see
README.md. About three minutes of CPU a row. Keeps what it has in tpu.json.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.plan import markdown
from benchmarks.plan.rows import Row, load, make_rows_asked_for
from lm_scale.config import RunConfig, load_config
from lm_scale.objectives import MaskedLM
from lm_scale.planning.accelerators import GIB

HERE = Path(__file__).parent
CONFIGS = HERE.parents[1] / "configs"
KEPT, README = HERE / "tpu.json", HERE / "README.md"
HEADER = (
    "work of a core", "old step (s)", "ours (s)", "old / ours", "goal (s)", "tokens/s",
    "memory (GiB)", "MFU", "binds",
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
            config.compute, dtype=self.dtype, loss_chunk=chunk, remat=self.remat
        )
        return dataclasses.replace(
            config, batch=self.rows * CORES, objective=objective, compute=compute
        ), "v3-8"


MLM = functools.partial(Work, config="roberta_base_norwegian", masks=True, goal=0.21)
CLM = functools.partial(Work, config="gpt2_norwegian", goal=0.62)
# The old step's seconds: compiled by libtpu 0.0.50, as is told in README.md.
WORK = (
    MLM("RoBERTa-base MLM, 128 x 128, float32", rows=128, dtype="float32", old=0.485),
    MLM("RoBERTa-base MLM, 128 x 128, bfloat16", rows=128, dtype="bfloat16", old=0.439),
    MLM("the same, each mask drawn by itself", rows=128, dtype="bfloat16", masks=False,
        old=0.439),
    MLM("RoBERTa-base MLM, 256 x 128, bfloat16", rows=256, dtype="bfloat16", goal=None),
    CLM("GPT-2 124M CLM, 64 x 512, float32", rows=64, dtype="float32"),
    CLM("GPT-2 124M CLM, 64 x 512, bfloat16", rows=64, dtype="bfloat16", old=0.902),
    CLM("GPT-2 124M CLM, 128 x 512, bfloat16", rows=128, dtype="bfloat16", goal=None),
    CLM("the same, remat attention", rows=128, dtype="bfloat16", goal=None,
        remat="attention"),
)  # fmt: skip


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
    asked: dict[str, Callable] = {work.name: work.ask for work in WORK}
    make_rows_asked_for(KEPT, asked, __doc__)
    markdown.put(README, "steps", text(load(KEPT)))


if __name__ == "__main__":
    main()
