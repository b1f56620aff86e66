# SPDX-License-Identifier: Apache-2.0
"""A plan beside what a run of the same config has measured."""

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lm_scale.errors import InputError
from lm_scale.planning.plan import Plan

NAMES = ("step_time_s", "tokens_per_s", "mfu")  # of metrics.jsonl


@dataclass(frozen=True)
class Compared:
    """A figure, by the plan and by the run; None: not known."""

    name: str
    predicted: float | None
    measured: float | None

    @property
    def ratio(self) -> float | None:
        """Predicted by measured."""
        if self.predicted is None or not self.measured:
            return None
        return self.predicted / self.measured


def measured(run_dir: str) -> dict[str, float]:
    """The medians of a run's metrics over its train lines, those that it has.

    Raises InputError if there is no line that tells the time of a step.
    """
    path = Path(run_dir) / "metrics.jsonl"
    try:
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    except FileNotFoundError:
        lines = []
    except ValueError as error:
        raise InputError(
            f"{path} is damaged ({error}). Mend or remove its bad lines."
        ) from error
    found: dict[str, list[float]] = {name: [] for name in NAMES}
    for line in lines:
        for name in NAMES:
            value = line.get(name)
            if value is not None and math.isfinite(value):
                found[name].append(value)
    if not found["step_time_s"]:
        raise InputError(
            f"{path} tells the time of no step. Compare with a run that has made more "
            f"than `log_every` steps."
        )
    return {name: statistics.median(each) for name, each in found.items() if each}


def compare(plan: Plan, told: Mapping[str, float]) -> list[Compared]:
    """Seconds of a step, tokens/s and MFU, side by side; told: by `measured`."""
    predicted = (plan.times.step if plan.times else None, plan.tokens_per_s, plan.mfu)
    return [
        Compared(name, value, told.get(name))
        for name, value in zip(NAMES, predicted, strict=True)
    ]


def print_comparison(rows: list[Compared], console: Console) -> None:
    """A table of them, and what the ratios are."""
    table = Table("", "predicted", "measured", "predicted / measured", box=None)
    for row in rows:
        cells = [row.predicted, row.measured, row.ratio]
        shown = ["-" if x is None else f"{x:,.4g}" for x in cells]
        table.add_row(row.name, *shown)
    console.print(table, highlight=False)
