# SPDX-License-Identifier: Apache-2.0
"""The text of a compiled program, taken apart: computations, instructions, sources."""

import functools
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

PACKAGE = str(Path(__file__).resolve().parents[1])

BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8,
}  # fmt: skip

COMPUTATION = re.compile(r"^(ENTRY )?%(\S+) \(.*\{$")
INSTRUCTION = re.compile(r"^  (?:ROOT )?%(\S+) = (.*?) ([a-z][a-z0-9-]*)\((.*)$")
ARRAY = re.compile(r"\b([a-z]+\d+\w*|pred)\[([\d,]*)\](\{[^}]*\})?")
CALLED = re.compile(r"\b(?:calls|to_apply|async_computation)=%([^\s,]+)")
BRANCH = re.compile(r"\b(?:true|false)_computation=(%[^\s,]+)")
TABLE = re.compile(r"^(FileNames|FunctionNames|FileLocations|StackFrames)$")
ENTRY_OF_TABLE = re.compile(r"^(\d+) (.*)$")


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    result: str  # its type, with layouts
    opcode: str
    rest: str  # operands and attributes

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        """The names between its brackets."""
        return tuple(re.findall(r"%([^\s,()]+)", self.rest.partition(")")[0]))

    @property
    def called(self) -> list[str]:
        """The computations that it runs once."""
        return CALLED.findall(self.rest)

    @property
    def branches(self) -> list[str]:
        """The computations of which a conditional runs one."""
        listed = re.search(r"branch_computations=\{([^}]*)\}", self.rest)
        named = listed[1] if listed else " ".join(BRANCH.findall(self.rest))
        return re.findall(r"%([^\s,]+)", named)

    @property
    def cycles(self) -> int:
        """By XLA's model of the chip; 0 where it gives none."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
        return int(found[1]) if found else 0

    @property
    def scope(self) -> str:
        """Where it comes from in the traced function, without the noise of jax."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        parts = found[1].split("/") if found else []
        left = [p for p in parts[1:] if p not in ("closed_call", "body", "while")]
        text = "/".join(left).replace("transpose(jvp())", "backward")
        return text.replace("jvp()", "forward")

    def attribute(self, pattern: str) -> str | None:
        """The first group of what matches in its attributes."""
        found = re.search(pattern, self.rest)
        return found[1] if found else None


@dataclass
class Text:
    """A program: its computations by name, the last instruction of each its root."""

    computations: dict[str, list[Instruction]] = field(default_factory=dict)
    entry: str = ""
    tables: dict[str, dict[int, str]] = field(default_factory=dict)

    @functools.cached_property
    def results(self) -> dict[str, dict[str, str]]:
        """By computation and instruction: its type."""
        return {
            name: {one.name: one.result for one in instructions}
            for name, instructions in self.computations.items()
        }

    def source(self, instruction: Instruction) -> str:
        """File and line that it stems from, such as models/gpt2.py:154; "": unknown.

        The innermost frame of this package, else the innermost of all.
        """
        frame = instruction.attribute(r"stack_frame_id=(\d+)")
        if frame is None:
            path = instruction.attribute(r'source_file="([^"]*)"') or ""
            line = instruction.attribute(r"source_line=(\d+)")
            return f"{short(path)}:{line}" if line else ""
        frames = self._frames(int(frame))
        ours = [place for place in frames if place.startswith(PACKAGE)]
        return short((ours or frames or [""])[0])

    def _frames(self, number: int) -> list[str]:
        """path:line of a stack's frames, the innermost first."""
        places: list[str] = []
        while number > 0 and len(places) < 1000:
            frame = fields(self.tables.get("StackFrames", {}).get(number, ""))
            place = frame.get("file_location_id", 0)
            location = fields(self.tables.get("FileLocations", {}).get(place, ""))
            names = self.tables.get("FileNames", {})
            path = names.get(location.get("file_name_id", 0), "").strip('"')
            if path:
                places.append(f"{path}:{location.get('line', 0)}")
            number = frame.get("parent_frame_id", 0) - self.parents_from
        return places

    @functools.cached_property
    def parents_from(self) -> int:
        """What a parent's number is too high by: 0, or 1 where some print it so.

        Told by the first frame, which has no parent.
        """
        first = fields(self.tables.get("StackFrames", {}).get(1, ""))
        return first.get("parent_frame_id", 0)


def fields(text: str) -> dict[str, int]:
    """`{file_name_id=1 line=39}` as a dict."""
    return {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", text)}


def short(place: str) -> str:
    """A path inside this package without what leads there; of a library, its end."""
    if place.startswith(PACKAGE):
        return place[len(PACKAGE) + 1 :]
    return place.rpartition("site-packages/")[2]


def parse(text: str) -> Text:
    """What `compiled.as_text()` holds."""
    program = Text()
    inside: list[Instruction] = []
    table: dict[int, str] = {}
    for line in text.splitlines():
        if header := COMPUTATION.match(line):
            inside = program.computations.setdefault(header[2], [])
            program.entry = header[2] if header[1] else program.entry
        elif found := INSTRUCTION.match(line):
            inside.append(Instruction(*found.groups()))
        elif TABLE.match(line):
            table = program.tables.setdefault(line, {})
        elif not inside and (entry := ENTRY_OF_TABLE.match(line)):
            table[int(entry[1])] = entry[2]
    return program


def arrays(result: str) -> list[tuple[str, tuple[int, ...], str]]:
    """Type, shape and layout of each array of a type."""
    return [
        (dtype, tuple(int(n) for n in shape.split(",") if n), layout or "")
        for dtype, shape, layout in ARRAY.findall(result)
    ]


def size_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes, without what fills up tiles."""
    return BYTES.get(dtype, 1) * math.prod(shape)  # 1: of 8 bits, f8e4m3fn and the like


def hbm_bytes(result: str) -> int:
    """Bytes of a type's arrays that lie in HBM: those of no other memory space."""
    return sum(
        size_of(dtype, shape)
        for dtype, shape, layout in arrays(result)
        if "S(" not in layout
    )


def slice_bytes(whole: str, part: str) -> int:
    """Bytes of a slice, wherever it goes or comes from; 0: the whole is not in HBM."""
    if not hbm_bytes(whole):
        return 0
    return sum(size_of(dtype, shape) for dtype, shape, _ in arrays(part))


def first_array(result: str) -> list[str]:
    """The type of the first array of a tuple; none if there is none."""
    found = ARRAY.search(result)
    return [found[0]] if found else []
