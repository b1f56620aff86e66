# SPDX-License-Identifier: Apache-2.0
"""The plans of the shipped configs, for configs/README.md.

    python -m benchmarks.plan.configs            # makes what is missing, writes both
    python -m benchmarks.plan.configs llama_1b --fresh

A config stands with the slice that it names, and some with another one besides. Keeps
what it has in configs.json; about two minutes of CPU a row that has to be compiled.
"""

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path

from benchmarks.plan import markdown
from benchmarks.plan.rows import Row, load, make_rows_asked_for
from lm_scale.config import RunConfig, load_config
from lm_scale.planning.accelerators import GIB, find_slice
from lm_scale.planning.plan import ACCURACY
from lm_scale.shapes import parameter_count
from lm_scale.sharding import PRESETS, resolve_mesh_shape

HERE = Path(__file__).parent
CONFIGS = HERE.parents[1] / "configs"
KEPT, README = HERE / "configs.json", CONFIGS / "README.md"
HEADER = (
    "config", "weights", "slice", "mesh", "tokens a step, in parts", "rules, remat",
    "memory of a device (GiB)", "tokens/s", "MFU", "hours", "chip-hours",
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A config, and what it is changed in."""

    config: str  # the file's name, without .py
    words: tuple[str, ...] = ()  # of the command line; --slice first, if given

    @property
    def name(self) -> str:
        return " ".join((self.config, *self.words))

    def ask(self) -> tuple[RunConfig, str]:
        """The config with its changes, and the slice."""
        chosen, words = None, list(self.words)
        if words[:1] == ["--slice"]:
            chosen, words = words[1], words[2:]
        path = str(CONFIGS / f"{self.config}.py")
        config = load_config(path, words, prog="benchmarks.plan.configs")
        config.check()
        name = chosen or config.slice
        assert name is not None  # entries() leaves configs without a slice out
        return config, name


BEST = "--mesh.data 4 --mesh.fsdp 16 --mesh.tensor 4 --rules fsdp_tp_sp --accumulate 4"
VARIANTS = (Entry("llama3_8b", ("--slice", "v5e-256", *BEST.split())),)


@functools.cache
def entries() -> tuple[Entry, ...]:
    """Every config that names a slice, in the order of the names, and the variants."""
    found = []
    for path in sorted(CONFIGS.glob("*.py")):
        if load_config(str(path), [], prog="benchmarks.plan.configs").slice:
            found.append(Entry(path.stem))
            found += [each for each in VARIANTS if each.config == path.stem]
    return tuple(found)


def settings(entry: Entry) -> list[str]:
    """The cells of a row that its config tells: the first of HEADER."""
    config, chosen = entry.ask()
    shape = resolve_mesh_shape(config.mesh, find_slice(chosen).devices)
    sizes = dataclasses.asdict(shape).items()
    mesh = " ".join(f"{axis}={size}" for axis, size in sizes if size != 1)
    rules = [name for name, each in PRESETS.items() if each == config.compute.rules]
    tokens = f"{config.batch * config.seq_len:,}"
    if config.accumulate > 1:
        tokens += f", {config.accumulate}"
    changes = " ".join(entry.words[2:] if "--slice" in entry.words else entry.words)
    name = f"`{entry.config}`" + (f", `{changes}`" if changes else "")
    how = f"{rules[0] if rules else 'its own'}, {config.compute.remat}"
    weights = f"{parameter_count(config.model) / 1e6:,.0f} M"
    return [name, weights, chosen, mesh, tokens, how]


def measures(row: Row | None) -> list[str]:
    """The other cells."""
    if row is None:
        return ["not compiled yet", "", "", "", ""]
    usable = f"{row.usable / GIB:.2f}"
    if row.peak is None or row.step is None or row.tokens_per_s is None:
        return [f"**does not fit** {usable}", "", "", "", ""]
    hours, chip_hours = row.why.partition(",")[0], ""  # so many epochs
    if row.hours is not None and row.chip_hours is not None:
        hours, chip_hours = f"{row.hours:,.1f}", f"{row.chip_hours:,.0f}"
    return [f"{row.peak / GIB:.2f} of {usable}", f"{row.tokens_per_s:,.0f}",
            f"{row.mfu or 0:.1%}", hours, chip_hours]  # fmt: skip


def text(rows: dict[str, Row]) -> str:
    """The table, with how good it is and what made it."""
    lines = [[*settings(entry), *measures(rows.get(entry.name))] for entry in entries()]
    made_by = sorted({row.made_by for row in rows.values()})
    return (
        f"{markdown.table(HEADER, lines)}\n\n*{ACCURACY}* Compiled by "
        f"{'; '.join(made_by)}."
    )


def main() -> None:
    make_rows_asked_for(KEPT, {each.name: each.ask for each in entries()}, __doc__)
    markdown.put(README, "plans", text(load(KEPT)))


if __name__ == "__main__":
    main()
