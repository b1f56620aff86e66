# SPDX-License-Identifier: Apache-2.0
"""What the tables keep of a plan: a JSON file of rows by name, made one by one.

A row that is there is not made again, so a long table can be stopped and gone on with;
and what was compiled once is in the planner's own cache besides.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax

from lm_scale.config import RunConfig
from lm_scale.planning.accelerators import GIB
from lm_scale.planning.kept import cache_folder
from lm_scale.planning.plan import Plan, make_plan

Asked = Mapping[str, Callable[[], tuple[RunConfig, str]]]  # config and slice, by name


@dataclass(frozen=True)
class Row:
    """A plan in numbers; bytes and seconds of a device. None: not known."""

    fits: bool
    devices: int
    chips: int
    usable: float  # bytes that the compiler gives programs
    state: int  # bytes of weights and optimizer
    peak: float | None  # bytes of a step, the program included
    missing: float | None  # bytes, or more, where it does not fit
    step: float | None
    compute: float | None  # the model's FLOPs at the peak
    binds: str | None  # the largest of the bounds
    tokens: int  # of a step
    tokens_per_s: float | None  # of all devices
    mfu: float | None
    steps: int | None  # of the run
    why: str  # where that is from
    hours: float | None
    chip_hours: float | None
    # Kind, mesh axes, bytes that a device sends, of these while nothing else runs.
    traffic: list[list]
    attention: str
    error: str | None  # what the compiler said, if it was not about memory
    compiled_in: float  # seconds, by the clock of the machine it was made on
    made_by: str

    @property
    def sent(self) -> float:
        """Bytes that a device sends in a step."""
        return sum(one[2] for one in self.traffic)


def row_of(plan: Plan) -> Row:
    """A plan in short."""
    compiled, times, length = plan.compiled, plan.times, plan.length
    memory, failure, program = compiled.memory, compiled.failure, compiled.program
    spare = plan.spare
    return Row(
        fits=plan.fits, devices=plan.chips.devices, chips=plan.chips.chips,
        usable=plan.chips.usable_hbm,
        state=compiled.arguments.weights + compiled.arguments.optimizer,
        peak=memory.peak + memory.code if memory else None,
        missing=None if spare is None or spare >= 0 else -spare,
        step=times.step if times else None,
        compute=times.compute if times else None,
        binds=times.binds if times else None,
        tokens=plan.tokens, tokens_per_s=plan.tokens_per_s, mfu=plan.mfu,
        steps=length.steps, why=length.why, hours=length.hours,
        chip_hours=length.chip_hours,
        traffic=[[t.kind, t.axes, t.sent, t.waited] for t in program.traffic]
        if program else [],
        attention=plan.attention,
        error=None if failure is None or failure.out_of_memory else failure.message,
        compiled_in=compiled.seconds, made_by=compiled.made_by,
    )  # fmt: skip


def load(path: Path) -> dict[str, Row]:
    """The rows of a file by their names; none if there is no file."""
    if not path.exists():
        return {}
    return {name: Row(**row) for name, row in json.loads(path.read_text()).items()}


def make_rows_asked_for(path: Path, every: Asked, about: str | None) -> None:
    """`make_rows`, of those that the command line names. about: for its help."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("part", nargs="?", default="", help="of the names of rows")
    parser.add_argument("--fresh", action="store_true", help="make rows anew")
    options = parser.parse_args()
    wanted = {name: ask for name, ask in every.items() if options.part in name}
    make_rows(path, wanted, fresh=options.fresh)


def make_rows(path: Path, wanted: Asked, *, fresh: bool) -> None:
    """Makes the rows that the file lacks, and keeps each as soon as it is there.

    fresh: makes those anew that are there too; what the planner's cache has is taken
    from there.
    """
    jax.config.update("jax_platforms", "cpu")  # it compiles for others than are here
    found = load(path)
    for name, ask in wanted.items():
        if name in found and not fresh:
            print(f"{name}: is there", flush=True)
            continue
        begun = time.process_time()
        config, chosen = ask()
        row = row_of(make_plan(config, chosen, cache=cache_folder()))
        print(f"{name}: {told(row)}; {time.process_time() - begun:.0f} s of CPU",
              flush=True)  # fmt: skip
        found = load(path) | {name: row}
        text = json.dumps(
            {n: dataclasses.asdict(r) for n, r in found.items()}, indent=1
        )
        path.write_text(text + "\n")


def told(row: Row) -> str:
    """A row in a few words."""
    if row.error is not None:
        return f"cannot be compiled: {row.error.splitlines()[0]}"
    if row.peak is None or row.step is None:
        over = "" if row.missing is None else f" by {row.missing / GIB:.1f} GiB or more"
        return f"does not fit{over}"
    return (
        f"{row.peak / GIB:.2f} of {row.usable / GIB:.2f} GiB, {row.step:.3f} s a step, "
        f"MFU {row.mfu or 0:.1%}"
    )
