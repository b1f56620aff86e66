# SPDX-License-Identifier: Apache-2.0
"""Batches that a run leaves out: which batch a step trains on then.

The windows hold numbers of batches, never of steps: the number of a batch stays what it
is when further windows are left out, whereas later steps train on other batches then.
"""

from collections.abc import Sequence

Windows = tuple[tuple[int, int], ...]  # batches first .. stop - 1; sorted, apart


def batch_number(step: int, left_out: Sequence[tuple[int, int]]) -> int:
    """The batch that a step (both counted from 0) trains on.

    That is the step-th number which lies in no window; `left_out` are `Windows`.
    """
    number = step
    for first, stop in left_out:
        if number < first:
            break
        number += stop - first
    return number


def leave_out(left_out: Windows, first: int, stop: int) -> Windows:
    """The windows, and in them the batches that steps first .. stop - 1 trained on.

    Raises ValueError if there are no such steps.
    """
    if not 0 <= first < stop:
        raise ValueError(f"There are no steps from {first} to before {stop}.")
    new = (batch_number(first, left_out), batch_number(stop - 1, left_out) + 1)
    merged: list[tuple[int, int]] = []
    for low, high in sorted((*left_out, new)):
        if merged and low <= merged[-1][1]:
            low, former = merged.pop()
            high = max(high, former)
        merged.append((low, high))
    return tuple(merged)
