# SPDX-License-Identifier: Apache-2.0
"""Attempt after attempt: a VM, a job on it, what its end means, and what then."""

import signal
import tarfile
import tempfile
import time
from pathlib import Path

from launch.command_line import say
from launch.errors import Refused
from launch.exists import PROG, remains_if_possible
from launch.follow import Outcome, follow, read_log
from launch.gcloud import PASSING, Cloud, CloudError
from launch.record import Launch, Record
from launch.vm import (
    COMING,
    NoVM,
    Unreachable,
    bring_up,
    check_ours,
    start_job,
    state_of,
)


def again(launch: Launch) -> None:
    """The next start is another job, with a log of its own."""
    launch.job, launch.log_read = launch.job + 1, 0


def supervise(cloud: Cloud, launch: Launch, record: Record) -> int:
    """Attempt after attempt, until the run is done or must not go on."""
    try:
        status = launch.ending
        while status is None:
            status = next_step(cloud, launch, record)
        return end(cloud, launch, record, status)
    except KeyboardInterrupt:
        return leave(cloud, launch, record)
    except (CloudError, Refused):
        record.save(launch)
        remains_if_possible(cloud)
        raise


def next_step(cloud: Cloud, launch: Launch, record: Record) -> int | None:
    """An attempt and what follows from it: the status to end with; None: go on."""
    if record.down.exists():
        say(f"{launch.name} was taken down")
        launch.keep = False
        return 75
    if time.time() > launch.deadline - launch.saving:
        say(f"--max-hours {launch.max_hours:g} are over")
        return 75
    outcome = attempt(cloud, launch, record)
    if outcome.kind == "done":
        say(f"{launch.name}: done")
        bring_results(cloud, launch)
        return 0
    say(f"{launch.name}: {outcome.said}")
    if outcome.kind == "failed" or (outcome.kind == "broken" and outcome.worker):
        tail = read_log(cloud, launch, -6000, outcome.worker)
        print(f"--- the end of worker {outcome.worker}'s log:\n"
              f"{tail.decode(errors='replace')}", flush=True)  # fmt: skip
    if outcome.kind == "failed":
        return outcome.status
    if outcome.kind in ("broken", "gone") and has_only_copy(launch):
        return 1
    if launch.tried >= launch.attempts:
        say(f"{launch.tried} attempts have brought the run no further: giving up")
        return 1
    recover(cloud, launch, record, outcome)
    return None


def attempt(cloud: Cloud, launch: Launch, record: Record) -> Outcome:
    """One VM, one job on it, to its end."""
    launch.tried += 1
    launch.phase = "getting a VM"
    record.save(launch)
    try:
        bring_up(cloud, launch, record)
    except (CloudError, NoVM) as error:
        if isinstance(error, CloudError) and error.kind not in PASSING:
            raise
        return Outcome("none", said=str(error))
    launch.phase = "starting"
    record.save(launch)
    try:
        start_job(cloud, launch, record)
        return follow(cloud, launch, record)
    except Unreachable as error:
        return Outcome("broken", 1, str(error))


def recover(cloud: Cloud, launch: Launch, record: Record, outcome: Outcome) -> None:
    """What must be before the next attempt: no dead VM, and some time."""
    if outcome.kind != "none":
        again(launch)
        try:
            clear_away(cloud, launch, outcome)
        except CloudError as error:  # the next attempt looks again
            if error.kind not in PASSING:
                raise
            say(error.said)
    pause = min(launch.poll * 2 ** min(launch.tried, 10), 600.0)
    launch.phase = "waiting to try again"
    record.save(launch)
    say(f"attempt {launch.tried} of {launch.attempts} in a row; next in {pause:.0f} s")
    time.sleep(pause)


def clear_away(cloud: Cloud, launch: Launch, outcome: Outcome) -> None:
    """Deletes a VM that is dead or broken; one that was only stopped may go on."""
    alive = state_of(cloud.node(launch.name)) in ("READY", *COMING)
    if not (outcome.kind == "stopped" and alive):
        say(f"deleting {launch.name}, to make it again")
        cloud.delete(launch.name, queued=launch.queued)


def bring_results(cloud: Cloud, launch: Launch) -> None:
    """Copies worker 0's run folder to runs/NAME, without checkpoints and tokens."""
    if launch.config is None:
        return
    there = f"lm_scale/{launch.name}"
    cloud.ssh(launch.name, f"python3 {there}/worker.py pack", worker=0, seconds=1800)
    folder = Path("runs") / launch.run
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "run.tar.gz"
        done = cloud.copy_from(launch.name, f"{there}/run.tar.gz", file, seconds=3600)
        if done.status != 0:
            say(f"the results could not be copied:\n{done.err.strip()[-1000:]}")
            launch.keep = True
            return
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(file) as archive:
            archive.extractall(folder, filter="data")
    say(f"results: {folder}")


def end(cloud: Cloud, launch: Launch, record: Record, status: int) -> int:
    """The launch is over: the VM goes, unless it is to be kept.

    Noted as over when that is done: `resume` goes on here.
    """
    launch.ending, launch.phase = status, "deleting"
    record.save(launch)
    unused = launch.config is None and status != 0  # one that `up` could not set up
    if status != 0 and has_only_copy(launch) and not record.down.exists():
        say(f"{launch.name} stays: without --bucket it has the only checkpoints")
    elif not launch.keep or unused:
        say(f"deleting {launch.name}")
        delete(cloud, launch)
    launch.status, launch.ending = status, None
    launch.phase = "done" if status == 0 else "ended"
    record.save(launch)
    remains_if_possible(cloud)
    return status


def delete(cloud: Cloud, launch: Launch) -> None:
    """Deletes the VM, though the service may be in trouble for a while."""
    for left in (3, 2, 1, 0):
        try:
            return cloud.delete(launch.name, queued=launch.queued)
        except CloudError as error:
            if error.kind not in PASSING or not left:
                raise
            say(error.said)
            time.sleep(min(4 * launch.poll, 60.0))


def has_only_copy(launch: Launch) -> bool:
    """If the run's checkpoints are on its VM and nowhere else."""
    return launch.config is not None and launch.bucket is None and launch.step >= 0


def leave(cloud: Cloud, launch: Launch, record: Record) -> int:
    """Ctrl-C: what waits for a VM is cancelled; what is on one goes on."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one ends at once
    for received in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(received, signal.SIG_IGN)
    record.save(launch)
    queued = cloud.queued(launch.name) if launch.queued else None
    node = cloud.node(launch.name)
    for found in (queued, node):
        check_ours(found, launch, queued)
    if launch.phase == "deleting":
        say(f"interrupted: {PROG} resume {launch.name} goes on deleting it")
    elif state_of(node) == "READY":
        say(
            f"interrupted: {launch.name} goes on without this program. Follow it: "
            f"{PROG} resume {launch.name}; end it: {PROG} down {launch.name}"
        )
    else:
        say("interrupted: what was asked for is cancelled")
        delete(cloud, launch)
        launch.status = 75
        record.save(launch)
    remains_if_possible(cloud)
    return 75


def close(name: str) -> None:
    """`down` deletes its VM: a launch that had not ended has, one at work is to end."""
    record = Record(name)
    if record.exists() and (launch := record.load()).status is None:
        record.down.touch()
        launch.status, launch.ending, launch.phase = 75, None, "taken down"
        record.save(launch)
