# SPDX-License-Identifier: Apache-2.0
"""What Slurm knows of our jobs, and what is left of those that have ended."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from launch.errors import Failed, Refused

PREFIX = "lm_scale."  # of the names of our jobs: no other is shown, or ended


@dataclass(frozen=True)
class Job:
    number: str
    name: str
    state: str
    elapsed: str
    limit: str
    nodes: str
    folder: str  # where it was submitted
    reason: str  # why it waits, or its nodes

    def line(self) -> str:
        used = f"{self.elapsed} of {self.limit}"
        return (
            f"{self.number}  {self.name}  {self.state}  {used}  "
            f"{self.nodes} node{'s' * (self.nodes != '1')}  {self.reason}"
        )


def queued() -> list[Job]:
    """This user's jobs that this program has made, and that have not ended."""
    form = "%i|%j|%T|%M|%l|%D|%Z|%R"
    shown = slurm("squeue", "--noheader", f"--user={os.getuid()}", f"--format={form}")
    rows = [line.split("|", 7) for line in shown.splitlines()]
    return [
        Job(row[0], row[1].removeprefix(PREFIX), *row[2:])
        for row in rows
        if len(row) == 8 and row[1].startswith(PREFIX)
    ]


def log_of(job: Job) -> Path:
    return Path(job.folder) / "runs" / job.name / "slurm" / f"{job.number}.log"


def find_log(wanted: str) -> Path:
    """The newest log, below this folder, of a job's name or number."""
    runs = Path.cwd() / "runs"
    if not re.fullmatch(r"[\w.-]+", wanted):
        raise Refused(f"{wanted!r}: expected a job's name or number.")
    pattern = f"*/slurm/{wanted}.log" if wanted.isdigit() else f"{wanted}/slurm/*.log"
    found = sorted(runs.glob(pattern), key=lambda path: path.stat().st_mtime)
    if not found:
        raise Refused(
            f"no job {wanted} of ours is queued or running, and there is no log "
            f"{runs}/{pattern}: start this where the job was submitted."
        )
    return found[-1]


def accounted(number: str) -> str:
    """What the accounting, if there is one, knows of an ended job."""
    if shutil.which("sacct") is None:
        return ""
    form = "State,ExitCode,Elapsed,End"
    shown = slurm(
        "sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={number}",
        f"--format={form}", fail=False,
    )  # fmt: skip
    return "  ".join(shown.strip().splitlines()[-1:]).replace("|", "  ")


def slurm(*command: str, env: dict[str, str] | None = None, fail: bool = True) -> str:
    """What a program of Slurm prints. Raises Failed with what it complains of."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=env)
    except FileNotFoundError as error:
        raise Refused(
            f"{command[0]} is not on PATH: start this on a machine from which jobs are "
            f"submitted (--dry-run works anywhere)."
        ) from error
    if done.returncode and fail:
        raise Failed(f"{command[0]} failed: {done.stderr.strip() or done.stdout}")
    return done.stdout if not done.returncode else ""
