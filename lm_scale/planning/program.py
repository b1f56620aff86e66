# SPDX-License-Identifier: Apache-2.0
"""What the text of a program compiled for TPUs says: cycles, bytes, what devices send.

XLA's own cost analysis counts the body of a loop once. Here it counts as often as the
loop turns: the constant that the loop's condition compares its counter with. Of a
conditional the lightest branch counts.
"""

import collections
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from lm_scale.planning.collectives import (
    axes_of,
    bytes_of,
    group_of,
    kind_of,
    sent_share,
    whole_arrays,
)
from lm_scale.planning.hlo import Instruction, Text, parse
from lm_scale.planning.loops import trip_count
from lm_scale.planning.moved import moved

COSTLIEST = 10  # instructions that are told by name
# A loop over layers keeps its activations in stacks and takes them from there; a layer
# that stands alone keeps them where they are.
STACKING = ("dynamic_update_slice", "dynamic_slice")


@dataclass(frozen=True)
class Traffic:
    """The collectives of one kind over the same mesh axes, in one step of a device."""

    kind: str
    axes: str  # mesh axes, as `data×fsdp`
    count: int
    size: int  # bytes of the whole arrays that are gathered, summed or sent
    sent: float  # bytes that a device sends, in a ring
    waited: float  # bytes of these while which nothing else runs


@dataclass(frozen=True)
class Loop:
    """A loop, or the straight code around all loops."""

    name: str  # ""; the straight code
    scope: str  # named scope that it comes from
    turns: int  # in a step
    cycles: int  # of all of these, loops inside left out
    stacking: int  # of these cycles: instructions that only fill or read stacks
    known: bool = True  # False: its number of turns was not found, and taken as 1


@dataclass(frozen=True)
class Costly:
    """An instruction that takes long."""

    name: str
    source: str  # file:line
    scope: str
    times: int  # in a step
    cycles: int  # of all these times


@dataclass(frozen=True)
class Program:
    """One step of one device, as its compiled text tells it."""

    # By XLA's model of the chip, of all but collectives and hand-written kernels.
    cycles: int
    loops: tuple[Loop, ...]  # first the straight code
    costliest: tuple[Costly, ...]
    kernels: int  # calls of hand-written kernels
    hbm_bytes: int  # read and written; a fusion reads its operands, or slices of them
    traffic: tuple[Traffic, ...]
    # kind, arrays, how many devices it joins, how often: for a closer look
    arrays: tuple[tuple[str, ...], ...]

    @property
    def sent(self) -> float:
        """Bytes that a device sends."""
        return sum(one.sent for one in self.traffic)

    @property
    def waited(self) -> float:
        """Bytes that it sends while nothing else runs."""
        return sum(one.waited for one in self.traffic)

    @property
    def stacking(self) -> int:
        """Cycles of the instructions that only fill or read a loop's stacks."""
        return sum(loop.stacking for loop in self.loops)

    def of_kind(self, kind: str) -> Traffic:
        """The collectives of a kind, over whatever axes, together."""
        ones = [one for one in self.traffic if one.kind == kind]
        return Traffic(
            kind, " ".join(one.axes for one in ones), sum(one.count for one in ones),
            sum(one.size for one in ones), sum(one.sent for one in ones),
            sum(one.waited for one in ones),
        )  # fmt: skip


def read(text: str, mesh: Mapping[str, int]) -> Program:
    """The program of `compiled.as_text()`, for a mesh of these axes and sizes."""
    return Reader(parse(text), mesh).program()


@dataclass
class _Sums:
    """What is added up for a loop."""

    scope: str
    turns: int
    known: bool
    cycles: int = 0
    stacking: int = 0


