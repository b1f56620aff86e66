# SPDX-License-Identifier: Apache-2.0
"""How often a loop of a compiled program turns."""

from lm_scale.planning.hlo import Instruction


def trip_count(condition: list[Instruction], body: list[Instruction]) -> int | None:
    """How often a loop turns: limit / step of its counter, which starts at 0.

    XLA's own loops, of a product in which a gather is hidden, take steps of 2. None: it
    is of another form.
    """
    tests = {one.name: one for one in condition}
    work = {one.name: one for one in body}
    compared = [one for one in condition if one.opcode == "compare"]
    if len(compared) != 1 or "direction=LT" not in compared[0].rest:
        return None
    counter, limit = (tests.get(name) for name in compared[0].operands)
    place = counter and counter.attribute(r"index=(\d+)")
    root = body[-1]
    if not place or limit is None or limit.opcode != "constant":
        return None
    if root.opcode != "tuple":
        return None
    added = work.get(root.operands[int(place)])
    while added is not None and added.opcode == "copy":
        added = work.get(added.operands[0])
    if added is None or added.opcode != "add":
        return None
    steps = [work[x] for x in added.operands if work[x].opcode == "constant"]
    if len(steps) != 1:
        return None
    return -(-value(limit) // value(steps[0]))


def value(constant: Instruction) -> int:
    return int(constant.rest.partition(")")[0])
