# SPDX-License-Identifier: Apache-2.0
"""What the text of a program compiled for TPUs says: cycles, and what devices send.

XLA's own cost analysis counts the body of a loop once. Here it counts as often as the
loop turns: the constant that the loop's condition compares its counter with.
"""

import collections
import math
import re
from dataclasses import dataclass, field

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"
)  # fmt: skip

COMPUTATION = re.compile(r"^(ENTRY )?%(\S+) \(.*\{$")
INSTRUCTION = re.compile(r"^  (?:ROOT )?%(\S+) = (.*?) ([a-z][a-z0-9-]*)\((.*)$")
CALLED = re.compile(r"\b(?:calls|to_apply|async_computation)=%([^\s,]+)")
Instruction = tuple[str, ...]  # name, type of the result, operation, the rest
ARRAY = re.compile(r"\b([a-z]+\d+|pred)\[([\d,]*)\]")


@dataclass
class Traffic:
    """The collectives of one kind in one step of one device."""

    count: int = 0
    size: int = 0  # bytes of the whole arrays that are gathered, summed or sent
    sent: float = 0.0  # bytes that a device sends, in a ring


@dataclass
class Program:
    """One step of one device, as its compiled text tells it."""

    # By XLA's model of the chip, of all but collectives and hand-written kernels.
    cycles: int = 0
    traffic: dict[str, Traffic] = field(
        default_factory=lambda: collections.defaultdict(Traffic)
    )
    # (kind, arrays, how many devices it joins) -> how often: for a closer look
    arrays: collections.Counter = field(default_factory=collections.Counter)

    @property
    def sent(self) -> float:
        return sum(one.sent for one in self.traffic.values())


def read(text: str, devices: int) -> Program:
    """The program of `compiled.as_text()`, which runs on so many devices."""
    computations: dict[str, list[Instruction]] = {}
    entry, inside = "", []
    for line in text.splitlines():
        if header := COMPUTATION.match(line):
            inside = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif instruction := INSTRUCTION.match(line):
            inside.append(instruction.groups())
    program = Program()

    def walk(name: str, times: int, seen: set[str], *, fused: bool) -> None:
        """Adds what a computation does, `times` times.

        seen: the channels met at this turn of the loop, and of those around it. A
        collective that runs beside other work is in the text several times, as it
        begins, goes on (in a loop between, perhaps) and ends, each time in a fusion.
        """
        for _, result, opcode, rest in computations[name]:
            if not fused and (cycles := re.search(r'"estimated_cycles":"(\d+)"', rest)):
                program.cycles += times * int(cycles[1])
            kind = opcode.removesuffix("-start")
            if kind in KINDS:
                channel = re.search(r"channel_id=\d+", rest)
                if channel and channel[0] in seen:
                    continue
                seen.add(channel[0] if channel else "")
                # XLA's name of the fusion of an all-reduce and of taking one's part.
                if name.startswith("all-reduce-scatter"):
                    kind = "reduce-scatter"
                add(kind, result, rest, times, opcode)
            elif opcode == "while":
                loop = dict(re.findall(r"(condition|body)=%([^\s,]+)", rest))
                condition, body = (computations[loop[x]] for x in ("condition", "body"))
                turns = trip_count(condition, body)
                walk(loop["body"], times * turns, set(seen), fused=False)
            elif opcode in ("fusion", "call", "async-start"):
                for called in CALLED.findall(rest):
                    walk(called, times, seen, fused=fused or opcode == "fusion")

    def add(kind: str, result: str, rest: str, times: int, opcode: str) -> None:
        arrays = [match.groups() for match in ARRAY.finditer(result)]
        if opcode == "all-gather-start":  # (its operand, its result)
            arrays = arrays[len(arrays) // 2 :]
        elif opcode == "collective-permute-start":  # and two semaphores
            arrays = arrays[1:2]
        group = group_size(rest, devices)
        size = sum(
            BYTES[dtype] * math.prod(int(n) for n in shape.split(",") if n)
            for dtype, shape in arrays
        )
        if kind == "reduce-scatter" and opcode.startswith("reduce-scatter"):
            size *= group  # its result is one device's part
        if group == 1:
            return
        share = {"all-reduce": 2.0 * (group - 1) / group, "collective-permute": 1.0}
        traffic = program.traffic[kind]
        traffic.count += times
        traffic.size += times * size
        traffic.sent += times * size * share.get(kind, (group - 1) / group)
        shapes = ", ".join(f"{dtype}[{shape}]" for dtype, shape in arrays)
        program.arrays[kind, shapes, group] += times

    walk(entry, 1, set(), fused=False)
    return program


def trip_count(condition: list[Instruction], body: list[Instruction]) -> int:
    """How often a loop turns: limit / step of its counter, which starts at 0.

    XLA's own loops, of a product in which a gather is hidden, take steps of 2.
    """
    tests = {name: (opcode, rest) for name, _, opcode, rest in condition}
    work = {name: (opcode, rest) for name, _, opcode, rest in body}
    (compared,) = [rest for opcode, rest in tests.values() if opcode == "compare"]
    assert "direction=LT" in compared, compared
    counter, limit = operands(compared)
    place = re.search(r"index=(\d+)", tests[counter][1])
    kind, result = work[body[-1][0]]  # the root comes last
    assert place and kind == "tuple", (place, kind)
    opcode, rest = work[operands(result)[int(place[1])]]
    while opcode == "copy":
        opcode, rest = work[operands(rest)[0]]
    assert opcode == "add", (opcode, rest)
    added = [work[name] for name in operands(rest)]
    (step,) = [rest for opcode, rest in added if opcode == "constant"]
    return -(-value(tests[limit][1]) // value(step))


def operands(rest: str) -> list[str]:
    """The names between an instruction's brackets."""
    return re.findall(r"%([^\s,()]+)", rest.partition(")")[0])


def value(constant: str) -> int:
    return int(constant.partition(")")[0])


def group_size(rest: str, devices: int) -> int:
    """How many devices a collective joins."""
    if lists := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return len(lists[1].split(","))
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", rest):
        return int(iota[1])
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
    return devices
