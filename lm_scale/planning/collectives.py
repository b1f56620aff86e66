# SPDX-License-Identifier: Apache-2.0
"""The collectives of a compiled program: their bytes, and the mesh axes they join."""

import itertools
import math
import re
from collections.abc import Mapping

import numpy as np

from lm_scale.planning.hlo import Instruction, arrays, size_of

KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"
)  # fmt: skip
UNKNOWN = "?"


def kind_of(instruction: Instruction, computation: str) -> str | None:
    """Which of KINDS an instruction is (its beginning, if it has an end); else None."""
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    # XLA's name of the fusion of an all-reduce and of taking one's part.
    if computation.startswith("all-reduce-scatter"):
        return "reduce-scatter"
    return kind


def whole_arrays(instruction: Instruction) -> list[tuple[str, tuple[int, ...], str]]:
    """What is gathered, summed or sent; of a reduce-scatter, one device's part."""
    found = arrays(instruction.result)
    if instruction.opcode == "all-gather-start":  # (its operand, its result)
        return found[len(found) // 2 :]
    if instruction.opcode == "collective-permute-start":  # and two semaphores
        return found[1:2]
    return found


def bytes_of(instruction: Instruction, group: int) -> int:
    """Bytes of the whole arrays."""
    size = sum(size_of(dtype, shape) for dtype, shape, _ in whole_arrays(instruction))
    scattered = instruction.opcode.startswith("reduce-scatter")
    return size * group if scattered else size


def sent_share(kind: str, group: int) -> float:
    """How much of the whole arrays a device sends, in a ring of so many."""
    share = {"all-reduce": 2.0 * (group - 1) / group, "collective-permute": 1.0}
    return share.get(kind, (group - 1) / group)


def group_of(rest: str, devices: int) -> tuple[int, ...]:
    """The devices that a collective joins with device 0, it included, in order.

    Devices by their number in the mesh, row by row. All, where the text does not say.
    """
    everyone = np.arange(devices)
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", rest):
        return _joined(re.findall(r"\{(\d+),(\d+)\}", pairs[1]))
    if lists := re.search(r"replica_groups=\{(\{[\d,]*\}(?:,\{[\d,]*\})*)\}", rest):
        groups = [
            [int(n) for n in group.split(",")]
            for group in re.findall(r"\{([\d,]+)\}", lists[1])
        ]
        return tuple(sorted(next((g for g in groups if 0 in g), groups[0])))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)",
                     rest)  # fmt: skip
    if iota:
        order = _iota(iota[3]).reshape(int(iota[1]), int(iota[2]))
        (row,) = order[(order == 0).any(axis=1)]
        return tuple(sorted(row.tolist()))
    named = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\[[^)]*\)?)\))?\s*"
        r"\{([^}]*)\}", rest,
    )  # fmt: skip
    if named is None:
        return tuple(everyone.tolist())
    axes = re.findall(r"'(\w+)'=(\d+)", named[1])
    order = everyone if named[2] is None else _iota(named[2])
    shape, joined = [], []
    parts = dict(re.findall(r"'(\w+)'(?::(\(\d+\)\d+))?", named[3]))
    for axis, size in axes:
        # 'axis':(4)2 is the middle one of the axis cut into 4, 2 and what is left.
        cut = [int(n) for n in re.findall(r"\d+", parts.get(axis, ""))]
        pieces = [cut[0], cut[1], int(size) // math.prod(cut)] if cut else [int(size)]
        shape += pieces
        joined += [axis in parts and (not cut or n == 1) for n in range(len(pieces))]
    index = tuple(slice(None) if j else 0 for j in joined)
    return tuple(sorted(order.reshape(shape)[index].ravel().tolist()))


def _iota(text: str) -> np.ndarray:
    """`[2,4]T(1,0)`: the numbers from 0 on in that shape, transposed, in a row."""
    shape, _, transposed = text.partition("T")
    sizes = [int(n) for n in re.findall(r"\d+", shape)]
    order = np.arange(math.prod(sizes)).reshape(sizes)
    axes = [int(n) for n in re.findall(r"\d+", transposed)]
    return order.transpose(axes or None).ravel()


def _joined(pairs: list[tuple[str, str]]) -> tuple[int, ...]:
    """Who is reached from device 0 by any way of senders and receivers."""
    links = [(int(a), int(b)) for a, b in pairs]
    found, size = {0}, 0
    while len(found) > size:
        size = len(found)
        found |= {x for link in links if set(link) & found for x in link}
    return tuple(sorted(found))


def axes_of(group: tuple[int, ...], mesh: Mapping[str, int]) -> str:
    """The mesh axes along which these devices lie, as `data×fsdp`; "?": along none.

    mesh: the axes' sizes, the last one changing fastest.
    """
    order = np.arange(math.prod(mesh.values())).reshape(tuple(mesh.values()))
    long = [axis for axis, size in mesh.items() if size > 1]
    for count in range(1, len(long) + 1):
        for chosen in itertools.combinations(long, count):
            index = tuple(slice(None) if axis in chosen else 0 for axis in mesh)
            if tuple(sorted(order[index].ravel().tolist())) == group:
                return "×".join(chosen)
    return UNKNOWN
