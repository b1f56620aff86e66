# SPDX-License-Identifier: Apache-2.0
"""Which share of a preparation is whose: flags, Slurm arrays, Kubernetes, jax."""

import pytest

from lm_scale.__main__ import prepare_flags
from lm_scale.data.ranks import Rank, find_rank
from lm_scale.errors import InputError

ARRAY = {
    "SLURM_ARRAY_TASK_ID": "7",
    "SLURM_ARRAY_TASK_COUNT": "4",
    "SLURM_ARRAY_TASK_MIN": "1",
    "SLURM_ARRAY_TASK_STEP": "2",
}
POD = {"JOB_COMPLETION_INDEX": "2"}


def placed(rank=None, world=None, env=None, **processes) -> tuple[int, int]:
    found = find_rank(rank, world, env or {}, **processes)
    return found.index, found.world


def test_alone_there_is_one_rank():
    assert find_rank(None, None, {}) == Rank() == Rank(0, 1, "")
    assert placed(None, 1, ARRAY | POD) == (0, 1)


def test_flags_win():
    assert placed(1, 3, ARRAY | POD, process=5, processes=8) == (1, 3)


def test_processes_of_jax_win_over_a_cluster():
    assert placed(env=ARRAY | POD, process=5, processes=8) == (5, 8)


def test_a_slurm_array():
    assert placed(env=ARRAY) == placed(None, 4, ARRAY) == (3, 4)
    ids = range(1, 8, 2)
    ranks = [placed(env=ARRAY | {"SLURM_ARRAY_TASK_ID": str(i)})[0] for i in ids]
    assert ranks == [0, 1, 2, 3]
    for gap in ("2", "9", "0"):
        with pytest.raises(InputError, match="an array without gaps"):
            placed(env=ARRAY | {"SLURM_ARRAY_TASK_ID": gap})


def test_an_indexed_job():
    assert placed(None, 4, POD) == (2, 4)
    assert placed(env={"JOB_COMPLETION_INDEX": "0"}) == (0, 1)
    with pytest.raises(InputError, match="INDEX is 2: .* give --world"):
        placed(env=POD)
    with pytest.raises(InputError, match="rank 2 of world 2"):
        placed(None, 2, POD)


@pytest.mark.parametrize(
    ("rank", "world", "said"),
    [
        (1, None, "--rank 1 needs --world"),
        (None, 3, "--world 3 needs --rank, 0 to 2"),
        (3, 3, "expected a rank from 0 to world - 1"),
        (0, 0, "expected a rank"),
    ],
)
def test_flags_that_cannot_be(rank, world, said):
    with pytest.raises(InputError, match=said):
        placed(rank, world)


def test_the_flags_of_prepare_are_taken_out():
    argv = ["--rank", "1", "c.py", "--world=4", "--batch", "8"]
    flags = {"rank": 1, "world": 4}
    assert prepare_flags(argv) == (flags, ["c.py", "--batch", "8"])
    for wrong in (["--rank"], ["--world", "-1"], ["--rank=a"]):
        with pytest.raises(InputError, match="expected a number"):
            prepare_flags(wrong)
