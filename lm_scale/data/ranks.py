# SPDX-License-Identifier: Apache-2.0
"""Which share of a preparation is this process's: by flags, or by the cluster."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from lm_scale.errors import InputError


@dataclass(frozen=True)
class Rank:
    """One of `world` processes, counted from 0, that divide the units of a corpus."""

    index: int = 0
    world: int = 1
    told_by: str = ""  # what says so, for a person; empty: nothing, it is alone


def find_rank(
    rank: int | None,
    world: int | None,
    env: Mapping[str, str],
    *,
    process: int = 0,
    processes: int = 1,
) -> Rank:
    """The rank that flags, jax.distributed, a Slurm array or a Kubernetes Job tell.

    rank, world: the flags. process, processes: of jax.distributed.
    The first pod of a Kubernetes Job is told nothing of the others: without `world` it
    takes itself for the only one.

    Raises:
      InputError: what is told is incomplete or cannot be.
    """
    if rank is not None:
        if world is None:
            raise InputError(f"--rank {rank} needs --world, the number of ranks.")
        return _checked(rank, world, "--rank")
    if processes > 1 and world is None:
        return Rank(process, processes, "jax.distributed")
    if "SLURM_ARRAY_TASK_ID" in env and world in (None, _slurm(env, "COUNT", 1)):
        return _of_array(env)
    if "JOB_COMPLETION_INDEX" in env and world != 1:
        index = _number(env, "JOB_COMPLETION_INDEX")
        if world is None and index == 0:
            return Rank()
        if world is None:
            raise InputError(
                f"JOB_COMPLETION_INDEX is {index}: this pod is one of several, but "
                "Kubernetes does not tell of how many: give --world, the Job's "
                "`completions`."
            )
        return _checked(index, world, "the Kubernetes Job")
    if world not in (None, 1):
        raise InputError(f"--world {world} needs --rank, 0 to {world - 1}.")
    return Rank()


def _of_array(env: Mapping[str, str]) -> Rank:
    task, count = _slurm(env, "ID", 0), _slurm(env, "COUNT", 1)
    first, step = _slurm(env, "MIN", 0), _slurm(env, "STEP", 1)
    index, rest = divmod(task - first, max(1, step))
    if rest or not 0 <= index < count:
        raise InputError(
            f"SLURM_ARRAY_TASK_ID is {task}, of {count} tasks from {first} on: "
            "expected an array without gaps, such as --array=0-15. Give --rank and "
            "--world, or --world 1 if each task prepares a whole corpus."
        )
    return _checked(index, count, "the Slurm array")


def _slurm(env: Mapping[str, str], name: str, default: int) -> int:
    name = f"SLURM_ARRAY_TASK_{name}"
    return _number(env, name) if name in env else default


def _number(env: Mapping[str, str], name: str) -> int:
    if not re.fullmatch(r"\d{1,9}", env[name]):
        raise InputError(f"{name} is {env[name]!r}: expected a number.")
    return int(env[name])


def _checked(index: int, world: int, told_by: str) -> Rank:
    if world < 1 or not 0 <= index < world:
        raise InputError(
            f"rank {index} of world {world}: expected a rank from 0 to world - 1."
        )
    return Rank(index, world, told_by)
