# SPDX-License-Identifier: Apache-2.0
"""llama3_8b and llama3_70b on 8 to 512 TPUs: memory and bytes sent, against theory.

    python -m benchmarks.scaling.tpu                   # all; goes on where it stopped
    python -m benchmarks.scaling.tpu --model llama3_8b --generation v5e --rules fsdp
    python -m benchmarks.scaling.tpu --plot            # makes tpu.png (matplotlib)

Weak scaling: a sequence of 8192 tokens a chip, every layer made again in the backward
pass. Keeps each row in tpu.json as soon as it is there, and writes the table in
README.md. A row takes minutes.
"""

import argparse
import dataclasses
import functools
import itertools
from dataclasses import dataclass
from pathlib import Path

from benchmarks.plan import markdown
from benchmarks.plan.rows import Row, load, make_rows
from benchmarks.scaling import tpu_theory
from benchmarks.scaling.tpu_theory import CHUNK, Layout
from lm_scale.config import RunConfig, load_config
from lm_scale.models import Compute, LlamaConfig
from lm_scale.planning.accelerators import GIB
from lm_scale.sharding import PRESETS, MeshShape

HERE = Path(__file__).parent
CONFIGS = HERE.parents[1] / "configs"
KEPT, README = HERE / "tpu.json", HERE / "README.md"
MODELS = ("llama3_8b", "llama3_70b")
GENERATIONS = {"v5e": 256, "v5p": 512, "v6e": 256}  # the most chips of a slice, to 512
CHIPS = (8, 16, 32, 64, 128, 256, 512)
LENGTH = 8192
GROUP = 4  # chips along `tensor` or `context`
HEADER = ("model", "slice", "rules", "mesh", "memory (GiB)", "theory", "/",
          "sent (GB)", "theory", "/", "step (s)")  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One program of the table."""

    model: str
    generation: str
    chips: int
    rules: str

    @property
    def name(self) -> str:
        return f"{self.model} {self.slice} {self.rules}"

    @property
    def slice(self) -> str:
        cores = 2 if self.generation == "v5p" else 1  # what the name counts
        return f"{self.generation}-{self.chips * cores}"

    @property
    def layout(self) -> Layout:
        """A device of v5e, v5p and v6e is a chip; each chip has a sequence, or a share
        of the sequences of its group."""
        if self.rules in ("dp", "zero1"):
            return Layout(self.rules, data=self.chips)
        if self.rules == "fsdp":
            return Layout(self.rules, fsdp=self.chips)
        inner = "context" if self.rules == "context" else "tensor"
        return Layout(self.rules, fsdp=self.chips // GROUP, rows=GROUP,
                      **{inner: GROUP})  # fmt: skip

    def ask(self) -> tuple[RunConfig, str]:
        """The shipped config in this layout, and the slice."""
        at = self.layout
        mesh = MeshShape(data=at.data, fsdp=at.fsdp, tensor=at.tensor,
                         context=at.context)  # fmt: skip
        compute = Compute(rules=PRESETS[self.rules], remat="full", loss_chunk=CHUNK)
        changed = dataclasses.replace(
            shipped(self.model), mesh=mesh, compute=compute, batch=self.chips,
            accumulate=1, seq_len=LENGTH, slice=self.slice,
        )  # fmt: skip
        return changed, self.slice


@functools.cache
def shipped(name: str) -> RunConfig:
    """A config of `configs`."""
    return load_config(str(CONFIGS / f"{name}.py"), [], prog="benchmarks.scaling.tpu")


def cells() -> list[Cell]:
    """The whole grid."""
    grid = itertools.product(MODELS, GENERATIONS.items(), CHIPS, PRESETS)
    return [
        Cell(model, generation, chips, rules)
        for model, (generation, most), chips, rules in grid if chips <= most
    ]  # fmt: skip


def theory(cell: Cell) -> tuple[float, float]:
    """Bytes of a device in memory, and bytes that it sends in a step."""
    model = shipped(cell.model).model
    assert isinstance(model, LlamaConfig)
    return (
        sum(tpu_theory.memory(model, cell.layout, LENGTH).values()),
        sum(tpu_theory.sent(model, cell.layout, LENGTH).values()),
    )


def line(cell: Cell, row: Row) -> list[str]:
    """A cell of the grid as a line of the table."""
    at = dataclasses.asdict(cell.layout)
    mesh = " ".join(
        f"{axis}={at[axis]}" for axis in ("data", "fsdp", "context", "tensor")
        if at[axis] > 1
    )  # fmt: skip
    memory, sent = theory(cell)
    head = [cell.model, cell.slice, cell.rules, mesh]
    theirs = f"{memory / GIB:.1f}"
    if row.peak is None or row.step is None:
        over = "?" if row.missing is None else f"{row.missing / GIB:.1f}"
        return [*head, f"over {row.usable / GIB:.1f} by {over} or more", theirs, "",
                "", f"{sent / 1e9:.2f}", "", ""]  # fmt: skip
    return [*head, f"{row.peak / GIB:.1f} of {row.usable / GIB:.1f}", theirs,
            f"{row.peak / memory:.2f}", f"{row.sent / 1e9:.2f}", f"{sent / 1e9:.2f}",
            f"{row.sent / sent:.2f}", f"{row.step:.2f}"]  # fmt: skip


def text(rows: dict[str, Row]) -> str:
    """The table of what has been compiled."""
    if not rows:
        return "None compiled yet."
    lines = [line(cell, rows[cell.name]) for cell in cells() if cell.name in rows]
    made_by = sorted({row.made_by for row in rows.values()})
    return f"{markdown.table(HEADER, lines)}\n\nCompiled by {'; '.join(made_by)}."


def plot(rows: dict[str, Row]) -> None:
    """Memory and bytes sent over chips: markers by the compiler, lines by theory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        2, len(MODELS), figsize=(11, 8), sharex=True, layout="constrained"
    )
    for panels, model in zip(axes.T, MODELS, strict=True):
        draw(panels, [cell for cell in cells() if cell.model == model], rows)
        panels[0].set_title(model)
        panels[0].set_ylabel("memory of a device (GiB)")
        panels[1].set_ylabel("sent by a device in a step (GB)")
        panels[1].set_xlabel("chips, each with 8192 tokens")
        panels[0].legend(fontsize="x-small", ncols=2)
        for panel in panels:
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_xticks(CHIPS, [str(n) for n in CHIPS])
    figure.savefig(HERE / "tpu.png", dpi=120)


