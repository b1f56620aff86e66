# SPDX-License-Identifier: Apache-2.0
"""Where the compiler's schedule of a step is longer than its estimate.

    python -m benchmarks.step.schedule "RoBERTa-base MLM, 128 x 128, bfloat16"

For a row of tpu.py: what XLA reckons an instruction to take, and what the instructions
of the chip that it is made of take, one a cycle and as often as its own loop turns.
That counts what a turn may pass over as well, such as the end of a product that is made
in parts, and no waiting for memory: of the two, take the larger. What is in the
schedule alone is what XLA does not reckon, such as multiplying integers where the chip
cannot. Each is counted once, in a loop over layers too.
"""

import itertools
import math
import os
import re
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from benchmarks.step.tpu import WORK
from lm_scale.planning.accelerators import find_slice
from lm_scale.planning.compile_step import lower_step, slice_mesh
from lm_scale.planning.hlo import parse
from lm_scale.planning.kernel_cycles import DELAY, dump_arguments

SHOWN = 12  # instructions
BOUNDS = re.compile(r'"iteration_bounds":\[([^\]]*)\]')
IN_LOOP = re.compile(r"^\s*(?:0x)?[0-9a-f]+\s+[A-Z ,]*:\s*> ")


@dataclass(frozen=True)
class Line:
    """Instructions that are alike; M cycles of each."""

    estimated: float
    scheduled: float
    scope: str


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        # libtpu reads it when it is loaded, which is when the slice is asked for.
        os.environ["LIBTPU_INIT_ARGS"] = dump_arguments(folder)
        found = Counter(compare(compile_text(sys.argv[1]), Path(folder)))
    print("M cycles, estimated and scheduled, and of how many instructions")
    by_excess = sorted(found, key=lambda one: one.estimated - one.scheduled)
    for one in by_excess[:SHOWN]:
        print(f"{one.estimated:7.3f} {one.scheduled:7.3f} {found[one]:3}  {one.scope}")


def compile_text(name: str) -> str:
    """The program of a row."""
    rows = {one.name: one for one in WORK}
    if name not in rows:
        sys.exit(f"{name!r}: expected one of\n" + "\n".join(rows))
    config, slice_name = rows[name].ask()
    mesh = slice_mesh(config, find_slice(slice_name))
    text = lower_step(config, mesh)[0].compile().as_text()
    assert text is not None
    return text


def compare(text: str, folder: Path) -> list[Line]:
    """The instructions of a program whose schedules lie in a folder."""
    schedules = {}
    for file in folder.glob("*-final_bundles.txt"):
        found = re.fullmatch(r"\d+-(.*)-\d+-final_bundles.txt", file.name)
        if found:
            schedules[found[1]] = file
    lines = []
    for one in itertools.chain(*parse(text).computations.values()):
        bounds = BOUNDS.search(one.rest)
        if one.cycles == 0 or bounds is None or one.name not in schedules:
            continue
        turns = math.prod(int(number) for number in re.findall(r"\d+", bounds[1]))
        cycles = turns * cycles_of_loop(schedules[one.name].read_text("utf-8"))
        lines.append(Line(one.cycles / 1e6, cycles / 1e6, one.scope[-60:]))
    return lines


def cycles_of_loop(schedule: str) -> int:
    """Of one turn: bundles, and what they wait."""
    inside = [line for line in schedule.splitlines() if IN_LOOP.match(line)]
    return len(inside) + sum(int(n) for line in inside for n in DELAY.findall(line))


if __name__ == "__main__":
    main()