@dataclass
class Reader:
    """Goes once through a program, as it runs."""

    text: Text
    mesh: Mapping[str, int]
    loops: dict[str, _Sums] = field(default_factory=dict)
    costs: collections.Counter = field(default_factory=collections.Counter)
    times: dict[str, tuple[Instruction, int]] = field(default_factory=dict)
    kernels: int = 0
    hbm: int = 0
    traffic: dict[tuple[str, str], list[float]] = field(
        default_factory=lambda: collections.defaultdict(lambda: [0, 0, 0.0, 0.0])
    )
    arrays: collections.Counter = field(default_factory=collections.Counter)

    def program(self) -> Program:
        """All that was found."""
        self.loops[""] = _Sums("", 1, True)
        self.walk(self.text.entry, 1, "", set())
        costliest = [
            Costly(name, self.text.source(one), one.scope, times, cycles)
            for name, cycles in self.costs.most_common(COSTLIEST)
            for one, times in (self.times[name],)
        ]
        return Program(
            cycles=sum(loop.cycles for loop in self.loops.values()),
            loops=tuple(
                Loop(name, one.scope, one.turns, one.cycles, one.stacking, one.known)
                for name, one in self.loops.items()
            ),
            costliest=tuple(costliest),
            kernels=self.kernels,
            hbm_bytes=self.hbm,
            traffic=tuple(
                Traffic(kind, axes, int(count), int(size), sent, waited)
                for (kind, axes), (count, size, sent, waited) in self.traffic.items()
            ),
            arrays=tuple(
                (*map(str, key), str(count)) for key, count in self.arrays.items()
            ),
        )

    def walk(self, name: str, times: int, loop: str, seen: set) -> None:
        """Adds what a computation does, `times` times, as a part of a loop.

        seen: the collectives met at this turn of the loop, and of those around it. One
        that runs beside other work is in the text several times, as it begins, goes on
        (in a loop between, perhaps) and ends, each time in a fusion.
        """
        results = self.text.results[name]
        for one in self.text.computations[name]:
            self.add_cycles(one, times, loop)
            self.hbm += times * moved(self.text, one, results)
            if one.opcode == "while":
                self.turn(one, times, seen)
            elif one.opcode in ("call", "async-start"):
                for called in one.called:
                    self.walk(called, times, loop, seen)
            elif one.opcode == "conditional":
                self.walk(self.lightest(one), times, loop, seen)
            elif one.opcode == "fusion":
                for called in one.called:
                    self.look_inside(called, times, seen)
            elif 'custom_call_target="tpu_custom_call"' in one.rest:
                self.kernels += times
            else:
                self.add_collective(one, name, times, waits="-start" not in one.opcode)

    def lightest(self, one: Instruction) -> str:
        """The branch that takes least: the others are for what hardly ever happens."""
        return min(
            one.branches,
            key=lambda name: sum(x.cycles for x in self.text.computations[name]),
        )

    def turn(self, one: Instruction, times: int, seen: set) -> None:
        """A loop: its body as often as it turns."""
        named = dict(re.findall(r"(condition|body)=%([^\s,]+)", one.rest))
        condition, body = (
            self.text.computations[named[x]] for x in ("condition", "body")
        )
        turns = trip_count(condition, body)
        total = times * (turns or 1)
        self.loops[one.name] = _Sums(one.scope, total, turns is not None)
        self.walk(named["body"], total, one.name, set(seen))

    def look_inside(self, fusion: str, times: int, seen: set) -> None:
        """The collectives in a fusion; its cycles are its own."""
        inside = self.text.computations[fusion]
        beside = fusion.startswith("async_collective") or any(
            "AsyncCollective" in one.rest for one in inside
        )
        for one in inside:
            if one.opcode == "fusion":
                for called in one.called:
                    self.look_inside(called, times, seen)
                continue
            channel = one.attribute(r"(channel_id=\d+)")
            key = (channel, *(array[:2] for array in whole_arrays(one)))
            if kind_of(one, fusion) is None or (channel and key in seen):
                continue
            seen.add(key)
            self.add_collective(one, fusion, times, waits=not beside)

    def add_cycles(self, one: Instruction, times: int, loop: str) -> None:
        cycles = times * one.cycles
        if not cycles:
            return
        self.costs[one.name] += cycles
        self.times[one.name] = one, times
        self.loops[loop].cycles += cycles
        if loop and one.scope.rpartition("/")[2] in STACKING:
            self.loops[loop].stacking += cycles

    def add_collective(
        self, one: Instruction, computation: str, times: int, *, waits: bool
    ) -> None:
        kind = kind_of(one, computation)
        if kind is None:
            return
        joined = group_of(one.rest, math.prod(self.mesh.values()))
        group = len(joined)
        if group == 1:
            return
        size = times * bytes_of(one, group)
        sent = size * sent_share(kind, group)
        found = self.traffic[kind, axes_of(joined, self.mesh)]
        for place, added in enumerate((times, size, sent, sent if waits else 0.0)):
            found[place] += added
        shapes = ", ".join(
            f"{dtype}[{','.join(map(str, shape))}]"
            for dtype, shape, _ in whole_arrays(one)
        )
        self.arrays[kind, shapes, group] += times