def draw(panels, of_model: list[Cell], rows: dict[str, Row]) -> None:
    """A model's memory and bytes sent, each in a panel."""
    colours = {rules: f"C{number}" for number, rules in enumerate(PRESETS)}
    markers = dict(zip(GENERATIONS, "o^s", strict=True))
    for rules, colour in colours.items():
        there = {
            cell.chips: theory(cell) for cell in of_model
            if cell.rules == rules and cell.name in rows
        }  # fmt: skip
        chips = sorted(there)
        for place, (panel, unit) in enumerate(zip(panels, (GIB, 1e9), strict=True)):
            panel.plot(chips, [there[n][place] / unit for n in chips], "--", lw=1,
                       color=colour, label=rules if chips else None)  # fmt: skip
    for cell in of_model:
        row = rows.get(cell.name)
        if row is None or row.peak is None:
            continue
        looks = dict(color=colours[cell.rules], marker=markers[cell.generation],
                     mfc="none", ls="")  # fmt: skip
        panels[0].plot(cell.chips, row.peak / GIB, **looks)
        panels[1].plot(cell.chips, row.sent / 1e9, **looks)
    for generation, marker in markers.items():
        panels[0].plot([], [], color="k", marker=marker, mfc="none", ls="",
                       label=f"{generation}, compiled")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS)
    parser.add_argument("--generation", choices=GENERATIONS)
    parser.add_argument("--chips", type=int, choices=CHIPS)
    parser.add_argument("--rules", choices=PRESETS)
    parser.add_argument("--plot", action="store_true", help="of what tpu.json holds")
    parser.add_argument("--fresh", action="store_true", help="make rows anew")
    options = parser.parse_args()
    wanted = {
        cell.name: cell.ask for cell in cells()
        if all(
            getattr(options, field) in (None, getattr(cell, field))
            for field in ("model", "generation", "chips", "rules")
        )
    }  # fmt: skip
    if options.plot:
        plot(load(KEPT))
    else:
        make_rows(KEPT, wanted, fresh=options.fresh)
    markdown.put(README, "tpu", text(load(KEPT)))


if __name__ == "__main__":
    main()
