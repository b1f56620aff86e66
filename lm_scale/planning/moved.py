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
    if one.opcode in FREE or one.opcode.endswith("-done"):
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
    for x in inside:
        if x.opcode != "parameter":
            continue
        operand = given[int(x.rest.partition(")")[0])]
        users = [user for user in inside if x.name in user.operands]
        if users and all(user.opcode == "dynamic-slice" for user in users):
            total += sum(slice_bytes(operand, user.result) for user in users)
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
