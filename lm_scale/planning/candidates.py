# SPDX-License-Identifier: Apache-2.0
"""What a search chooses among: meshes, rules, remat policies, accumulation.

All candidates train on the same batches: only where and in which order they are worked
through differs. Two that cut every array alike are one candidate, whatever their mesh
axes are called: it is tried by the first of these names.
"""

import dataclasses
import math
import typing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lm_scale.assemble import declare_model
from lm_scale.config import RunConfig
from lm_scale.errors import InputError
from lm_scale.models import Compute
from lm_scale.sharding import (
    LOGICAL_AXES,
    MESH_AXES,
    PRESETS,
    MeshShape,
    Rules,
    make_mesh,
    shards,
)

OWN = "config's"  # the name of rules that the config sets and that are no preset
REMATS: tuple[str, ...] = typing.get_args(typing.get_type_hints(Compute)["remat"])
_ONE = dict.fromkeys(MESH_AXES, 1)
OFFLOADABLE = ("dots", "attention")  # remat policies that `compute.offload` goes with


@dataclass(frozen=True)
class Space:
    """What may be chosen. `accumulate`: (), all that divide the rows of a device."""

    rules: tuple[str, ...] = (OWN, *PRESETS)
    remat: tuple[str, ...] = REMATS
    accumulate: tuple[int, ...] = ()


@dataclass(frozen=True)
class Candidate:
    """One choice."""

    mesh: MeshShape  # no -1
    rules: str  # a preset, or OWN
    remat: str
    accumulate: int

    def of(self, config: RunConfig) -> RunConfig:
        """The config with this choice."""
        compute = dataclasses.replace(
            config.compute,
            rules=rules_of(self.rules, config),
            remat=typing.cast(Any, self.remat),
            offload=config.compute.offload and self.remat in OFFLOADABLE,
        )
        return dataclasses.replace(
            config, mesh=self.mesh, compute=compute, accumulate=self.accumulate
        )

    def overrides(self, config: RunConfig) -> list[str]:
        """The words that make this choice, after the config file's name."""
        words = []
        for axis in MESH_AXES:
            size = getattr(self.mesh, axis)
            if size != 1 or getattr(config.mesh, axis) != 1:
                words += [f"--mesh.{axis}", str(size)]
        if self.rules != OWN:
            words += ["--rules", self.rules]
        words += ["--compute.remat", self.remat, "--accumulate", str(self.accumulate)]
        if config.compute.offload and self.remat not in OFFLOADABLE:
            words.append("--compute.no-offload")
        return words

    @property
    def mesh_text(self) -> str:
        """`data=2 fsdp=4`."""
        sizes = dataclasses.asdict(self.mesh)
        return " ".join(f"{axis}={n}" for axis, n in sizes.items() if n > 1) or "1"


def rules_of(name: str, config: RunConfig) -> Rules:
    """The rules of a name."""
    return config.compute.rules if name == OWN else PRESETS[name]


def own_choice(config: RunConfig, devices: Sequence[Any]) -> Candidate:
    """What the config says now; InputError if its mesh is not of so many devices."""
    sizes = make_mesh(config.mesh, devices).shape
    names = [n for n, rules in PRESETS.items() if rules == config.compute.rules]
    name = names[0] if names else OWN
    mesh = dataclasses.replace(config.mesh, **sizes)
    return Candidate(mesh, name, config.compute.remat, config.accumulate)


def find_candidates(
    config: RunConfig, devices: Sequence[Any], space: Space
) -> list[Candidate]:
    """All choices in the space that can cut the config's batch and weights."""
    found = []
    for name, mesh in find_layouts(config, devices, space.rules):
        rules = rules_of(name, config)
        rows = config.batch // shards(rules, make_mesh(mesh, devices), "batch")
        for remat in space.remat:
            for accumulate in space.accumulate or divisors(rows):
                if rows % accumulate == 0:
                    found.append(Candidate(mesh, name, remat, accumulate))
    return found


def find_layouts(
    config: RunConfig, devices: Sequence[Any], names: Iterable[str]
) -> Iterator[tuple[str, MeshShape]]:
    """Rules and meshes, no two of which cut all arrays alike."""
    seen = set()
    own = config.compute.rules
    for name in names:
        if name == OWN and own in PRESETS.values():
            continue
        rules = rules_of(name, config)
        # Devices on the other axes would all do the same work.
        busy = rules.batch + rules.seq + rules.act_heads + rules.act_mlp
        axes = [axis for axis in MESH_AXES if axis in busy]
        for sizes in sorted(factors(len(devices), len(axes)), key=_axes_in_use):
            cut = _ONE | dict(zip(axes, sizes, strict=True))
            mesh = dataclasses.replace(config.mesh, **cut)
            layout = layout_of(rules, mesh)
            if layout not in seen and can_be_cut(config, name, mesh, devices):
                seen.add(layout)
                yield name, mesh


def _axes_in_use(sizes: tuple[int, ...]) -> tuple:
    return sum(size > 1 for size in sizes), tuple(-size for size in sizes)


def can_be_cut(
    config: RunConfig, name: str, mesh: MeshShape, devices: Sequence[Any]
) -> bool:
    """If the mesh divides batch, sequences and weights."""
    choice = Candidate(mesh, name, config.compute.remat, accumulate=1)
    try:
        declare_model(choice.of(config), make_mesh(mesh, devices))
    except InputError:
        return False
    return True


def layout_of(rules: Rules, mesh: MeshShape) -> frozenset:
    """Which logical axes are cut together, and into how many parts."""
    parts: dict[frozenset[str], int] = {}
    for axis, size in dataclasses.asdict(mesh).items():
        cut = frozenset(name for name in LOGICAL_AXES if axis in getattr(rules, name))
        if size > 1:
            parts[cut] = parts.get(cut, 1) * size
    return frozenset(parts.items())


def factors(number: int, count: int) -> Iterator[tuple[int, ...]]:
    """All ways to write a number as a product of so many, in order."""
    if count == 1:
        yield (number,)
        return
    for first in divisors(number):
        for rest in factors(number // first, count - 1):
            yield first, *rest


def divisors(number: int) -> list[int]:
    """Those of a number, from 1 on."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
