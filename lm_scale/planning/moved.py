# SPDX-License-Identifier: Apache-2.0
"""The bytes that the instructions of a compiled program read and write in HBM."""

from lm_scale.planning.hlo import (
    Instruction,
    Text,
    first_array,
    hbm_bytes,
    slice_bytes,
)

# What moves no bytes, or what another instruction moves.
FREE = (
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call",
    "conditional", "async-start", "after-all", "partition-id", "replica-id", "iota",
)  # fmt: skip


def moved(text: Text, one: Instruction, results: dict[str, str]) -> int:
    """Bytes of HBM that an instruction reads and writes.

    results: the types of the instructions of its computation. An estimate: what a
    fusion reads of an operand that it neither slices nor updates is all of it.
    """
    free = one.opcode in FREE or one.opcode.endswith("-done")
    if free or 'custom_call_target="AllocateBuffer"' in one.rest:
        return 0
    given = [results.get(x, "") for x in one.operands]
    if one.opcode == "fusion" and one.called:
        return moved_by_fusion(text, one, given)
    if one.opcode == "dynamic-update-slice":
        return hbm_bytes(given[1]) + slice_bytes(given[0], given[1])
    if one.opcode == "dynamic-slice":
        return slice_bytes(given[0], one.result) + hbm_bytes(one.result)
    read = sum(hbm_bytes(x) for x in given)
    if one.opcode == "copy-start":  # (the copy, what it is of, a flag)
        return read + sum(hbm_bytes(x) for x in first_array(one.result))
    return read + hbm_bytes(one.result)


def moved_by_fusion(text: Text, one: Instruction, given: list[str]) -> int:
    """The same of a fusion, which may touch slices of its operands only."""
    inside = text.computations[one.called[0]]
    results = text.results[one.called[0]]
    total, updated = 0, False
    for operand, x in zip(given, parameters(inside), strict=True):
        users = [user for user in inside if x.name in user.operands]
        slices = slices_of(text, inside, x)
        if slices is not None:
            total += sum(slice_bytes(operand, each) for each in slices)
        elif users and all(
            user.opcode == "dynamic-update-slice" and user.operands[0] == x.name
            for user in users
        ):
            # In place: what is written is what is put in.
            new = [results[user.operands[1]] for user in users]
            total += sum(slice_bytes(operand, each) for each in new)
            updated = True
        else:
            total += hbm_bytes(operand)
    return total if updated else total + hbm_bytes(one.result)


def slices_of(
    text: Text, inside: list[Instruction], x: Instruction
) -> list[str] | None:
    """The types of the slices that a computation takes of a parameter, if no more.

    A fusion inside another may be what takes them. None: it is used as a whole.
    """
    found: list[str] = []
    for user in inside:
        if x.name not in user.operands:
            continue
        if user.opcode == "dynamic-slice" and user.operands[0] == x.name:
            found.append(user.result)
            continue
        if user.opcode != "fusion":
            return None
        deeper = text.computations[user.called[0]]
        for name, given in zip(user.operands, parameters(deeper), strict=True):
            if name == x.name:
                slices = slices_of(text, deeper, given)
                if slices is None:
                    return None
                found += slices
    return found or None


def parameters(inside: list[Instruction]) -> list[Instruction]:
    """Those of a computation, in the order of what it is called with."""
    found = [one for one in inside if one.opcode == "parameter"]
    return sorted(found, key=lambda one: int(one.rest.partition(")")[0]))
