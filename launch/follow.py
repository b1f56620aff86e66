# SPDX-License-Identifier: Apache-2.0
"""Watches the job of a launch until it ends, or its VM does."""

import base64
import json
import sys
import time
from dataclasses import dataclass
from typing import Any

from launch.command_line import say
from launch.gcloud import PASSING, Cloud, CloudError
from launch.record import Launch, Record
from launch.vm import COMING, state_of

PROBES = 3  # looks in a row that find no answer, until the VM is taken for dead
OTHERS = 6  # looks that others have to end, when one has failed
PROGRAM = ("prepare", "train")  # stages in which the user's program fails, not a VM


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended."""

    kind: str  # done, failed (the program), stopped (75), broken (a VM), gone (the VM)
    status: int = 0
    said: str = ""  # why, for people
    worker: int = 0  # that was the first to fail


def follow(cloud: Cloud, launch: Launch, record: Record) -> Outcome:
    """Copies worker 0's log to the terminal and a file, until the job has ended."""
    silent, since_failure = 0, 0
    while True:
        try:
            state = state_of(cloud.node(launch.name))
        except CloudError as error:
            if error.kind not in PASSING:
                raise
            say(f"{error.said} (asking again)")
            time.sleep(launch.poll)
            continue
        if state != "READY" and state not in COMING:
            return Outcome("gone", said=f"the VM is {state or 'gone'}")
        found = ask(cloud, launch)
        missing = sorted(set(range(launch.made().hosts)) - found.keys())
        if missing:
            silent += 1
            workers = ", ".join(map(str, missing))
            say(f"no answer from worker {workers} ({silent} of {PROBES})")
            if silent == PROBES:
                return Outcome("gone", said=f"worker {workers} does not answer")
        else:
            silent = 0
            copy_log(cloud, launch, record, found[0]["log"])
            launch.phase = str(found[0].get("stage"))
            if (step := found[0].get("step") or -1) > launch.step:
                launch.step, launch.tried = step, 0  # as good as a first attempt
            record.save(launch)
            since_failure += any(failed(one) for one in found.values())
            ended = all(not one["alive"] for one in found.values())
            if ended or since_failure > OTHERS:
                return judge(found)
        time.sleep(launch.poll)


def failed(one: dict[str, Any]) -> bool:
    """If a worker's job has ended as it should not, or has just vanished."""
    return not one["alive"] and one.get("status") != 0


def judge(found: dict[int, dict[str, Any]]) -> Outcome:
    """What the ends of all workers mean; the first that failed decides."""
    bad = [one for one in found.values() if failed(one)]
    if not bad:
        return Outcome("done")
    # One that vanished is the cause of what the others say, never its consequence.
    killed = [one for one in bad if one.get("status") is None]
    first = killed[0] if killed else min(bad, key=lambda one: one["ended"])
    worker, stage, status = first["worker"], first.get("stage"), first.get("status")
    where = f"worker {worker}, stage {stage}"
    if status is None:
        return Outcome("broken", 1, f"{where}: the job's process was killed", worker)
    if stage not in PROGRAM or status >= 128:
        return Outcome("broken", status, f"{where}: ended with {status}", worker)
    if status == 75:
        return Outcome("stopped", 75, f"{where}: stopped by a signal", worker)
    return Outcome("failed", status, f"{where}: ended with {status}", worker)


def ask(cloud: Cloud, launch: Launch) -> dict[int, dict[str, Any]]:
    """What the workers say of their jobs, by number; those that answer."""
    command = f"python3 lm_scale/{launch.name}/worker.py status"
    done = cloud.ssh(launch.name, command, seconds=120)
    found = {}
    for line in done.out.splitlines():
        _, mark, text = line.partition("lm_scale-status ")
        if mark:
            one = json.loads(text)
            found[one["worker"]] = one
    return found


def copy_log(cloud: Cloud, launch: Launch, record: Record, size: int) -> None:
    """What worker 0 has printed since the last time."""
    while launch.log_read < size:
        text = read_log(cloud, launch, launch.log_read)
        if not text:
            return
        launch.log_read += len(text)
        with open(record.folder / "worker-0.log", "ab") as file:
            file.write(text)
        sys.stdout.write(text.decode(errors="replace"))
        sys.stdout.flush()


def read_log(cloud: Cloud, launch: Launch, offset: int, worker: int = 0) -> bytes:
    """A worker's log from an offset on; a negative one counts from its end."""
    command = f"python3 lm_scale/{launch.name}/worker.py log {offset}"
    done = cloud.ssh(launch.name, command, worker=worker, seconds=120)
    _, mark, text = done.out.partition("lm_scale-log ")
    return base64.b64decode(text) if mark and done.status == 0 else b""
