# SPDX-License-Identifier: Apache-2.0
"""Predictions for published runs beside what was published.

    python -m benchmarks.plan.validation               # makes what is missing
    python -m benchmarks.plan.validation "v6e-8" --fresh   # rows whose name has this

Keeps rows in validation.json and writes the table in README.md. Minutes of CPU a row.
"""

from pathlib import Path

from benchmarks.plan import markdown
from benchmarks.plan.published import Published, published
from benchmarks.plan.rows import Row, load, make_rows_asked_for
from lm_scale.planning.accelerators import GIB

HERE = Path(__file__).parent
KEPT, README = HERE / "validation.json", HERE / "README.md"
HEADER = (
    "run", "slice", "published", "tokens/s", "predicted", "error", "MFU, both",
    "memory (GiB)", "binds",
)  # fmt: skip


def error(predicted: float, known: tuple[float, float]) -> str:
    """Of the prediction, against the nearest and the farthest of a range."""
    errors = sorted({round(100 * (predicted / each - 1)) for each in known})
    return " to ".join(f"{each:+d} %" for each in errors)


def line(run: Published, row: Row | None) -> list[str]:
    """A run's cells; row: None if it has not been planned."""
    low, high = run.speed
    known = f"{low / 1e3:,.0f} k"
    if high > low:
        known = f"{low / 1e3:,.0f}–{high / 1e3:,.0f} k"
    cells = [f"{run.who}: {run.model}", run.slice, run.given, known]
    if row is None:
        return [*cells, "not compiled yet", "", "", "", ""]
    if row.tokens_per_s is None or row.mfu is None or row.peak is None:
        over = "" if row.missing is None else f" by {row.missing / GIB:.1f} GiB or more"
        return [*cells, f"does not fit{over}", "", "", f"of {row.usable / GIB:.2f}", ""]
    # Both by our formula: as the tokens/s, so the MFU.
    theirs = [row.mfu * each / row.tokens_per_s for each in sorted(set(run.speed))]
    mfus = "–".join(f"{100 * each:.1f}" for each in theirs)
    return [
        *cells, f"{row.tokens_per_s / 1e3:,.0f} k", error(row.tokens_per_s, run.speed),
        f"{100 * row.mfu:.1f} % for {mfus} %",
        f"{row.peak / GIB:.1f} of {row.usable / GIB:.2f}", str(row.binds),
    ]  # fmt: skip


def text(rows: dict[str, Row]) -> str:
    """The table, and where each figure is from."""
    runs = published()
    lines = [line(run, rows.get(run.name)) for run in runs]
    notes = [
        f"- {run.who}, {run.model}, {run.slice}: {run.source}. Not published, or "
        f"not the same here: {run.assumed}."
        for run in runs
    ]
    made_by = sorted({row.made_by for row in rows.values()})
    compiled = f"Compiled by {'; '.join(made_by)}." if rows else "None compiled yet."
    return "\n".join([markdown.table(HEADER, lines), "", compiled, "", *notes])


def main() -> None:
    runs = {run.name: lambda run=run: (run.config, run.slice) for run in published()}
    make_rows_asked_for(KEPT, runs, __doc__)
    markdown.put(README, "validation", text(load(KEPT)))


if __name__ == "__main__":
    main()
